"""How a run stands, asked from outside: finished, stopped, killed, under way; of one process and of many."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from chaos import wait_until
from program import Program, clean_environment, make_pictures, records_of, start

from md3cli.files import OutputLock, lock_holder
from md3cli.run.run_info import RunCounts
from md3cli.run.status import Standing, State

KEYS = ["requests", "done", "ok", "failed", "error_types", "children", "state"]
SLOW_S = 2.0  # a step of the stub, of four requests: the run outlives all that is asked about it meanwhile


@pytest.fixture
def md3(md3: Program, tmp_path: Path) -> Program:
    make_pictures(tmp_path / "pictures", 30)
    (tmp_path / "pictures/p4.png").write_bytes(b"no picture")
    return md3


def status(md3: Program, run: object) -> dict[str, Any]:
    result = md3("status", run, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("output", ["out/", "out.jsonl", "out.json", "out.csv"])
def test_a_finished_run(md3: Program, output: str) -> None:
    assert md3("detect", "pictures", "a", "b", "-o", output).exit_code == 3
    found = status(md3, output)
    assert list(found) == KEYS
    assert found == {
        "requests": 60,
        "done": 60,
        "ok": 58,
        "failed": 2,
        "error_types": {"not_an_image": 2},
        "children": 0,
        "state": "finished",
    }
    said = md3("status", output).stdout.splitlines()
    assert said[0] == f"{output}: finished"
    assert said[1] == "60 of 60 requests done (100.0%): 58 ok, 2 failed (not_an_image 2)"
    assert said[2].startswith("last record ")
    assert len(said) == 3  # nothing is left to do


def test_counts_are_those_of_the_records_whatever_run_json_says(md3: Program) -> None:
    """Records of a finished run are believed by their size; where that is another one they are counted."""
    md3("detect", "pictures", "a", "-o", "out.jsonl")
    records, info = Path("out.jsonl"), Path("out.jsonl.run.json")
    records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:7]) + b'{"torn')
    assert status(md3, "out.jsonl")["done"] == 7
    document = json.loads(info.read_bytes())
    document["starts"][-1]["exit_status"] = None
    info.write_text(json.dumps(document))
    found = status(md3, "out.jsonl")
    assert (found["requests"], found["done"], found["ok"], found["state"]) == (30, 7, 6, "stopped")
    info.unlink()
    found = status(md3, "out.jsonl")
    assert (found["requests"], found["done"], found["state"]) == (None, 7, "unknown")
    assert "no run.json beside these records says" in md3("status", "out.jsonl").stdout


def test_a_request_that_was_done_again_counts_once(md3: Program) -> None:
    md3("detect", "pictures", "a", "-o", "out.jsonl")
    records = Path("out.jsonl")
    lines = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(b"".join([*lines, lines[4].replace(b"not_an_image", b"decode"), lines[0]]))
    Path("out.jsonl.run.json").unlink()
    found = status(md3, "out.jsonl")
    assert (found["done"], found["error_types"]) == (30, {"decode": 1})


def test_a_list_on_stdin_is_not_counted(md3: Program) -> None:
    md3("detect", "-", "a", "-o", "out.jsonl", stdin="pictures/p0.png\n")
    document = json.loads(Path("out.jsonl.run.json").read_bytes())
    assert "requests" not in document
    document["starts"][-1]["exit_status"] = 130
    Path("out.jsonl.run.json").write_text(json.dumps(document))
    assert status(md3, "out.jsonl") | {"state": ""} == {
        "requests": None,
        "done": 1,
        "ok": 1,
        "failed": 0,
        "error_types": {},
        "children": 0,
        "state": "",
    }
    assert md3("status", "out.jsonl").stdout.splitlines()[1] == "1 request done: 1 ok"


def test_what_may_pass_later_is_offered_again(md3: Program) -> None:
    Path("rows.csv").write_text("image,task,prompt\npictures/p0.png,detect,fail me\n")
    md3("run", "rows.csv", "-o", "out.jsonl")
    info = Path("out.jsonl.run.json")
    document = json.loads(info.read_bytes())
    document["arguments"] = ["md3", "run", "rows.csv", "-o", "out.jsonl", "--overwrite"]  # here it is pytest's
    info.write_text(json.dumps(document))
    said = md3("status", "out.jsonl").stdout.splitlines()
    assert said[-1] == "try the failed ones again with: md3 run rows.csv -o out.jsonl --retry-failed"
    document["arguments"] = ["rm", "-rf", "x"]  # a stranger's
    info.write_text(json.dumps(document))
    assert "again with" not in md3("status", "out.jsonl").stdout


@pytest.mark.process
@pytest.mark.parametrize("many", [(), ("--engine", "local", "--shard-size", 20)])
def test_a_run_under_way_and_killed(md3: Program, tmp_path: Path, many: tuple[Any, ...]) -> None:
    """Also before any shard is committed: what its journal has counts."""
    arguments = ("detect", "pictures", "a b", "--workers", 1, "-o", "out/", *many)
    process = start(*arguments, step_s=SLOW_S, env=clean_environment(tmp_path / "home"), cwd=tmp_path)
    try:
        wait_until(lambda: Path("out/run.json").exists() and status_or_none(md3) is not None, "no run began")
        wait_until(lambda: status(md3, "out")["done"] >= 5, "no records came")
        found = status(md3, "out")
        assert (found["requests"], found["state"], found["children"]) == (30, "running", 0)
        said = md3("status", "out").stdout
        assert f"out: running (process {process.pid} on " in said
        assert "go on with" not in said
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    found = status(md3, "out")
    assert (found["requests"], found["state"]) == (30, "stopped")
    assert 5 <= found["done"] < 30
    assert found["ok"] + found["failed"] == found["done"]
    said = md3("status", "out").stdout
    assert "out: stopped" in said
    assert "go on with: md3 detect pictures 'a b' --workers 1 -o out/" in said
    assert md3("detect", "pictures", "a b", "-o", "out/", *many).exit_code == 3
    found = status(md3, "out")
    assert [found[key] for key in KEYS] == [30, 30, 29, 1, {"not_an_image": 1}, 0, "finished"]
    assert len(records_of(Path("out/records.jsonl"))) == 30


def test_children_are_counted_as_they_come(md3: Program) -> None:
    """What is typed or listed may look like a record's own words; what an annotation asks is no child."""
    command = ("run", "pictures", "--task", "detect:2 things", "--no-reasoning", "-o", "out.jsonl")
    asked = ("--then", 'query:"region":{{ "of": {label}?', "--then", "detect:lid")
    assert md3(*command, *asked).exit_code == 3
    found = status(md3, "out.jsonl")
    assert (found["requests"], found["done"], found["children"]) == (30 + 29 * 4, 30 + 29 * 4, 29 * 4)
    out, lines = Path("out.jsonl"), Path("out.jsonl").read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([*lines[:7], lines[3]]))
    found = status(md3, "out.jsonl")
    assert (found["done"], found["children"], found["ok"]) == (7, 5, 7)
    info = Path("out.jsonl.run.json")
    document = json.loads(info.read_text())
    document["starts"][-1]["exit_status"] = 130
    info.write_text(json.dumps(document))
    found = status(md3, "out.jsonl")
    assert (found["requests"], found["state"]) == (30 + 5, "stopped")
    assert "5 of them about what others found" in md3("status", "out.jsonl").stdout
    assert md3("detect", "pictures", '","region":{"x_min":', "-o", "plain.jsonl").exit_code == 3
    assert status(md3, "plain.jsonl")["children"] == 0


