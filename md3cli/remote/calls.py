"""Coroutines run from ordinary threads, on the one event loop that fsspec keeps for all its stores."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from fsspec.asyn import get_loop

_T = TypeVar("_T")


class Calls:
    """Runs coroutines and can cancel all that are under way, from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: set[Future[Any]] = set()
        self._is_closed = False

    def run(self, coroutine: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        """What `coroutine` returns.

        Raises:
            TimeoutError: it took longer; it is cancelled.
            CancelledError: `close` was called.
        """
        with self._lock:
            if self._is_closed:
                coroutine.close()
                raise CancelledError
            future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, timeout_s), get_loop())
            self._under_way.add(future)
        try:
            return future.result()
        finally:
            future.cancel()  # where a signal ended the wait; else it is done
            with self._lock:
                self._under_way.discard(future)

    def close(self) -> None:
        """Cancel what is under way, and whatever comes."""
        with self._lock:
            self._is_closed = True
            under_way = list(self._under_way)
        for future in under_way:
            future.cancel()
