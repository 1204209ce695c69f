"""The `md3` program for tests, with a stub in the model's place: in this process, or in one of its own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stub_engine import StubModel
from typer.testing import CliRunner, Result

import md3cli.pipeline
from md3cli.cli import app

TESTS = Path(__file__).parents[1]
STUB_MD3 = Path(__file__).with_name("stub_md3.py")


class Program:
    """Runs `md3 ...` in this process; `models` are the stubs that were found, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models: list[StubModel] = []
        run = functools.partial(md3cli.pipeline.run, find=self._find)
        monkeypatch.setattr(md3cli.pipeline, "run", run)
        monkeypatch.setattr("md3cli.run.feed.num_auto_workers", lambda: 0)  # unless --workers asks for more

    def _find(self, options: Any) -> StubModel:
        self.models.append(StubModel(options))
        return self.models[-1]

    def __call__(self, *arguments: object, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, prog_name="md3")

    @property
    def num_answered(self) -> int:
        """What the engine of the last run was asked; 0 where it was not even loaded."""
        engine = self.models[-1].engine
        return 0 if engine is None else engine.num_answered


def make_pictures(folder: Path, count: int, *, side: int = 24) -> Path:
    """`count` small PNGs, all different: `p0.png`, `p1.png`, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (side + i % 7, side), (i % 256, i // 256, 99)).save(folder / f"p{i}.png")
    return folder


def records_of(text: str | bytes | Path) -> list[dict[str, Any]]:
    """The records of JSON Lines, from text or from a file."""
    content = text.read_bytes() if isinstance(text, Path) else text
    return [json.loads(line) for line in content.splitlines()]


def start(*arguments: object, step_s: float = 0.0, **settings: Any) -> subprocess.Popen[bytes]:
    """`md3 ...` with the stub as a process of its own."""
    command = [
        sys.executable,
        str(STUB_MD3),
        "--step-seconds",
        str(step_s),
        *map(str, arguments),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **(pipes | settings))


def isolate(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """For this process: no settings of md3 but what the test sets, folders under `home`."""
    wanted = clean_environment(home)
    for name in os.environ.keys() - wanted.keys():
        monkeypatch.delenv(name)
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, wanted[name])


def clean_environment(home: Path) -> dict[str, str]:
    """The environment without settings of md3, its folders under `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MD3_", "XDG_"))}
    return kept | {"XDG_CONFIG_HOME": str(home / "config"), "XDG_CACHE_HOME": str(home / "cache")}


def beside_pictures(monkeypatch: pytest.MonkeyPatch, folder: Path, count: int = 3) -> Program:
    """The program in a new working folder with `count` pictures in `img`, its settings apart from the user's."""
    isolate(monkeypatch, folder / "home")
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    make_pictures(Path("img"), count)
    return Program(monkeypatch)
