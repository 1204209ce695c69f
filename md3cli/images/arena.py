"""Memory that one decode worker shares with the pool: a whole picture stands in it while its crops are cut elsewhere.

Each worker process has an arena of its own, made and measured by the pool, for one picture at a time. So a decoder that
was taken over can write wrong pixels into its own pictures, as it could through a socket, and into no other worker's.
It cannot make the memory smaller, which would end this process at the next look. Memory is used where a picture has
stood, and goes back to the system when both sides have let go of it. Apart from pool.py, because it knows nothing of
pictures or messages.
"""

from __future__ import annotations

import mmap
import os

import numpy as np

from md3cli.system import available_memory, shared_memory

ARENA_BYTES = 80 << 20  # a photograph of 27 megapixels
MEMORY_SHARE = 0.125  # of what is free, for the arenas of all workers
LEAST_BYTES = 8 << 20  # of a useful arena: a picture of 2 megapixels
PAGE = mmap.PAGESIZE


class Arena:
    """Memory for one picture of one worker; one thread uses it."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        """Take over `fd`, which is `num_bytes` of `system.shared_memory`."""
        self.fd, self.num_bytes = fd, num_bytes
        self._map = mmap.mmap(fd, num_bytes)
        self._num_backed = 0  # from the start: bytes that the system has promised memory for

    def first(self, num_bytes: int) -> np.ndarray | None:
        """Return the first `num_bytes`; None where there are fewer, or where the system has no memory for them."""
        if num_bytes > self.num_bytes or not self._back(num_bytes):
            return None
        return np.frombuffer(self._map, np.uint8, num_bytes)

    def close(self) -> None:
        """Let go of the file; what `first` gave stays as it is."""
        os.close(self.fd)

    def _back(self, end: int) -> bool:
        """Have the system find memory up to `end`; where it cannot, a write to a page would end a process."""
        if end <= self._num_backed:
            return True
        try:
            os.posix_fallocate(self.fd, self._num_backed, end - self._num_backed)
        except OSError:
            return False
        self._num_backed = end
        return True


def arena_bytes(num_workers: int) -> int:
    """Return the size of each worker's arena, by the memory that is free now; 0 where that is too little."""
    available = available_memory()
    if available is None:
        return 0
    size = min(ARENA_BYTES, int(available * MEMORY_SHARE) // max(1, num_workers)) // PAGE * PAGE
    return size if size >= LEAST_BYTES else 0


def make_arena(num_bytes: int) -> Arena | None:
    """Make an arena; return None where the system shares no such memory, or for 0 bytes."""
    fd = shared_memory(num_bytes) if num_bytes else None
    return Arena(fd, num_bytes) if fd is not None else None
