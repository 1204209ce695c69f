"""Records read from JSON Lines files, one at a time, whatever their length: the one reader of all commands.

Knows a file's shape (one object a line, perhaps a torn tail, perhaps a request twice) and nothing of formats. Every
string of a record is valid UTF-8. A file that holds no record is an error. Several files are read as one, one after
another; the pictures of a file may get a name in front that tells them from those of the others.

Files that were joined, or a request that was asked again, hold an id twice: the last line counts and stands where the
first stood. Two pictures that share a name (two runs joined) have equal ids too, and there nobody can say which is
meant: that is an error. SQLite notes a line as a few numbers in a private temporary file and sorts them there, so
memory stays bounded.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from md3cli.errors import ExportError, InputError
from md3cli.finished.record_shape import LINE_LIMIT_BYTES
from md3cli.finished.run_json import has_run_info
from md3cli.finished.tidied import NotJson, tidied_record
from md3cli.records import ID_DIGITS, RecordDict, compact_json, is_annotation_id, printable

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How md3 begins a line; any other is parsed, and a last line that may be torn. Without backslashes a text is its own
# bytes.
_HEAD = re.compile(
    rb'\{"schema":"md3/1","id":"([^"\\]*)","image":(?:"([^"\\]*)"|null),(?:"image_b64":"([^"\\]*)",)?"(?!image_b64")'
)
_DOUBLED = """
SELECT key, place FROM line
WHERE key IN (SELECT key FROM line GROUP BY key HAVING count(*) > 1) ORDER BY key, place
"""
_LINES = "SELECT place, file, number, offset FROM line"

_Parsed = TypeVar("_Parsed")


class NamedRecords(NamedTuple):
    """A records file, and what goes before the names of its pictures (`NAME/`), if anything."""

    path: Path
    prefix: str = ""


class Line(NamedTuple):
    """A line: which file it is in, its number there from 1, and the offset in bytes of its first byte."""

    file: int
    number: int
    offset: int


class _Keys(NamedTuple):
    """What a line is known by: its request (None for a record without an id) and its picture."""

    request: int | None
    picture: int


def open_records(path: Path) -> BinaryIO:
    """Open `path` for reading; a file that cannot be read is an InputError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read the records {printable(str(path))}: {error.strerror or error}") from error


def record_identity(record: RecordDict) -> str:
    """Return what tells a record from others: its id, and its image as it is named, byte for byte."""
    return f"{record.get('id')}\0{record.get('image') or ''}\0{record.get('image_b64') or ''}"


def renamed(record: RecordDict, prefix: str) -> RecordDict:
    """Return a record whose picture's name begins with `prefix`, under an id of its own, made of both.

    A part of a picture knows the record that found it by its new id; the id of somebody's annotation stays.
    """
    if not prefix:
        return record
    changed: RecordDict = {"id": _renamed_id(record["id"], prefix)} if record.get("id") else {}
    region = record.get("region")
    if region is not None and not is_annotation_id(region["of"]):
        changed["region"] = region | {"of": _renamed_id(region["of"], prefix)}
    if record.get("image") is not None:
        changed["image"] = prefix + record["image"]
    if record.get("image_b64") is not None:
        changed["image_b64"] = b64encode(prefix.encode() + b64decode(record["image_b64"])).decode()
    return record | changed


def _renamed_id(record_id: object, prefix: str) -> str:
    return hashlib.sha256(compact_json([prefix, record_id])).hexdigest()[:ID_DIGITS]


