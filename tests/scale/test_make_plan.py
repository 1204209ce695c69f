"""Waiting for other ranks: never for ever, never without a word, and never by another machine's clock."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from program import Program, make_pictures, records_of
from run_folders import planned, rows_of

from md3cli.scale.attempts import Signs, Teller
from md3cli.scale.folder import PLAN, RunFolder, host_name, open_run_folder
from md3cli.scale.make_plan import (
    NOBODY_PLANS_S,
    PLANNER,
    STANDSTILL_S,
    PlannerMark,
    PlanOvertakenError,
    make_plan,
    wait_for_plan,
)
from md3cli.scale.plan import Plan
from md3cli.scale.run import SILENCE_S, _ScaledRun

ELSEWHERE = {"host": "elsewhere", "pid": 7, "rank": 0, "beat": 0}
NO_PID = 999_999_999


class Waiter:
    """A rank that waits for a plan, with a clock that only its own sleep moves; `events` happen at their time."""

    def __init__(self, folder: RunFolder, rank: int = 1) -> None:
        self.folder, self.rank = folder, rank
        self.now, self.said = 1e6, []  # type: float, list[str]
        self.events: list[Callable[[float], None]] = []

    def wait(self) -> Plan | None:
        self.began = self.now
        return wait_for_plan(self.folder, self.rank, self.said.append, clock=lambda: self.now, sleep=self._sleep)

    @property
    def waited_s(self) -> float:
        return self.now - self.began

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        for event in self.events:
            event(self.waited_s)
        assert self.waited_s < 5000, "it waits for ever"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return open_run_folder(str(tmp_path / "run"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures", 4)


def put_mark(folder: RunFolder, **changes: Any) -> None:
    folder.store.put(PLANNER, json.dumps(ELSEWHERE | changes).encode())


def test_a_planner_elsewhere_that_gives_no_sign_is_given_up(folder: RunFolder) -> None:
    put_mark(folder)
    waiter = Waiter(folder)
    assert waiter.wait() is None
    assert waiter.waited_s == pytest.approx(STANDSTILL_S, abs=0.5)
    assert waiter.said[0].startswith("waiting for rank 0 (on elsewhere, process 7) to make the plan, ")
    assert waiter.said[-1] == (
        "rank 0 (on elsewhere, process 7) does not make the plan any more: no sign of life for 20 s; rank 1 makes it"
    )


@pytest.mark.process
def test_a_planner_that_lives_is_waited_for_with_a_word_now_and_then(folder: RunFolder, pictures: Path) -> None:
    put_mark(folder)
    waiter = Waiter(folder)

    def go_on(waited_s: float) -> None:
        put_mark(folder, beat=int(waited_s / 2))
        if waited_s > 600:
            planned(folder.uri, rows_of(pictures, ["p0.png"]))

    waiter.events.append(go_on)
    plan = waiter.wait()
    assert plan is not None
    assert plan.rows == 1
    assert 15 <= len(waiter.said) <= 22
    assert " to make the plan, 35." in waiter.said[1]


def test_a_planner_whose_process_is_gone_is_not_waited_for(folder: RunFolder) -> None:
    put_mark(folder, host=host_name(), pid=NO_PID)
    waiter = Waiter(folder)
    assert waiter.wait() is None
    assert waiter.waited_s == 0
    assert "its process is gone" in waiter.said[0]


def test_a_planner_whose_process_is_there_is_not_given_up_at_once(folder: RunFolder) -> None:
    put_mark(folder, host=host_name(), pid=os.getpid())
    waiter = Waiter(folder)
    assert waiter.wait() is None
    assert waiter.waited_s >= STANDSTILL_S - 0.5, "but when it stands still, stopped or as another's process"


@pytest.mark.parametrize(
    "mark", [b"", b"{", b"[" * 5000, b"null", b'{"host":"\\u001b[2J","pid":"7"}', b'{"pid":-1,"rank":[]}', b"\xff"]
)
def test_a_mark_that_anybody_wrote_is_waited_for_no_longer(folder: RunFolder, mark: bytes) -> None:
    folder.store.put(PLANNER, mark)
    waiter = Waiter(folder)
    assert waiter.wait() is None
    assert waiter.waited_s == pytest.approx(STANDSTILL_S, abs=0.5)
    assert "\x1b" not in "".join(waiter.said)


def test_nobody_plans(folder: RunFolder) -> None:
    waiter = Waiter(folder)
    assert waiter.wait() is None
    assert waiter.waited_s == pytest.approx(NOBODY_PLANS_S, abs=0.5)
    assert waiter.said == ["waiting for rank 0 to begin"]


@pytest.mark.process
def test_of_many_ranks_one_takes_over_and_the_others_see_it(folder: RunFolder) -> None:
    put_mark(folder)
    first, second = Waiter(folder, rank=1), Waiter(folder, rank=2)
    assert first.wait() is None

    def taken_over(waited_s: float) -> None:
        if waited_s >= first.waited_s + 0.1:
            put_mark(folder, rank=1, beat=int(waited_s))
        if waited_s > 100:
            folder.store.remove(PLANNER)

    second.events.append(taken_over)
    assert second.wait() is None
    assert second.waited_s > 100
    assert any("rank 1 " in words for words in second.said)


def test_the_mark_changes_with_each_beat_and_goes_with_the_planner(folder: RunFolder) -> None:
    seen = set()

    def plan_in_vain() -> None:
        with PlannerMark(folder, 0) as mark:
            for _ in range(4):
                seen.add(folder.store.read(PLANNER))
                mark.beat()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        plan_in_vain()
    assert len(seen) == 4
    assert folder.store.read(PLANNER) is None


def test_a_planner_that_was_only_slow_leaves_the_others_plan_whole(folder: RunFolder, pictures: Path) -> None:
    """Its manifest would be of another plan."""

    def slowly() -> Any:
        yield from rows_of(pictures, ["p0.png"])
        planned(folder.uri, rows_of(pictures, ["p0.png", "p1.png"]))

    with pytest.raises(PlanOvertakenError) as overtaken:
        make_plan(folder, slowly(), (), planned(f"{folder.uri}2", [])[1].identity, {})
    assert overtaken.value.plan.rows == 2
    from md3cli.scale.plan import PlanReader

    assert len(PlanReader(folder).shard(0)) == 2


# -- through the program ------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_goes_on_where_the_planner_was_killed(md3: Program, pictures: Path, tmp_path: Path, rank: int) -> None:
    mark = tmp_path / "o/.md3run" / PLANNER
    mark.parent.mkdir(parents=True)
    mark.write_text(json.dumps({"host": host_name(), "pid": NO_PID, "rank": 0, "beat": 3}))
    done = md3("caption", pictures, "-o", f"{tmp_path}/o/", "--world-size", 2, "--worker-rank", rank)
    assert done.exit_code == 0, done.output
    assert f"(on {host_name()}, process {NO_PID}) does not make the plan any more: its process is gone" in done.stderr
    assert not mark.exists()
    assert (mark.parent.parent / PLAN).exists()
    assert len(records_of(tmp_path / "o/records.jsonl")) == 4


def test_who_is_alone_waits_for_nobody(md3: Program, pictures: Path, tmp_path: Path) -> None:
    mark = tmp_path / "o/.md3run" / PLANNER
    mark.parent.mkdir(parents=True)
    mark.write_text(json.dumps(ELSEWHERE))
    done = md3("caption", pictures, "-o", f"{tmp_path}/o/", "--shard-size", 2)
    assert done.exit_code == 0, done.output
    assert "does not make the plan" not in done.stderr


class Stuck:
    """A run whose queue says what is given; only what `_tell_of_waiting` looks at."""

    num_ok = 0

    def __init__(self, owners: set[str]) -> None:
        self.now, self.said = 0.0, []  # type: float, list[str]
        self.commits: dict[int, Any] = {}
        self.owners, self.num_open, self.is_waiting = owners, 3, bool(owners)
        self._queue, self._num_seen = self, -1
        self._others = Teller(self.said.append, clock=lambda: self.now)
        self._silence = Teller(
            self.said.append, first_after_s=SILENCE_S, interval_s=SILENCE_S, growth=2.0, clock=lambda: self.now
        )

    def look(self) -> None:
        _ScaledRun._tell_of_waiting(self, self.num_ok)  # type: ignore[arg-type]


def test_a_wait_for_other_ranks_shards_is_told() -> None:
    run = Stuck({"elsewhere-\x1b (process 7)"})
    while run.now < 100:
        run.look()
        run.now += 1
    assert len(run.said) == 4
    assert run.said[0] == "waiting for 3 shards that others run, such as elsewhere-\\x1b (process 7)"


def test_a_silence_is_told_more_and_more_seldom() -> None:
    run = Stuck(set())
    while run.now < 3600:
        run.look()
        run.now += 1
    assert len(run.said) == 5
    assert run.said[0].startswith("no new record for 2:00: ")
    run.num_ok = 1
    run.look()
    run.now += SILENCE_S - 1
    run.look()
    assert len(run.said) == 5, "a record has come"


def test_signs_and_tellers() -> None:
    now = 0.0
    signs = Signs(lambda: now)
    assert signs.still_for("a", None) == 0
    now = 5.0
    assert (signs.still_for("a", None), signs.still_for("b", 1)) == (5.0, 0.0)
    assert signs.still_for("a", 2) == 0
    assert time.monotonic() >= Teller(print).waited_s == 0
