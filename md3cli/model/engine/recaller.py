"""Threads that read embeddings from a disk ahead of the engine's need: a GPU answers faster than one thread reads.

A picture of the real model is 2.85 MiB to read, to check and to copy, while an H200 prefills its prefix in 5 ms
(examples/benchmarks.md). Apart from encoder.py, because it knows nothing of pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from torch import Tensor

NUM_THREADS = 4
MOST_AHEAD = 128  # 365 MiB of the real model: a batch of many questions takes as many pictures at once as it has slots


class Recaller:
    """Reads by `load` what is expected; one thread asks. The threads start with the first that is expected."""

    def __init__(self, load: Callable[[str], Tensor | None], most_ahead: int = MOST_AHEAD) -> None:
        self._load, self._most_ahead = load, most_ahead
        # They end by themselves, as the keeper's thread does: nothing they hold is the engine's.
        self._threads = ThreadPoolExecutor(NUM_THREADS, "recall")
        self._coming: dict[str, Future[Tensor | None]] = {}

    def expect(self, keys: Iterable[str]) -> None:
        """Begin to read the first of `keys`, as many as are read ahead, and forget all that was expected before."""
        before, self._coming = self._coming, {}
        for key in islice(keys, self._most_ahead):
            if key in before:
                self._coming[key] = before.pop(key)
            elif key not in self._coming:
                self._coming[key] = self._threads.submit(self._load, key)
        for forgotten in before.values():
            forgotten.cancel()

    def take(self, key: str) -> Tensor | None:
        """Return what `load` gives for a key; waits where it is being read."""
        coming = self._coming.pop(key, None)
        return coming.result() if coming is not None else self._load(key)
