"""What comes from files and models, printed on a real terminal: none of it may steer the terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

HOSTILE = "\x1b]0;owned\x07 \x9b2J \u202egnp.exe \r\x08 \u2028 \u061c \ufff9"
STEERING = [b"\x1b]", b"\x07", b"\x08", *(char.encode() for char in "\x9b\u202e\u2028\u061c\ufff9")]
CAR = {"label": HOSTILE, "x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6, "score": 0.9}
HEAD = {"schema": "md3/1", "width": 120, "height": 80, "model": "tiny@1" + HOSTILE, "meta": {}, "error": None}

pty = pytest.importorskip("pty")


def on_a_terminal(folder: Path, *arguments: str) -> tuple[int, bytes]:
    """Exit status of the command and all that its terminal was sent."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "md3cli", *arguments]
    process = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    return process.wait(), shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records whose every text is hostile, under a hostile name, and a ground truth of the same names."""
    made = tmp_path_factory.mktemp("terminal")
    image = f"d/{HOSTILE}.png"
    answer = {"answer": HOSTILE, "reasoning": {"text": HOSTILE, "grounding": []}}
    failure = {"type": HOSTILE, "message": HOSTILE, "retry": False}
    lines = [
        {**HEAD, "id": "1", "image": image, "task": "detect", "prompt": HOSTILE, "objects": [CAR]},
        {**HEAD, "id": "2", "image": image, "task": "query", "prompt": HOSTILE, **answer},
        {**HEAD, "id": "3", "image": "b" + image, "task": "detect", "prompt": HOSTILE, "error": failure},
    ]
    other = [{**lines[0], "objects": []}, {**lines[1], "answer": "other " + HOSTILE}, lines[2]]
    for name, records in ((f"r{HOSTILE}.jsonl", lines), ("other.jsonl", other)):
        (made / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in records))
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [12, 16, 48, 32], "area": 1536, "iscrowd": 0}
    truth = {
        "images": [{"id": 1, "file_name": image, "width": 120, "height": 80}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": HOSTILE}, {"id": 2, "name": "x" + HOSTILE}],
    }
    (made / "gt.json").write_text(json.dumps(truth))
    return made


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "-f", "csv"],
        ["export", "-f", "coco"],
        ["export", "-f", "jsonl"],
        ["export", "-f", "yolo", "-o", "yolo" + HOSTILE],
        ["export", "-f", "overlay", "--root", ".", "-o", "overlay"],
        ["report", "-o", f"page{HOSTILE}.html"],
        ["eval", "--compare", "other.jsonl"],
        ["eval", "--compare", "other.jsonl", "--json"],
        ["eval", "--gt", "gt.json"],
        ["eval", "--gt", "gt.json", "--json", "-o", "sheet" + HOSTILE],
        ["eval", "--gt", f"missing{HOSTILE}.json"],
        ["status"],
        ["verify"],
    ],
    ids=lambda arguments: " ".join(arguments).encode("unicode_escape").decode(),
)
def test_nothing_steers_the_terminal(folder: Path, arguments: list[str]) -> None:
    command, *options = arguments
    _, shown = on_a_terminal(folder, command, f"r{HOSTILE}.jsonl", *options)
    assert shown.strip()
    assert [steering for steering in STEERING if steering in shown] == []


@pytest.mark.parametrize("format", ["coco", "jsonl"])
def test_a_document_on_a_terminal_says_the_same(folder: Path, format: str) -> None:
    arguments = ["export", f"r{HOSTILE}.jsonl", "-f", format]
    status, shown = on_a_terminal(folder, *arguments)
    assert status == 0
    command = [sys.executable, "-m", "md3cli", *arguments]
    piped = subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout.decode()
    assert "\u202e" in piped
    lines = [line for line in shown.decode().replace("\r\n", "\n").split("\n") if not line.startswith("note:")]
    as_one = format == "coco"
    documents = ["".join(text) if as_one else text for text in (lines, piped.split("\n"))]
    assert _parsed(documents[0]) == _parsed(documents[1])


def _parsed(text: str | list[str]) -> object:
    return json.loads(text) if isinstance(text, str) else [json.loads(line) for line in text if line]
