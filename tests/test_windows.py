"""Where `fcntl`, `resource` and `os.O_NONBLOCK` do not exist, md3 does everything but decode in child processes.

The modules are hidden from md3cli's own imports only (tests/support/without_posix.py); this machine has them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from program import STUB_MD3, clean_environment, make_pictures, records_of

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]
HIDING = Path(__file__).parent / "support" / "without_posix.py"
PACKAGE = ROOT / "md3cli"
# What needs another package than md3cli's own dependencies, or a GPU's.
LEFT_OUT = ("md3cli.model.kernels", "md3cli.scale.ray", "md3cli.model.hf")

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import md3cli.system, os
assert not hasattr(md3cli.system.os, "O_NONBLOCK") and not hasattr(md3cli.system, "fcntl")
assert hasattr(os, "O_NONBLOCK")
"""


def modules() -> list[str]:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(PACKAGE.rglob("*.py"))]
    return [name for name in names if not name.startswith(LEFT_OUT) and not name.endswith("__main__")]


def without_posix(
    folder: Path, script: Path, *arguments: object, hiding: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HIDING), *hiding, str(script), *map(str, arguments)]
    environment = clean_environment(folder / "home") | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def md3(folder: Path, *arguments: object, hiding: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The program with a stub in the model's place."""
    return without_posix(folder, STUB_MD3, *arguments, hiding=hiding)


def test_every_module_is_imported(tmp_path: Path) -> None:
    script = tmp_path / "import_all.py"
    script.write_text(IMPORT_ALL)
    done = without_posix(tmp_path, script, *modules())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["estimate", "--help"], ["models", "info", "tiny"], ["cache", "info"]]
)
def test_commands_without_pictures(tmp_path: Path, arguments: list[str]) -> None:
    done = md3(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("options", [[], ["--devices", "cpu"]])
def test_a_run_then_its_exports(tmp_path: Path, options: list[str]) -> None:
    make_pictures(tmp_path / "img", 3)
    done = md3(tmp_path, "detect", "img", "cat", "-o", "out.jsonl", *options)
    assert done.returncode == 0, done.stderr
    assert len(records_of(tmp_path / "out.jsonl")) == 3
    for format, name in (("coco", "out.json"), ("csv", "out.csv"), ("html", "report.html")):
        done = md3(tmp_path, "export", "out.jsonl", "-f", format, "-o", name)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name).stat().st_size
    assert md3(tmp_path, "verify", "out.jsonl").returncode == 0


def test_a_second_run_goes_on_where_the_first_was_done(tmp_path: Path) -> None:
    make_pictures(tmp_path / "img", 2)
    for count in (2, 3):
        make_pictures(tmp_path / "img", count)
        done = md3(tmp_path, "caption", "img", "-o", "out.jsonl")
        assert done.returncode == 0, done.stderr
        assert len(records_of(tmp_path / "out.jsonl")) == count


def test_where_no_child_can_be_started_a_decoding_command_says_what_to_do(tmp_path: Path) -> None:
    make_pictures(tmp_path / "img", 1)
    done = md3(tmp_path, "caption", "img", "-o", "out.jsonl", hiding=("--no-sockets",))
    assert done.returncode == 1
    assert "run md3 on Linux or macOS (on Windows: in WSL" in done.stderr
    assert "Traceback" not in done.stderr


def test_commands_that_decode_nothing_need_no_child(tmp_path: Path) -> None:
    make_pictures(tmp_path / "img", 2)
    assert md3(tmp_path, "caption", "img", "-o", "out.jsonl").returncode == 0
    done = md3(tmp_path, "export", "out.jsonl", "-f", "csv", "-o", "out.csv", hiding=("--no-sockets",))
    assert done.returncode == 0, done.stderr
    done = md3(tmp_path, "verify", "out.jsonl", hiding=("--no-sockets",))
    assert done.returncode == 0, done.stderr
    doctor = md3(tmp_path, "doctor", hiding=("--no-sockets",))
    assert "in WSL" in doctor.stdout
    assert "Traceback" not in doctor.stderr
