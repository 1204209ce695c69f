"""OUT.damaged: copies of the lines of a journal that are no whole records, before they are taken out of it.

Appended to, never overwritten, and never INPUT. A line that is there already is not copied again: whoever was
killed between the copy and what follows it copies nothing twice.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from md3cli.journal_scan import DamagedLines
from md3cli.publish import output_error
from md3cli.records import printable

SUFFIX = ".damaged"
_MOST_NAMED = 5
_WHOLE_LIMIT_BYTES = 1 << 26  # what is longer is copied in pieces
_PIECE_BYTES = 1 << 20


def damaged_path(journal: Path) -> Path:
    """Return where the copies of a journal's damaged lines stand."""
    return journal.with_name(journal.name + SUFFIX)


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


def keep_damaged(path: Path, fd: int, spans: Iterable[tuple[int, int]]) -> None:
    """Copy spans (start, end) of the open file `fd` to `path`; they are safe from a power cut when this returns.

    Without a span nothing is made.

    Raises:
        OutputError: they cannot be written, or `path` is no regular file.
    """
    spans = list(spans)
    if not spans:
        return
    try:
        with os.fdopen(_open(path), "r+b", buffering=0) as file:
            known = {_digest(line) for line in file}
            for start, end in spans:
                for text in _lines(fd, start, end):
                    if _digest(text) not in known:
                        known.add(_digest(text))
                        _write_all(file.fileno(), text)
            os.fsync(file.fileno())
    except OSError as error:
        raise output_error(path, error) from error


def _open(path: Path) -> int:
    no_link = getattr(os, "O_NOFOLLOW", 0)  # the copies would be written into whatever it leads to
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | no_link, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "not a regular file")
    return fd


def _lines(fd: int, start: int, end: int) -> Iterator[bytes]:
    """Yield the lines of a span, the last with a newline too; pieces of it where it is long."""
    is_long = end - start > _WHOLE_LIMIT_BYTES
    for at in range(start, end, _PIECE_BYTES if is_long else end - start):
        text = os.pread(fd, min(_PIECE_BYTES, end - at) if is_long else end - start, at)
        if is_long:
            yield text
        else:
            yield from (line + b"\n" for line in text.removesuffix(b"\n").split(b"\n"))


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).digest()[:16]


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def line_number(fd: int, offset: int) -> int:
    """Return the number of the line that begins at `offset` of an open file, from 1."""
    parts = range(0, offset, _PIECE_BYTES)
    return 1 + sum(os.pread(fd, min(_PIECE_BYTES, offset - at), at).count(b"\n") for at in parts)
