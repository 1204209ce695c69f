"""Damaged lines of a file of records: where they stand, their copies, and what a user reads of them.

Nothing that was written is thrown away: a damaged line is copied to OUT.damaged before it is taken out of the journal,
and one that stands there already is not copied again. Knows nothing of what makes a line whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from md3cli.files import output_error
from md3cli.records import printable
from md3cli.system import open_regular, read_at, write_all

_SUFFIX = ".damaged"
_MOST_NAMED = 5
_WHOLE_LIMIT_BYTES = 1 << 26  # what is longer is copied in pieces
_PIECE_BYTES = 1 << 20


class DamagedLines(NamedTuple):
    """Bytes from `start` to `end` that are no record: lines `first` to `last`, counted from 1.

    `is_json`: each of them parses, so that no kill has torn it.
    """

    first: int
    last: int
    start: int
    end: int
    is_json: bool

    @classmethod
    def at(cls, fd: int, start: int, end: int) -> DamagedLines:
        """Return the one line of an open file from `start` to `end`, which parses but is not what it should be."""
        parts = range(0, start, _PIECE_BYTES)
        number = 1 + sum(read_at(fd, min(_PIECE_BYTES, start - at), at).count(b"\n") for at in parts)
        return cls(number, number, start, end, True)


def damaged_path(journal: Path) -> Path:
    """Return where the copies of a journal's damaged lines stand."""
    return journal.with_name(journal.name + _SUFFIX)


def damage_words(journal: Path, damaged: Sequence[DamagedLines]) -> str | None:
    """Return what a user should know of damaged lines of a journal, the first few by number; None where none are."""
    return repair_words(str(journal), damaged, str(damaged_path(journal))) if damaged else None


def repair_words(file: str, damaged: Sequence[DamagedLines], copies: str) -> str:
    """Return in words which lines of `file` were damaged, the first few by number, and that `copies` has them."""
    count = sum(lines.last - lines.first + 1 for lines in damaged)
    named = [str(lines.first) if lines.first == lines.last else f"{lines.first} to {lines.last}" for lines in damaged]
    more = f" and {len(named) - _MOST_NAMED:,} more places" if len(named) > _MOST_NAMED else ""
    places = f"{', '.join(named[:_MOST_NAMED])}{more}"
    where, they = (f"line {places} was", "it") if count == 1 else (f"lines {places} were", "they")
    return (
        f"repaired {printable(file)}: {where} damaged, copied to {printable(copies)}; "
        f"what {they} answered is done again"
    )


def keep_damaged(journal: Path, fd: int, damaged: Sequence[DamagedLines]) -> None:
    """Copy damaged lines of the journal, open as `fd`, to OUT.damaged; without any no file is made.

    The copies are safe from a power cut when this returns.

    Raises:
        OutputError: they cannot be written, or OUT.damaged is no regular file.
    """
    if not damaged:
        return
    path = damaged_path(journal)
    try:
        # The copies would be written into whatever a link leads to.
        beside = open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, follows_links=False)
        with os.fdopen(beside, "r+b", buffering=0) as file:
            known = {_digest(line) for line in file}
            for lines in damaged:
                for text in _texts(fd, lines.start, lines.end):
                    if _digest(text) not in known:
                        known.add(_digest(text))
                        write_all(file.fileno(), text)
            os.fsync(file.fileno())
    except OSError as error:
        raise output_error(path, error) from error


def _texts(fd: int, start: int, end: int) -> Iterator[bytes]:
    """Yield the lines from `start` to `end`, the last with a newline, too; pieces where they are long together."""
    is_long = end - start > _WHOLE_LIMIT_BYTES
    for at in range(start, end, _PIECE_BYTES if is_long else end - start):
        text = read_at(fd, min(_PIECE_BYTES, end - at) if is_long else end - start, at)
        if is_long:
            yield text
        else:
            yield from (line + b"\n" for line in text.removesuffix(b"\n").split(b"\n"))


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).digest()[:16]
