"""Memory that one decode worker shares with the pool: whole pictures stand in it until the engine has taken them.

Each worker process has an arena of its own, made and measured by the pool; where a picture goes is the pool's word, and
the worker's word moves nothing. So a decoder that was taken over can write wrong pixels into its own pictures, as it
could through a socket, and into no other worker's. It cannot make the memory smaller, which would end this process at
the next look. Memory is used where a picture stands for the first time, and goes back to the system when the worker
has ended and nobody holds a picture any more. Apart from pool.py, because it knows nothing of pictures or messages.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
import weakref
from bisect import bisect, insort
from queue import Empty, SimpleQueue

import numpy as np

from md3cli.system import available_memory, shared_memory

ARENA_BYTES = 80 << 20  # two photographs of 12 megapixels, or one of 27
MEMORY_SHARE = 0.125  # of what is free, for the arenas of all workers
LEAST_BYTES = 8 << 20  # of a useful arena: a picture of 2 megapixels
PAGE = mmap.PAGESIZE


class Ranges:
    """The book of an arena: which bytes are taken. A range begins and ends on a page."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes // PAGE * PAGE
        self._taken: list[tuple[int, int]] = []  # (start, end), in order

    def take(self, num_bytes: int) -> int | None:
        """Return the start of the first free range of `num_bytes`, taken from now on; None where there is none."""
        size = -(-num_bytes // PAGE) * PAGE
        start = 0
        for first, end in self._taken:
            if first - start >= size:
                break
            start = end
        if size > self._num_bytes - start:
            return None
        insort(self._taken, (start, start + size))
        return start

    def give_back(self, start: int) -> None:
        """Free the range that begins at `start`."""
        at = bisect(self._taken, (start,))
        assert self._taken[at][0] == start, start
        del self._taken[at]


class Arena:
    """Memory for one worker's pictures; one thread lends, whoever holds a picture may let go of it in any thread."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        """Take over `fd`, which is `num_bytes` of `system.shared_memory`."""
        self.fd, self.num_bytes = fd, num_bytes
        self._map = mmap.mmap(fd, num_bytes)
        self._ranges = Ranges(num_bytes)
        self._num_backed = 0  # from the start: bytes that the system has promised memory for
        self._is_over = False
        # A queue and no lock: a finaliser may put into it at any moment, even while this thread is inside `lend`.
        self._returned: SimpleQueue[int | None] = SimpleQueue()

    def lend(self, num_bytes: int, timeout_s: float) -> tuple[int, np.ndarray] | None:
        """Return the place of `num_bytes` and the bytes there, lent until nothing refers to the array any more.

        Waits up to `timeout_s` for room. Returns None where there is none, or where the system has no memory for it.
        """
        if num_bytes > self.num_bytes:
            return None
        deadline = time.monotonic() + timeout_s
        self._collect(0.0)
        while (start := self._ranges.take(num_bytes)) is None:
            if self._is_over or not self._collect(deadline - time.monotonic()):
                return None
        if not self._back(start + num_bytes):
            self._ranges.give_back(start)
            return None
        # An array of its own for each loan: numpy lets views of views refer to the first one.
        lent = np.frombuffer(self._map, np.uint8, num_bytes, start)
        weakref.finalize(lent, self._returned.put, start).atexit = False
        return start, lent

    def _collect(self, timeout_s: float) -> bool:
        """Free all ranges that came back, having waited for the first; return whether one did."""
        has_any = False
        with contextlib.suppress(Empty):
            while True:
                start = self._returned.get(timeout=0.0 if has_any else max(0.0, timeout_s))
                if start is None:
                    self._is_over = True
                else:
                    self._ranges.give_back(start)
                has_any = True
        return has_any

    def give_up(self) -> None:
        """Let whoever waits for room wait no longer, now and later; any thread may say so."""
        self._returned.put(None)

    def whole(self) -> np.ndarray:
        """Return all bytes, for whoever makes them known to a device; memory stays while the array is there."""
        return np.frombuffer(self._map, np.uint8)

    def close(self) -> None:
        """Let go of the file; what is lent stays as it is."""
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