def status_or_none(md3: Program) -> dict[str, Any] | None:
    result = md3("status", "out", "--json")
    return json.loads(result.stdout) if result.exit_code == 0 else None


def test_many_processes_have_the_same_keys_and_their_own(md3: Program) -> None:
    md3("detect", "pictures", "a", "b", "-o", "out.jsonl", "--engine", "local", "--shard-size", 10)
    found = status(md3, "out.jsonl")
    assert [found[key] for key in KEYS] == [60, 60, 58, 2, {"not_an_image": 2}, 0, "finished"]
    assert (found["shards"], found["shards_done"], found["rows_done"], found["exported"]) == (3, 3, 30, True)
    Path("out.jsonl.md3run/exported.json").unlink()
    assert status(md3, "out.jsonl")["state"] == "stopped"
    assert "the same command exports their records" in md3("status", "out.jsonl").stdout


def test_a_run_of_its_own_inside_a_run_folder(md3: Program) -> None:
    md3("detect", "pictures", "a", "b", "-o", "out/", "--engine", "local")
    md3("detect", "pictures/p0.png", "a", "-o", "out/one.jsonl")
    assert (status(md3, "out/one.jsonl")["done"], status(md3, "out/records.jsonl")["done"]) == (1, 60)


def test_selected_records_are_a_finished_run(md3: Program) -> None:
    md3("detect", "pictures", "a", "-o", "out/")
    md3("select", "out", "--limit", 3, "-o", "some.jsonl")
    assert [status(md3, "some.jsonl")[key] for key in KEYS] == [3, 3, 3, 0, {}, 0, "finished"]


