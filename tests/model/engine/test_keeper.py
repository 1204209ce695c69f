"""What an engine need not wait for is done in order, within a bound, and to the end."""

from __future__ import annotations

import threading

import pytest

from md3cli.model.engine.keeper import Keeper

PATIENCE_S = 30.0


def test_jobs_are_done_in_order_and_flush_waits_for_them() -> None:
    keeper, done, gate = Keeper(), [], threading.Event()

    def job(number: int) -> None:
        assert gate.wait(PATIENCE_S)
        done.append(number)

    for number in range(20):
        keeper.add(lambda number=number: job(number), 1)
    assert done == []
    gate.set()
    keeper.flush()
    assert done == list(range(20))


def test_who_brings_too_much_waits() -> None:
    keeper, gate, done = Keeper(most_bytes=10), threading.Event(), []
    keeper.add(lambda: done.append(gate.wait(PATIENCE_S)), 6)
    keeper.add(lambda: done.append(True), 4)
    threading.Timer(0.1, gate.set).start()
    keeper.add(lambda: done.append(True), 8)
    assert gate.is_set()
    assert len(done) >= 2
    keeper.flush()
    assert done == [True] * 3


def test_a_job_larger_than_the_bound_is_done_alone() -> None:
    keeper, done = Keeper(most_bytes=10), []
    keeper.add(lambda: done.append(1), 100)
    keeper.flush()
    assert done == [1]


def test_an_error_reaches_whoever_flushes() -> None:
    keeper = Keeper()
    keeper.add(lambda: 1 / 0, 1)  # type: ignore[arg-type,return-value]  # gives nothing, for it fails
    with pytest.raises(ZeroDivisionError):
        keeper.flush()
    keeper.flush()


def test_a_keeper_that_is_dropped_leaves_no_thread() -> None:
    keeper, done = Keeper(), []
    keeper.add(lambda: done.append(threading.current_thread()), 1)
    keeper.flush()
    del keeper
    done[0].join(PATIENCE_S)
    assert not done[0].is_alive()
