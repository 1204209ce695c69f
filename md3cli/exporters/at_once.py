"""Work on several pictures at once, with the results in order: for all that draws or copies pictures.

Threads, because Pillow decodes and encodes outside the interpreter's lock and that is most of the work. Bounded: two
pictures a thread are in flight, and of large ones a single one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from threading import Lock, Thread, current_thread
from typing import TypeVar

from md3cli.system import num_cores

MAX_THREADS = 8  # more only hold more pictures: what is not Pillow's work waits for the interpreter's lock
LARGE_PIXELS = 50_000_000  # pictures of this size (150 MB decoded) are opened one at a time

_one_large = Lock()
Given = TypeVar("Given")
Made = TypeVar("Made")


def in_order(
    work: Callable[[Given], Made], given: Iterable[Given], *, is_quick: Callable[[Given], bool] = lambda thing: False
) -> Iterator[Made]:
    """Yield `work` of each thing given, in order; `given` itself is read in the caller's thread.

    What `is_quick` is worked on in that thread, too: another one costs more than a small thing is worth. What `work`
    raises is raised here, and the rest is given up. At the end nothing is worked on any more, whatever ended it.
    """
    num_threads = min(MAX_THREADS, num_cores())
    todo = iter(given)
    threads: list[Thread] = []

    def begun(thing: Given) -> Future[Made] | Made:
        return work(thing) if is_quick(thing) else pool.submit(work, thing)

    pool = ThreadPoolExecutor(num_threads, initializer=lambda: threads.append(current_thread()))
    try:
        in_flight = deque(map(begun, islice(todo, 2 * num_threads)))
        while in_flight:
            first = in_flight.popleft()
            yield first.result() if isinstance(first, Future) else first
            in_flight.extend(map(begun, islice(todo, 1)))
    finally:
        pool.shutdown(cancel_futures=True)
        for thread in threads:  # the pool does not know the one that it was starting when a signal raised
            thread.join()


def holding(width: int | None, height: int | None) -> AbstractContextManager[object]:
    """Return what to hold while a picture of this size is open."""
    return _one_large if (width or 0) * (height or 0) >= LARGE_PIXELS else nullcontext()
