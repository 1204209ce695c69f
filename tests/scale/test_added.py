"""Runs of many processes that grow: a plan beside the first, the same bytes as of a run that asked all at once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from chaos import wait_until
from forked import Forks
from marked_processes import MARK, marked_processes
from program import STUB_MD3, Program, clean_environment, make_pictures, records_of

from md3cli.records import ImageItem, Request, RowFailure, SourceRow, Task
from md3cli.scale.added import RowsDifferError, added_rows, merged
from md3cli.scale.folder import open_run_folder
from md3cli.scale.plan import read_plan
from md3cli.scale.workers import ShardQueue

MANY = ("--engine", "local", "--shard-size", 4)
NUM_PICTURES = 10


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = make_pictures(tmp_path / "pictures", NUM_PICTURES)
    (folder / "p4.png").write_bytes(b"no picture")
    return folder


def run_of(out: Path) -> Path:
    return Path(f"{out}.md3run")


@pytest.fixture
def begun(md3: Program, pictures: Path, tmp_path: Path) -> Callable[..., Path]:
    """A run of `detect b a` that is finished but for the last `num_left` shards."""

    def begin(num_left: int = 0, source: Path = pictures, out: Path = tmp_path / "o.jsonl") -> Path:
        assert md3("detect", source, "b", "a", "-o", out, *MANY).exit_code == 3
        if num_left:
            (run_of(out) / "exported.json").unlink()
            out.unlink()
            for shard in range(3 - num_left, 3):
                commit = run_of(out) / f"commits/{shard:05d}.json"
                (run_of(out) / json.loads(commit.read_bytes())["part"]).unlink()
                commit.unlink()
        return out

    return begin


def whole(md3: Program, source: Path, folder: Path, *prompts: str) -> bytes:
    md3("detect", source, *prompts, "-o", folder / "whole.jsonl", "--overwrite")
    return (folder / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("num_left", [0, 1, 3])
@pytest.mark.parametrize("words", [("c",), ("c", "b", "a"), ("b", "a", "c")])
def test_what_is_added_is_a_second_plan(
    md3: Program, pictures: Path, tmp_path: Path, begun: Callable[..., Path], words: tuple[str, ...], num_left: int
) -> None:
    out = begun(num_left)
    first = (run_of(out) / "plan/plan.json").read_bytes()
    done = md3("detect", pictures, *words, "-o", out, "--add", *MANY)
    assert done.exit_code == 3, done.output
    assert md3.num_answered == NUM_PICTURES - 1 + [0, 4, 0, 18][num_left]
    assert (run_of(out) / "plan/plan.json").read_bytes() == first, "the first plan stays"
    added = json.loads((run_of(out) / "plan/added-1.json").read_bytes())
    assert [request["prompt"] for request in added["config"]["identity"]["requests"]] == ["c"]
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "b", "a", "c")
    assert md3("verify", out).exit_code == 0
    asked = [r["prompt"] for r in json.loads(Path(f"{out}.run.json").read_bytes())["identity"]["requests"]]
    assert asked == ["b", "a", "c"]
    status = json.loads(md3("status", out, "--json").output)
    assert (status["shards"], status["shards_done"], status["rows"], status["rows_done"]) == (6, 6, 10, 10)
    for again in (
        ("detect", pictures, "b", "a", "c", "-o", out, *MANY),
        ("detect", pictures, *words, "-o", out, "--add"),
    ):
        assert md3(*again).exit_code == 3
        assert md3.num_answered == 0
    assert len(list((run_of(out) / "plan").iterdir())) == 4


def test_it_grows_again_and_again(md3: Program, pictures: Path, tmp_path: Path, begun: Callable[..., Path]) -> None:
    out = begun()
    for words in (("c",), ("d", "c"), ("e",)):
        assert md3("detect", pictures, *words, "-o", out, "--add", *MANY).exit_code == 3
        assert md3.num_answered == NUM_PICTURES - 1
    assert out.read_bytes() == whole(md3, pictures, tmp_path, *"bacde")
    plan = read_plan(open_run_folder(str(run_of(out))))
    assert plan is not None
    assert (len(plan.parts), plan.shards, plan.shards_of_rows, plan.requests) == (4, 12, 3, 50)
    assert md3("verify", out).exit_code == 0


def test_other_tasks_join_and_documents_are_made_of_all(md3: Program, pictures: Path, tmp_path: Path) -> None:
    md3("detect", pictures, "a", "-o", "run/", "-f", "csv", *MANY)
    assert md3("caption", pictures, "-o", "run/", "-f", "csv", "--add", *MANY).exit_code == 3
    md3("run", pictures, "--task", "detect:a", "--task", "caption", "-o", "whole/", "-f", "csv")
    assert Path("run/records.jsonl").read_bytes() == Path("whole/records.jsonl").read_bytes()
    assert Path("run/records.csv").read_bytes() == Path("whole/records.csv").read_bytes()


def test_from_one_process_to_many_and_back(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    md3("detect", pictures, "a", "-o", out)
    assert md3("detect", pictures, "b", "-o", out, "--add", *MANY).exit_code == 3
    assert md3.num_answered == NUM_PICTURES - 1, "what one process did is taken over"
    assert md3("detect", pictures, "c", "-o", out, "--add").exit_code == 3
    assert not run_of(out).exists()
    assert md3("detect", pictures, "d", "-o", out, "--add", *MANY).exit_code == 3
    assert md3.num_answered == NUM_PICTURES - 1
    assert out.read_bytes() == whole(md3, pictures, tmp_path, *"abcd")


def test_a_plain_start_adds_to_a_run_folder_that_is_not_finished(
    md3: Program, pictures: Path, tmp_path: Path, begun: Callable[..., Path]
) -> None:
    out = begun(1)
    assert md3("detect", pictures, "c", "-o", out, "--add").exit_code == 3
    assert (run_of(out) / "plan/added-1.json").exists()
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "b", "a", "c")


@pytest.mark.parametrize("num_left", [0, 1])
def test_ranks_add_too(md3: Program, pictures: Path, tmp_path: Path, begun: Callable[..., Path], num_left: int) -> None:
    out = begun(num_left)
    asked = ("detect", pictures, "c", "-o", out, "--add", "--world-size", 2)
    assert md3(*asked).exit_code == 3
    assert md3(*asked, "--worker-rank", 1).exit_code == 3
    assert md3.num_answered == 0
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "b", "a", "c")
    document = json.loads(Path(f"{out}.run.json").read_bytes())
    assert [request["prompt"] for request in document["identity"]["requests"]] == ["b", "a", "c"]
    assert md3("detect", pictures, "b", "a", "c", "-o", out, "--world-size", 2).exit_code == 3


def test_run_json_knows_before_the_first_record_of_a_rank(
    md3: Program, pictures: Path, begun: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = begun(), []
    take = ShardQueue.take

    def look_and_take(queue: ShardQueue) -> int | None:
        seen.append(len(json.loads(Path(f"{out}.run.json").read_bytes())["identity"]["requests"]))
        return take(queue)

    monkeypatch.setattr(ShardQueue, "take", look_and_take)
    md3("detect", pictures, "c", "-o", out, "--add", "--world-size", 2)
    assert set(seen) == {3}


def test_the_whole_union_finishes_what_add_has_begun(
    md3: Program, pictures: Path, tmp_path: Path, begun: Callable[..., Path]
) -> None:
    """Killed behind run.json and before the second plan."""
    out = begun(1)
    path = Path(f"{out}.run.json")
    document = json.loads(path.read_bytes())
    requests = document["identity"]["requests"]
    requests.append({**requests[0], "prompt": "c"})
    path.write_text(json.dumps(document))
    assert md3("detect", pictures, "b", "a", "c", "-o", out, *MANY).exit_code == 3
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "b", "a", "c")


def test_failures_are_done_again_while_it_grows(
    md3: Program, pictures: Path, tmp_path: Path, begun: Callable[..., Path]
) -> None:
    out = begun()
    make_pictures(pictures, 5)  # the bad one too
    assert md3("detect", pictures, "c", "-o", out, "--add", "--retry-failed", *MANY).exit_code == 0
    assert md3.num_answered == NUM_PICTURES + 2
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "b", "a", "c")


@pytest.mark.parametrize("form", [MANY, (), ("--world-size", 2)])
def test_names_that_were_given_stay(md3: Program, pictures: Path, tmp_path: Path, form: tuple[str, ...]) -> None:
    out = tmp_path / "o.jsonl"
    md3("detect", pictures, "mark=circle", "-o", out, *MANY)
    (run_of(out) / "exported.json").unlink()
    commit = run_of(out) / "commits/00001.json"
    (run_of(out) / json.loads(commit.read_bytes())["part"]).unlink()
    commit.unlink()
    Path(f"{out}.run.json").unlink()  # ranks have none until they export
    assert md3("detect", pictures, "star", "-o", out, "--add", *form).exit_code == 3
    found = {(r["prompt"], r["objects"][0]["label"]) for r in records_of(out) if r["error"] is None}
    assert found == {("circle", "mark"), ("star", "star")}


# -- what INPUT has become -------------------------------------------------------------------------------


def test_a_finished_run_takes_new_pictures_in_as_well(
    md3: Program, pictures: Path, tmp_path: Path, begun: Callable[..., Path]
) -> None:
    out = begun()
    make_pictures(pictures / "later", 2)
    assert md3("detect", pictures, "c", "-o", out, "--add", *MANY).exit_code == 3
    assert md3.num_answered == NUM_PICTURES - 1 + 6
    assert not (run_of(out) / "plan/added-1.json").exists(), "one plan of all"
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "b", "a", "c")


def test_a_run_that_has_grown_takes_new_pictures_in(
    md3: Program, pictures: Path, tmp_path: Path, begun: Callable[..., Path]
) -> None:
    out = begun()
    md3("detect", pictures, "c", "-o", out, "--add", *MANY)
    make_pictures(pictures / "later", 2)
    assert md3("detect", pictures, "b", "a", "c", "-o", out, *MANY).exit_code == 3
    assert md3.num_answered == 6
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "b", "a", "c")


def test_an_unfinished_run_is_finished_first_where_input_has_changed(
    md3: Program, pictures: Path, tmp_path: Path, begun: Callable[..., Path]
) -> None:
    out = begun(1)
    make_pictures(pictures / "a_new_one", 1)
    refused = md3("detect", pictures, "c", "-o", out, "--add", *MANY)
    assert (refused.exit_code, "INPUT is not what it was when the plan was made" in refused.stderr) == (2, True)
    assert not (run_of(out) / "plan/added-1.json").exists()
    assert md3("detect", pictures, "b", "a", "-o", out, *MANY).exit_code == 3, "as the message says"
    assert md3("detect", pictures, "d", "-o", out, "--add", *MANY).exit_code == 3
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "b", "a", "d")


# -- manifests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_left", [0, 2])
def test_rows_of_a_manifest_grow_by_what_the_command_asks(
    md3: Program, pictures: Path, tmp_path: Path, begun: Callable[..., Path], num_left: int
) -> None:
    """Own requests stay alone, overridden settings hold for what is added, and repeats count on."""
    rows: list[dict[str, Any]] = [
        {"image": "p0.png"},
        {"image": "p0.png", "tag": [1, None]},
        {"image": "p1.png", "task": "query", "prompt": "Why?"},
        {"image": "p2.png", "max_objects": 7, "tag": {"a": 1.5}},
        {"image": "p4.png"},
        {"image": "p3.png", "task": "detect", "prompt": "c"},
        {"image": "p3.png"},
        {"image": "gone.png"},
        {"image": 3},
        {"image": "p5.png"},
    ]
    manifest = pictures / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = begun(num_left, manifest)
    assert md3("detect", manifest, "c", "-o", out, "--add", *MANY).exit_code == 3
    expected = whole(md3, manifest, tmp_path, "b", "a", "c")
    assert out.read_bytes() == expected
    assert len({record["id"] for record in records_of(out)}) == len(records_of(out))
    assert md3("verify", out).exit_code == 0
    assert md3("detect", manifest, "b", "a", "c", "-o", out, *MANY).exit_code == 3
    assert md3.num_answered == 0
    assert out.read_bytes() == expected


# -- what is refused, found and cleared away -------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("b", "a", "c"), "it has detect b and detect a; you now ask detect c as well. To keep what is there and ask"),
        (("b",), "you now ask only detect b. For a part of the records, type `md3 select"),
        (("c", "--add", "--dtype", "bf16"), "dtype auto, now bf16"),
        (("c", "--add", "--limit", "5"), "limit none, now 5"),
        (("b", "--add", "--max-objects", "5"), "OUTPUT has detect b with other settings: max-objects 150, now 5"),
        (("c", "--add", "--overwrite"), "leave one of them out"),
    ],
)
@pytest.mark.parametrize("many", [MANY, ("--world-size", 2)])
def test_what_cannot_be_added_is_refused(
    md3: Program, pictures: Path, begun: Callable[..., Path], words: tuple[str, ...], said: str, many: tuple[str, ...]
) -> None:
    out = begun(1)
    refused = md3("detect", pictures, *words, "-o", out, *many)
    assert (refused.exit_code, said in refused.stderr) == (2, True), refused.stderr
    assert len(list((run_of(out) / "plan").iterdir())) == 2


def test_damage_to_what_was_added_is_found_and_done_again(
    md3: Program, pictures: Path, tmp_path: Path, begun: Callable[..., Path]
) -> None:
    out, other = begun(), run_of(tmp_path / "other.jsonl")
    md3("detect", pictures, "c", "-o", tmp_path / "other.jsonl", "--limit", 3, *MANY)
    md3("detect", pictures, "c", "-o", out, "--add", *MANY)
    expected, run = out.read_bytes(), run_of(out)
    part = run / json.loads((run / "commits/00004.json").read_bytes())["part"]
    part.write_bytes(part.read_bytes().replace(b"stop", b"step", 1))
    (run / "parts/part-00005-lost-1-a.jsonl").write_bytes(b"")
    found = md3("verify", out)
    assert (found.exit_code, "shard 4" in found.output, "belong to nothing" in found.output) == (1, True, True)
    cleaned = md3("runs", "gc", out, "--damaged", "--older-than", 0)
    assert "2 files removed, 1 shards" in cleaned.output
    assert md3("detect", pictures, "b", "a", "c", "-o", out, *MANY).exit_code == 3
    assert (md3.num_answered, out.read_bytes()) == (3, expected)
    (run / "plan/added-1.parquet").write_bytes((other / "plan/manifest.parquet").read_bytes())
    assert "added-1.json and added-1.parquet are of two plans" in md3("verify", out).stderr
    (run / "plan/added-1.json").write_bytes((other / "plan/plan.json").read_bytes())
    assert "plan/added-1.json and plan/plan.json are of two runs" in md3("verify", out).stderr


def test_a_rank_of_before_does_not_end_what_is_being_added(
    md3: Program, pictures: Path, tmp_path: Path, begun: Callable[..., Path]
) -> None:
    """It exports the plan that it knows; the records of the other plan are not there then, and that is known."""
    out = begun()
    assert md3("detect", pictures, "c", "-o", out, "--add", *MANY).exit_code == 3
    exported = run_of(out) / "exported.json"
    exported.write_text(json.dumps({**json.loads(exported.read_bytes()), "plans": 1}))
    assert not json.loads(md3("status", out, "--json").output)["exported"]
    assert "not exported yet" in md3("verify", out).output
    assert md3("detect", pictures, "b", "a", "c", "-o", out).exit_code == 3
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "b", "a", "c")
    assert md3("verify", out).exit_code == 0


@pytest.mark.parametrize("seed", range(5))
def test_any_way_to_a_union_gives_its_records(md3: Program, pictures: Path, tmp_path: Path, seed: int) -> None:
    """One process, a run folder and a rank in turn: what was asked first comes first, nothing is asked twice."""
    chooser, out = random.Random(seed), tmp_path / "o.jsonl"
    forms = [(), MANY, ("--world-size", 2, "--shard-size", 3), ("--engine", "local")]
    union: list[str] = []
    num_answered = 0
    while len(union) < 6:
        some = chooser.sample("abcdef", chooser.randrange(1, 4))
        union += [prompt for prompt in some if prompt not in union]
        assert md3("detect", pictures, *some, "-o", out, "--add", *chooser.choice(forms)).exit_code == 3
        num_answered += md3.num_answered
    assert md3("detect", pictures, *union, "-o", out, *chooser.choice(forms)).exit_code == 3
    assert (md3.num_answered, num_answered) == (0, (NUM_PICTURES - 1) * len(union)), "each was asked once"
    assert out.read_bytes() == whole(md3, pictures, tmp_path, *union)
    assert md3("verify", out).exit_code == 0


# -- kills -----------------------------------------------------------------------------------------------


def start(folder: Path, out: Path, *words: str, step_s: float = 0.0) -> subprocess.Popen[bytes]:
    """The program as a process of its own; its workers find the stub too."""
    settings = clean_environment(folder / "home") | {MARK: f"{os.getpid()}-{folder.name}", "OMP_NUM_THREADS": "1"}
    own = ["--step-seconds", str(step_s)]
    asked = ["detect", str(folder / "pictures"), *words, "-o", str(out), "--workers", "1", "--batch-size", "2"]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen([sys.executable, str(STUB_MD3), *own, *asked], env=settings, stdout=log, stderr=log)


@pytest.mark.process
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("count", "step"), [(8, 60), pytest.param(100, 12, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_kills_while_it_grows(
    md3: Program, forks: Forks, pictures: Path, tmp_path: Path, begun: Callable[..., Path], count: int, step: int
) -> None:
    """Kills before file operations of a start that adds; then the same command in one form or another, to the end."""
    chooser, num_killed, at = random.Random(count), 0, 0
    expected = whole(md3, pictures, tmp_path, "b", "a", "c", "d")
    isolated = clean_environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
    while num_killed < count:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        out = begun(chooser.randrange(0, 3), out=tmp_path / "out/o.jsonl")
        at += chooser.randrange(1, step)
        asked = ("detect", pictures, "c", "d", "--add", "-o", out)
        fault = ("--fault", f"kill:{at}:{out.parent}")
        done = forks(*fault, *asked, *MANY, "--workers", 1, "--batch-size", 2, env=isolated)
        status = done.returncode
        assert status in (3, -signal.SIGKILL), done.stderr
        if status == 3:
            assert at > step, "there was nothing to interrupt"
            at = 0
        num_killed += status != 3
        again = md3(*asked, *chooser.choice([MANY, (), ("--world-size", 2)]))
        assert again.exit_code == 3, again.output
        assert out.read_bytes() == expected
        if run_of(out).exists():
            assert md3("verify", out).exit_code == 0


@pytest.mark.process
@pytest.mark.parametrize("num_left", [0, 2])
def test_ranks_that_start_together_freeze_one_plan(
    md3: Program, pictures: Path, tmp_path: Path, begun: Callable[..., Path], num_left: int
) -> None:
    out = begun(num_left)
    started = [
        start(tmp_path, out, "c", "--add", "--world-size", "3", "--worker-rank", str(rank), step_s=0.05)
        for rank in range(3)
    ]
    assert [process.wait(240) for process in started] == [3, 3, 3], (tmp_path / "log").read_text()[-2000:]
    assert sorted(path.name for path in (run_of(out) / "plan").iterdir()) == [
        "added-1.json",
        "added-1.parquet",
        "manifest.parquet",
        "plan.json",
    ]
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "b", "a", "c")
    assert md3("verify", out).exit_code == 0


@pytest.mark.process
@pytest.mark.timeout(900)
def test_kills_of_workers_and_their_supervisor_while_it_grows(
    md3: Program, pictures: Path, tmp_path: Path, begun: Callable[..., Path]
) -> None:
    out, chooser = begun(2), random.Random(1)
    three = ("--devices", "cpu", "--workers-per-device", "3")
    mark = f"{os.getpid()}-{tmp_path.name}"
    added = run_of(out) / "plan/added-1.json"
    for target in ("supervisor", "worker", "supervisor"):
        journals = set((run_of(out) / "wip").glob("*.jsonl"))
        process = start(tmp_path, out, "c", "d", "--add", *three, step_s=0.3)
        wait_until(
            lambda before=journals: added.exists() and set((run_of(out) / "wip").glob("*.jsonl")) - before,
            (tmp_path / "log").read_text()[-2000:],
        )
        time.sleep(chooser.random())
        workers = [pid for pid in marked_processes(mark) if pid != process.pid]
        if target == "worker" and workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chooser.choice(workers), signal.SIGKILL)
            time.sleep(0.5)
        process.kill()
        process.wait(240)
        wait_until(lambda: not marked_processes(mark), "workers outlive the run")
    process = start(tmp_path, out, "b", "a", "c", "d", *three)
    assert process.wait(240) == 3, (tmp_path / "log").read_text()[-2000:]
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "b", "a", "c", "d")
    assert md3("verify", out).exit_code == 0


# -- rows and records ------------------------------------------------------------------------------------

A, B, C = (Request(Task.DETECT, prompt) for prompt in "abc")


def row(*requests: Request, name: str = "x.png", **more: Any) -> SourceRow:
    return SourceRow(ImageItem(name, f"/{name}"), requests, **more)


def test_rows_are_asked_what_they_were_not_asked_before() -> None:
    new = (C,)
    now = [row(A, B, C), row(A), row(A, B, B), row(A, B, C, meta={"x": (1, float("nan"))})]
    then = [row(A, B), row(A), row(A, B), row(A, B, meta={"x": [1, float("nan")]})]
    found = [each.requests for each in added_rows(now, then, new)]
    assert found == [(C,), (), (B,), (C,)]
    assert found[0] is new, "so that the manifest need not repeat it"


@pytest.mark.parametrize(
    "now",
    [
        [],
        [row(A), row(A)],
        [row(B)],
        [row(A, name="y.png")],
        [row(A, meta={"x": 1})],
        [row(A, failure=RowFailure("bad_row", "no"))],
        [row()],
    ],
)
def test_other_rows_are_told_from_the_planned_ones(now: Sequence[SourceRow]) -> None:
    with pytest.raises(RowsDifferError):
        list(added_rows(now, [row(A)], (B,)))


@pytest.mark.parametrize("seed", range(5))
def test_records_are_merged_by_row(seed: int) -> None:
    chooser = random.Random(seed)
    counts = [[chooser.randrange(3) for _ in range(6)] for _ in range(chooser.randrange(1, 4))]
    parts = [
        b"".join(b"%d %d %d\n" % (number, part, i) for number, count in enumerate(of_part) for i in range(count))
        for part, of_part in enumerate(counts)
    ]
    lines = list(merged(parts, counts))
    assert lines == sorted(lines)
    assert len(lines) == sum(map(sum, counts))
    assert list(merged([*parts[:-1], parts[-1] + b"9\n"], counts)) == [*lines, b"9\n"], "nothing is lost"
