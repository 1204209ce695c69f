"""Lines of stdin as they come: what is not there yet is not waited for.

A pipe that stays open for hours (`tail -f list | md3 caption -`) gives a line now and then. Whoever reads it
line by line with `readline` is blocked between two lines, while pictures are ready to be run.
"""

from __future__ import annotations

import io
import os
import select
from typing import IO

CHUNK_BYTES = 1 << 16


class LiveLines:
    """The lines of `file`, taken from its descriptor where it has one; nothing may have been read from it before.

    Attributes:
        may_wait: whether `readline` waits for a line, as it does for a file on a disk.
    """

    def __init__(self, file: IO[bytes], *, may_wait: bool = True) -> None:
        self.may_wait = may_wait
        self._file = file
        self._fd = _descriptor(file)
        self._buffer = bytearray()
        self._num_searched = 0  # bytes of it that hold no line end
        self._is_ended = False

    def readline(self, limit: int, /) -> bytes | None:
        """The next line with its end, cut at `limit` bytes; empty at the end of all; None: it has not come yet."""
        if self._fd is None:
            return self._file.readline(limit)
        while True:
            end = self._buffer.find(b"\n", self._num_searched, limit) + 1
            if end or self._is_ended or len(self._buffer) >= limit:
                return self._take(end or min(limit, len(self._buffer)))
            self._num_searched = len(self._buffer)
            if not self.may_wait and not self.wait(0):
                return None
            chunk = os.read(self._fd, CHUNK_BYTES)
            self._buffer += chunk
            self._is_ended = not chunk

    def _take(self, num_bytes: int) -> bytes:
        line = bytes(self._buffer[:num_bytes])
        del self._buffer[:num_bytes]
        self._num_searched = 0
        return line

    def wait(self, timeout_s: float) -> bool:
        """Wait until there is something to read, or the end, at most so long; whether there is."""
        return self._fd is None or bool(select.select([self._fd], [], [], timeout_s)[0])


def _descriptor(file: IO[bytes]) -> int | None:
    try:
        return file.fileno()
    except (OSError, io.UnsupportedOperation):  # a file in memory
        return None
