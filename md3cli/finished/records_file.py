"""Records read from a JSON Lines file, one at a time, whatever its length: the one reader of all commands.

Knows the file's shape (one object a line, perhaps a torn tail, perhaps a request twice) and nothing of formats. Every
string of a record is valid UTF-8. A file that holds no record is an error.

Files that were joined, or a request that was asked again, hold an id twice: the last line counts and stands where the
first stood. Two pictures that share a name (two runs joined) have equal ids too, and there nobody can say which is
meant: that is an error. SQLite notes a line as two numbers in a private temporary file and sorts them there, so memory
stays bounded.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from md3cli.errors import ExportError, InputError
from md3cli.finished.record_shape import LINE_LIMIT_BYTES, NotJson, tidied_record
from md3cli.finished.run_json import has_run_info
from md3cli.records import RecordDict, printable

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How md3 begins a line; any other is parsed, and a last line that may be torn. Without backslashes a text is its own
# bytes.
_HEAD = re.compile(
    rb'\{"schema":"md3/1","id":"([^"\\]*)","image":(?:"([^"\\]*)"|null),(?:"image_b64":"([^"\\]*)",)?"(?!image_b64")'
)
_DOUBLED = """
SELECT key, number, offset FROM line
WHERE key IN (SELECT key FROM line GROUP BY key HAVING count(*) > 1) ORDER BY key, number
"""

_Parsed = TypeVar("_Parsed")


class Line(NamedTuple):
    """A line of the file: its number from 1 and the offset in bytes of its first byte."""

    number: int
    offset: int


def read_records(path: Path, notes: list[str] | None = None) -> Iterator[RecordDict]:
    """Yield the records of `path` in order, each request once; add to `notes` what a user should know.

    Raises:
        InputError: the file cannot be read, holds no record, a line is none, or two pictures share a name.
    """
    with closing(RecordsFile(path)) as file:
        if notes is not None:
            notes += file.notes
        for _, record in file.placed():
            yield record


def open_records(path: Path) -> BinaryIO:
    """Open `path` for reading; a file that cannot be read is an InputError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read the records {printable(str(path))}: {error.strerror or error}") from error


def record_identity(record: RecordDict) -> str:
    """Return what tells a record from others: its id, and its image as it is named, byte for byte."""
    return f"{record.get('id')}\0{record.get('image') or ''}\0{record.get('image_b64') or ''}"


