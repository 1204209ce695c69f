"""Records with a hostile value somewhere, through every format and command: read or named, never unexpected."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finished_runs import CAR, Run, failure, record, write_records

from md3cli.errors import Md3Error
from md3cli.evaluate import compare_runs
from md3cli.exporters import FORMATS
from md3cli.report.build import ReportOptions, write_report

pytestmark = pytest.mark.process

BOX = {key: CAR[key] for key in ("x_min", "y_min", "x_max", "y_max")}
GROUNDING = [{"start_idx": 0, "end_idx": 1, "points": [[0.1, 0.2]]}]
REASONING = {"text": "abc", "grounding": GROUNDING, "finish_reason": "stop"}
GOOD = [
    record("a/photo.jpg", "detect", "car", objects=[CAR]),
    record(
        "a/photo.jpg", "segment", "dog", segments=[{"label": "dog", "svg_path": "M 0 0 L 1 0 L 1 1 Z", "bbox": BOX}]
    ),
    record("a/photo.jpg", "point", "nose", points=[{"label": "nose", "x": 0.1, "y": 0.2, "score": 0.5}]),
    record("b/photo.jpg", "query", "Is it?", answer="yes", reasoning=REASONING, choices={"yes": 0.5}),
    record("b/photo.jpg", "caption", length="short", caption="x", meta={"a": [1]}),
    failure("c.png", "detect", "car"),
]
HOSTILE = [
    None, True, 0, -1, 0.5, 10**400, 2**63, 1e308, -1e308, 1e-320, math.nan, math.inf, "", "x", "\0", "\ud800",
    "../../x", "/etc/passwd", "http://h.example/a" * 3, "a" * 70_000, "a/" * 3000 + "x.png", "é" * 300, "\x1b[31m",
    "=1+1", "M 1e5 1e5 L 9e9 1", "%s{0}", [], {}, [[]], [None], {"": None}, {"a": {"b": [1]}},
]  # fmt: skip


def places(value: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to every value inside `value`."""
    if above:
        yield above
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*above, key))


def with_hostile_value(choose: random.Random) -> list[dict[str, Any]]:
    lines = copy.deepcopy(GOOD)
    place: Any = choose.choice(lines)
    *above, last = choose.choice(list(places(place)))
    for key in above:
        place = place[key]
    if choose.random() < 0.1:
        del place[last]
    else:
        place[last] = choose.choice(HOSTILE)
    return lines


@pytest.mark.parametrize("seed", range(24))
def test_a_hostile_value_is_read_or_named(run: Run, seed: int) -> None:
    run.records.write_text("".join(json.dumps(line) + "\n" for line in with_hostile_value(random.Random(seed))))
    others = write_records(run.folder / "others.jsonl", GOOD)
    for number, format in enumerate(FORMATS):
        try:
            _, out = run.export(format, f"out{number}", keypoints=True, embed_images=True)
        except Md3Error:
            continue
        if format in ("coco", "jsonl"):
            assert not {"NaN", "Infinity"} & set(out.read_text(encoding="utf-8").replace(",", ":").split(":"))
    for read in (
        lambda: write_report(run.records, run.folder / "report.html", ReportOptions(thumbnail_px=64)),
        lambda: compare_runs(run.records, others, []),
    ):
        try:
            read()
        except Md3Error:
            continue
    assert not [path for path in Path(run.folder.parent).rglob("passwd*") if not path.is_relative_to(run.folder)]
