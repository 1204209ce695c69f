"""Work on several pictures at once, with the results in order: for overlays and reports.

Threads, because Pillow decodes and encodes outside the interpreter's lock and that is most of the work. Bounded: two
pictures a thread are in flight, and of large ones a single one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from threading import Lock
from typing import TypeVar

from md3cli.system import num_cores

MAX_THREADS = 4  # more only hold more pictures: what is not Pillow's work waits for the interpreter's lock
LARGE_PIXELS = 50_000_000  # pictures of this size (150 MB decoded) are opened one at a time

_one_large = Lock()
Given = TypeVar("Given")
Made = TypeVar("Made")


def in_order(work: Callable[[Given], Made], given: Iterable[Given]) -> Iterator[Made]:
    """Yield `work` of each thing given, in order; `given` itself is read in the caller's thread.

    What `work` raises is raised here, and the rest is given up.
    """
    num_threads = min(MAX_THREADS, num_cores())
    todo = iter(given)
    with ThreadPoolExecutor(num_threads) as pool:
        in_flight: list[Future[Made]] = []
        try:
            in_flight += [pool.submit(work, thing) for thing in islice(todo, 2 * num_threads)]
            while in_flight:
                yield in_flight.pop(0).result()
                in_flight += [pool.submit(work, thing) for thing in islice(todo, 1)]
        finally:
            for future in in_flight:
                future.cancel()


def holding(width: int | None, height: int | None) -> AbstractContextManager[object]:
    """Return what to hold while a picture of this size is open."""
    return _one_large if (width or 0) * (height or 0) >= LARGE_PIXELS else nullcontext()
