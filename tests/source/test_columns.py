"""`--map`, `--const` and `--template`: what they make of a row, and what is refused before any row is read."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.config import ColumnOptions
from md3cli.errors import RequestError, UsageError
from md3cli.records import ImageItem, Request, Task
from md3cli.refine.template import PROMPT_LIMIT_CHARS, Template
from md3cli.source.columns import ColumnRules, near_miss, renamed_columns
from md3cli.source.requests import EmbeddedImage

PICTURE = ImageItem("cats/sub/a.b.jpg", "/data/cats/sub/a.b.jpg")


def filled(prompt: str, columns: dict[str, Any] | None = None, image: ImageItem | None = PICTURE) -> str | None:
    asked = (Request(Task.QUERY, prompt),)
    rules = ColumnRules(ColumnOptions(is_template=True), asked)
    found = rules.filled(asked, columns or {}, image)
    if found.refused:
        raise RequestError(found.refused[prompt])
    return found.requests[0].prompt


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Is it {color}?", "Is it red?"),
        ("{color}", "red"),
        ("{color}{color} {size}", "redred 3"),
        ("{{color}}", "{color}"),
        ("{{{color}}}", "{red}"),
        ("{{}}{{", "{}{"),
        ("{main colour} {0}", "blue zero"),
        ("{stem} {name} {folder}", "a.b a.b.jpg sub"),
        ("{share} {is_new}", "0.5 true"),
        ("nothing to fill", "nothing to fill"),
        ("{evil}", "{stem} {0.__class__} }{"),  # what a column holds is never filled again
        ("{image}", "0001-cat.jpg"),
    ],
)
def test_what_a_template_becomes(prompt: str, expected: str) -> None:
    columns = {
        "color": "red",
        "size": 3,
        "main colour": "blue",
        "0": "zero",
        "share": 0.5,
        "is_new": True,
        "evil": "{stem} {0.__class__} }{",
        "image": EmbeddedImage("0001-cat.jpg", 0, 0, "image"),
    }
    assert filled(prompt, columns) == expected


@pytest.mark.parametrize(
    "prompt", ["{}", "{ color }", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{color", "color}", "{a{b}}", "{{}", "{ }"]
)
def test_odd_placeholders_are_refused_at_once(prompt: str) -> None:
    with pytest.raises(UsageError, match=r"is not the plain name|has a lone"):
        filled(prompt)


@given(st.text(alphabet="{}ab. ", max_size=12))
def test_a_template_is_read_whole_or_refused(prompt: str) -> None:
    """It is as Python's own formats have it, where those know plain names only."""
    try:
        template = Template.parse(prompt)
    except UsageError:
        return
    values = {name: f"<{name}>" for name in template.names}
    assert template.filled(values) == prompt.format_map(values)


@given(st.dictionaries(st.sampled_from(["a", "b"]), st.text(min_size=1).filter(str.strip), min_size=2, max_size=2))
def test_values_come_out_as_they_are(columns: dict[str, str]) -> None:
    assert filled("{a}|{{{b}}}", columns) == f"{columns['a']}|{{{columns['b']}}}"


