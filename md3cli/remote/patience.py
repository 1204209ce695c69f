"""How long to wait, and how often to try again."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TypeVar

from md3cli.errors import MissingExtraError
from md3cli.remote.failures import FetchError, of_exception, too_slow

SLOWEST_BYTES_PER_S = 1 << 16  # what a large file must come with once its first seconds are over
_T = TypeVar("_T")


class Patience:
    """The time that one attempt has: `timeout_s`, and a second more for every 64 KiB that came.

    A file of any size may thus be fetched, and a server that sends a byte now and then is given up.
    """

    def __init__(self, timeout_s: float) -> None:
        self._ends_at = time.monotonic() + timeout_s
        self._num_bytes = 0

    def left_s(self) -> float:
        """Seconds left.

        Raises:
            FetchError: none is.
        """
        left = self._ends_at - time.monotonic()
        if left <= 0:
            raise too_slow(self._num_bytes)
        return left

    def came(self, num_bytes: int) -> None:
        """Note that so many bytes came."""
        self._num_bytes += num_bytes
        self._ends_at += num_bytes / SLOWEST_BYTES_PER_S

    def paused(self, seconds: float) -> None:
        """Note that the delay was ours."""
        self._ends_at += seconds


@dataclass(frozen=True, slots=True)
class Retries:
    """Exponential back-off with full jitter (AWS Architecture Blog, 2015): many clients do not come back at once.

    Before try k (from 1) a wait of up to `first_wait_s` * 2^(k-1), at most `longest_wait_s`, or what the server
    asks for. No new try once `total_s` have passed since the first.
    """

    num_tries: int = 4
    first_wait_s: float = 0.5
    longest_wait_s: float = 20.0
    total_s: float = 90.0

    def run(self, attempt: Callable[[], _T], *, stopped: threading.Event | None = None) -> _T:
        """What `attempt` returns in the end.

        Raises:
            FetchError: the last failure, in all its tries or one that will not pass.
        """
        started = time.monotonic()
        for num_failed in range(1, self.num_tries + 1):
            try:
                return attempt()
            except (CancelledError, MissingExtraError):
                raise
            except Exception as error:  # foreign libraries raise whatever they like
                failure = of_exception(error)
                wait_s = self._wait_s(num_failed, failure)
                is_late = time.monotonic() + wait_s - started > self.total_s
                if not failure.may_pass or num_failed == self.num_tries or is_late:
                    raise failure from error
            if stopped is None:
                time.sleep(wait_s)
            elif stopped.wait(wait_s):
                break
        raise FetchError("io", "stopped")

    def _wait_s(self, num_failed: int, failure: FetchError) -> float:
        most = min(self.longest_wait_s, self.first_wait_s * 2 ** (num_failed - 1))
        return max(min(failure.wait_s, self.longest_wait_s), random.uniform(0, most))