def test_verify_tells_the_digest_of_a_finished_run(md3: Program) -> None:
    digests = []
    for output, many in (("one.jsonl", ()), ("many.jsonl", ("--engine", "local"))):
        md3("detect", "pictures", "a", "-o", output, *many)
        said = md3("verify", output).stdout.splitlines()
        assert said[0].startswith("ok: 30 records")
        digests.append(said[1])
    assert digests[0] == digests[1]
    Path("one.jsonl.run.json").unlink()
    assert md3("verify", "one.jsonl").exit_code == 1


@pytest.mark.parametrize("command", ["status", "verify"])
@pytest.mark.parametrize(
    ("name", "content"), [("gone", None), ("notes.csv", b"a,b\n1,2\n"), ("none.jsonl", b""), ("empty/", None)]
)
def test_there_is_no_run(md3: Program, name: str, content: bytes | None, command: str) -> None:
    Path("empty").mkdir()
    if content is not None:
        Path(name).write_bytes(content)
    result = md3(command, name)
    assert (result.exit_code, result.stdout) == (1, "")
    missing = "no run at" if command == "status" else "no records at"
    assert (missing in result.stderr) != ("holds no record of md3" in result.stderr)


@pytest.mark.parametrize("many", [(), ("--engine", "local")])
def test_a_run_that_ends_while_it_is_asked_for_was_not_stopped(
    md3: Program, monkeypatch: pytest.MonkeyPatch, many: tuple[str, ...]
) -> None:
    """Nobody holds its lock any more; so what it noted before that counts."""
    asked = ("detect", "pictures", "a", "-o", "out.jsonl", *many)
    ask, ended = lock_holder, []

    def end_and_ask(path: Path) -> str | None:
        if not ended:
            ended.append(md3(*asked))
        return ask(path)

    md3(*asked, "--limit", 5)
    if many:
        shutil.rmtree("out.jsonl.md3run/commits")
        Path("out.jsonl.md3run/exported.json").unlink()
        asked = (*asked, "--limit", 5)
    else:
        document = json.loads(Path("out.jsonl.run.json").read_bytes())
        document["starts"][-1]["exit_status"] = None
        Path("out.jsonl.run.json").write_text(json.dumps(document))
    assert status(md3, "out.jsonl")["state"] == "stopped"
    monkeypatch.setattr("md3cli.run.status.lock_holder", end_and_ask)
    monkeypatch.setattr("md3cli.scale.inspect.lock_holder", end_and_ask)
    assert status(md3, "out.jsonl")["state"] == "finished"
    assert ended[0].exit_code == 3, ended[0].output


# -- the lock ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [False, True])
def test_who_holds_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_shared: bool) -> None:
    path = tmp_path / "o.lock"
    assert lock_holder(path) is None
    assert not path.exists()  # who asks leaves nothing behind
    lock = OutputLock.acquire(path, "o", is_shared=is_shared)
    assert str(lock_holder(path)).startswith(f"process {os.getpid()} on ")
    lock.release()
    monkeypatch.setattr("md3cli.files.time.sleep", lambda seconds: pytest.fail("a free lock needs no second look"))
    assert lock_holder(path) is None
    OutputLock.acquire(path, "o").release()  # and takes nothing


def test_a_lock_that_is_no_file_is_held_by_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "o.lock")
    assert lock_holder(tmp_path / "o.lock") is None
    (tmp_path / "link.lock").symlink_to("/dev/zero")
    assert lock_holder(tmp_path / "link.lock") is None


def test_no_time_is_told_while_objects_may_still_be_found() -> None:
    facts: dict[str, Any] = {"run": "out", "requests": 83, "counts": RunCounts(50), "rate": 5.5}
    far = Standing(**facts, state=State.RUNNING, seconds_since_record=1.0)
    assert "6.0 s left" in "".join(far.lines())
    far = Standing(**facts, state=State.RUNNING, seconds_since_record=1.0, children=49)
    assert far.lines()[2:] == [
        "49 of them about what others found; more may come",
        "last record 1.0 s ago, 5.5 requests/s",
    ]
    assert "more may" not in "".join(Standing(**facts, state=State.FINISHED, children=49).lines())
