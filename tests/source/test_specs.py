"""SPECs: the words of `--task`, `--then` and the column `then`."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from md3cli.errors import RequestError, RowError
from md3cli.records import Request, Task
from md3cli.source.specs import MOST_THEN, are_followed, parse_task, parse_then, then_requests

BASE = Request(
    Task.DETECT, "car", reasoning=False, max_tokens=7, seed=3, spatial_refs=((0.1, 0.2),), choices=("a", "b")
)
PLAIN = replace(BASE, spatial_refs=(), choices=())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("caption", [(Task.CAPTION, None)]),
        ("caption:long", [(Task.CAPTION, "long")]),
        ("detect:car, red person", [(Task.DETECT, "car"), (Task.DETECT, "red person")]),
        ("point:nose", [(Task.POINT, "nose")]),
        ("segment:dog", [(Task.SEGMENT, "dog")]),
        ("segment", [(Task.SEGMENT, None)]),
        ("query:Is it a, b: or c?", [(Task.QUERY, "Is it a, b: or c?")]),
    ],
)
def test_tasks(spec: str, expected: list[tuple[Task, str | None]]) -> None:
    assert parse_task(spec) == expected


@pytest.mark.parametrize("spec", ["", "caption:", "caption:huge", "detect:", "detect:,", "query", "query: ", "x:y"])
def test_tasks_that_make_no_sense(spec: str) -> None:
    with pytest.raises(ValueError, match=r"one of|missing"):
        parse_task(spec)


def test_what_is_asked_about_objects() -> None:
    assert parse_then("query:What colour is the {label}?") == [(Task.QUERY, "What colour is the {label}?")]
    assert parse_then("detect:wheel,{label} door") == [(Task.DETECT, "wheel"), (Task.DETECT, "{label} door")]
    assert parse_then("caption") == [(Task.CAPTION, None)]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("query:What colour is the {colour}?", "{colour} is filled by nothing; {label} is"),
        ("query:{", "lone '{'"),
        ("query:{label.real}", "not the plain name"),
        ("detect", "an object is missing; write it like detect:wheel"),
        ("look:x", "no task 'look'"),
    ],
)
def test_what_cannot_be_asked_about_objects(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_then(spec)


def test_rows_ask_about_objects_with_the_settings_of_their_requests() -> None:
    color = replace(PLAIN, task=Task.QUERY, prompt="What colour is the {label}?")
    assert then_requests("query:What colour is the {label}?", BASE) == (color,)
    several = then_requests(["caption:long", "segment:a,b"], BASE)
    caption = replace(PLAIN, task=Task.CAPTION, prompt=None, length="long")
    assert several == (caption, *(replace(PLAIN, task=Task.SEGMENT, prompt=name) for name in "ab"))
    assert then_requests([], BASE) == ()


@pytest.mark.parametrize("value", [1, True, {"a": 1}, ["caption", 1], [["caption"]]])
def test_a_then_of_another_type_is_a_row_that_cannot_be_read(value: Any) -> None:
    with pytest.raises(RowError, match="not a SPEC or a list of SPECs") as caught:
        then_requests(value, BASE)
    assert caught.value.type == "bad_row"


@pytest.mark.parametrize("value", ["", "what?", ["caption", "query:{x}"], ["caption"] * (MOST_THEN + 1)])
def test_a_then_that_makes_no_sense(value: Any) -> None:
    with pytest.raises(RequestError, match="then"):
        then_requests(value, BASE)


def test_objects_of_detect_and_segment_are_asked_about() -> None:
    assert are_followed([Request(Task.CAPTION), Request(Task.SEGMENT, "dog")])
    assert not are_followed([Request(Task.CAPTION), Request(Task.POINT, "nose")])
