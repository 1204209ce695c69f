"""The table of records in a terminal."""

from __future__ import annotations

from typing import Any

import pytest
from rich.cells import cell_len
from terminal import terminal

from md3cli.console import RunConsole
from md3cli.console.table import NUMBERS, TableHead, describe, folded
from md3cli.records import Request, Task

BOX = {"label": "car", "x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.625, "score": 0.931}
SQUARE = "M 0 0 L 1 0 L 1 1 L 0 1 Z"


def record(**changes: Any) -> dict[str, Any]:
    base = {
        "image": "a/b.jpg",
        "task": "caption",
        "prompt": None,
        "length": "short",
        "caption": "A dog.",
        "error": None,
    }
    return base | changes


def detected(*boxes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return record(**({"task": "detect", "prompt": "car", "objects": list(boxes)} | changes))


def shown(requests: list[Request], *records: dict[str, Any], columns: int = 80) -> list[str]:
    """The lines of the table in a terminal of so many columns."""
    console = RunConsole(has_color=False)
    with terminal(COLUMNS=str(columns)) as stream:
        console.begin_table(requests)
        for one in records:
            console.show_record(one)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert all(cell_len(line) <= columns for line in lines)
    return lines


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "A dog."),
        ({"task": "query", "answer": "Yes."}, "Yes."),
        ({"task": "detect", "objects": []}, "none"),
        ({"task": "detect", "prompt": "car", "objects": [BOX]}, "1: 0.93 [0.10 0.20 0.50 0.62]"),
        ({"task": "detect", "prompt": "a red car", "objects": [BOX]}, "1: car 0.93 [0.10 0.20 0.50 0.62]"),
        ({"task": "detect", "objects": [BOX | {"label": "n" * 9999}]}, f"1: {'n' * 79}… 0.93 [0.10 0.20 0.50 0.62]"),
        ({"task": "detect", "prompt": "car", "objects": [BOX | {"score": None}]}, "1: [0.10 0.20 0.50 0.62]"),
        (
            {"task": "detect", "prompt": "car", "objects": [BOX] * 8},
            "8: " + ", ".join(["0.93 [0.10 0.20 0.50 0.62]"] * 6) + " and 2 more",
        ),
        (
            {"task": "point", "prompt": "x", "points": [{"label": "x", "x": 0.25, "y": 0.5, "score": 0.8}]},
            "1: 0.80 (0.25 0.50)",
        ),
        (
            {"task": "segment", "prompt": "x", "segments": [{"svg_path": SQUARE, "bbox": BOX, "score": 0.7}]},
            "1: 0.70 [0.10 0.20 0.50 0.62] 17.0%",
        ),
        (
            {
                "task": "segment",
                "prompt": "x",
                "segments": [{"svg_path": "", "parse_error": "odd", "bbox": BOX, "score": 0.7}],
            },
            "1: 0.70 [0.10 0.20 0.50 0.62] no outline (odd)",
        ),
        ({"error": {"type": "empty", "message": "0 bytes"}}, "empty: 0 bytes"),
    ],
)
def test_describe(changes: dict[str, Any], text: str) -> None:
    assert describe(record(**changes)) == text


def test_one_request_is_the_title_and_its_numbers_are_explained_once() -> None:
    assert shown([Request(Task.DETECT, "car")], detected(), detected(BOX), detected(BOX, BOX)) == [
        "detect car",
        "score [x_min y_min x_max y_max], 0-1 from top left",
        "image                 answer",
        "a/b.jpg               none",
        "a/b.jpg               1: 0.93 [0.10 0.20 0.50 0.62]",
        "a/b.jpg               2: 0.93 [0.10 0.20 0.50 0.62], 0.93 [0.10 0.20 0.50 0.62]",
    ]


def test_one_task_is_the_title_and_what_was_asked_a_column() -> None:
    requests = [Request(Task.DETECT, "car"), Request(Task.DETECT, "dog")]
    lines = shown(requests, detected(BOX), detected(prompt="dog"), columns=120)
    assert lines[0] == "detect"
    assert [line.split()[:2] for line in lines[2:]] == [["image", "asked"], ["a/b.jpg", "car"], ["a/b.jpg", "dog"]]


def test_several_tasks_have_no_title() -> None:
    point = record(task="point", prompt="nose", points=[])
    lines = shown([Request(Task.CAPTION), Request(Task.POINT, "nose")], record(), point)
    assert lines[0] == "point: score (x y), 0-1 from top left"
    assert [line.split() for line in lines[1:]] == [
        ["image", "asked", "answer"],
        ["a/b.jpg", "caption", "short", "A", "dog."],
        ["a/b.jpg", "point", "nose", "none"],
    ]


def test_numbers_of_a_task_that_only_rows_bring_are_explained_before_them() -> None:
    point = record(task="point", prompt="nose", points=[])
    assert "point: score (x y), 0-1 from top left" in shown([Request(Task.CAPTION)], record(), point)[3]


def test_explanations_fit_80_columns() -> None:
    for task in NUMBERS:
        assert len(TableHead().explain(task)) <= 80


def test_a_row_that_asks_something_else_says_so() -> None:
    """A manifest's rows may bring their own task and prompt."""
    lines = shown([Request(Task.CAPTION, length="short")], record(), record(task="query", prompt="why?", answer="so"))
    assert lines[0] == "caption short"
    assert lines[2:] == ["a/b.jpg               A dog.", "a/b.jpg               query why?: so"]


def test_a_failure_is_a_row_like_any_other() -> None:
    failed = {"error": {"type": "empty", "message": "0 bytes"}}
    lines = shown([Request(Task.CAPTION)], record(length=None, **failed))
    assert lines == ["caption normal", "image                 answer", "a/b.jpg               empty: 0 bytes"]


def test_what_was_found_is_not_broken_in_the_middle() -> None:
    for columns in (60, 80, 100, 120):
        for line in shown([Request(Task.DETECT, "car")], detected(*[BOX] * 5), columns=columns)[2:]:
            assert line.count("[") == line.count("]")


def test_records_without_a_head_have_all_columns() -> None:
    assert [name for name, _ in TableHead().columns()] == ["image", "asked", "answer"]


def test_folded() -> None:
    assert folded(["aa", "bb", "cc"], 5) == ["aa bb", "cc"]
    assert folded(["a long word", "b"], 5) == ["a long word", "b"]


def test_a_row_about_an_object_says_which() -> None:
    region = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6, "label": "car", "of": "0" * 32, "index": 0}
    question = record(task="query", prompt="What colour is the car?", answer="red", region=region)
    failed = question | {"region": region | {"index": 1, "label": "\x1b[31mcar"}}
    failed |= {"error": {"type": "model", "message": "overflow"}}
    wheel = detected(prompt="wheel", region=region)
    rows = [line.split(maxsplit=1)[1] for line in shown([Request(Task.DETECT, "car")], question, failed, wheel)[3:]]
    assert rows == [
        "car 1: What colour is the car?: red",
        "\\x1b[31mcar 2: What colour is the car?: model: overflow",
        "car 1: detect wheel: none",
    ]
    assert " ".join(" ".join(shown([], question)[1:]).split()) == "a/b.jpg car 1: What red colour is the car?"
