"""Sidecar texts: `photo.txt` for `photo.jpg`, as training scripts for captions want them.

One file for each caption or answer, in a folder that mirrors the pictures' or beside the pictures. Files are added to
OUT; one that stands there already is replaced only with `overwrite`. Where a name is taken within the run (`a.jpg` and
`a.png`, or two captions of one image), the second text gets a longer one: `a.png.txt`, then with a digest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.files import StagedFolder, merged_folder
from md3cli.exporters.names import candidates
from md3cli.exporters.pictures import Pictures
from md3cli.records import RecordDict
from md3cli.refine.collection import Collection, read


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write one text file for each answered caption or query record that has an image."""
    if options.beside:
        pictures = Pictures(records, options)
        pictures.require_root("txt beside the pictures")
        pictures.require_trusted("txt beside the pictures")
        assert pictures.root is not None
        out = pictures.root
    reading_notes = list[str]()
    num_records = num_written = num_failures = num_renamed = 0
    with merged_folder(out, overwrite=options.overwrite, format=None if options.beside else "txt") as folder:
        for record in read(records, reading_notes):
            num_records += 1
            num_failures += record.get("error") is not None
            text = text_of(record)
            if text is None or record.get("image") is None:
                continue
            num_written += 1
            num_renamed += _write(folder, record, text)
    nothing = [] if num_written else ["the records hold no captions or answers to write as text"]
    notes = [*reading_notes, *nothing]
    if num_renamed:
        notes.append(f"{num_renamed} texts got a longer name because another text has the plain one")
    return ExportReport("txt", out, num_records, num_failures=num_failures, notes=tuple(notes))


def text_of(record: RecordDict) -> str | None:
    """Return the text of a caption or query record as one line: trainers read the first line, or each as a caption."""
    text = record.get("caption", record.get("answer"))
    if text is None or record.get("error") is not None:
        return None
    return " ".join(line.strip() for line in str(text).splitlines() if line.strip())


def _write(folder: StagedFolder, record: RecordDict, text: str) -> bool:
    """Write one text; True where its plain name was taken."""
    names = list(_names(record))
    file, name = folder.create(names)
    with file:
        file.write(text.encode())
    return name != names[0]


def _names(record: RecordDict) -> Iterator[PurePosixPath]:
    yield from candidates(record["image"], ".txt")
    # One image, several texts: the record's own id tells them apart.
    record_id = str(record.get("id")).replace("/", "_")
    yield from candidates(f"{record['image']}~{record_id}", ".txt", keep_suffix=True)
