"""OUTPUT in a bucket: the run folder, what is exported from it, and what happens when somebody dies; with the stub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chaos import wait_until
from faulty_servers import Fault, StoreDoor
from program import TESTS, Program, clean_environment, make_pictures, records_of, start

from md3cli.scale.folder import open_run_folder
from md3cli.scale.markers import read_commit
from md3cli.scale.store import open_store

pytestmark = pytest.mark.process

Objects = Callable[[], dict[str, bytes]]
RUN = "s3://pictures/out/run"
MANY = ("--devices", "cpu", "--workers-per-device", "2")
RACER = """
import sys, time
from md3cli.scale.store import open_store
store, me = open_store("s3://pictures/race"), sys.argv[1]
store.read("commits/00000.json")
store.put(f"ready/{me}", b"")
while store.read("go") is None:
    time.sleep(0.01)
print(store.put_if_absent("commits/00000.json", me.encode()))
"""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = make_pictures(tmp_path / "pictures", 30)
    (folder / "p4.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def expected(md3: Program, pictures: Path) -> bytes:
    """The records of an undisturbed run on this machine."""
    assert md3("caption", pictures, "-o", "plain/o.jsonl").exit_code == 3
    return Path("plain/o.jsonl").read_bytes()


@pytest.fixture
def objects(store: StoreDoor, _store_client: Any) -> Objects:
    """What lies in the bucket, by key."""

    def read() -> dict[str, bytes]:
        pages = _store_client.get_paginator("list_objects_v2").paginate(Bucket="pictures")
        keys = [found["Key"] for page in pages for found in page.get("Contents", ())]
        return {key: _store_client.get_object(Bucket="pictures", Key=key)["Body"].read() for key in keys}

    return read


def begin(tmp_path: Path, *arguments: object, step_s: float = 0.0) -> subprocess.Popen[bytes]:
    """The program as a process of its own, with another home: another machine, as far as it can tell."""
    return start(*arguments, step_s=step_s, env=clean_environment(tmp_path / "elsewhere"), cwd=tmp_path)


def num_committed() -> int:
    return len(open_store(f"{RUN}/.md3run").names("commits"))


# -- what stands in the bucket ---------------------------------------------------------------------


def test_a_run_in_a_bucket_gives_the_bytes_of_one_on_this_machine(
    md3: Program, pictures: Path, expected: bytes, objects: Objects
) -> None:
    done = md3("caption", pictures, "-o", f"{RUN}/", "-f", "coco", "-f", "yolo", "--shard-size", 7)
    assert done.exit_code == 3, done.output
    assert f"written: {RUN}/coco.json, {RUN}/yolo, {RUN}/records.jsonl" in done.stderr
    found = objects()
    assert found["out/run/records.jsonl"] == expected
    assert json.loads(found["out/run/run.json"])["counts"]["failed"] == 1
    assert json.loads(found["out/run/run.json"])["starts"][0]["exit_status"] == 3
    assert len(json.loads(found["out/run/coco.json"])["images"]) >= 29
    assert sum(key.startswith("out/run/yolo/labels/") for key in found) >= 1
    assert len([key for key in found if key.startswith("out/run/.md3run/commits/")]) == 5
    assert not any("selftest" in key or "wip" in key for key in found)
    assert b"p4.png" in found["out/run/.md3run/errors.jsonl"]
    status = json.loads(md3("status", RUN, "--json").output)
    assert (status["shards_done"], status["exported"]) == (5, True)
    assert (status["requests"], status["done"], status["failed"], status["state"]) == (30, 30, 1, "finished")
    checked = md3("verify", f"{RUN}/")
    assert (checked.exit_code, checked.stderr) == (0, ""), checked.output
    assert list(Path("home/cache/md3cli").glob("output-*")) == [], "nothing stays on this machine"


@pytest.mark.parametrize(("name", "records"), [("o.jsonl", "o.jsonl"), ("o.parquet", "o.parquet.records.jsonl")])
def test_a_file_in_a_bucket(
    md3: Program, pictures: Path, expected: bytes, objects: Objects, name: str, records: str
) -> None:
    assert md3("caption", pictures, "-o", f"s3://pictures/{name}").exit_code == 3
    found = {key for key in objects() if ".md3run/" not in key}
    assert found == {name, records, f"{name}.run.json"}
    assert objects()[records] == expected
    assert md3("verify", f"s3://pictures/{name}").exit_code == 0


def test_a_whole_bucket(md3: Program, pictures: Path, expected: bytes, objects: Objects) -> None:
    assert md3("caption", pictures, "-o", "s3://pictures").exit_code == 3
    assert objects()["records.jsonl"] == expected
    assert md3("verify", "s3://pictures").exit_code == 0


def test_again_costs_nothing_and_what_is_new_is_taken_in(md3: Program, pictures: Path, objects: Objects) -> None:
    command = ("caption", pictures, "-o", f"{RUN}/", "-f", "csv", "--shard-size", 8)
    md3(*command)
    assert md3(*command).exit_code == 3
    assert md3.num_answered == 0
    make_pictures(pictures / "later", 3)
    md3(*command)
    assert md3.num_answered == 3
    assert md3("caption", pictures, "-o", "grown.jsonl").exit_code == 3
    assert objects()["out/run/records.jsonl"] == Path("grown.jsonl").read_bytes()
    assert md3("verify", RUN).exit_code == 0
    for i in range(5):
        (pictures / f"p{i}.png").unlink()
    before = objects()["out/run/records.jsonl"].splitlines()
    md3(*command)
    assert md3.num_answered == 0
    assert sorted(objects()["out/run/records.jsonl"].splitlines()) == sorted(before), "nothing finished is dropped"
    assert b"later/p0.png" in objects()["out/run/records.csv"]


def test_failures_are_done_again_and_files_of_before_go(md3: Program, pictures: Path, objects: Objects) -> None:
    command = ("detect", pictures, "car", "-o", f"{RUN}/", "-f", "yolo", "--shard-size", 6)
    assert md3(*command).exit_code == 3
    open_store(RUN).put("yolo/labels/stale.txt", b"")
    make_pictures(pictures, 5)  # the bad one too
    assert md3(*command, "--retry-failed").exit_code == 0
    assert md3.num_answered == 1
    found = objects()
    assert found["out/run/records.jsonl"].count(b'"error":null') == 30
    assert "out/run/yolo/labels/stale.txt" not in found
    assert found["out/run/.md3run/errors.jsonl"] == b""


def test_another_run_is_refused_unless_it_may_overwrite(md3: Program, pictures: Path, objects: Objects) -> None:
    md3("caption", pictures, "-o", RUN + "/")
    refused = md3("caption", pictures, "-o", RUN + "/", "--length", "short")
    assert refused.exit_code == 2
    assert f"({RUN}/run.json): " in refused.stderr
    assert md3("caption", pictures, "-o", RUN + "/", "--length", "short", "--overwrite").exit_code == 3
    assert md3.num_answered == 29
    assert b'"length":"short"' in objects()["out/run/records.jsonl"]


@pytest.mark.parametrize("many", [(), ("--world-size", 2)])
def test_a_run_in_a_bucket_grows(
    md3: Program, pictures: Path, objects: Objects, tmp_path: Path, many: tuple[object, ...]
) -> None:
    """Finished and then added to by a start that is killed; another machine goes on with it."""
    command = ("detect", pictures, "-o", f"{RUN}/", "-f", "csv", "--batch-size", 2)
    assert md3(*command, "mark=a", "--shard-size", 6).exit_code == 3
    refused = md3(*command, "a", "b")
    assert (refused.exit_code, "you now ask detect b as well" in refused.stderr) == (2, True)
    process = begin(tmp_path, *command, "b", "--add", *many, step_s=0.6)
    wait_until(lambda: num_committed() >= 7 or process.poll() is not None, "nothing is committed")
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.communicate()
    told = json.loads(objects()["out/run/run.json"])
    assert [request["prompt"] for request in told["identity"]["requests"]] == ["a", "b"]
    assert md3(*command, "b", "--add", *many).exit_code == 3
    assert 0 < md3.num_answered < 29 - 2 * 6 + 6
    assert md3("detect", pictures, "mark=a", "b", "-o", "plain/", "-f", "csv").exit_code == 3
    found = objects()
    assert found["out/run/records.jsonl"] == Path("plain/records.jsonl").read_bytes()
    assert found["out/run/records.csv"] == Path("plain/records.csv").read_bytes()
    assert "out/run/.md3run/plan/added-1.json" in found
    assert md3("verify", RUN).exit_code == 0


# -- many, and the dead ----------------------------------------------------------------------------


@pytest.mark.parametrize("many", [(), MANY])
def test_what_is_killed_is_gone_on_with_from_anywhere(
    md3: Program, pictures: Path, expected: bytes, objects: Objects, tmp_path: Path, many: tuple[str, ...]
) -> None:
    command = ("caption", pictures, "-o", f"{RUN}/", "--batch-size", 2)
    process = begin(tmp_path, *command, "--shard-size", 3, *many, step_s=0.6)
    wait_until(lambda: num_committed() >= 2 or process.poll() is not None, "nothing is committed")
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.communicate()
    unfinished = md3("verify", RUN)
    assert unfinished.exit_code == 1
    assert "shards are not done" in unfinished.output
    assert md3("status", RUN).exit_code == 0
    done = md3(*command)
    assert done.exit_code == 3, done.output
    assert 0 < md3.num_answered < 29
    assert objects()["out/run/records.jsonl"] == expected
    md3("runs", "gc", RUN, "--older-than", 0)
    assert md3("verify", RUN).exit_code == 0


def test_ranks_share_a_bucket(md3: Program, pictures: Path, expected: bytes, objects: Objects, tmp_path: Path) -> None:
    asked = ("caption", pictures, "-o", f"{RUN}/", "--shard-size", 5, "--world-size", 2, "--batch-size", 1)
    ranks = [begin(tmp_path, *asked, "--worker-rank", rank, step_s=0.3) for rank in range(2)]
    said = [rank.communicate(timeout=240)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [3, 3], said
    assert objects()["out/run/records.jsonl"] == expected
    assert md3("verify", RUN).exit_code == 0
    attempts = {json.loads(data)["attempt"] for key, data in objects().items() if "/commits/" in key}
    assert len({attempt.split("-")[-2] for attempt in attempts}) == 2, "both did something"


@pytest.mark.ray
def test_ray_writes_to_a_bucket(
    md3: Program, pictures: Path, expected: bytes, objects: Objects, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (the extra md3cli[ray])")
    process = begin(tmp_path, "caption", pictures, "-o", f"{RUN}/", "--shard-size", 5, "--engine", "ray")
    _, said = process.communicate(timeout=240)
    assert process.returncode == 3, said.decode()
    assert objects()["out/run/records.jsonl"] == expected
    assert md3("verify", RUN).exit_code == 0


def test_of_eight_racing_processes_one_wins(store: StoreDoor, objects: Objects) -> None:
    command = [sys.executable, "-c", RACER]
    racers = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(8)]
    wait_until(lambda: sum("/ready/" in key for key in objects()) == 8, "not all are ready")
    open_store("s3://pictures/race").put("go", b"")
    said = [racer.communicate(timeout=240)[0].strip() for racer in racers]
    assert sorted(said) == ["False"] * 7 + ["True"]
    assert objects()["race/commits/00000.json"] == str(said.index("True")).encode()


# -- stores that fail ------------------------------------------------------------------------------


def test_a_marker_whose_answer_was_lost_is_still_ours(
    md3: Program, pictures: Path, expected: bytes, objects: Objects, store: StoreDoor
) -> None:
    """The store takes the marker and says 503; what tries again is told that there is one: our own."""
    store.faults["/pictures/out/run/.md3run/commits/00000.json"] = Fault(503, is_late=True, times=1)
    assert md3("caption", pictures, "-o", RUN + "/", "--shard-size", 30).exit_code == 3
    assert read_commit(open_run_folder(f"{RUN}/.md3run"), 0) is not None
    assert objects()["out/run/records.jsonl"] == expected
    assert md3("verify", RUN).exit_code == 0


def test_a_store_without_conditional_writes(
    md3: Program, pictures: Path, expected: bytes, objects: Objects, store: StoreDoor
) -> None:
    store.dropped_headers = {"if-none-match"}
    refused = md3("caption", pictures, "-o", RUN + "/", "--world-size", 2)
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"error: {RUN}/.md3run: the store replaces what it should refuse to replace")
    alone = md3("caption", pictures, "-o", RUN + "/")
    assert alone.exit_code == 3
    assert "start no second run on this OUTPUT" in alone.stderr
    assert objects()["out/run/records.jsonl"] == expected


def test_short_failures_are_waited_out(
    md3: Program, pictures: Path, expected: bytes, objects: Objects, store: StoreDoor
) -> None:
    for name in ("commits/00001.json", "plan/manifest.parquet", "run.json"):
        store.faults[f"/pictures/out/run/.md3run/{name}"] = Fault(503, times=2)
    assert md3("caption", pictures, "-o", RUN + "/", "--shard-size", 9).exit_code == 3
    assert objects()["out/run/records.jsonl"] == expected


def test_a_store_that_refuses_ends_the_run_and_it_goes_on_later(
    md3: Program, pictures: Path, expected: bytes, objects: Objects, store: StoreDoor
) -> None:
    marker = "out/run/.md3run/commits/00001.json"
    store.faults[f"/pictures/{marker}"] = Fault(403)
    refused = md3("caption", pictures, "-o", RUN + "/", "--shard-size", 9, "--no-progress")
    assert refused.exit_code == 1
    assert "check the credentials in the environment" in refused.stderr
    assert refused.stderr.count("\n") == 1
    store.faults.clear()
    assert md3("caption", pictures, "-o", RUN + "/").exit_code == 3
    assert objects()["out/run/records.jsonl"] == expected


@pytest.mark.parametrize(
    ("output", "status", "said"),
    [
        ("s3://no-such-bucket/run/", 1, "make the bucket first"),
        ("s3://pictures/run.v2", 2, "s3://pictures/run.v2: no format has the suffix"),
        ("hf://datasets/a/b/", 2, "OUTPUT is a path on this machine, or in a bucket"),
        ("https://key@host/x.jsonl", 2, "https://host/x.jsonl cannot be written"),
        ("s3://key:secret@pictures/run/", 2, "credentials do not belong in an address"),
        ("s3:///run/", 2, "names no bucket"),
    ],
)
def test_what_is_no_output(md3: Program, pictures: Path, objects: Objects, output: str, status: int, said: str) -> None:
    refused = md3("caption", pictures, "-o", output)
    assert refused.exit_code == status
    assert said in refused.stderr
    assert "secret" not in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert objects() == {}


# -- without the extra -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("-o", "s3://bucket/run/"), "a run folder at s3://bucket/run/.md3run needs an optional part"),
        (("-o", "o.jsonl", "--engine", "ray"), "--engine ray needs an optional part"),
    ],
)
def test_a_python_without_the_extras_is_told_what_to_install(
    tmp_path: Path, arguments: tuple[str, ...], line: str
) -> None:
    told = run_without_extras(tmp_path, make_pictures(tmp_path / "few", 1), *arguments)
    extra = "ray" if "ray" in arguments else "remote"
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == f"error: {line}; install it with: pip install 'md3cli[{extra}]'\n"


@pytest.mark.parametrize("typed", ["s3://bucket/folder", "https://host/x.png", "hf://datasets/a/b/x.png"])
def test_remote_input_without_the_extra(tmp_path: Path, typed: str) -> None:
    told = run_without_extras(tmp_path, typed)
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr.count("\n") == 1
    assert "install it with: pip install 'md3cli[remote]'" in told.stderr


def run_without_extras(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The program in a Python that cannot import what the extras bring."""
    hide = "import sys; sys.modules.update(dict.fromkeys(('ray', 'fsspec', 's3fs', 'gcsfs', 'aiohttp', 'boto3')))"
    program = f"{hide}; import stub_md3; sys.argv[:1] = ['md3']; stub_md3.main()"
    environment = clean_environment(folder / "home") | {
        "PYTHONPATH": os.pathsep.join([str(TESTS / "support"), *sys.path])
    }
    command = [sys.executable, "-c", program, "caption", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)


def test_everything_else_works_without_the_extras(tmp_path: Path) -> None:
    few = make_pictures(tmp_path / "few", 3)
    done = run_without_extras(tmp_path, few, "-o", "o.jsonl", "--engine", "local")
    assert done.returncode == 0, done.stderr
    assert len(records_of(tmp_path / "o.jsonl")) == 3
