"""Shards over Ray: the same records whatever is killed, an orderly stop, and what a worker must see to begin."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import stub_scale
from program import Program, clean_environment, isolate, make_pictures
from stub_scale import FINDER

from md3cli.config import DecodeOptions, ModelOptions, ScaleOptions, SourceSpec
from md3cli.errors import EngineError, Md3Error, MissingExtraError
from md3cli.records import Request, Task
from md3cli.run.run_info import identity_of
from md3cli.scale.folder import RunFolder, open_run_folder
from md3cli.scale.make_plan import make_plan, put_plan
from md3cli.scale.markers import CommitLog, RunOptions, write_run_options
from md3cli.scale.plan import Plan
from md3cli.scale.ray import GO_ON, STOP, RayDriver, ShardAnswer, ShardWorker, WorkerSetup
from md3cli.scale.ray_cluster import Placement, _own_sigterm, _shut_down, check_installed, connected, place
from md3cli.scale.shard_runner import ShardRunner
from md3cli.scale.workers import ShardQueue
from md3cli.source.source import open_source

TESTS = Path(__file__).parents[1]
SCENES = TESTS.parent / "examples" / "scenes"
NUM_PICTURES, SHARD_ROWS = 100, 5
DEADLY = "kill the worker"
CAR, DOG = (Request(Task.DETECT, prompt) for prompt in ("car", "dog"))


@pytest.fixture(scope="module")
def ray_local() -> Iterator[None]:
    """Ray on this machine, reachable from it alone. Its environment goes before its import."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    ray = pytest.importorskip("ray", reason="Ray is not installed (the extra md3cli[ray])")
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: the path of a socket has 107 bytes
    before = dict(os.environ)
    (folder / "token").write_text("0" * 64)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder / "token")
    os.environ |= {stub_scale.STEP_SECONDS: "0.1", stub_scale.DEADLY: DEADLY}  # of the workers alone
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS / "support"), os.environ.get("PYTHONPATH")]))
    ray.init(
        num_cpus=4,  # logical ones: workers of the tests hardly compute
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level="error",
        _temp_dir=str(folder),
    )
    del os.environ[stub_scale.STEP_SECONDS], os.environ[stub_scale.DEADLY]
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)
    shutil.rmtree(folder, ignore_errors=True)


class ToldDriver(RayDriver):
    """Tells of each shard that was committed."""

    on_answer: Callable[[ShardAnswer], None]

    def take(self, answer: ShardAnswer) -> None:
        super().take(answer)
        if not answer.failure and not answer.is_stopped:
            self.on_answer(answer)