@pytest.mark.parametrize(
    ("prompt", "columns", "message"),
    [
        ("{color}", {}, "no column 'color' for {color}"),
        ("{color}", {"color": None}, "{color} has no value: the column 'color' is empty"),
        ("{color}", {"color": "  "}, "the column 'color' is empty"),
        ("{color}", {"color": ["red"]}, "the column 'color' holds a list, which fills no prompt"),
        ("{color}", {"color": {"a": 1}}, "the column 'color' holds an object"),
        ("{color}", {"color": "x" * (PROMPT_LIMIT_CHARS + 1)}, "the filled prompt is longer than 1 Mi characters"),
        ("{color}" * 1000, {"color": "x" * 10**6}, "the filled prompt is longer"),
    ],
)
def test_what_cannot_be_filled_is_a_bad_request(prompt: str, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        filled(prompt, columns)
    assert message in str(error.value)
    assert error.value.type == "bad_request"


def test_a_question_without_a_picture_has_no_name() -> None:
    with pytest.raises(RequestError, match=r"{stem} has no value: the picture has none"):
        filled("{stem}", image=None)


@pytest.mark.parametrize(
    ("image", "folder"),
    [
        (ImageItem("a.jpg", "photos/a.jpg"), "photos"),
        (ImageItem("../a.jpg", "/data/list/../a.jpg"), "data"),
        (ImageItem("a.jpg", "a.jpg"), os.path.basename(os.getcwd())),
        (ImageItem("dir/a.jpg", "x.tar", None, 512, 9), "dir"),
        (ImageItem("s3://bucket/cats/a.jpg", "s3://bucket/cats/a.jpg"), "cats"),
        (ImageItem("caf\\xe9/a.jpg", "/x/caf\udce9/a.jpg", "eA=="), "caf\\xe9"),
    ],
)
def test_the_last_folder(image: ImageItem, folder: str) -> None:
    assert filled("{folder}", image=image) == folder


def test_a_tar_without_folders_has_none() -> None:
    with pytest.raises(RequestError, match=r"{folder} has no value"):
        filled("{folder}", image=ImageItem("a.jpg", "x.tar", None, 512, 9))


def test_a_prompt_of_the_row_stays_as_it_is() -> None:
    asked = (Request(Task.QUERY, "{color}"),)
    rules = ColumnRules(ColumnOptions(is_template=True), asked)
    own = (Request(Task.QUERY, "{size}"),)
    assert rules.filled(own, {"prompt": "{size}", "size": "3"}, PICTURE).requests == own


def test_what_can_be_filled_is_filled() -> None:
    """The template that cannot stays as it is, with the reason; names are kept of what looks for something."""
    asked = (Request(Task.DETECT, "{color} car"), Request(Task.DETECT, "{size}"), Request(Task.QUERY, "{size}?"))
    found = ColumnRules(ColumnOptions(is_template=True), asked).filled(asked, {"size": "big"}, PICTURE)
    assert [request.prompt for request in found.requests] == ["{color} car", "big", "big?"]
    assert found.typed == {"big": "{size}"}
    assert found.refused == {"{color} car": "no column 'color' for {color}"}


def test_without_the_option_braces_are_braces() -> None:
    asked = (Request(Task.QUERY, "{color}"),)
    assert ColumnRules(ColumnOptions(), asked).filled(asked, {"color": "red"}, PICTURE).requests is asked


def test_constants() -> None:
    constants = (("max_tokens", "9"), ("split", "train"), ("reasoning", "no"))
    rules = ColumnRules(ColumnOptions(constants=constants), ())
    assert rules.with_constants({"image": "a", "split": "", "max_tokens": 5}) == {
        "image": "a",
        "split": "train",
        "max_tokens": 5,
        "reasoning": False,
    }
    assert rules.with_constants({"split": None, "reasoning": True})["reasoning"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constants": (("max_tokens", "many"),)}, "--const max_tokens=many: max_tokens is 'many', not a whole number"),
        ({"constants": (("task", "detct"),)}, "--const task=detct: unknown task 'detct'"),
        ({"constants": (("length", "tall"),)}, "--const length=tall: length is 'tall'"),
        ({"constants": (("a", "1"), ("a", "2"))}, "--const sets a column twice"),
        ({"renamed": (("a", "x"), ("a", "y"))}, "--map names a column twice"),
        ({"renamed": (("a", "x"), ("b", "x"))}, "--map names a column twice"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        ColumnRules(ColumnOptions(**options), ())
    assert message in str(error.value)


def test_renamed_columns() -> None:
    assert renamed_columns({"image": "a", "q": "why"}, {"q": "prompt"}) == {"image": "a", "prompt": "why"}
    assert renamed_columns({"a": 1, "b": 2}, {"a": "b", "b": "a"}) == {"b": 1, "a": 2}
    assert renamed_columns({"image": "a"}, {"q": "prompt"}) == {"image": "a"}
    with pytest.raises(ValueError, match="--map prompt=q, and there is a column 'prompt', too"):
        renamed_columns({"q": 1, "prompt": 2}, {"q": "prompt"})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("promt", "prompt"),
        ("Prompt", "prompt"),
        ("lenght", "length"),
        ("tasks", "task"),
        ("taks", "task"),
        ("class", None),
        ("q", None),
    ],
)
def test_near_misses(name: str, meant: str | None) -> None:
    assert near_miss(name, ["prompt", "length", "task"]) == meant