@contextmanager
def disk_trouble_in_words() -> Iterator[None]:
    """Raise ExportError where SQLite finds no room for its temporary file."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise ExportError(f"cannot sort the records on disk ({error}); make room in TMPDIR or set another") from error


class RecordsFiles:
    """Records files whose lines were looked through once: none is foreign, and which count is known. Close it.

    `notes` are sentences about what was left out. A place is a number from which `placed` can go on.
    """

    def __init__(self, sources: Sequence[NamedRecords], *, keeps_lines: bool = False) -> None:
        """Look through the files; with `keeps_lines` single records can be read by their places.

        Raises:
            InputError: a file cannot be read, holds no record, a line is none, or two pictures share a name.
            ExportError: there is no room to note the lines.
        """
        self.sources = tuple(sources)
        self.notes: list[str] = []
        self._files: list[BinaryIO] = []
        self._database = sqlite3.connect("")  # a temporary file that SQLite removes by itself
        self._database.execute(
            "CREATE TABLE line(place INTEGER PRIMARY KEY, file INT, number INT, offset INT, key INT, picture INT)"
        )
        try:
            self._files += [open_records(source.path) for source in self.sources]
            with disk_trouble_in_words():
                self._database.executemany("INSERT INTO line VALUES (NULL, ?, ?, ?, ?, ?)", self._rows())
                num_repeats = self._settle(self._database.execute(_DOUBLED).fetchall())
                # Without the table a single file is read from its beginning to its end.
                self._has_places = keeps_lines or num_repeats > 0 or len(self._files) > 1
                self._database.execute(
                    "CREATE INDEX picture ON line(picture)" if self._has_places else "DELETE FROM line"
                )
        except BaseException:
            self.close()
            raise
        if num_repeats:
            what = "1 line repeats" if num_repeats == 1 else f"{num_repeats:,} lines repeat"
            self.notes.append(f"{what} a request that is there already; of each request the last line counts")

    def close(self) -> None:
        """Close the files and what was noted of them."""
        self._database.close()
        for file in self._files:
            file.close()

    def placed(self, start: int = 0) -> Iterator[tuple[int, RecordDict]]:
        """Yield the records from the place `start` on, each with its place; a doubled request once, at its first."""
        if not self._has_places:
            for line, record in self._parsed(0, tidied_record, start):
                yield line.offset, renamed(record, self.sources[0].prefix)
            return
        for place, *line in self._database.execute(f"{_LINES} WHERE place >= ? ORDER BY place", (start,)):
            yield place, self._record_at(Line(*line))

    def places(self, start: int = 0) -> Iterator[int]:
        """Yield the places of `placed` without reading what stands there; the lines must be kept."""
        for (place,) in self._database.execute("SELECT place FROM line WHERE place >= ? ORDER BY place", (start,)):
            yield place

    def of_picture(self, place: int) -> dict[int, RecordDict]:
        """Return, by place and in order, all records of the picture (by its exact name) that a record is about."""
        same = f"{_LINES} WHERE picture = (SELECT picture FROM line WHERE place = ?) ORDER BY place"
        return {other: self._record_at(Line(*line)) for other, *line in self._database.execute(same, (place,))}

    def record_at(self, place: int) -> RecordDict:
        """Return the record at a place."""
        query = "SELECT file, number, offset FROM line WHERE place = ?"
        return self._record_at(Line(*self._database.execute(query, (place,)).fetchone()))

    def _rows(self) -> Iterator[tuple[int, int, int, int | None, int]]:
        for file, source in enumerate(self.sources):
            num_records = 0
            for line, keys in self._parsed(file, partial(_keys_of, prefix=source.prefix)):
                num_records += 1
                yield *line, *keys
            if not num_records and not (self._files[file].tell() == 0 and has_run_info(source.path)):
                where = printable(str(source.path))
                raise InputError(f"{where} holds no records of md3; give the records.jsonl of a run, or its folder")

    def _settle(self, doubled: Iterable[tuple[int, int]]) -> int:
        """Have the last line of each doubled request stand in the place of its first; return how many lines go.

        Raises:
            InputError: two lines of one request are about different pictures; names both.
        """
        num_repeats = 0
        for _, rows in groupby(doubled, key=lambda row: row[0]):
            firsts: dict[str, tuple[int, int, str | None]] = {}  # more than one only where two keys collide
            for _, place in rows:
                record = self.record_at(place)
                name, digest = record_identity(record), record.get("sha256")
                first, last, known = firsts.get(name, (place, place, digest))
                if digest and known and digest != known:
                    raise InputError(self._two_pictures(last, place, record))
                firsts[name] = (first, place, digest or known)
                num_repeats += place != first
                if last not in (first, place):
                    self._database.execute("DELETE FROM line WHERE place = ?", (last,))
            for first, last, _ in firsts.values():
                if first != last:
                    moved = self._database.execute("SELECT file, number, offset FROM line WHERE place = ?", (last,))
                    values = (*moved.fetchone(), first)
                    self._database.execute("UPDATE line SET file = ?, number = ?, offset = ? WHERE place = ?", values)
                    self._database.execute("DELETE FROM line WHERE place = ?", (last,))
        return num_repeats

    def _record_at(self, line: Line) -> RecordDict:
        file = self._files[line.file]
        file.seek(line.offset)
        text = _without_mark(file.readline(LINE_LIMIT_BYTES), line.offset)
        try:
            return renamed(tidied_record(text), self.sources[line.file].prefix)
        except ValueError as error:
            raise self._refusal(line, error) from error

    def _parsed(self, index: int, parse: Callable[[bytes], _Parsed], offset: int = 0) -> Iterator[tuple[Line, _Parsed]]:
        """Yield each line of a file from `offset` on and what `parse` makes of it; a torn last line is left out.

        Torn is what comes after a record, begins like one and is cut off; all else that is no record is foreign.
        """
        number, has_record, file = 0, offset > 0, self._files[index]
        while file.seek(offset) == offset and (text := file.readline(LINE_LIMIT_BYTES)):  # others read it meanwhile
            number += 1
            line, is_last = Line(index, number, offset), not text.endswith(b"\n")
            bare = _without_mark(text, offset).strip()
            if bare:
                try:
                    parsed = parse(_without_mark(text, offset))
                except ValueError as error:
                    if has_record and is_last and isinstance(error, NotJson) and bare.startswith(b"{"):
                        self._note_torn(line)
                        return
                    raise self._refusal(line, error, has_record=has_record) from error
                has_record = True
                yield line, parsed
            offset += len(text)

    def _note_torn(self, line: Line) -> None:
        where = f"{printable(str(self.sources[line.file].path))}: " if len(self.sources) > 1 else ""
        what = f"{where}line {line.number:,}, the last, is cut off and was left out"
        note = f"{what}; the run that wrote it can be continued"
        if note not in self.notes:  # each pass over the file meets it
            self.notes.append(note)

    def _refusal(self, line: Line, error: ValueError, *, has_record: bool = True) -> InputError:
        advice = "mend or remove the line, or run the command again"
        if not has_record:
            advice = "give the records.jsonl of a run, or its folder; of such a file, mend or remove the line"
        return InputError(f"{self._shown(line)}: {error}; {advice}")

    def _shown(self, line: Line) -> str:
        return f"{printable(str(self.sources[line.file].path))}, line {line.number}"

    def _two_pictures(self, first: int, second: int, record: RecordDict) -> str:
        query = "SELECT file, number, offset FROM line WHERE place = ?"
        lines = [Line(*self._database.execute(query, (place,)).fetchone()) for place in (first, second)]
        advice = "export the runs one by one, or remove the line that is not meant"
        if lines[0].file != lines[1].file:
            advice = "tell the runs apart with --as NAME=RECORDS"
        return (
            f"{self._shown(lines[0])} and {self._shown(lines[1])}: two pictures share the name "
            f"{printable(str(record.get('image')))} and the id {printable(str(record.get('id')))} (their sha256 "
            f"differs); {advice}"
        )


def _keys_of(line: bytes, prefix: str) -> _Keys:
    """Return numbers that stand for the record's `record_identity`, under `prefix`, and for its picture's name."""
    if line.endswith(b"}\n") and (head := _HEAD.match(line)):
        record_id, *image = (part or b"" for part in head.groups())
    else:
        record = tidied_record(line)
        record_id, *image = (part.encode("utf-8", "replace") for part in record_identity(record).split("\0", 2))
        record_id = record_id if record.get("id") else b""
    picture = b"\0".join([prefix.encode(), *image])
    return _Keys(_number_of(record_id + b"\0" + picture) if record_id else None, _number_of(picture))


def _number_of(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


def _without_mark(text: bytes, offset: int) -> bytes:
    """Return a line without the byte order mark that Windows programs put at the beginning of a file."""
    return text.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else text