class Run:
    """A planned run folder; `plan_again` plans the same in another."""

    def __init__(self, where: Path, pictures: Path, requests: tuple[Request, ...] = (CAR, DOG)) -> None:
        self.folder: RunFolder = open_run_folder(str(where))
        model = stub_scale.find(ModelOptions(batch_size=4))
        write_run_options(self.folder, RunOptions(model.options, DecodeOptions(workers=1)), ("md3",))
        source = open_source(SourceSpec((str(pictures),)), requests)
        config = {"identity": identity_of(requests, model.identity, str(pictures))}
        plan = make_plan(self.folder, source, requests, model.identity, config, shard_size=SHARD_ROWS)
        self.plan: Plan = put_plan(self.folder, plan)

    @property
    def todo(self) -> list[int]:
        done = CommitLog(self.folder).refresh()
        return [shard for shard in range(self.plan.shards) if shard not in done]

    def on_ray(
        self,
        on_answer: Callable[[ShardAnswer], None] = lambda answer: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Run what is left; True where nothing asked to stop."""
        driver = ToldDriver(
            self.folder, self.plan, ShardQueue(self.folder, self.plan.shards), ScaleOptions(workers_per_device=2), "cpu"
        )
        driver.on_answer = on_answer
        with patch("md3cli.scale.shard_runner.FINDER", FINDER):
            driver.run(lambda: driver.stop() if should_stop() else None)
        return not driver.is_stopping

    def here(self) -> None:
        with ShardRunner(self.folder.uri, finder=FINDER) as runner:
            for shard in self.todo:
                runner.run(shard)

    def records(self) -> bytes:
        commits = CommitLog(self.folder).refresh()
        assert sorted(commits) == list(range(self.plan.shards))
        return b"".join(self.folder.store.read(commits[shard].part) or b"" for shard in sorted(commits))

    def num_journals(self) -> int:
        return len(self.folder.wip.names("wip"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("ray") / "pictures", NUM_PICTURES)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> bytes:
    """The records of an undisturbed run without Ray."""
    run = Run(tmp_path_factory.mktemp("plain"), pictures)
    run.here()
    assert len(run.records().splitlines()) == 2 * NUM_PICTURES
    return run.records()


@pytest.fixture
def run(tmp_path: Path, pictures: Path) -> Run:
    return Run(tmp_path / "out", pictures)


# -- with Ray ------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_killed_actors_lose_nothing(run: Run, expected: bytes) -> None:
    killed: list[int] = []
    answers: list[ShardAnswer] = []

    def kill(answer: ShardAnswer) -> None:
        answers.append(answer)
        pid = int(answer.worker.rpartition("-")[2])
        if answer.shard >= 2 and len(killed) < 2 and pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    assert run.on_ray(kill)
    assert len(killed) == 2
    assert run.records() == expected
    assert sorted(answer.shard for answer in answers) == list(range(run.plan.shards))
    assert {(answer.images, answer.ok, answer.errors) for answer in answers} == {(5, 10, 0)}
    assert run.num_journals() == 0
    assert run.folder.store.names("sessions") == []


@pytest.mark.process
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_killed_driver_loses_nothing_and_any_engine_goes_on(run: Run, expected: bytes, tmp_path: Path) -> None:
    """The driver has a Ray of its own, for this machine alone; what that still commits before it ends is right."""
    temp = tempfile.mkdtemp(prefix="r", dir="/tmp")
    with (tmp_path / "stderr.txt").open("w") as stderr:  # a file, because what is left of its Ray holds on to it
        driver = subprocess.run(
            [sys.executable, str(TESTS / "support" / "stub_ray.py"), run.folder.uri, "3"],
            env=without_ray_settings() | {"TMPDIR": temp},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=240,
        )
    shutil.rmtree(temp, ignore_errors=True)  # what is left of its Ray is ending
    assert driver.returncode == -signal.SIGKILL, (tmp_path / "stderr.txt").read_text()
    hosts = set(driver.stdout.split())
    assert hosts
    assert all(map(is_loopback, hosts)), hosts
    done = CommitLog(run.folder).refresh()
    assert len(done) >= 3
    answers: list[ShardAnswer] = []
    run.on_ray(answers.append, should_stop=lambda: bool(answers))
    run.here()
    assert run.records() == expected


@pytest.mark.process
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_stop_keeps_what_is_finished(run: Run, expected: bytes) -> None:
    answers: list[ShardAnswer] = []
    assert not run.on_ray(answers.append, should_stop=lambda: bool(answers))
    assert 1 <= len(answers) < run.plan.shards
    at_work = [thread.name for thread in threading.enumerate()]
    assert not [name for name in at_work if "StreamingExecutor" in name or "_pump" in name], at_work
    run.here()
    assert run.records() == expected


@pytest.mark.process
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_request_that_kills_its_worker_is_an_error_record(tmp_path: Path) -> None:
    make_pictures(tmp_path / "few", 3)
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            f'{{"image":"few/p{i}.png","task":"detect","prompt":"{p}"}}\n' for i, p in enumerate(("a", DEADLY, "b"))
        )
    )
    run = Run(tmp_path / "out", tmp_path / "rows.jsonl", ())
    assert run.on_ray()
    records = [json.loads(line) for line in run.records().splitlines()]
    assert [record["error"] and record["error"]["type"] for record in records] == [None, "model", None]
    assert "worker process died" in records[1]["error"]["message"]


@pytest.mark.process
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_worker_that_cannot_begin_ends_the_run_with_its_words(run: Run) -> None:
    run.plan = replace(run.plan, fingerprint="another")
    with pytest.raises(EngineError, match=r"worker \S+: the run folder .* has another plan .* goes on from there"):
        run.on_ray()


@pytest.mark.process
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_what_is_added_runs_on_ray_too(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a shard of the first plan still open: the actors know both plans."""
    isolate(monkeypatch, tmp_path / "home")
    monkeypatch.setattr("md3cli.scale.shard_runner.FINDER", FINDER)
    md3, out = Program(monkeypatch), tmp_path / "ray.jsonl"
    command = ("detect", pictures, "--limit", "8", "-o")
    on_ray = ("--engine", "ray", "--shard-size", 2, "--workers-per-device", 2)
    assert md3(*command, out, "car", "--engine", "local", "--shard-size", 2).exit_code == 0
    run = Path(f"{out}.md3run")
    (run / "commits/00002.json").unlink()
    (run / "exported.json").unlink()
    result = md3(*command, out, "dog", "--add", *on_ray)
    assert result.exit_code == 0, result.stderr
    assert (run / "plan/added-1.json").exists()
    assert md3(*command, tmp_path / "plain.jsonl", "car", "dog").exit_code == 0
    assert out.read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    assert md3("verify", out).exit_code == 0


def is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def without_ray_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


@pytest.mark.process
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_the_command_writes_what_it_writes_without_ray(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolate(monkeypatch, tmp_path / "home")
    monkeypatch.setattr("md3cli.scale.shard_runner.FINDER", FINDER)
    md3 = Program(monkeypatch)
    command = ("detect", pictures, "car", "dog", "--limit", "12", "-o")
    assert md3(*command, tmp_path / "plain.jsonl").exit_code == 0
    result = md3(*command, tmp_path / "ray.jsonl", "--engine", "ray", "--shard-size", 2, "--workers-per-device", 2)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    assert result.stdout == ""
    assert "24 of 24 ok, 12 images in " in result.stderr


@pytest.mark.process
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_questions_about_objects_are_asked_by_actors_too(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolate(monkeypatch, tmp_path / "home")
    monkeypatch.setattr("md3cli.scale.shard_runner.FINDER", FINDER)
    md3 = Program(monkeypatch)
    asked = ("--task", "detect:3 things", "--then", "query:What {label}?", "--no-reasoning", "--nms", "0.97")
    command = ("run", pictures, *asked, "--limit", "8", "-o")
    assert md3(*command, tmp_path / "plain.jsonl").exit_code == 0
    result = md3(*command, tmp_path / "ray.jsonl", "--engine", "ray", "--shard-size", 2, "--workers-per-device", 2)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    assert len((tmp_path / "plain.jsonl").read_bytes().splitlines()) == 8 + 8 * 2, "the actors know what is hidden"
    assert md3("verify", tmp_path / "ray.jsonl").exit_code == 0


@pytest.mark.process
@pytest.mark.ray
def test_a_signal_stops_in_order_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """As a process of its own: Ray would take SIGTERM over."""
    pytest.importorskip("ray", reason="Ray is not installed (the extra md3cli[ray])")
    images = tmp_path / "images"
    images.mkdir()
    for i in range(120):
        os.link(SCENES / f"scene_{i % 12:05}.png", images / f"{i}.png")
    command = [sys.executable, "-m", "md3cli", "caption", str(images), "-m", "tiny", "-o", str(tmp_path / "out.jsonl")]
    command += ["--engine", "ray", "--shard-size", "5", "--no-cache", "--offline"]
    environment = clean_environment(tmp_path / "home")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    commits = tmp_path / "out.jsonl.md3run" / "commits"
    while process.poll() is None and len(list(commits.glob("*.json"))) < 2:
        time.sleep(0.05)
    process.terminate()
    told = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert told[0] == ""
    assert "stopped by SIGTERM" in told[1]
    assert "SIGTERM handler" not in told[1], "nothing starts a second Ray"
    assert "Traceback" not in told[1], told[1]
    plain = [argument for argument in command if argument not in ("--engine", "ray", "--shard-size", "5")]
    assert subprocess.run(plain, env=environment, capture_output=True, timeout=240).returncode == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert [record["image"] for record in records] == [f"{i}.png" for i in range(120)]


# -- without Ray ---------------------------------------------------------------------------------------


def setup_of(run: Run, **changes: Any) -> WorkerSetup:
    run.folder.store.put("sessions/mine", GO_ON)
    setup = WorkerSetup(run.folder.uri, run.plan.fingerprint, "sessions/mine", "cpu", 1, os.getcwd(), FINDER)
    return replace(setup, **changes)


def call(worker: ShardWorker, shard: int) -> ShardAnswer:
    return ShardAnswer(**{name: values[0] for name, values in worker({"shard": [shard]}).items()})


@pytest.mark.process
def test_a_worker_answers_with_the_counts_of_its_commit(run: Run) -> None:
    answer = call(ShardWorker(setup_of(run)), 3)
    assert answer == ShardAnswer(3, 5, 10, 0, worker=answer.worker)
    assert run.todo == [shard for shard in range(20) if shard != 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"session": "sessions/other"}, "is not on storage that .* shares"),
        ({"run_uri": "/nowhere/out.md3run"}, "is not on storage that .* shares"),
        ({"fingerprint": "other"}, "has another plan on"),
        ({"working_folder": "/nowhere"}, "start it in a folder that all machines share"),
        ({"finder": "stub_scale:missing"}, "unexpected AttributeError"),
    ],
)
def test_a_worker_in_the_wrong_place_says_so_and_never_raises(run: Run, changes: dict[str, Any], message: str) -> None:
    answer = call(ShardWorker(setup_of(run, **changes)), 0)
    assert re.search(message, answer.failure)
    assert len(run.todo) == run.plan.shards


