"""Records with a hostile value somewhere, through every format and command: read or named, never unexpected."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from finished_runs import CAR, Run, failure, record, write_records
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import Md3Error
from md3cli.evaluate import compare_runs
from md3cli.exporters import FORMATS
from md3cli.finished.tidied import put_back, tidied_record
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


def as_md3_writes(task: str, **result: Any) -> bytes:
    size = {"width": 640, "height": 480}
    asked = {"schema": "md3/1", "id": "0" * 32, "image": "a.jpg", **size, "task": task, "prompt": "car"}
    used = {"sha256": "0" * 64, "finish_reason": "stop", "tokens": {"prompt": 738, "output": 31}}
    ends = {"model": "m@1", "meta": {"a": 1.5}, "error": None}
    return json.dumps(asked | result | used | ends, separators=(",", ":")).encode() + b"\n"


ANSWERS = [as_md3_writes("detect", objects=[CAR, CAR]), as_md3_writes("query", answer="yes")]


def made_of(read: Callable[[bytes], dict[str, Any]], line: bytes) -> str:
    """What a reader makes of a line: the record with its keys in order, or the refusal."""
    try:
        return repr(read(line))  # tells 1 from 1.0 and True, as equality does not
    except ValueError as error:
        return f"refused: {error}"


NUMBERS = st.one_of(
    st.floats(), st.integers(), st.sampled_from([0, -0.0, 1e6, 1.0000001e6, 2**31 - 1, 2**31, 2**53 + 1, 10**14])
)


@given(number=NUMBERS, place=st.sampled_from(["width", "height", "x", "score", "prompt", "output", "meta"]))
def test_a_whole_line_is_read_as_by_the_plain_way(number: float, place: str) -> None:
    for good in map(json.loads, ANSWERS):
        line = json.dumps(replaced(good, place, number), separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        assert made_of(tidied_record, line) == made_of(put_back, line)


def replaced(value: Any, key: str, new: Any) -> Any:
    """`value` with what stands under a key called `key` (or `key_min`), at any depth, replaced."""
    if isinstance(value, dict):
        return {
            name: new if name in (key, f"{key}_min") and not isinstance(part, (dict, str)) else replaced(part, key, new)
            for name, part in value.items()
        }
    return [replaced(part, key, new) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(200))
def test_a_hostile_line_is_read_as_by_the_plain_way(seed: int) -> None:
    for value in with_hostile_value(random.Random(seed)):
        for indent in (None, 0):
            text = json.dumps(value, ensure_ascii=indent is None, separators=(",", ":")).encode("utf-8", "replace")
            assert made_of(tidied_record, text + b"\n") == made_of(put_back, text + b"\n")


@pytest.mark.parametrize("odd", [b"\xff", b"\xed\xa0\x80", "\u2028".encode(), b"\\u001f", b"\\ud800"])
def test_odd_bytes_are_read_as_by_the_plain_way(odd: bytes) -> None:
    for line in ANSWERS:
        assert made_of(tidied_record, line.replace(b"car", odd)) == made_of(put_back, line.replace(b"car", odd))


@pytest.mark.parametrize("line", ANSWERS)
def test_an_answer_of_md3_needs_no_putting_back(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = put_back(line)
    monkeypatch.setattr("md3cli.finished.tidied.put_back", None)
    assert repr(tidied_record(line)) == repr(plain)
