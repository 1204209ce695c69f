"""A thread that does what an engine need not wait for, in order: embeddings are written to a disk there.

What waits is bounded in bytes: an engine that is faster than the disk for long waits for it in the end. Apart from
encoder.py, because it knows nothing of pictures and tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

MOST_BYTES = 256 << 20  # 90 pictures of the real model


class Keeper:
    """Does jobs in the order they come in; one thread hands them over. The thread starts with the first job."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        # Ends by itself, its jobs done, when the interpreter ends in the usual way or nobody holds it any more.
        self._thread = ThreadPoolExecutor(1, "keep")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._num_bytes = 0

    def add(self, job: Callable[[], None], num_bytes: int) -> None:
        """Have `job` done, which holds so many bytes; waits while what is to be done holds too many already."""
        while self._waiting and (self._waiting[0][0].done() or self._num_bytes + num_bytes > self._most_bytes):
            self._finish_first()
        self._waiting.append((self._thread.submit(job), num_bytes))
        self._num_bytes += num_bytes

    def flush(self) -> None:
        """Wait until everything is done."""
        while self._waiting:
            self._finish_first()

    def _finish_first(self) -> None:
        future, num_bytes = self._waiting.popleft()
        self._num_bytes -= num_bytes
        future.result()