def test_a_worker_stops_when_the_driver_asks(run: Run) -> None:
    worker = ShardWorker(setup_of(run))
    run.folder.store.put("sessions/mine", STOP)
    assert call(worker, 0).is_stopped
    assert len(run.todo) == run.plan.shards


@pytest.mark.parametrize(
    ("nodes", "device", "per_device", "expected"),
    [
        ([{"CPU": 96, "GPU": 8}], "auto", 1, Placement(8, 1, 1.0, "cuda", 12)),
        ([{"CPU": 96, "GPU": 8}, {"CPU": 16, "GPU": 2}, {"CPU": 64}], "cuda:0", 1, Placement(10, 1, 1.0, "cuda", 8)),
        ([{"CPU": 16, "GPU": 1}], "auto", 2, Placement(2, 1, 0.5, "cuda", 8)),
        ([{"CPU": 16}, {"CPU": 8}, {}], "auto", 1, Placement(2, 8, 0.0, "cpu", 8)),
        ([{"CPU": 8}], "cpu", 4, Placement(4, 2, 0.0, "cpu", 2)),
        ([{"CPU": 96, "GPU": 8}], "cpu", 1, Placement(1, 96, 0.0, "cpu", 16)),
        ([{"CPU": 2}], "auto", 8, Placement(2, 1, 0.0, "cpu", 1)),
    ],
)
def test_what_workers_get(nodes: list[dict[str, float]], device: str, per_device: int, expected: Placement) -> None:
    assert place(nodes, device, per_device) == expected


