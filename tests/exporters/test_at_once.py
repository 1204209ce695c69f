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
    both = threading.Barrier(2, timeout=20)

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
