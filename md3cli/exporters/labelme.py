"""labelme and X-AnyLabeling: a JSON for each image, beside its picture; a folder of both, or beside the user's own.

Both programs take the JSON of a picture by its name without suffix. So where `a.jpg` and `a.png` would share one, the
second is `a.png.json`, and its copy `a.png.png`. Beside the user's pictures nothing is renamed: such a JSON is opened
itself. A box is a rectangle of two points, a mask a polygon, a point a point, in pixels of the upright picture, as
labelme shows it. `score`, and of the image `description` and `chat_history`, are X-AnyLabeling's; labelme keeps them.
Source: the loaders of labelme 5.11 and 6.3 and of X-AnyLabeling 3 (`label_file.py` in both, `shape.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any

from md3cli.errors import ImageError, UsageError
from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.copies import USUAL, Copy, copied, missing_notes
from md3cli.exporters.files import StagedFolder, merged_folder, staged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex
from md3cli.exporters.names import Names, beside_pictures, is_picture_name
from md3cli.exporters.objects import Ring, joined_ring
from md3cli.exporters.pictures import Pictures
from md3cli.finished.guards import files_of_run
from md3cli.records import printable
from md3cli.refine.collection import Collection

VERSION = "5.11.4"  # of labelme, whose keys these are; 6 reads them, too
_BESIDE = "labelme beside the pictures"


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write one JSON for each image, in a folder with the pictures, or with `beside` next to the user's own.

    Raises:
        UsageError: `existing` joins texts; or a file stands there, and the user did not say what becomes of it.
    """
    if options.existing in ("append", "prepend"):
        raise UsageError(f"--existing {options.existing} is for texts; labelme takes refuse, skip or replace")
    if options.beside:
        return _export_beside(records, options)
    pictures, names = Pictures(records, options), Names(is_flat=False, fitted=beside_pictures)
    with (
        closing(ImageIndex(records)) as index,
        staged_folder(out, overwrite=options.overwrite, format="labelme") as folder,
    ):
        documented = _documented(index, folder, names, pictures, out)
        num_images = sum(1 for _ in copied(documented, pictures, USUAL))
    survey = index.survey
    notes = (*survey.notes(), *missing_notes(pictures, "beside the JSON files"))
    return ExportReport("labelme", out, survey.num_records, num_images, survey.num_failures, notes)


def _documented(index: ImageIndex, folder: StagedFolder, names: Names, pictures: Pictures, out: Path) -> Iterator[Copy]:
    """Write the JSON of each image, and yield where its picture belongs."""
    for group in index.images():
        file, name = folder.create(names.about(group.file_name, ".json"))
        image = name.with_name(name.stem + USUAL.suffix_of(group.name))
        with file:
            file.write(_document(group, image.name))
        yield Copy.of(group, folder.path / image, pictures, out)


def _export_beside(records: Collection, options: ExportOptions) -> ExportReport:
    """Write the JSON files next to the pictures, which stay as they are; nothing at all where one is refused."""
    pictures = Pictures(records, options)
    pictures.require_root(_BESIDE)
    pictures.require_trusted(_BESIDE)
    if len(pictures.roots) > 1:
        raise UsageError(f"{_BESIDE} takes records of one folder; export each run by itself")
    root = pictures.roots[0].path
    with (
        closing(ImageIndex(records)) as index,
        merged_folder(root, overwrite=options.existing == "replace", format=None) as folder,
    ):
        written = _Beside(root, options, records)
        for group in index.images():
            written.add(group, folder, pictures)
    survey = index.survey
    notes = (*survey.notes(), *pictures.missing_note(), *written.notes())
    return ExportReport("labelme", root, survey.num_records, written.num_images, survey.num_failures, notes)


