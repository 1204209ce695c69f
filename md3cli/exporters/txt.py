"""Sidecar texts: `photo.txt` for `photo.jpg`, one caption a picture, as training scripts want them.

A picture's captions and answers are joined in input order, but for those about a part of it; prefix and suffix go once
around the whole, all three as typed. Each text is one line: kohya's sd-scripts read a file's first line, OneTrainer
takes every line for a caption. A picture whose texts are all empty gets no file, since kohya's stop at an empty one.

Under OUT the files mirror the pictures and are added to what is there; one that stands there already is replaced only
with `overwrite`. Where a name is taken within the run (`a.jpg` and `a.png`), the second gets a longer one: `a.png.txt`.
Beside the pictures (`md3cli.exporters.beside`) a text that is there may be added to. What it holds stays byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from md3cli.errors import UsageError
from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.beside import BesidePictures
from md3cli.exporters.files import merged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex
from md3cli.exporters.names import candidates
from md3cli.records import RecordDict, printable
from md3cli.refine.collection import Collection
from md3cli.refine.parts import is_of_part

_BYTE_ORDER_MARK = "\ufeff"


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write one text file for each picture that has an answered caption or query record with a text."""
    _check_typed(options)
    texts = _Texts(options)
    if options.beside:  # whose pictures are told when they are written, not when that is planned
        records = replace(records, told=lambda done, total: options.told(done, None) if total is None else None)
    with closing(ImageIndex(records)) as index:
        if options.beside:
            out, num_images, notes = _write_beside(records, texts.of(index), options)
        else:
            num_images, notes = _write_below(out, texts.of(index), options)
        survey = index.survey
        notes = [*survey.notes(), *survey.part_notes(have_place=False), *texts.notes(), *notes]
    return ExportReport("txt", out, survey.num_records, num_images, survey.num_failures, tuple(notes))


def text_of(record: RecordDict, *, keeps_lines: bool = False) -> str:
    """Return the text of a caption or query record, as one line unless `keeps_lines`; empty where it has none."""
    text = str(record.get("caption") or record.get("answer") or "").replace("\0", " ")  # no text file has it: `merged`
    if keeps_lines:
        return text.replace("\r\n", "\n").replace("\r", "\n").strip()
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def merged(former: bytes, added: bytes, *, join: str, is_prepended: bool) -> bytes:
    """Return the content of a text file with `added` behind what it says, or before it, and `join` between.

    Blanks and line breaks at both ends and a byte order mark stay where they are. A file that has `added` already, as
    a whole part between joins or on lines of its own, is returned as it is.

    Raises:
        ValueError: the file is no text in UTF-8; the message follows the file's name.
    """
    try:
        text, new = former.decode(), added.decode()
    except UnicodeDecodeError as error:
        raise ValueError("is not text in UTF-8") from error
    if "\0" in text:  # UTF-16 without a mark passes for UTF-8
        raise ValueError("is not text in UTF-8")
    bare = text.lstrip(_BYTE_ORDER_MARK)
    new, said = new.lstrip(_BYTE_ORDER_MARK), bare.strip()
    if not said:
        return (text[: len(text) - len(bare)] + new).encode()
    if _has(said, new, join, is_prepended=is_prepended):
        return former
    start = len(text) - len(bare.lstrip())
    whole = f"{new}{join}{said}" if is_prepended else f"{said}{join}{new}"
    return (text[:start] + whole + text[start + len(said) :]).encode()


def _has(said: str, new: str, join: str, *, is_prepended: bool) -> bool:
    """Return whether a text has what would be added: at the end where that goes, or as a part of its own anywhere."""
    part = new.strip()
    is_where_it_goes = said.startswith((new + join).lstrip()) if is_prepended else said.endswith((join + new).rstrip())
    if said == part or is_where_it_goes:
        return True
    ends = rf"{re.escape(join)}|[\r\n]" if join else r"[\r\n]"
    return re.search(rf"(?:\A|{ends}){re.escape(part)}(?:{ends}|\Z)", said) is not None


def _check_typed(options: ExportOptions) -> None:
    """Refuse bytes that the shell passed and that are no text: nobody could read the files."""
    for name in ("prefix", "suffix", "join"):
        value = getattr(options, name)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"--{name} is not UTF-8: {printable(value)}") from error


class _Texts:
    """The texts of pictures, as the options word them, counted."""

    def __init__(self, options: ExportOptions) -> None:
        self._options = options
        self.num_written = 0
        self.num_empty = 0
        self._first_empty = ""

    def of(self, index: ImageIndex) -> Iterator[tuple[ImageGroup, bytes]]:
        """Yield each picture that has a text, with the content of its file."""
        options = self._options
        for group in index.images():
            whole = (record for record in group.records if not is_of_part(record))
            answered = [record for record in whole if {"caption", "answer"} & record.keys()]
            texts = [text for record in answered if (text := text_of(record, keeps_lines=options.keeps_lines))]
            if texts:
                self.num_written += 1
                yield group, f"{options.prefix}{options.join.join(texts)}{options.suffix}".encode()
            elif answered:
                self.num_empty += 1
                self._first_empty = self._first_empty or group.name

    def notes(self) -> Iterator[str]:
        if self.num_empty:
            yield f"{self.num_empty:,} pictures have empty texts, so no file (first: {printable(self._first_empty)})"
        if not self.num_written:
            yield "the records hold no captions or answers to write as text"


def _write_beside(
    records: Collection, texts: Iterator[tuple[ImageGroup, bytes]], options: ExportOptions
) -> tuple[Path, int, list[str]]:
    """Write the texts beside the pictures; returns their folder, how many there are, and what the user should know."""
    merge = partial(merged, join=options.join, is_prepended=options.existing == "prepend")
    with closing(BesidePictures(records, options, "txt", options.extension, merge)) as beside:
        for group, content in texts:
            beside.add(group, content)
        beside.write()
        return beside.root, beside.pictures.num_found, list(beside.notes())


def _write_below(out: Path, texts: Iterator[tuple[ImageGroup, bytes]], options: ExportOptions) -> tuple[int, list[str]]:
    """Add the texts to the folder OUT; returns how many there are, and what the user should know."""
    num_written = num_renamed = 0
    with merged_folder(out, overwrite=options.overwrite, format="txt") as folder:
        for group, content in texts:
            names = list(candidates(group.file_name, options.extension))
            num_renamed += folder.write(names, content) != names[0]
            num_written += 1
    note = f"{num_renamed} texts got a longer name because another text has the plain one"
    return num_written, [note] if num_renamed else []
