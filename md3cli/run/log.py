"""An append log: a file of whole lines that one process appends to, and of which a failed append leaves nothing.

The journal of a run, the journal of an attempt at a shard and the file of waiting records are such logs. They differ in
what a power cut may take (`SyncAfter`), and in what becomes of an end that a kill has torn: the journal cuts it off,
the others are never opened again to append, and their readers pass over it. Whatever kills the process, what was
appended is in the file. Knows nothing of what the lines say.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from md3cli.files import atomic_publish, output_error
from md3cli.finished.record_shape import LINE_LIMIT_BYTES
from md3cli.system import open_regular, read_at, sync_data, write_all

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

    def __init__(self, path: Path, *, is_new: bool = False, sync_after: SyncAfter | None = None) -> None:
        """Open the file at `path`, made where it is not there; `sync_after` None: it is never synced.

        Raises:
            OutputError: it cannot be opened, is no regular file, or is there though it should be new.
        """
        self.path, self._sync_after = path, sync_after
        self._fd = -1
        self._open(os.O_EXCL if is_new else 0)
        self._num_unsynced, self._synced_at = 0, time.monotonic()
        self._buffer, self._buffer_start = b"", 0

    def _open(self, flags: int) -> None:
        try:
            fd = open_regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | flags)
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
        self._open(0)
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
