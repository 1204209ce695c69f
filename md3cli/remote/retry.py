"""What to do when a fetch fails: the words for its record, whether to try again, and how long to wait.

Exceptions come in all the shapes that aiohttp, s3fs, gcsfs and huggingface_hub give them. Their texts are never passed
on, because they quote addresses with whatever signs them. `ByteBudget` bounds the bytes that are under way.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TypeVar

from md3cli.errors import ImageError, MissingExtraError

_ABSENT = {404, 410}
_FORBIDDEN = {401, 403, 407}
_BUSY = {408, 421, 423, 425, 429}  # and all from 500 on
RANGE_NOT_SATISFIABLE = 416
_TELLING = set(errno.errorcode) - {errno.EIO}  # s3fs says EIO for all that it does not know


class FetchError(ImageError):
    """One attempt to fetch failed: an ImageError that knows whether to try again.

    `wait_s` is what the server asked to be left alone for.
    """

    def __init__(self, type: str, message: str, *, may_pass: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(type, message)
        self.may_pass = may_pass
        self.wait_s = wait_s


class RangeError(FetchError):
    """There is nothing at the offset asked for: the file ends before it, or is empty."""

    def __init__(self) -> None:
        super().__init__("empty", "the file is empty (0 bytes)")


def truncated(expected: int | None = None) -> FetchError:
    """Return the failure of a body that ended too early."""
    size = f"all {expected:,} bytes" if expected is not None else "the end of the file"
    return FetchError("io", f"the connection ended before {size} came", may_pass=True)


def of_status(status: int, retry_after: str = "") -> FetchError:
    """Return the failure that an HTTP status means."""
    said = f"the server answered {status}"
    if status in _ABSENT:
        return FetchError("not_found", said)
    if status in _FORBIDDEN:
        return FetchError("permission", said)
    if status == RANGE_NOT_SATISFIABLE:
        return RangeError()
    wait_s = float(retry_after) if retry_after.isdecimal() else 0.0
    return FetchError("io", said, may_pass=status in _BUSY or status >= 500, wait_s=wait_s)


def of_exception(error: BaseException) -> FetchError:
    """Return the failure that a store's or aiohttp's exception means."""
    if isinstance(error, FetchError):
        return error
    for cause in _chain(error):
        if isinstance(cause, FetchError):
            return cause
        status = _status_of(cause)
        if status is not None and status >= 300:
            return of_status(status)
    if isinstance(error, FileNotFoundError | IsADirectoryError):
        return FetchError("not_found", "there is no such file")
    if isinstance(error, PermissionError) or type(error).__name__ in ("NoCredentialsError", "RefreshError"):
        return FetchError("permission", f"not allowed: {type(error).__name__}")
    if isinstance(error, TimeoutError):
        return FetchError("timeout", "no answer in time (--fetch-timeout)", may_pass=True)
    reason = type(error).__name__
    if isinstance(error, OSError) and error.errno is not None and error.errno in _TELLING:
        reason = os.strerror(error.errno)
    return FetchError("io", f"cannot fetch: {reason}", may_pass=True)


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an exception and what it was raised from, the outermost first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = getattr(error, "os_error", None) or error.__cause__
    return chain


def _status_of(error: BaseException) -> int | None:
    """Return the HTTP status inside an exception of botocore, gcsfs, aiohttp or huggingface_hub."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None) or getattr(error, "status", None) or getattr(error, "code", None)
    try:
        return int(found) if found is not None else None
    except (TypeError, ValueError):
        return None


SLOWEST_BYTES_PER_S = 1 << 16  # what a large file must come with once its first seconds are over
_T = TypeVar("_T")


class Patience:
    """The time that one attempt has: `timeout_s`, and a second more for every 64 KiB that came.

    So a file of any size may be fetched, and a server that sends a byte now and then is given up.
    """

    def __init__(self, timeout_s: float) -> None:
        self._ends_at = time.monotonic() + timeout_s
        self._num_bytes = 0

    def left_s(self) -> float:
        """Return the seconds that are left.

        Raises:
            FetchError: none are.
        """
        left = self._ends_at - time.monotonic()
        if left <= 0:
            told = f"not fetched in time; {self._num_bytes:,} bytes came (--fetch-timeout)"
            raise FetchError("timeout", told, may_pass=True)
        return left

    def came(self, num_bytes: int) -> None:
        """Note that so many bytes came, which earn more time."""
        self._num_bytes += num_bytes
        self._ends_at += num_bytes / SLOWEST_BYTES_PER_S

    def paused(self, seconds: float) -> None:
        """Note a delay of our own, which costs the attempt nothing."""
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
        """Call `attempt` until it succeeds, and return what it returns.

        Raises:
            FetchError: a failure that will not pass, or the one of the last try.
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


class ByteBudget:
    """A bound in bytes for threads that each load one picture; whoever would take too many waits.

    The oldest picture never waits, so that there is always one that can be finished: the size of one picture may
    come on top of the bound.
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
        """Return the number of a new picture."""
        with self._changed:
            self._next_number += 1
            self._taken[self._next_number] = 0
            return self._next_number

    def take(self, number: int, num_bytes: int) -> float:
        """Take so many bytes more for a picture, and return the seconds that this had to wait.

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
        """Give back what a picture took, because it is fetched once more."""
        with self._changed:
            self._num_taken -= self._taken[number]
            self._taken[number] = 0
            self._changed.notify_all()

    def give_back(self, number: int) -> None:
        """Give back what a picture took, because it is decoded or has failed."""
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
