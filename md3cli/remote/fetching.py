"""The bytes of one remote picture: limits, patience, retries. For the threads that fetch ahead of the decoder."""

from __future__ import annotations

import threading

from md3cli.records import ImageItem
from md3cli.remote.byte_budget import ByteBudget
from md3cli.remote.failures import FetchError, truncated
from md3cli.remote.options import FetchOptions
from md3cli.remote.patience import Patience
from md3cli.remote.reading import Reader


class Fetcher:
    """Fetches pictures, from any number of threads."""

    def __init__(self, options: FetchOptions, budget: ByteBudget) -> None:
        self._options, self._budget = options, budget
        self._reader = Reader(options)
        self._stopped = threading.Event()

    def fetch(self, item: ImageItem, number: int) -> bytes:
        """The bytes of `item`, taken from the budget under `number`.

        Raises:
            FetchError: as its record says it; what may pass was tried again.
            CancelledError: `close` was called.
        """
        return self._options.retries.run(lambda: self._attempt(item, number), stopped=self._stopped)

    def close(self) -> None:
        """Stop what is under way."""
        self._stopped.set()
        self._reader.close()

    def _attempt(self, item: ImageItem, number: int) -> bytes:
        self._budget.start_over(number)
        patience = Patience(self._options.timeout_s)
        end = None if item.size is None else item.offset + item.size
        pieces: list[bytes] = []
        for piece in self._reader.pieces(item.path, patience, self._options.limit_bytes, start=item.offset, end=end):
            patience.paused(self._budget.take(number, len(piece)))
            pieces.append(piece)
        data = b"".join(pieces)
        if item.size is not None and len(data) < item.size:
            raise truncated(item.size)
        if not data:
            raise FetchError("empty", "the file is empty (0 bytes)")
        return data
