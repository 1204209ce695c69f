"""An append log: a file of whole lines that one process appends to; and what becomes of lines that were damaged.

The journal of a run, the journal of an attempt at a shard, the file of waiting records and OUT.damaged are such logs.
Of a failed append they keep nothing. They differ in what a power cut may take (`SyncAfter`), and in what becomes of an
end that a kill has torn: the journal cuts it off, the others are never opened again to append, and their readers pass
over it. Whatever kills the process, what was appended is in the file.

Nothing that was written is thrown away: a damaged line is copied to OUT.damaged before it is taken out of the journal.
Knows nothing of what the lines say.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from md3cli.files import atomic_publish, output_error
from md3cli.finished.record_shape import LINE_LIMIT_BYTES
from md3cli.records import printable
from md3cli.system import open_regular, read_at, sync_data, write_all

_SUFFIX = ".damaged"
_MOST_NAMED = 5
_WHOLE_LIMIT_BYTES = 1 << 26  # what is longer is copied in pieces
_PIECE_BYTES = 1 << 20
_FEW_BYTES, _MANY_BYTES = 1 << 12, 1 << 18  # read at a time: of one line, and of lines in order


class SyncAfter(NamedTuple):
    """When a log is synced: after so many records, and so many seconds after the last time."""

    records: int
    seconds: float


class AppendLog:
    """A file of lines, open for appending; used by one thread.

    Attributes:
        path: where the file was opened.
        size: the bytes of all that was appended, or cut to.
    """

    def __init__(
        self, path: Path, *, is_new: bool = False, follows_links: bool = True, sync_after: SyncAfter | None = None
    ) -> None:
        """Open the file at `path`, made where it is not there; `sync_after` None: it is synced only when asked to.

        Raises:
            OutputError: it cannot be opened, is no regular file, or is there though it should be new.
        """
        self.path, self._sync_after = path, sync_after
        self._fd = -1
        self._open(os.O_EXCL if is_new else 0, follows_links=follows_links)
        self._num_unsynced, self._synced_at = 0, time.monotonic()
        self._buffer, self._buffer_start = b"", 0

    def _open(self, flags: int = 0, *, follows_links: bool = True) -> None:
        try:
            fd = open_regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | flags, follows_links=follows_links)
            self.size = os.fstat(fd).st_size
        except OSError as error:
            raise output_error(self.path, error) from error
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd

    def fileno(self) -> int:
        """Return the open file, to read from."""
        return self._fd

    def append(self, data: bytes, num_records: int = 0) -> None:
        """Put whole lines at the end; `num_records` of them wait for a sync, the others need none.

        Raises:
            OutputError: not all of it could be written. Then none of it was: the file is as before.
        """
        try:
            write_all(self._fd, data)
        except OSError as error:
            with contextlib.suppress(OSError):  # where the cut fails, too, whoever reads the file finds a torn end
                os.ftruncate(self._fd, self.size)
            raise output_error(self.path, error) from error
        self.size += len(data)
        self._num_unsynced += num_records if self._sync_after is not None else 0

    def cut(self, size: int) -> None:
        """Leave the first `size` bytes: what is behind them was torn."""
        os.ftruncate(self._fd, size)
        self.size = size

    def sync_in_time(self) -> None:
        """Sync where so many records wait, or have waited so long, as a power cut may take.

        Raises:
            OutputError: the disk refuses.
        """
        if self._sync_after is None or not self._num_unsynced:
            return
        is_late = time.monotonic() - self._synced_at >= self._sync_after.seconds
        if is_late or self._num_unsynced >= self._sync_after.records:
            self.sync()

    def sync(self) -> None:
        """Make what was appended safe from a power cut.

        Raises:
            OutputError: the disk refuses.
        """
        try:
            sync_data(self._fd)
        except OSError as error:
            raise output_error(self.path, error) from error
        self._num_unsynced, self._synced_at = 0, time.monotonic()

    @contextlib.contextmanager
    def replaced(self) -> Iterator[IO[bytes]]:
        """Yield a new file that takes the log's place when the block ends; a kill leaves the old one or the new one.

        Raises:
            OutputError: it cannot be written; the log is as before.
        """
        with atomic_publish(self.path) as temp, open(temp, "wb") as new:
            yield new
        self._open()
        self._num_unsynced = 0
        self._buffer, self._buffer_start = b"", 0

    def line_at(self, start: int) -> bytes:
        """Return the line from offset `start` with its newline; cheap where lines are asked for in their order.

        Raises:
            OutputError: it cannot be read.
        """
        at = start - self._buffer_start
        end = self._buffer.find(b"\n", at) if 0 <= at < len(self._buffer) else -1
        if end >= 0:
            return self._buffer[at : end + 1]
        is_next = 0 <= at <= len(self._buffer)
        num_bytes = _MANY_BYTES if is_next else _FEW_BYTES
        while True:
            try:
                self._buffer, self._buffer_start = read_at(self._fd, num_bytes, start), start
            except OSError as error:
                raise output_error(self.path, error) from error
            end = self._buffer.find(b"\n")
            if end >= 0 or len(self._buffer) < num_bytes or num_bytes > LINE_LIMIT_BYTES:
                return self._buffer[: end + 1]
            num_bytes *= 4

    def close(self) -> None:
        """Sync what waits for it, and close; a second call does nothing.

        Raises:
            OutputError: the last records could not be synced.
        """
        if self._fd < 0:
            return
        try:
            if self._num_unsynced:
                self.sync()
        finally:
            os.close(self._fd)
            self._fd = -1


# -- damaged lines -------------------------------------------------------------------------------------


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

    A line that stands there already is not copied again. The copies are safe from a power cut when this returns.

    Raises:
        OutputError: they cannot be written, or OUT.damaged is no regular file.
    """
    if not damaged:
        return
    # Links are not followed: the copies would be written into whatever they lead to.
    with contextlib.closing(AppendLog(damaged_path(journal), follows_links=False)) as copies:
        try:
            with open(copies.fileno(), "rb", closefd=False) as file:
                known = set(map(_digest, file))
            texts = (text for lines in damaged for text in _texts(fd, lines.start, lines.end))
            for text in texts:
                if (digest := _digest(text)) not in known:
                    known.add(digest)
                    copies.append(text)
        except OSError as error:
            raise output_error(copies.path, error) from error
        copies.sync()


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
