"""The examples about scoring and reviewing run as they stand; a stub takes the model's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from report_runs import found, record

pytestmark = pytest.mark.process

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples"


@pytest.fixture
def start(tmp_path):
    """Run an example; what it printed. `md3` is the program with a stub for the model."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "md3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{TESTS}/support/stub_md3.py" "$@"\n')
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for program in folder.iterdir():
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}

    def run(name, *arguments):
        interpreter = "bash" if name.endswith(".sh") else sys.executable
        command = [interpreter, EXAMPLES / name, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_score(start, tmp_path):
    printed = start("score.sh", tmp_path / "scores")
    assert printed.startswith("boxes: 24 images, 72 requests, 0 failed")
    assert json.loads((tmp_path / "scores/eval/eval.json").read_text())["sections"][0]["name"] == "boxes"
    assert (tmp_path / "scores/eval/boxes-pr.png").is_file()
    assert "Boxes by ground truth" in (tmp_path / "scores/report.html").read_text()


def test_compare_runs(start, tmp_path):
    assert start("compare_runs.sh", tmp_path / "out").startswith("compared: ")


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.jsonl"
    scores = {"a.jpg": 0.9, "b.jpg": 0.2, "c.jpg": 0.5}
    boxes = {name: [found("car", (0, 0, 0.5, 0.5), score)] for name, score in scores.items()}
    lines = [record(name, "detect", "car", objects=objects) for name, objects in boxes.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_least_sure(start, records):
    assert start("least_sure.py", records, "--count", 2) == "0.200  car  b.jpg\n0.500  car  c.jpg\n"


def test_apply_marks(start, records, tmp_path):
    ids = [json.loads(line)["id"] for line in records.read_text().splitlines()]
    marks = tmp_path / "run.marks.jsonl"
    marks.write_text(json.dumps({"id": ids[0], "mark": "right"}) + "\n" + json.dumps({"id": ids[1], "mark": "wrong"}))

    def kept(*options):
        return [json.loads(line)["id"] for line in start("apply_marks.py", records, marks, *options).splitlines()]

    assert kept() == [ids[0], ids[2]]
    assert kept("--only-right") == [ids[0]]