@contextmanager
def disk_trouble_in_words() -> Iterator[None]:
    """Raise ExportError where SQLite finds no room for its temporary file."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise ExportError(f"cannot sort the records on disk ({error}); make room in TMPDIR or set another") from error


class RecordsFile:
    """A records file whose lines were looked through once: none is foreign, and which count is known. Close it.

    `notes` are sentences about what was left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self._num_repeats = 0
        self._file = open_records(path)
        self._database = sqlite3.connect("")  # a temporary file that SQLite removes by itself
        self._database.execute("CREATE TABLE line(number INTEGER PRIMARY KEY, key INT, offset INT)")
        self._database.execute("CREATE TABLE final(offset INTEGER PRIMARY KEY, final INT)")
        try:
            with disk_trouble_in_words():
                self._database.executemany("INSERT INTO line VALUES (?, ?, ?)", self._keys())
                doubled = self._database.execute(_DOUBLED)
                self._database.executemany("INSERT INTO final VALUES (?, ?)", self._settled(doubled))
                self._database.execute("DELETE FROM line")
        except BaseException:
            self.close()
            raise
        if self._num_repeats:
            what = "1 line repeats" if self._num_repeats == 1 else f"{self._num_repeats:,} lines repeat"
            self.notes.append(f"{what} a request that is there already; of each request the last line counts")

    def close(self) -> None:
        """Close the file and what was noted of it."""
        self._database.close()
        self._file.close()

    def placed(self, offset: int = 0) -> Iterator[tuple[Line, RecordDict]]:
        """Return the records from the line at `offset` on with their lines; a doubled request once, at its first."""
        return self._without_repeats(offset) if self._num_repeats else self._parsed(tidied_record, offset)

    def _without_repeats(self, offset: int) -> Iterator[tuple[Line, RecordDict]]:
        moves = self._database.execute("SELECT offset, final FROM final WHERE offset >= ? ORDER BY offset", (offset,))
        move = next(moves, None)
        for line, record in self._parsed(tidied_record, offset):
            if move is None or move[0] != line.offset:
                yield line, record
                continue
            if move[1] is not None:
                back = self._file.tell()
                yield line, self._record_at(Line(line.number, move[1]))
                self._file.seek(back)
            move = next(moves, None)

    def _keys(self) -> Iterator[tuple[int, int, int]]:
        num_records = 0
        for line, key in self._parsed(_key_of):
            num_records += 1
            if key is not None:
                yield line.number, key, line.offset
        if not num_records and not (self._file.tell() == 0 and has_run_info(self.path)):
            raise InputError(
                f"{printable(str(self.path))} holds no records of md3; give the records.jsonl of a run, or its folder"
            )

    def _settled(self, doubled: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int | None]]:
        """Yield of each line that is doubled its offset and that of the line to read in its place, None for nothing.

        Raises:
            InputError: two lines of one request are about different pictures; names both.
        """
        for _, rows in groupby(doubled, key=lambda row: row[0]):
            firsts: dict[str, tuple[Line, Line, str | None]] = {}  # more than one only where two keys collide
            for _, number, offset in rows:
                line = Line(number, offset)
                record = self._record_at(line)
                name, digest = record_identity(record), record.get("sha256")
                if name not in firsts:
                    firsts[name] = (line, line, digest)
                    continue
                first, last, known = firsts[name]
                if digest and known and digest != known:
                    raise InputError(_two_pictures(self.path, last, line, record))
                firsts[name] = (first, line, digest or known)
                self._num_repeats += 1
                if last != first:
                    yield last.offset, None
            for first, last, _ in firsts.values():
                if first != last:
                    yield first.offset, last.offset
                    yield last.offset, None

    def _record_at(self, line: Line) -> RecordDict:
        self._file.seek(line.offset)
        text = _without_mark(self._file.readline(LINE_LIMIT_BYTES), line.offset)
        try:
            return tidied_record(text)
        except ValueError as error:
            raise self._refusal(line.number, error) from error

    def _parsed(self, parse: Callable[[bytes], _Parsed], offset: int = 0) -> Iterator[tuple[Line, _Parsed]]:
        """Yield each line from `offset` on and what `parse` makes of it; a torn last line is left out.

        Torn is what comes after a record, begins like one and is cut off; all else that is no record is foreign.
        """
        number, has_record = 0, offset > 0
        self._file.seek(offset)
        while text := self._file.readline(LINE_LIMIT_BYTES):
            number += 1
            bare, is_last = _without_mark(text, offset).strip(), not text.endswith(b"\n")
            if bare:
                try:
                    parsed = parse(_without_mark(text, offset))
                except ValueError as error:
                    if has_record and is_last and isinstance(error, NotJson) and bare.startswith(b"{"):
                        self._note_torn(number)
                        return
                    raise self._refusal(number, error, has_record=has_record) from error
                has_record = True
                yield Line(number, offset), parsed
            offset += len(text)

    def _note_torn(self, number: int) -> None:
        note = f"line {number:,}, the last, is cut off and was left out; the run that wrote it can be continued"
        if note not in self.notes:  # each pass over the file meets it
            self.notes.append(note)

    def _refusal(self, number: int, error: ValueError, *, has_record: bool = True) -> InputError:
        advice = "mend or remove the line, or run the command again"
        if not has_record:
            advice = "give the records.jsonl of a run, or its folder; of such a file, mend or remove the line"
        return InputError(f"{printable(str(self.path))}, line {number}: {error}; {advice}")


def _key_of(line: bytes) -> int | None:
    """Return a number that stands for the record's `record_identity`; None where the record has no id."""
    if line.endswith(b"}\n") and (head := _HEAD.match(line)):
        identity = b"\0".join(part or b"" for part in head.groups())
        has_id = bool(head[1])
    else:
        record = tidied_record(line)
        has_id, identity = bool(record.get("id")), record_identity(record).encode()
    digest = hashlib.blake2b(identity, digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) if has_id else None


def _two_pictures(path: Path, first: Line, second: Line, record: RecordDict) -> str:
    where = printable(str(path))
    return (
        f"{where}, line {first.number} and {where}, line {second.number}: two pictures share the name "
        f"{printable(str(record.get('image')))} and the id {printable(str(record.get('id')))} (their sha256 differs); "
        "export the runs one by one, or remove the line that is not meant"
    )


def _without_mark(text: bytes, offset: int) -> bytes:
    """Return a line without the byte order mark that Windows programs put at the beginning of a file."""
    return text.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else text
