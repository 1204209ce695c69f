"""Runs of many processes through the program: the same bytes in every form, and from one form to the next."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chaos import wait_until
from marked_processes import MARK, marked_processes
from program import STUB_MD3, Program, clean_environment, make_pictures, records_of
from scale_chaos import UNHURRIED_S, ScaleChaos, forms, run_scale_chaos

from md3cli.errors import ExportError, OutputError
from md3cli.files import atomic_publish
from md3cli.run.run_info import RunCounts, RunDocument
from md3cli.scale.finish import Finish
from md3cli.scale.workers import LocalDriver
from md3cli.signals import StopSignals

THREE = ("--devices", "cpu", "--workers-per-device", "3")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = make_pictures(tmp_path / "pictures", 30)
    (folder / "p4.png").write_bytes(b"no picture")
    return folder


def whole(md3: Program, pictures: Path, out: Path) -> bytes:
    md3("caption", pictures, "-o", out / "whole.jsonl")
    return (out / "whole.jsonl").read_bytes()


def start(folder: Path, *arguments: Any, step_s: float = 0.0, **environment: str) -> subprocess.Popen[str]:
    """The program as a process of its own; its workers find the stub too."""
    settings = clean_environment(folder / "home") | {MARK: f"{os.getpid()}-{folder.name}", **environment}
    command = [
        sys.executable,
        str(STUB_MD3),
        "--step-seconds",
        str(step_s),
        *map(str, arguments),
    ]
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# -- in this process -------------------------------------------------------------------------------


def test_a_run_folder_gives_the_bytes_of_a_single_process(md3: Program, pictures: Path, tmp_path: Path) -> None:
    expected = whole(md3, pictures, tmp_path)
    done = md3("caption", pictures, "-o", f"{tmp_path}/out/", "--engine", "local", "--shard-size", 7, "-f", "coco")
    assert done.exit_code == 3, done.output
    assert (tmp_path / "out/records.jsonl").read_bytes() == expected
    assert len(list((tmp_path / "out/.md3run/commits").iterdir())) == 5
    assert json.loads((tmp_path / "out/run.json").read_bytes())["counts"]["failed"] == 1
    assert len(json.loads((tmp_path / "out/coco.json").read_bytes())["images"]) >= 29
    errors = records_of(tmp_path / "out/.md3run/errors.jsonl")
    assert [record["image"] for record in errors] == ["p4.png"]
    assert md3("verify", tmp_path / "out").exit_code == 0


@pytest.mark.process
def test_ranks_share_out_and_the_last_one_exports(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    asked = ("caption", pictures, "-o", out, "--shard-size", 5, "--world-size", 2)
    first = start(tmp_path, *asked, "--worker-rank", 0, step_s=0.05)
    second = start(tmp_path, *asked, "--worker-rank", 1, step_s=0.05)
    said = [process.communicate(timeout=240)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [3, 3], said
    assert out.read_bytes() == whole(md3, pictures, tmp_path)
    status = json.loads(md3("status", out, "--json").output)
    assert (status["shards_done"], status["exported"]) == (6, True)


def test_a_rank_alone_does_it_all(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    assert md3("caption", pictures, "-o", out, "--world-size", 3, "--shard-size", 4).exit_code == 3
    assert out.read_bytes() == whole(md3, pictures, tmp_path)


def after_running(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object]) -> None:
    """Have something happen to the queue once all shards are run."""
    run = LocalDriver.run

    def run_and_change(driver: LocalDriver, on_step: Callable[[], None]) -> None:
        run(driver, on_step)
        change(driver._queue)

    monkeypatch.setattr(LocalDriver, "run", run_and_change)


def test_a_shard_given_up_here_may_be_finished_by_another_rank(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.jsonl"
    after_running(monkeypatch, lambda queue: queue.given_up.add(0))
    assert md3("caption", pictures, "-o", out, "--engine", "local").exit_code == 3
    assert out.read_bytes() == whole(md3, pictures, tmp_path)


@pytest.mark.process
def test_a_marker_that_is_gone_again_is_told_of(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_running(monkeypatch, lambda queue: queue.commits.pop(2))
    done = md3("caption", pictures, "-o", tmp_path / "o.jsonl", "--engine", "local", "--shard-size", 10)
    assert done.exit_code == 1
    assert "1 of 3 shards are not done, for their markers are gone again" in done.stderr


def test_what_ended_a_run_is_told_not_what_came_of_it(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> Callable[..., None]:
        def raise_it(*_: object) -> None:
            raise error

        return raise_it

    monkeypatch.setattr(Finish, "export", fail(ExportError("the first failure")))
    monkeypatch.setattr(Finish, "note", fail(OutputError("the second")))
    done = md3("caption", pictures, "-o", tmp_path / "o.jsonl", "--engine", "local")
    assert (done.exit_code, "the first failure" in done.stderr, "the second" in done.stderr) == (1, True, False)


def test_a_rank_that_cannot_make_the_lock_of_the_export_says_so(md3: Program, pictures: Path, tmp_path: Path) -> None:
    """It is not taken for another rank's, or nobody would export."""
    out = tmp_path / "o.jsonl"
    Path(f"{out}.md3run/export.lock").mkdir(parents=True)
    done = md3("caption", pictures, "-o", out, "--world-size", 2)
    assert (done.exit_code, "export.lock" in done.stderr) == (1, True), done.output