class _Beside:
    """The JSON files of one export next to the user's pictures, counted. Knows nothing of what is in them."""

    def __init__(self, root: Path, options: ExportOptions, records: Collection) -> None:
        self._root = root
        self._existing = options.existing
        self._read = {os.path.realpath(file) for source in records.sources for file in files_of_run(source.path)}
        self._names = Names(is_flat=False, fitted=lambda name: name)  # the user's own names, as they are
        self.num_images = self.num_kept = self.num_in_tars = self.num_renamed = self.num_odd = 0

    def add(self, group: ImageGroup, folder: StagedFolder, pictures: Pictures) -> None:
        """Write the JSON of one image, if its picture is there.

        Raises:
            UsageError: a file of that name stands there and is to be refused, or is one that this export reads.
        """
        picture = pictures.find(group.picture_record, has_twins=group.has_twins)
        if picture is None:
            return
        if picture.size is not None:
            self.num_in_tars += 1
            return
        if picture.sha256 is not None:  # one of several of this name
            try:
                pictures.read_bytes(picture)
            except ImageError:
                pictures.note_unreadable(group.name)
                return
        image = PurePosixPath(Path(os.path.relpath(picture.path, self._root)).as_posix())
        name = self._names.first_free(str(image), ".json")
        self.num_images += 1
        if self._stays(self._root / name):
            return
        self.num_renamed += name != image.with_suffix(".json") and is_picture_name(image.name)
        self.num_odd += "\\" in image.name
        file, _ = folder.create([name])
        with file:
            file.write(_document(group, os.path.relpath(image, name.parent)))

    def _stays(self, target: Path) -> bool:
        """Return whether what stands at `target` is kept; count it."""
        if not os.path.lexists(target):
            return False
        shown = printable(str(target))
        if os.path.realpath(target) in self._read:
            raise UsageError(f"{shown} belongs to the run that is exported; move the run out of the pictures' folder")
        if self._existing == "refuse":
            raise UsageError(f"{shown} exists already; say --existing skip or --existing replace")
        self.num_kept += self._existing == "skip"
        return self._existing == "skip"

    def notes(self) -> Iterator[str]:
        """Yield what is not as the user may expect it."""
        if self.num_kept:
            yield f"{self.num_kept} JSON files were there already and stay as they are"
        if self.num_renamed:
            yield (
                f"{self.num_renamed} pictures share their name without suffix with another, so their JSON is called "
                "after the whole name (a.png.json); open that file itself"
            )
        if self.num_odd:
            yield f"{self.num_odd} pictures have a backslash in their name, which labelme takes for a folder"
        if self.num_in_tars:
            yield f"{self.num_in_tars} pictures are in tars, so nothing can stand beside them; leave --beside out"


def _document(group: ImageGroup, image: str) -> bytes:
    """Return the JSON of an image; `image` is the picture's path from there."""
    document: dict[str, Any] = {
        "version": VERSION,
        "flags": {},
        "shapes": [*_shapes(group)],
        "imagePath": image,
        "imageData": None,
        "imageHeight": group.height,
        "imageWidth": group.width,
    }
    if captions := group.captions():
        document["description"] = "\n".join(captions)
    if answers := group.answers():
        document["chat_history"] = [*_chat(answers)]
    # A name that is not UTF-8 has surrogates, which JSON holds as escapes and Python's readers turn back.
    is_utf8 = not any("\ud800" <= char <= "\udfff" for char in image)
    text = json.dumps(document, ensure_ascii=not is_utf8, indent=2)
    return text.encode("utf-8", "replace") + b"\n"


def _shapes(group: ImageGroup) -> Iterator[dict[str, Any]]:
    for box in group.boxes():
        corners = [(box.x, box.y), (box.x + box.width, box.y + box.height)]
        yield _shape("rectangle", corners, box.label, box.score)
    for segment in group.segments():
        yield _shape("polygon", joined_ring(segment.rings), segment.box.label, segment.box.score)
    for point in group.points():
        yield _shape("point", [(point.x, point.y)], point.label, point.score)


def _shape(kind: str, points: Ring, label: str, score: float | None) -> dict[str, Any]:
    return {
        "label": printable(label),
        **({} if score is None else {"score": score}),
        "points": [[round(x, 2), round(y, 2)] for x, y in points],
        "group_id": None,
        "description": "",
        "shape_type": kind,
        "flags": {},
        "mask": None,
    }


def _chat(answers: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for question, answer in answers:
        yield {"role": "user", "content": question, "image": None}
        yield {"role": "assistant", "content": answer, "image": None}
