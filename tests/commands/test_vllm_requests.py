"""Requests in the shape of vLLM's Moondream 3 processor (`task`, `object`, `image`, `max_objects`), run as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from program import Program, make_pictures, records_of

REQUESTS: list[dict[str, Any]] = [
    {"task": "detect", "object": "car", "image": "pictures/p0.png", "max_objects": 10},
    {"task": "point", "object": "nose", "image": "pictures/p1.png"},
    {"task": "detect", "object": "dog", "image": "pictures/p0.png", "max_objects": 1, "request_id": "r7"},
    {"task": "segment", "object": "cat", "image": "pictures/p2.png"},
    {"task": "detect", "object": "car", "image": "pictures/p1.png", "max_objects": 0},
    {"task": "detect", "object": "", "image": "pictures/p1.png"},
]


@pytest.fixture
def md3(md3: Program, tmp_path: Path) -> Program:
    make_pictures(tmp_path / "pictures", 3)
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in REQUESTS))
    return md3


def test_each_line_is_a_request_and_other_keys_are_carried(md3: Program) -> None:
    result = md3("run", "requests.jsonl", "--map", "prompt=object")
    assert result.exit_code == 3, result.stderr  # the last two lines
    records = records_of(result.stdout)
    assert [(record["task"], record["prompt"], record["image"]) for record in records[:5]] == [
        (row["task"], row["object"], row["image"]) for row in REQUESTS[:5]
    ]
    assert [record["meta"] for record in records] == [{}, {}, {"request_id": "r7"}, {}, {}, {}]
    assert [record["error"] is None for record in records] == [True] * 4 + [False] * 2
    for record, told in zip(records[4:], ("max_objects", "needs a prompt"), strict=True):
        assert record["error"]["type"] == "bad_request"
        assert told in record["error"]["message"]


def test_ids_are_those_of_the_same_requests_typed(md3: Program) -> None:
    row = {"task": "detect", "object": "car", "image": "p0.png", "max_objects": 10}
    Path("pictures/requests.jsonl").write_text(json.dumps(row) + "\n")
    (asked,) = records_of(md3("run", "pictures/requests.jsonl", "--map", "prompt=object").stdout)
    (typed,) = records_of(md3("detect", "pictures/p0.png", "car", "--max-objects", "10").stdout)
    assert asked == typed


def test_they_come_by_stdin_too(md3: Program) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in REQUESTS[:4])
    result = md3("run", "-", "--map", "prompt=object", stdin=lines)
    assert result.exit_code == 0, result.stderr
    assert [record["prompt"] for record in records_of(result.stdout)] == ["car", "nose", "dog", "cat"]
