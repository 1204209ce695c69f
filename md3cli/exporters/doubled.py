"""Which lines of a records file say the same request again, in bounded memory.

Files that were joined, or a request that was asked again, hold an id twice: the last line counts and
stands where the first stood. Two pictures that share a name (two runs joined) have equal ids too, and
there nobody can say which is meant: that is an error. SQLite notes a line as two numbers in a private
temporary file and sorts them there.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from md3cli.errors import ExportError, InputError
from md3cli.records import RecordDict, printable

# How md3 begins a line; any other is parsed, and a last line that may be torn. Without backslashes a text is its own
# bytes.
_HEAD = re.compile(
    rb'\{"schema":"md3/1","id":"([^"\\]*)","image":(?:"([^"\\]*)"|null),(?:"image_b64":"([^"\\]*)",)?"(?!image_b64")'
)
_DOUBLED = """
SELECT key, number, offset FROM line
WHERE key IN (SELECT key FROM line GROUP BY key HAVING count(*) > 1) ORDER BY key, number
"""


class Line(NamedTuple):
    """A line of the file: its number from 1 and the offset in bytes of its first byte."""

    number: int
    offset: int


class Doubled:
    """The lines of one file that are doubled. Empty for nearly all files. Close it."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # a temporary file that SQLite removes by itself
        self._database.execute("CREATE TABLE line(number INTEGER PRIMARY KEY, key INT, offset INT)")
        self._database.execute("CREATE TABLE final(offset INTEGER PRIMARY KEY, final INT)")
        self.num_repeats = 0

    def close(self) -> None:
        self._database.close()

    def note(self, lines: Iterable[tuple[int, int, int]]) -> None:
        """Take (number, key, offset) of every record of the file that has an id."""
        with told_where():
            self._database.executemany("INSERT INTO line VALUES (?, ?, ?)", lines)

    def settle(self, path: Path, read: Callable[[Line], RecordDict]) -> None:
        """Decide which line of each request counts; `read` gives the record of a line.

        Raises:
            InputError: two lines of one request are about different pictures; names both.
        """
        with told_where():
            doubled = self._database.execute(_DOUBLED)
            self._database.executemany("INSERT INTO final VALUES (?, ?)", self._settled(doubled, path, read))
            self._database.execute("DELETE FROM line")

    def starting_at(self, offset: int) -> Iterator[tuple[int, int | None]]:
        """(offset of a doubled line, offset of the line to read in its place or None) from `offset` on, in order."""
        if not self.num_repeats:
            return iter(())
        return self._database.execute("SELECT offset, final FROM final WHERE offset >= ? ORDER BY offset", (offset,))

    def _settled(
        self, doubled: Iterable[tuple[int, int, int]], path: Path, read: Callable[[Line], RecordDict]
    ) -> Iterator[tuple[int, int | None]]:
        for _, rows in groupby(doubled, key=lambda row: row[0]):
            firsts: dict[str, tuple[Line, Line, str | None]] = {}  # more than one only where two keys collide
            for _, number, offset in rows:
                line = Line(number, offset)
                record = read(line)
                name, digest = identity_of(record), record.get("sha256")
                if name not in firsts:
                    firsts[name] = (line, line, digest)
                    continue
                first, last, known = firsts[name]
                if digest and known and digest != known:
                    raise InputError(_two_pictures(path, last, line, record))
                firsts[name] = (first, line, digest or known)
                self.num_repeats += 1
                if last != first:
                    yield last.offset, None
            for first, last, _ in firsts.values():
                if first != last:
                    yield first.offset, last.offset
                    yield last.offset, None


def _two_pictures(path: Path, first: Line, second: Line, record: RecordDict) -> str:
    where = printable(str(path))
    return (
        f"{where}, line {first.number} and {where}, line {second.number}: two pictures share the name "
        f"{printable(str(record.get('image')))} and the id {printable(str(record.get('id')))} (their sha256 differs); "
        "export the runs one by one, or remove the line that is not meant"
    )


def identity_of(record: RecordDict) -> str:
    """Return what tells a record from others: its id, and its image as it is named, byte for byte."""
    return f"{record.get('id')}\0{record.get('image') or ''}\0{record.get('image_b64') or ''}"


def key_of(line: bytes, parse: Callable[[bytes], RecordDict]) -> int | None:
    """Return a number that stands for the record's `identity_of`; None where it has no id. Raises as `parse`."""
    if line.endswith(b"}\n") and (head := _HEAD.match(line)):
        identity = b"\0".join(part or b"" for part in head.groups())
        has_id = bool(head[1])
    else:
        record = parse(line)
        has_id, identity = bool(record.get("id")), identity_of(record).encode()
    digest = hashlib.blake2b(identity, digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) if has_id else None


@contextmanager
def told_where() -> Iterator[None]:
    """Turn what SQLite says where its temporary file finds no room into ExportError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise ExportError(f"cannot sort the records on disk ({error}); make room in TMPDIR or set another") from error