def test_ranks_write_run_json_one_after_the_other(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends while another notes its end neither removes what that one writes nor reads half of it."""
    out, others = tmp_path / "o.jsonl", []
    publish, finish = atomic_publish, RunDocument.finish

    @contextmanager
    def meet_another(path: Path) -> Iterator[Path]:
        with publish(path) as temp:
            yield temp
            if is_ending and not others:
                others.append(None)
                others.append(md3("caption", pictures, "-o", out, "--world-size", 2, "--worker-rank", 1))

    def note_end(
        document: RunDocument, counts: RunCounts, stages: dict[str, float], status: int | None, *more: Any
    ) -> None:
        is_ending[:] = [status] if status is not None else []
        finish(document, counts, stages, status, *more)

    is_ending: list[int] = []
    monkeypatch.setattr("md3cli.run.run_info.atomic_publish", meet_another)
    monkeypatch.setattr(RunDocument, "finish", note_end)
    done = md3("caption", pictures, "-o", out, "--world-size", 2)
    assert (done.exit_code, others[1].exit_code) == (3, 3), done.output + others[1].output
    assert "another rank exports" in others[1].stderr
    starts = json.loads(Path(f"{out}.run.json").read_bytes())["starts"]
    assert [start["exit_status"] for start in starts] == [3]


def test_a_stray_file_is_no_shard_that_was_begun(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    md3("caption", pictures, "-o", out, "--engine", "local")
    Path(f"{out}.md3run/wip/notes.txt").write_text("mine")
    assert json.loads(md3("status", out, "--json").output)["shards_started"] == 0


def test_names_of_stray_files_do_nothing_to_a_terminal(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    md3("caption", pictures, "-o", out, "--engine", "local")
    Path(f"{out}.md3run/parts/part-00000-\x1b[31m.jsonl").touch()
    found = md3("verify", out)
    assert (found.exit_code, "\x1b" in found.output, "x1b[31m" in found.output) == (1, False, True)


@pytest.mark.process
def test_a_grown_input_is_taken_in_after_the_end(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out, many = tmp_path / "o.jsonl", ("--engine", "local", "--shard-size", 8)
    md3("caption", pictures, "-o", out, *many)
    md3("caption", pictures, "-o", out, *many)
    assert md3.num_answered == 0
    make_pictures(pictures / "later", 3)
    md3("caption", pictures, "-o", out, *many)
    assert md3.num_answered == 3
    assert out.read_bytes() == whole(md3, pictures, tmp_path)
    make_pictures(pictures / "latest", 2)
    md3("caption", pictures, "-o", out)
    assert md3.num_answered == 2, "a plain command goes on from the export"
    assert sorted(out.read_bytes().splitlines()) == sorted(whole(md3, pictures, tmp_path / "again").splitlines())
    assert not Path(f"{out}.md3run").exists(), "what is out of date is gone"


def test_records_that_are_no_longer_asked_for_stay(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    md3("caption", pictures, "-o", out)
    before = out.read_bytes().splitlines()
    for i in range(5):
        (pictures / f"p{i}.png").unlink()
    md3("caption", pictures, "-o", out, "--engine", "local")
    assert md3.num_answered == 0
    assert sorted(out.read_bytes().splitlines()) == sorted(before)


@pytest.mark.parametrize("many", [(), ("--engine", "local")])
def test_failures_are_done_again(md3: Program, pictures: Path, tmp_path: Path, many: tuple[str, ...]) -> None:
    out = tmp_path / "o.jsonl"
    assert md3("caption", pictures, "-o", out, "--engine", "local", "--shard-size", 6).exit_code == 3
    make_pictures(pictures, 5)  # the bad one too
    done = md3("caption", pictures, "-o", out, "--retry-failed", *many)
    assert (done.exit_code, md3.num_answered) == (0, 1), done.output
    assert out.read_bytes() == whole(md3, pictures, tmp_path)
    assert md3("caption", pictures, "-o", out, *many).exit_code == 0


def test_starting_over(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    md3("caption", pictures, "-o", out, "--engine", "local")
    md3("caption", pictures, "-o", out, "--engine", "local", "--overwrite", "--length", "short")
    assert md3.num_answered == 29
    md3("caption", pictures, "-o", out, "--overwrite")
    assert md3.num_answered == 29
    assert not Path(f"{out}.md3run").exists()
    assert out.read_bytes() == whole(md3, pictures, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--length", "short"), "it has caption normal; you now ask caption short"),
        (("--dtype", "bf16"), "dtype auto, now bf16"),
        (("--limit", "5"), "limit none, now 5"),
    ],
)
def test_an_unfinished_run_goes_on_as_it_began_or_not(
    md3: Program, pictures: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "o.jsonl"
    md3("caption", pictures, "-o", out, "--engine", "local")
    Path(f"{out}.md3run/exported.json").unlink()
    refused = md3("caption", pictures, "-o", out, *options)
    assert refused.exit_code == 2
    assert said in refused.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--engine", "local"), "-o"),
        (("-o", "x", "--worker-rank", "2", "--world-size", "2"), "count from 0"),
        (("-o", "x", "--overwrite", "--world-size", "2"), "one process"),
        (("-o", "x", "--engine", "ray", "--devices", "cpu"), "ray"),
        (("-o", "x", "--devices", "gpu"), "no device"),
        (("-o", "x", "--devices", "cpu,cpu"), "twice"),
    ],
)
def test_options_that_make_no_sense(md3: Program, pictures: Path, options: tuple[str, ...], said: str) -> None:
    refused = md3("caption", pictures, *options)
    assert refused.exit_code == 2
    assert said in refused.stderr


def test_damage_is_found_and_done_again(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    run = Path(f"{out}.md3run")
    md3("caption", pictures, "-o", out, "--engine", "local", "--shard-size", 10)
    expected = out.read_bytes()
    part = sorted((run / "parts").iterdir())[1]
    part.write_bytes(part.read_bytes().replace(b"stop", b"step", 1))
    (run / "parts/part-00000-lost-1-a.jsonl").write_bytes(b"")
    found = md3("verify", out)
    assert found.exit_code == 1
    assert "shard 1" in found.output
    assert "belong to nothing" in found.output
    cleaned = md3("runs", "gc", out, "--damaged", "--older-than", 0)
    assert "2 files removed, 1 shards" in cleaned.output
    assert md3("verify", out).exit_code == 1
    md3("caption", pictures, "-o", out)
    assert md3.num_answered == 10
    assert out.read_bytes() == expected
    assert md3("verify", out).exit_code == 0
    out.write_bytes(expected[:-1])
    assert md3("verify", out).exit_code == 1


@pytest.mark.process
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [*lines[:3], *lines[4:]], "does not have each request once: 1 missing"),
        (lambda lines: [*lines[:4], *lines[3:]], "does not have each request once: 1 there twice"),
        (lambda lines: [*lines[:3], lines[2], *lines[4:]], "1 missing, 1 there twice"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "does not have its requests in order"),
        (lambda lines: [lines[0].replace(b'"id":"', b'"id":"f'), *lines[1:]], "1 missing, 1 of another run"),
        (lambda lines: [b"no record\n", *lines], "has lines that are no records"),
    ],
)
def test_records_that_are_not_the_planned_ones_are_found(
    md3: Program, pictures: Path, tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], said: str
) -> None:
    """Even where the marker agrees with its part, as that of a wrong program would."""
    out = tmp_path / "o.jsonl"
    run = Path(f"{out}.md3run")
    md3("caption", pictures, "-o", out, "--engine", "local", "--shard-size", 10)
    expected = out.read_bytes()
    marker = run / "commits/00001.json"
    commit = json.loads(marker.read_bytes())
    data = b"".join(change((run / commit["part"]).read_bytes().splitlines(keepends=True)))
    (run / commit["part"]).write_bytes(data)
    marker.write_text(json.dumps(commit | {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}))
    found = md3("verify", out)
    assert found.exit_code == 1
    assert f"shard 1: {commit['part']} " in found.output
    assert said in found.output
    assert "1 shards to be done again" in md3("runs", "gc", out, "--damaged").output
    md3("caption", pictures, "-o", out)
    assert md3.num_answered == 10
    assert out.read_bytes() == expected
    assert md3("verify", out).exit_code == 0


@pytest.mark.process
def test_a_changed_byte_anywhere_is_found(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    run = Path(f"{out}.md3run")
    md3("caption", pictures, "-o", out, "--engine", "local", "--shard-size", 10)
    for path in (out, *sorted((run / "parts").iterdir())):
        data = path.read_bytes()
        for at in range(0, len(data), 997):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert md3("verify", out).exit_code == 1, (path, at)
        path.write_bytes(data)
    assert md3("verify", out).exit_code == 0


@pytest.mark.process
def test_a_foreign_marker_is_found_and_does_no_harm(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "o.jsonl", tmp_path / "other.jsonl"
    many = ("--engine", "local", "--shard-size")
    md3("caption", pictures, "-o", out, *many, 10)
    expected = out.read_bytes()
    md3("query", pictures, "what?", "-o", other, *many, 2)
    run, foreign = Path(f"{out}.md3run"), Path(f"{other}.md3run")
    for number in ("00001", "00009"):  # one in the place of ours, one of no shard at all
        commit = json.loads((foreign / f"commits/{number}.json").read_bytes())
        (run / commit["part"]).write_bytes((foreign / commit["part"]).read_bytes())
        (run / f"commits/{number}.json").write_text(json.dumps(commit))
    found = md3("verify", out)
    assert found.exit_code == 1
    assert "10 missing, 2 of another run" in found.output
    assert "shard 9: the plan has no such shard" in found.output
    assert json.loads(md3("status", out, "--json").output)["shards_done"] == 3
    assert "2 shards to be done again" in md3("runs", "gc", out, "--damaged", "--older-than", 0).output
    md3("caption", pictures, "-o", out)
    assert out.read_bytes() == expected
    assert md3("verify", out).exit_code == 0


def test_there_is_no_run_folder(md3: Program, tmp_path: Path) -> None:
    missing = {("status",): "no run at", ("verify",): "no records at", ("runs", "gc"): "no run folder at"}
    for command, said in missing.items():
        refused = md3(*command, tmp_path)
        assert refused.exit_code == 1
        assert said in refused.stderr
        assert "give " in refused.stderr


# -- worker processes ------------------------------------------------------------------------------


@pytest.mark.process
def test_worker_processes_give_the_same_bytes(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    process = start(tmp_path, "caption", pictures, "-o", out, *THREE, "--shard-size", 3, step_s=1.0)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 3, said
    assert "/s)" in said
    assert out.read_bytes() == whole(md3, pictures, tmp_path)
    attempts = {json.loads(path.read_bytes())["attempt"] for path in Path(f"{out}.md3run/commits").iterdir()}
    assert len({attempt.split("-")[-2] for attempt in attempts}) > 1, "one process did it all"


@pytest.mark.process
def test_a_deadly_request_costs_itself_alone(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    asked = ("detect", pictures, "a", "deadly", "-o", out, "--devices", "cpu", "--limit", 2)
    process = start(tmp_path, *asked, STUB_DEADLY="deadly")
    _, said = process.communicate(timeout=240)
    assert process.returncode == 3, said
    assert "status 139" in said
    found = [(record["prompt"], (record["error"] or {}).get("type")) for record in records_of(out)]
    assert found == [("a", None), ("deadly", "model")] * 2


@pytest.mark.process
def test_ctrl_c_stops_in_order_and_a_plain_command_goes_on(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    process = start(tmp_path, "caption", pictures, "-o", out, *THREE, "--shard-size", 5, step_s=1.5)
    wip = Path(f"{out}.md3run/wip")
    wait_until(lambda: any(path.stat().st_size for path in wip.glob("*.jsonl")), "no records came")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 130, said
    assert "resume with: md3 caption" in said
    assert not marked_processes(f"{os.getpid()}-{tmp_path.name}")
    md3("caption", pictures, "-o", out)
    assert 0 < md3.num_answered < 29
    assert out.read_bytes() == whole(md3, pictures, tmp_path)


@pytest.mark.process
def test_a_second_ctrl_c_and_a_killed_supervisor_leave_nobody(pictures: Path, tmp_path: Path) -> None:
    for kinds in ((signal.SIGINT, signal.SIGINT), (signal.SIGKILL,)):
        out = tmp_path / f"{len(kinds)}.jsonl"
        process = start(tmp_path, "caption", pictures, "-o", out, *THREE, step_s=600.0)
        wait_until(lambda wip=Path(f"{out}.md3run/wip"): any(wip.glob("*.jsonl")), "no shard was begun")
        for kind in kinds:
            process.send_signal(kind)
            time.sleep(0.2)
        assert process.wait(240) in (130, -signal.SIGKILL), "a step was waited for"
        mark = f"{os.getpid()}-{tmp_path.name}"
        wait_until(lambda mark=mark: not marked_processes(mark), "workers outlive the run")


@pytest.mark.process
def test_a_second_run_on_an_output_is_refused(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    process = start(tmp_path, "caption", pictures, "-o", out, "--engine", "local", step_s=600.0)
    wait_until(lambda: any(Path(f"{out}.md3run").glob("wip/*.jsonl")), "no shard was begun")
    second = start(tmp_path, "caption", pictures, "-o", out, "--world-size", 2)
    _, said = second.communicate(timeout=240)
    process.kill()
    process.communicate()
    assert second.returncode == 1
    assert f"process {process.pid}" in said


@pytest.mark.process
def test_kills_in_every_form(tmp_path: Path) -> None:
    chaos = ScaleChaos(tmp_path, num_rows=400, shard_size=40, forms=("one", "three", "ranks", "one"))
    run_scale_chaos(chaos, 6)


@pytest.mark.process
def test_kills_while_children_are_asked(tmp_path: Path) -> None:
    forms = ("one", "three", "ranks")
    run_scale_chaos(ScaleChaos(tmp_path, num_rows=60, shard_size=10, forms=forms, has_children=True), 3)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("form", sorted({*forms()} - {"ranks"}))
def test_100_kills_while_children_are_asked(tmp_path: Path, form: str) -> None:
    run_scale_chaos(ScaleChaos(tmp_path, num_rows=3000, step_s=UNHURRIED_S, forms=(form,), has_children=True), 100)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_200_kills_in_every_form(tmp_path: Path) -> None:
    run_scale_chaos(ScaleChaos(tmp_path, step_s=UNHURRIED_S), 200)


def test_what_killed_writers_left_is_removed(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out, asked = tmp_path / "o", ("-f", "coco", "-f", "csv", "--shard-size", 10)
    md3("caption", pictures, "-o", f"{out}/", *asked)
    names = [".coco.json.tmp-1", ".records.csv.tmp-22", ".records.jsonl.tmp-3", ".run.json.tmp-4"]
    names += [
        ".md3run/.exported.json.tmp-5",
        ".md3run/parts/.part-00000-x.jsonl.tmp-6",
        ".md3run/plan/.plan.json.tmp-7",
    ]
    kept = [".mine.tmp-8", "notes.tmp-9", ".coco.json.tmp-x", ".md3run/notes.tmp-1"]
    for name in (*names, *kept):
        (out / name).write_text("half")
    assert md3("caption", pictures, "-o", f"{out}/", *asked).exit_code == 3
    assert [name for name in names if (out / name).exists()] == []
    assert [name for name in kept if not (out / name).exists()] == []


def test_what_breaks_once_a_signal_has_come_is_the_stop(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a cluster that ends with the same signal."""
    stops: list[StopSignals] = []

    class Stop(StopSignals):
        def __enter__(self) -> StopSignals:
            stops.append(self)
            return self

    def break_off(*_: object) -> None:
        stops[-1].received = signal.SIGTERM
        raise RuntimeError("the cluster is gone")

    monkeypatch.setattr("md3cli.scale.run.StopSignals", Stop)
    monkeypatch.setattr(LocalDriver, "run", break_off)
    stopped = md3("caption", pictures, "-o", tmp_path / "o.jsonl", "--engine", "local")
    assert stopped.exit_code == 128 + signal.SIGTERM
    assert "warning: while stopping: the cluster is gone" in stopped.stderr
    assert "stopped by SIGTERM" in stopped.stderr
    assert "resume with: " in stopped.stderr


@pytest.mark.parametrize("many", [(), ("--shard-size", "4")], ids=["one process", "a run folder"])
def test_an_output_that_cannot_be_there_is_told_in_words(
    md3: Program, pictures: Path, tmp_path: Path, many: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("mine")
    refused = md3("caption", pictures, "-o", tmp_path / "file/deep/o.jsonl", *many)
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"error: cannot write {tmp_path}/file/deep")
