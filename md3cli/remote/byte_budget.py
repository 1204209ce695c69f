"""A bound on the bytes of pictures that are fetched or being fetched and not decoded yet."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError


class ByteBudget:
    """Bytes shared by threads that each fill one picture; whoever would take too many waits.

    The oldest picture never waits, so that there is always one that can be finished: the bound may be exceeded
    by the size of one picture.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._taken: dict[int, int] = {}  # by number; the oldest picture has the lowest
        self._num_taken = 0
        self._next_number = 0
        self._changed = threading.Condition()
        self._is_closed = False

    @property
    def num_taken(self) -> int:
        """Bytes taken by all."""
        return self._num_taken

    def open(self) -> int:
        """The number of a new picture."""
        with self._changed:
            self._next_number += 1
            self._taken[self._next_number] = 0
            return self._next_number

    def take(self, number: int, num_bytes: int) -> float:
        """Take so many bytes more; returns the seconds it had to wait.

        Raises:
            CancelledError: the budget was closed.
        """
        started = time.monotonic()
        with self._changed:
            while not (self._is_closed or self._has_room(number, num_bytes)):
                self._changed.wait()
            if self._is_closed:
                raise CancelledError
            self._taken[number] += num_bytes
            self._num_taken += num_bytes
        return time.monotonic() - started

    def start_over(self, number: int) -> None:
        """Give back what a picture took; it is fetched once more."""
        with self._changed:
            self._num_taken -= self._taken[number]
            self._taken[number] = 0
            self._changed.notify_all()

    def give_back(self, number: int) -> None:
        """The picture is decoded, or has failed."""
        with self._changed:
            self._num_taken -= self._taken.pop(number)
            self._changed.notify_all()

    def close(self) -> None:
        """Wake whoever waits."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _has_room(self, number: int, num_bytes: int) -> bool:
        return self._num_taken + num_bytes <= self._limit_bytes or number == min(self._taken)
