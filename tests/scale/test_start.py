"""--overwrite of a run of many processes: the old records stay until there is a new one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import stub_scale
from forked import Forks
from program import STUB_MD3, Program, clean_environment, isolate, make_pictures
from typer.testing import CliRunner

from md3cli.cli import app

pytestmark = pytest.mark.process

MANY = ("--devices", "cpu", "--no-progress")
HERE = ("--engine", "local", "--no-progress")  # a run folder as well, but no worker processes


def state(folder: Path) -> dict[str, bytes]:
    """What stands in OUTPUT and in its run folder, but for notes of starts."""
    out = folder / "out"
    files = (path for path in out.rglob("*") if path.is_file())
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if "starts/" not in name and not name.endswith("lock")}


def ids_of(folder: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "out/records.jsonl").read_text().splitlines()]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program in this process; what workers it starts find the stub too."""
    isolate(monkeypatch, tmp_path / "home")
    monkeypatch.setattr("md3cli.scale.shard_runner.FINDER", stub_scale.FINDER)
    monkeypatch.setenv("PYTHONPATH", str(STUB_MD3.parent))
    return Program(monkeypatch)


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that a worker process has finished; `finished` puts it back as it was."""
    folder = tmp_path_factory.mktemp("finished") / "now"
    make_pictures(folder / "pictures", 3)
    command = [sys.executable, str(STUB_MD3), "caption", "pictures", "-o", "out/", "-f", "csv", *MANY]
    environment = clean_environment(folder / "home")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder, folder.with_name("kept"))
    return folder


@pytest.fixture
def finished(run_once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a finished run in `out`."""
    shutil.rmtree(run_once)
    shutil.copytree(run_once.with_name("kept"), run_once)
    monkeypatch.chdir(run_once)
    return run_once


@pytest.mark.parametrize("is_exported", [True, False])
@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ("pictures", ("--include", "*.tif")),  # nothing to annotate is left
        ("nothing", ()),
        ("pictures", ("--adapter", "nowhere")),
        ("pictures", ("--device", "cuda", "--devices", "cuda:7")),
        ("broken", ("--devices", "cuda:7")),  # its failures come before the device is known to be missing
    ],
)
def test_a_start_over_that_fails_leaves_all_as_it_was(
    finished: Path, asked: str, options: tuple[str, ...], is_exported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolate(monkeypatch, finished / "home")
    (finished / "nothing").mkdir()
    make_pictures(finished / "broken", 2)
    (finished / "broken/p0.png").write_bytes(b"broken")
    if not is_exported:  # then the run folder has the only copy
        (finished / "out/records.jsonl").unlink()
        (finished / "out/.md3run/exported.json").unlink()
    before = state(finished)
    asks = ["caption", asked, "--model", "tiny", "-o", "out/", "--overwrite", *MANY, *options]
    failed = CliRunner().invoke(app, asks, prog_name="md3")
    assert failed.exit_code in (1, 2), failed.stderr
    assert "unexpected" not in failed.stderr
    assert state(finished) == before


def test_a_start_over_replaces_all(finished: Path, program: Program) -> None:
    before = ids_of(finished)
    done = program("caption", "pictures", "--length", "short", "-o", "out/", "--overwrite", *MANY)
    assert done.exit_code == 0, done.stderr
    assert not (finished / "out/.md3run-former").exists()
    assert len(ids_of(finished)) == 3
    assert not set(ids_of(finished)) & set(before)
    assert json.loads((finished / "out/run.json").read_bytes())["identity"]["requests"][0]["length"] == "short"
    assert not (finished / "out/records.csv").exists(), "of the former run"


def test_what_a_killed_start_over_set_aside_comes_back(finished: Path, program: Program) -> None:
    before = state(finished)
    run_folder = finished / "out/.md3run"
    run_folder.rename(finished / "out/.md3run-former")
    shutil.copytree(finished / "out/.md3run-former/plan", run_folder / "plan")  # a new plan, and no record of it
    again = program("caption", "pictures", "-o", "out/", "-f", "csv")
    assert again.exit_code == 0, again.stderr
    after = state(finished)
    assert after["records.jsonl"] == before["records.jsonl"]
    assert not (finished / "out/.md3run-former").exists()


@pytest.mark.parametrize("many", [(), MANY])
@pytest.mark.parametrize(
    "at", [8, 20, 33, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 4, 12, 16, 24, 28, 38, 44, 50))]
)
def test_a_start_over_that_is_killed_leaves_old_or_new_records(
    finished: Path, program: Program, forks: Forks, at: int, many: tuple[str, ...]
) -> None:
    asked = ("caption", "pictures", "--length", "short", "-o", "out/", "-f", "csv", "--overwrite", *many)
    old = (finished / "out/records.jsonl").read_bytes()
    fault = ("--fault", f"kill:{at}:{finished / 'out'}")
    killed = forks(*fault, *asked, env=clean_environment(finished / "home"))
    assert killed.returncode in (0, -signal.SIGKILL), killed.stderr
    now = finished / "out/records.jsonl"
    if now.exists():  # else they are in the run folder, where records are before the export
        assert now.read_bytes() == old or not set(ids_of(finished)) & {
            json.loads(line)["id"] for line in old.splitlines()
        }
        assert now.stat().st_size
    else:
        assert any((finished / "out/.md3run/wip").iterdir()) or any((finished / "out/.md3run/parts").iterdir())
    assert program(*asked).exit_code == 0
    assert len(ids_of(finished)) == 3
    assert b"short" in (finished / "out/run.json").read_bytes()
    assert program(*asked[: -1 - len(many)]).exit_code == 0, "and it goes on like any run"


def test_records_of_bad_lines_go_once_the_lines_are_mended(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "pictures", 5)
    good = [json.dumps({"image": f"pictures/p{i}.png"}) for i in range(5)]
    manifest, lines = tmp_path / "rows.jsonl", [good[0], "not json", good[2], "nor this", "nor that"]

    def outcome(output: str, *options: str) -> tuple[int, str]:
        manifest.write_text("".join(f"{line}\n" for line in lines))
        status = program("caption", "rows.jsonl", "-o", output, *options, *HERE).exit_code
        return status, (tmp_path / output).read_text()

    assert outcome("grown.jsonl")[0] == 3
    for number, line in ((1, good[1]), (4, good[4]), (3, good[3])):
        lines[number] = line
        assert outcome("grown.jsonl") == outcome(f"clean-{number}.jsonl")
        assert outcome("grown.jsonl")[0] == (0 if number == 3 else 3)
    lines[2] = "broken again"
    assert outcome("grown.jsonl", "--limit", "1")[1].count("\n") == 5, "what INPUT does not reach stays"
