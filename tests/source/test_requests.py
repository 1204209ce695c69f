"""What a manifest row asks, laid over the command's own requests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import RequestError, RowError
from md3cli.records import Request, Task
from md3cli.source.requests import (
    ROW_COLUMNS,
    check_value,
    refuse_address,
    refused_request,
    row_image,
    row_requests,
    row_then,
    typed_cell,
)

DEFAULTS = Request(Task.QUERY, max_tokens=99)
WHY = Request(Task.QUERY, "why?", temperature=0.5)
HOW = Request(Task.QUERY, "how?", temperature=0.5)
CAR = Request(Task.DETECT, "car", max_objects=7)


def ask(*requests: Request, **columns: Any) -> tuple[Request, ...]:
    return row_requests({"image": "a.jpg", **columns}, requests, DEFAULTS)


def test_a_row_without_task_and_prompt_gets_all_requests_with_its_settings() -> None:
    assert ask(WHY, CAR) == (WHY, CAR)
    assert ask(WHY, CAR, max_tokens=5, seed=3) == (
        replace(WHY, max_tokens=5, seed=3),
        replace(CAR, max_tokens=5, seed=3),
    )


def test_a_row_with_a_task_or_a_prompt_gets_one() -> None:
    assert ask(WHY, HOW, prompt="when?") == (replace(WHY, prompt="when?"),)
    assert ask(WHY, CAR, task="Detect", prompt="bus") == (replace(WHY, task=Task.DETECT, prompt="bus"),)
    assert ask(WHY, task="caption", length="long") == (replace(WHY, task=Task.CAPTION, prompt=None, length="long"),)
    assert ask(task="point", prompt="nose") == (replace(DEFAULTS, task=Task.POINT, prompt="nose"),)


def test_a_row_that_leaves_the_prompt_open_takes_the_commands() -> None:
    assert ask(WHY, CAR, HOW, task="query") == (WHY, HOW)


def test_every_setting_has_its_type() -> None:
    columns = {
        "task": "query",
        "prompt": "why?",
        "length": "Short",
        "reasoning": False,
        "spatial_refs": [[0, 1], [0.1, 0.2, 0.3, 0.4]],
        "max_tokens": 5.0,  # a whole number among nulls is a float in many Parquet files
        "max_objects": 6,
        "temperature": 1,
        "top_p": 1,
        "seed": 7,
    }
    assert columns.keys() | {"image", "then"} == ROW_COLUMNS
    (request,) = ask(**columns)
    refs = ((0.0, 1.0), (0.1, 0.2, 0.3, 0.4))
    assert request == Request(Task.QUERY, "why?", "short", False, refs, 5, 6, 1.0, 1.0, 7)
    assert isinstance(request.temperature, float)  # 1 and 1.0 must give one id
    assert isinstance(request.max_tokens, int)


@pytest.mark.parametrize(
    ("columns", "kind", "message"),
    [
        ({"task": 5}, "bad_row", "task is 5, not text"),
        ({"prompt": ["x"]}, "bad_row", "prompt is ['x'], not text"),
        ({"max_tokens": "many"}, "bad_row", "max_tokens is 'many', not a whole number"),
        ({"max_tokens": True}, "bad_row", "not a whole number"),
        ({"max_tokens": 1.5}, "bad_row", "not a whole number"),
        ({"temperature": "hot\x1b[0m"}, "bad_row", "temperature is 'hot\\x1b[0m', not a number"),
        ({"reasoning": "maybe"}, "bad_row", "not true or false"),
        ({"spatial_refs": "x"}, "bad_row", "not a list of points"),
        ({"spatial_refs": [[0.1]]}, "bad_row", "not a list of points"),
        ({"spatial_refs": [[0.1, "x"]]}, "bad_row", "not a number"),
        ({"task": "dance"}, "bad_request", "unknown task 'dance'; tasks are: caption, query"),
        ({"task": "detect"}, "bad_request", "detect needs a prompt"),
        ({"task": "query", "prompt": "  "}, "bad_request", "query needs a prompt"),
        ({"task": "caption", "prompt": "x"}, "bad_request", "caption takes no prompt"),
        ({"task": "caption", "spatial_refs": [[0, 0]]}, "bad_request", "caption takes no spatial_refs"),
        ({"length": "epic"}, "bad_request", "length is 'epic', not one of: short, normal, long"),
        ({"max_tokens": 0}, "bad_request", "max_tokens is out of range"),
        ({"max_tokens": 10**4000}, "bad_request", "max_tokens is out of range"),
        ({"max_objects": -1}, "bad_request", "max_objects is out of range"),
        ({"seed": -1}, "bad_request", "seed is out of range"),
        ({"temperature": -0.1}, "bad_request", "it must be from 0"),
        ({"temperature": 10**400}, "bad_request", "it must be from 0"),
        ({"top_p": 0}, "bad_request", "above 0 and at most 1"),
        ({"top_p": float("nan")}, "bad_request", "above 0 and at most 1"),
        ({"spatial_refs": [[0.1, 1.1]]}, "bad_request", "from 0 to 1"),
        ({"spatial_refs": [[0.5, 0.5, 0.4, 0.9]]}, "bad_request", "inside out"),
        ({"image": None, "task": "detect", "prompt": "car"}, "bad_request", "detect needs an image"),
    ],
)
def test_what_makes_no_sense_is_refused(columns: dict[str, Any], kind: str, message: str) -> None:
    with pytest.raises(RowError) as caught:
        ask(WHY, **columns)
    assert caught.value.type == kind
    assert message in str(caught.value)


def test_without_any_task_there_is_nothing_to_ask() -> None:
    with pytest.raises(RequestError, match="no task"):
        ask()
    with pytest.raises(RequestError, match="a prompt without a task"):
        ask(prompt="x")
    with pytest.raises(RequestError, match="a prompt without a task"):
        ask(WHY, CAR, prompt="x")


def test_a_query_can_do_without_an_image() -> None:
    assert ask(WHY, image="") == ask(WHY, image=None) == (WHY,)
    with pytest.raises(RequestError, match="detect needs an image"):
        ask(WHY, CAR, image=None)


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.lists(st.floats()))


@pytest.mark.process
@given(st.dictionaries(st.sampled_from(sorted(ROW_COLUMNS)), anything))
def test_any_values_give_requests_or_a_row_error(columns: dict[str, Any]) -> None:
    outcome = "asked"
    try:
        row_image(columns)
        assert row_requests(columns, [WHY], DEFAULTS)
    except RowError as error:
        outcome = error.type
    assert outcome in ("asked", "bad_row", "bad_request")


@pytest.mark.parametrize("value", [5, False, 0, [], "a\0b", "x" * 5000])
def test_an_image_that_is_no_path_is_a_bad_row(value: Any) -> None:
    with pytest.raises(RowError, match="image"):
        row_image({"image": value})


def test_the_image_column_is_needed() -> None:
    with pytest.raises(RowError, match="no 'image'"):
        row_image({"file": "a.jpg"})
    assert [row_image({"image": value}) for value in (None, "", " ", "a:b.jpg")] == ["", "", " ", "a:b.jpg"]


@pytest.mark.parametrize(
    "name", ["http://x/a.jpg", "HTTPS://x/a", "s3://b/k", "hf://d", "file:///etc/passwd", "data:,x"]
)
def test_addresses_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="not fetched"):
        refuse_address(name)
    refuse_address("filed:under/x.jpg")


@pytest.mark.parametrize(
    ("columns", "task", "prompt"),
    [
        ({"task": "detect", "prompt": "star", "max_objects": "a"}, Task.DETECT, "star"),
        ({"task": "caption", "length": "epic"}, Task.CAPTION, None),
        ({"task": "query", "max_tokens": 0}, Task.QUERY, "why?"),
        ({"prompt": "when?", "seed": -1}, Task.QUERY, "when?"),
        ({"task": "dance", "prompt": "star"}, Task.QUERY, "star"),
        ({"task": "detect", "prompt": ["star"]}, Task.DETECT, None),
        ({}, Task.QUERY, "why?"),
    ],
)
def test_a_refused_row_keeps_the_task_and_prompt_that_can_be_read(
    columns: dict[str, Any], task: Task, prompt: str | None
) -> None:
    assert refused_request(columns, WHY) == replace(WHY, task=task, prompt=prompt)


COLOR = Request(Task.QUERY, "What colour is the {label}?", reasoning=False)


def then(*requests: Request, **columns: Any) -> tuple[Request, ...]:
    return row_then(columns, requests, (COLOR,))


def test_a_row_that_finds_objects_asks_about_them_what_the_command_does() -> None:
    assert then(CAR) == then(CAR, WHY) == (COLOR,)
    assert then(CAR, max_tokens=5, spatial_refs=[[0, 1]], then="") == (replace(COLOR, max_tokens=5),)
    assert then(WHY, Request(Task.POINT, "nose")) == ()


def test_a_row_may_ask_something_else_about_them_with_its_own_settings() -> None:
    assert then(CAR, then="query:Which shape?") == (Request(Task.QUERY, "Which shape?", max_objects=7),)
    assert then(CAR, then=["caption:short", "point:{label} wheel"]) == (
        replace(CAR, task=Task.CAPTION, prompt=None, length="short"),
        replace(CAR, task=Task.POINT, prompt="{label} wheel"),
    )
    assert then(CAR, then=[]) == (), "an empty list asks nothing"


def test_what_follows_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match="then asks about what detect and segment find"):
        then(WHY, then="query:Which shape?")


def test_a_cell_of_text_holds_a_spec_or_a_list_of_them() -> None:
    assert typed_cell("then", "query:[a] or b?") == "query:[a] or b?"
    assert typed_cell("then", ' ["caption", "query:x"]') == ["caption", "query:x"]
    with pytest.raises(RequestError, match="no task"):
        check_value("then", typed_cell("then", '["caption", '))
