"""One shard to its commit: what earlier attempts left is used, torn ends and racing attempts change nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from program import make_pictures
from run_folders import CAPTION, planned, rows_of, run_all
from stub_engine import StubEngine, StubModel

from md3cli.config import DecodeOptions, ModelOptions
from md3cli.errors import EngineError, InputError
from md3cli.images import cutter
from md3cli.images.parts import KeptImages
from md3cli.records import ImageItem, Request, Task
from md3cli.scale.attempts import (
    STALE_AFTER_S,
    TOUCH_INTERVAL_S,
    AttemptJournal,
    Signs,
    note_death,
    read_history,
    read_journal,
    who_runs,
)
from md3cli.scale.folder import RunFolder, host_name, journal_name, new_attempt
from md3cli.scale.markers import RunOptions, read_commit
from md3cli.scale.plan import Plan
from md3cli.scale.shard_runner import ShardRunner, ShardStopped

NAMES = [f"p{i}.png" for i in range(12)]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = make_pictures(tmp_path / "pictures", 12)
    (folder / "p3.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def run(tmp_path: Path, pictures: Path) -> tuple[RunFolder, Plan]:
    return planned(str(tmp_path / "run"), rows_of(pictures, NAMES), shard_size=12)


def part_of(folder: RunFolder, shard: int = 0) -> bytes:
    commit = read_commit(folder, shard)
    assert commit is not None
    return folder.store.read(commit.part) or b""


def expected(tmp_path: Path, pictures: Path) -> bytes:
    folder, plan = planned(str(tmp_path / "undisturbed"), rows_of(pictures, NAMES), shard_size=12)
    run_all(folder, plan)
    return part_of(folder)


def engine_of(runner: ShardRunner) -> StubEngine:
    engine = runner._model.engine
    assert isinstance(engine, StubEngine)
    return engine


@pytest.mark.process
def test_a_shard_becomes_a_part_and_a_marker(run: tuple[RunFolder, Plan]) -> None:
    folder, plan = run
    with ShardRunner(folder.uri, finder="stub_engine:StubModel") as runner:
        result = runner.run(0)
        assert result.is_ours
        assert (result.commit.rows, result.commit.ok, result.commit.errors) == (12, 11, 1)
        assert result.commit.error_types == {"not_an_image": 1}
        again = runner.run(0)
    assert (again.commit, again.is_ours) == (result.commit, False)
    assert [json.loads(line)["image"] for line in part_of(folder).splitlines()] == NAMES
    assert not folder.wip.names("wip")
    assert min(plan.shard_size, plan.rows) == 12


@pytest.mark.process
def test_a_journal_torn_at_any_byte_is_read_up_to_there(tmp_path: Path, pictures: Path) -> None:
    lines = expected(tmp_path, pictures).splitlines(keepends=True)[:3]
    lines[1] = lines[1].replace(b"a picture", "ein Bild \u00fc\u20ac\U0001f600".encode())
    begin = [json.dumps({"begin": json.loads(line)["id"]}).encode() + b"\n" for line in lines]
    data = b"".join(part for pair in zip(begin, lines, strict=True) for part in pair)
    for cut in range(len(data) + 1):
        content = read_journal(data[:cut])
        num_whole = data[:cut].count(b"\n")
        assert list(content.records.values()) == lines[: num_whole // 2]
        assert len(content.begun) == (num_whole + 1) // 2
    assert len(read_journal(data + b"\0\0\0\n" + lines[0]).records) == 3, "nothing behind damage counts"


@pytest.mark.process
@pytest.mark.parametrize("cut", [0, 1, 350, 1200, 2600])
def test_what_earlier_attempts_finished_is_not_asked_again(
    tmp_path: Path, pictures: Path, run: tuple[RunFolder, Plan], cut: int
) -> None:
    folder, whole = run[0], expected(tmp_path, pictures)
    folder.wip.put(journal_name(0, new_attempt()), whole[:cut])
    with ShardRunner(folder.uri, finder="stub_engine:StubModel") as runner:
        commit = runner.run(0).commit
        assert engine_of(runner).num_answered == 11 - commit.reused + sum(commit.reused_errors.values())
    assert commit.reused == whole[:cut].count(b"\n")
    assert part_of(folder) == whole


@pytest.mark.process
def test_stopping_leaves_what_was_finished(tmp_path: Path, pictures: Path, run: tuple[RunFolder, Plan]) -> None:
    folder, asked = run[0], 0

    def after_two_steps() -> bool:
        nonlocal asked
        asked += 1
        return len(read_history(folder, 0).records) >= 5

    with ShardRunner(folder.uri, finder="stub_engine:StubModel") as runner, pytest.raises(ShardStopped):
        runner.run(0, should_stop=after_two_steps)
    history = read_history(folder, 0)
    assert len(history.records) >= 5
    assert not history.left_open, "a stop in order is nobody's fault"
    run_all(*run)
    assert part_of(folder) == expected(tmp_path, pictures)


def die(folder: RunFolder, record_ids: list[str], status: int | None, *, is_alone: bool = False) -> None:
    """An attempt that was killed with these under way; `status` None: nobody saw it end."""
    journal = AttemptJournal(folder, 0, new_attempt())
    for record_id in record_ids:
        journal.begin(record_id, is_alone=is_alone)
    journal.close()
    if status is not None:
        note_death(folder, 0, journal.attempt, status)


def test_what_was_under_way_is_asked_alone_and_the_culprit_blamed(run: tuple[RunFolder, Plan]) -> None:
    folder = run[0]
    die(folder, ["a", "b"], 139)
    assert read_history(folder, 0).left_open == {"a", "b"}
    assert not read_history(folder, 0).blamed
    die(folder, ["b"], 139, is_alone=True)
    assert read_history(folder, 0).blamed == {"b"}


def test_kills_from_outside_blame_nobody_soon(run: tuple[RunFolder, Plan]) -> None:
    folder = run[0]
    die(folder, ["a", "b"], -9)
    for _ in range(3):
        assert not read_history(folder, 0).blamed
        die(folder, ["a"], None, is_alone=True)
    die(folder, ["a"], -9, is_alone=True)
    assert read_history(folder, 0).blamed == {"a"}


@pytest.mark.process
def test_the_blamed_become_error_records_and_the_others_are_asked(
    tmp_path: Path, pictures: Path, run: tuple[RunFolder, Plan]
) -> None:
    folder, whole = run[0], expected(tmp_path, pictures).splitlines()
    ids = [json.loads(line)["id"] for line in whole]
    die(folder, ids[4:8], 139)
    die(folder, ids[6:7], 139, is_alone=True)
    run_all(*run)
    found = part_of(folder).splitlines()
    assert found[:6] + found[7:] == whole[:6] + whole[7:]
    error = json.loads(found[6])
    assert error["id"] == ids[6]
    assert error["error"] == {
        "type": "model", "message": "the worker process died twice on this request", "retry": True
    }  # fmt: skip


@pytest.mark.process
def test_of_two_attempts_the_first_commit_counts(run: tuple[RunFolder, Plan]) -> None:
    folder = run[0]
    with ShardRunner(folder.uri, finder="stub_engine:StubModel") as slow:
        results = []

        def overtake(ok: int, failed: int) -> None:
            if ok and not results:
                with ShardRunner(folder.uri, finder="stub_engine:StubModel") as fast:
                    results.append(fast.run(0))

        late = slow.run(0, on_progress=overtake)
    assert results[0].is_ours
    assert (late.is_ours, late.commit) == (False, results[0].commit)
    assert len(folder.store.names("parts")) == 1


@pytest.mark.process
def test_many_requests_of_an_image_decode_it_once(tmp_path: Path, pictures: Path) -> None:
    requests = (CAPTION, Request(Task.DETECT, "a"), CAPTION)
    folder, plan = planned(str(tmp_path / "many"), rows_of(pictures, NAMES, requests), requests, 12)
    run_all(folder, plan)
    records = [json.loads(line) for line in part_of(folder).splitlines()]
    assert len({record["id"] for record in records}) == 36
    assert [record["task"] for record in records[:3]] == ["caption", "detect", "caption"]


def test_another_model_is_refused(run: tuple[RunFolder, Plan]) -> None:
    with pytest.raises(EngineError, match="the plan was made for"):
        ShardRunner(run[0].uri, finder=StubModel, options=RunOptions(ModelOptions("other"), DecodeOptions()))


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no plan"):
        ShardRunner(str(tmp_path))


def test_options_come_back_as_they_were() -> None:
    options = RunOptions(ModelOptions(cache_dir=Path("/c"), batch_size=3), DecodeOptions(named_hosts=("a",)))
    assert RunOptions.from_json(json.loads(json.dumps(options.to_json()))) == options


def test_who_is_alive_keeps_its_shard(run: tuple[RunFolder, Plan]) -> None:
    folder, signs = run[0], Signs()
    assert who_runs(folder, 0, host_name(), signs) is None
    folder.wip.put(journal_name(0, f"{host_name()}-999999999-ab"), b"")
    folder.wip.put(journal_name(0, f"{host_name()}-{10**30}-ab"), b"")
    folder.wip.put(journal_name(0, f"adopted-{new_attempt()}"), b"")
    assert who_runs(folder, 0, host_name(), signs) is None, "its process is gone, and records taken over are nobody's"
    folder.wip.put(journal_name(0, "elsewhere-999999999-ab"), b"")
    assert who_runs(folder, 0, host_name(), signs) == "elsewhere (process 999999999)"


@pytest.mark.parametrize("ahead_s", [0, 86_400, -86_400], ids=["right", "a day ahead", "a day behind"])
def test_a_dead_rank_keeps_its_shard_for_a_minute_whatever_its_clock_said(
    run: tuple[RunFolder, Plan], ahead_s: int
) -> None:
    folder, now = run[0], 0.0
    signs, name = Signs(lambda: now), journal_name(0, "elsewhere-1-ab")
    folder.wip.put(name, b"")

    def touch(beat: int) -> None:
        """As the rank does, by its own clock."""
        os.utime(folder.wip.path(name), (0, time.time() + ahead_s + beat))

    for beat in range(30):
        touch(beat)
        assert who_runs(folder, 0, host_name(), signs), "it is alive, whatever its clock says"
        now += TOUCH_INTERVAL_S
    died_at = now - TOUCH_INTERVAL_S
    now = died_at + STALE_AFTER_S - 1
    assert who_runs(folder, 0, host_name(), signs)
    now = died_at + STALE_AFTER_S
    assert who_runs(folder, 0, host_name(), signs) is None


@pytest.mark.process
def test_a_shard_leaves_no_pictures_behind(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[KeptImages[ImageItem]] = []
    monkeypatch.setattr(cutter, "KeptImages", _Noted(kept))
    rows = rows_of(pictures, NAMES, (Request(Task.DETECT, "car"),))
    asked = [replace(row, then=(Request(Task.QUERY, "Why?"),)) for row in rows]
    folder, plan = planned(str(tmp_path / "run"), asked, shard_size=4)
    with ShardRunner(folder.uri, finder="stub_engine:StubModel") as runner:
        for shard in range(plan.shards):
            assert runner.run(shard).commit.children
    assert len(kept) == plan.shards
    assert not any(images.find(row.image) for images in kept for row in rows if row.image is not None)


class _Noted:
    """`KeptImages`, each noted in a list."""

    def __init__(self, kept: list[KeptImages[ImageItem]]) -> None:
        self._kept = kept

    def __getitem__(self, key: object) -> Callable[[int], KeptImages[ImageItem]]:
        return self._new

    def _new(self, limit_bytes: int) -> KeptImages[ImageItem]:
        self._kept.append(KeptImages(limit_bytes))
        return self._kept[-1]
