"""A small finished run on disk for every test of a format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finished_runs import Run, detect_records, draw_pictures

from md3cli.finished.run_json import seal_of


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run without records yet: its pictures, and run.json that says where they are."""
    made = Run(tmp_path / "run", tmp_path / "pictures")
    made.folder.mkdir()
    draw_pictures(made.root)
    root = str(made.root)
    (made.folder / "run.json").write_text(json.dumps({"schema": "md3-run/1", "root": root, "seal": seal_of(root)}))
    return made


@pytest.fixture
def detect_run(run: Run) -> Run:
    """The run with boxes of two labels on every picture but one."""
    run.write(detect_records())
    return run
