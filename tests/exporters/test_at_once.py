"""Work at once: results in order, a bounded number in flight, errors where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from md3cli.exporters.at_once import LARGE_PIXELS, MAX_THREADS, holding, in_order


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("md3cli.exporters.at_once.num_cores", lambda: 16)


def test_results_come_in_order_and_several_work() -> None:
    both = threading.Barrier(2, timeout=60)

    def work(number: int) -> int:
        if number < 2:
            both.wait()  # passes only where two work at the same time
        time.sleep(0.002 * (number % 3))
        return number

    assert list(in_order(work, range(50))) == list(range(50))


def test_few_are_in_flight() -> None:
    taken = []

    def given() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    for number in in_order(lambda number: number, given()):
        assert len(taken) <= number + 2 * MAX_THREADS + 1
    assert len(taken) == 100


def test_an_error_ends_it() -> None:
    done = []

    def work(number: int) -> int:
        done.append(number)
        if number == 3:
            raise ValueError("three")
        return number

    results = in_order(work, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert len(done) <= 3 + 2 * MAX_THREADS


def test_large_pictures_are_held_one_at_a_time() -> None:
    large = holding(LARGE_PIXELS, 1)
    assert large is holding(1, LARGE_PIXELS)
    assert holding(640, 480) is not large
    assert holding(None, None) is not large


def test_nothing_is_worked_on_after_a_signal_that_came_while_a_thread_was_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, has_begun, has_ended = threading.Thread.start, threading.Event(), threading.Event()

    def start_and_raise(thread: threading.Thread) -> None:
        start(thread)
        has_begun.wait(60)
        raise KeyboardInterrupt

    def work(number: int) -> None:
        has_begun.set()
        time.sleep(0.3)
        has_ended.set()

    monkeypatch.setattr(threading.Thread, "start", start_and_raise)
    with pytest.raises(KeyboardInterrupt):
        next(in_order(work, [1]))
    assert has_ended.is_set()