def test_a_ray_that_does_not_start_leaves_the_signals_as_they_were() -> None:
    def start() -> None:
        with _own_sigterm():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does, but to end the program at once
            raise ValueError("no Ray")

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(ValueError, match="no Ray"):
            start()
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("error", "is_connected", "is_told"),
    [(ConnectionError(), False, False), (ConnectionError(), True, True), (ValueError(), False, True)],
)
def test_threads_that_die_of_the_cluster_that_was_left_are_not_told(
    error: Exception, is_connected: bool, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[BaseException | None] = []
    monkeypatch.setattr("threading.excepthook", lambda died: told.append(died.exc_value))
    ray = SimpleNamespace(
        shutdown=lambda: None,
        is_initialized=lambda: is_connected,
        exceptions=SimpleNamespace(RaySystemError=ConnectionError),
    )

    def ask() -> None:
        raise error

    _shut_down(ray)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert told == [error] * is_told


def test_gpus_asked_for_where_there_are_none() -> None:
    with pytest.raises(EngineError, match="has no GPU"):
        place([{"CPU": 4}], "cuda")


def test_without_ray_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'md3cli\[ray\]'"):
        check_installed()


def test_without_the_extra_nothing_is_begun(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path / "home")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = Program(monkeypatch)("caption", pictures, "-o", tmp_path / "out.jsonl", "--engine", "ray")
    assert result.exit_code == 1
    assert result.stderr == ("error: --engine ray needs an optional part; install it with: pip install 'md3cli[ray]'\n")
    assert not list(tmp_path.glob("out*.md3run"))


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: .*refused"), ("ray://head:10001", "ray job submit")],
)
def test_a_cluster_that_is_not_there(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("md3cli.scale.ray_cluster.check_installed", lambda: None)
    with pytest.raises(Md3Error, match=message), connected(address):
        pass


def test_a_signal_while_ray_starts_is_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own handler, in place for that time, ends with status 15."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:

        def start_and_be_stopped() -> None:
            with _own_sigterm():
                signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(EngineError, match="stopped while Ray was being started"):
            start_and_be_stopped()
        assert received == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert len(received) == 2, "the program's handler is back"
    finally:
        signal.signal(signal.SIGTERM, before)
