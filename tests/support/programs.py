"""Environments of their own for the real programs that slow tests start: an Ultralytics, a Label Studio.

    STUDIO = "label_studio"                      # tests/programs/label_studio.txt lists what pip installs, pinned
    pytestmark = programs.MARKS                  # slow; making an environment may take minutes

    def test_it_loads(tmp_path):
        program = programs.program(STUDIO)       # made now, or kept from an earlier run; else the test is skipped
        assert program.run(SCRIPT, tmp_path) == {"tasks": 3}
        subprocess.run([program.bin / "label-studio", "--version"], env=program.environment)

They are kept in the folder that MD3_PROGRAMS names, else in `md3-programs` of the user's cache; it may be deleted at
any time. An environment's name has the hash of its list: another text makes another environment. It is complete where
it has the file FINISHED, which is written last: what a killed pip has left is made anew. Knows nothing of any program.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

LISTS = Path(__file__).parents[1] / "programs"
FOLDER = Path(os.environ["TEST_PROGRAMS"])  # conftest.py takes it from MD3_PROGRAMS
FINISHED = "finished"
PIP_TIMEOUT_S = 1200
MARKS = [pytest.mark.slow, pytest.mark.process, pytest.mark.timeout(PIP_TIMEOUT_S + 600)]

_reasons: dict[Path, str] = {}  # why an environment cannot be had: the next test need not wait for the network again


@dataclass(frozen=True)
class Program:
    """A finished environment. What runs in it sees nothing of this Python's, and none of the user's settings."""

    folder: Path

    @property
    def bin(self) -> Path:
        """The folder of its commands."""
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.bin / ("python.exe" if os.name == "nt" else "python")

    @property
    def environment(self) -> dict[str, str]:
        """What its processes need: its commands first in PATH, and a home that is removed when pytest ends."""
        home = Path(os.environ["XDG_CACHE_HOME"]).parent / self.folder.name
        home.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MD3_"))}
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return kept | {"PATH": path, "HOME": str(home), "USERPROFILE": str(home), "PYTHONUTF8": "1"}

    def run(self, script: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Any:
        """Run a Python text in the environment, with `arguments` in sys.argv[1:].

        Returns what the last line of its stdout says in JSON; a script that fails, fails the test with its stderr.
        """
        command = [str(self.python), "-c", script, *map(str, arguments)]
        variables = self.environment | dict(environment or {})
        done = subprocess.run(command, env=variables, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return json.loads(done.stdout.splitlines()[-1])


def program(name: str, *pip_options: str) -> Program:
    """Return the environment of tests/programs/NAME.txt, made if it is not there; skip the test where it cannot be.

    `pip_options` go to `pip install` and count as part of the list: "--no-deps" where the list names everything.
    """
    requirements = LISTS / f"{name}.txt"
    version = "{}.{}".format(*sys.version_info)
    text = "\0".join([version, *pip_options, requirements.read_text(encoding="utf-8")])
    folder = FOLDER / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if folder not in _reasons and not (folder / FINISHED).exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # of two that want the same, one makes it and one waits
            if not (folder / FINISHED).exists():
                _make(folder, requirements, pip_options)
    if folder in _reasons:
        pytest.skip(f"{name} cannot be installed: {_reasons[folder]}")
    return Program(folder)


def _make(folder: Path, requirements: Path, pip_options: tuple[str, ...]) -> None:
    """Make an environment where it will stay, since its commands name their interpreter by its full path."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [Program(folder).python, "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check"]
    command = [*install, *pip_options, "-r", requirements]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        _reasons[folder] = f"pip took longer than {PIP_TIMEOUT_S} s"
        return
    if done.returncode == 0:
        (folder / FINISHED).touch()
    else:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        _reasons[folder] = lines[-1] if lines else f"pip ended with status {done.returncode}"
        shutil.rmtree(folder, ignore_errors=True)
