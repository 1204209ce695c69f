"""--overwrite of a run of many processes: the old records stay until there is a new one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from program import STUB_MD3, clean_environment, make_pictures

pytestmark = pytest.mark.process

MANY = ("--devices", "cpu", "--no-progress")


def run(folder: Path, *arguments: object, own: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A run as a process of its own, the stub in the model's place."""
    command = [sys.executable, str(STUB_MD3), *own, *map(str, arguments)]
    environment = clean_environment(folder / "home")
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def state(folder: Path) -> dict[str, bytes]:
    """What stands in OUTPUT and in its run folder, but for notes of starts."""
    out = folder / "out"
    files = (path for path in out.rglob("*") if path.is_file())
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if "starts/" not in name and not name.endswith("lock")}


def ids_of(folder: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "out/records.jsonl").read_text().splitlines()]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    make_pictures(tmp_path / "pictures", 3)
    done = run(tmp_path, "caption", "pictures", "-o", "out/", "-f", "csv", *MANY)
    assert done.returncode == 0, done.stderr
    return tmp_path


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
    finished: Path, asked: str, options: tuple[str, ...], is_exported: bool
) -> None:
    (finished / "nothing").mkdir()
    make_pictures(finished / "broken", 2)
    (finished / "broken/p0.png").write_bytes(b"broken")
    if not is_exported:  # then the run folder has the only copy
        (finished / "out/records.jsonl").unlink()
        (finished / "out/.md3run/exported.json").unlink()
    before = state(finished)
    program = [sys.executable, "-m", "md3cli", "caption", asked, "--model", "tiny", "-o", "out/", "--overwrite"]
    failed = subprocess.run(
        [*program, *MANY, *options],
        cwd=finished,
        env=clean_environment(finished / "home"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert failed.returncode in (1, 2), failed.stderr
    assert "unexpected" not in failed.stderr
    assert state(finished) == before


def test_a_start_over_replaces_all(finished: Path) -> None:
    before = ids_of(finished)
    done = run(finished, "caption", "pictures", "--length", "short", "-o", "out/", "--overwrite", *MANY)
    assert done.returncode == 0, done.stderr
    assert not (finished / "out/.md3run-former").exists()
    assert len(ids_of(finished)) == 3
    assert not set(ids_of(finished)) & set(before)
    assert json.loads((finished / "out/run.json").read_bytes())["identity"]["requests"][0]["length"] == "short"
    assert not (finished / "out/records.csv").exists(), "of the former run"


def test_what_a_killed_start_over_set_aside_comes_back(finished: Path) -> None:
    before = state(finished)
    run_folder = finished / "out/.md3run"
    run_folder.rename(finished / "out/.md3run-former")
    shutil.copytree(finished / "out/.md3run-former/plan", run_folder / "plan")  # a new plan, and no record of it
    again = run(finished, "caption", "pictures", "-o", "out/", "-f", "csv")
    assert again.returncode == 0, again.stderr
    after = state(finished)
    assert after["records.jsonl"] == before["records.jsonl"]
    assert not (finished / "out/.md3run-former").exists()


@pytest.mark.parametrize("many", [(), MANY])
@pytest.mark.parametrize(
    "at", [8, 20, 33, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 4, 12, 16, 24, 28, 38, 44, 50))]
)
def test_a_start_over_that_is_killed_leaves_old_or_new_records(finished: Path, at: int, many: tuple[str, ...]) -> None:
    asked = ("caption", "pictures", "--length", "short", "-o", "out/", "-f", "csv", "--overwrite", *many)
    old = (finished / "out/records.jsonl").read_bytes()
    run(finished, *asked, own=("--fault", f"kill:{at}:{finished / 'out'}"))
    now = finished / "out/records.jsonl"
    if now.exists():  # else they are in the run folder, where records are before the export
        assert now.read_bytes() == old or not set(ids_of(finished)) & {
            json.loads(line)["id"] for line in old.splitlines()
        }
        assert now.stat().st_size
    else:
        assert any((finished / "out/.md3run/wip").iterdir()) or any((finished / "out/.md3run/parts").iterdir())
    assert run(finished, *asked).returncode == 0
    assert len(ids_of(finished)) == 3
    assert b"short" in (finished / "out/run.json").read_bytes()
    assert run(finished, *asked[: -1 - len(many)]).returncode == 0, "and it goes on like any run"


def test_records_of_bad_lines_go_once_the_lines_are_mended(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 5)
    good = [json.dumps({"image": f"pictures/p{i}.png"}) for i in range(5)]
    manifest, lines = tmp_path / "rows.jsonl", [good[0], "not json", good[2], "nor this", "nor that"]

    def outcome(output: str, *options: str) -> tuple[int, str]:
        manifest.write_text("".join(f"{line}\n" for line in lines))
        status = run(tmp_path, "caption", "rows.jsonl", "-o", output, *options, *MANY).returncode
        return status, (tmp_path / output).read_text()

    assert outcome("grown.jsonl")[0] == 3
    for number, line in ((1, good[1]), (4, good[4]), (3, good[3])):
        lines[number] = line
        assert outcome("grown.jsonl") == outcome(f"clean-{number}.jsonl")
        assert outcome("grown.jsonl")[0] == (0 if number == 3 else 3)
    lines[2] = "broken again"
    assert outcome("grown.jsonl", "--limit", "1")[1].count("\n") == 5, "what INPUT does not reach stays"
