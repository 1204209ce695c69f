"""What positionals and `--task` mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from md3cli.commands.parse import check_objects, looks_like_input, may_carry_rows, parse_query, parse_task
from md3cli.errors import UsageError
from md3cli.records import Task


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "photo.jpg").write_bytes(b"x")
    (tmp_path / "what is this").write_bytes(b"x")
    return tmp_path


FILES = ["photo.jpg", "pictures", "gone.png", "a/b", "rows.CSV", "what is this"]


@pytest.mark.parametrize("text", [*FILES, "-", "*.jpg", "x[0-9].dat", "https://a/b", "s3://a/b"])
def test_inputs(text: str) -> None:
    assert looks_like_input(text)


@pytest.mark.parametrize("text", ["What is an encoder?", "why?", "cat", "is it 3/4 full?", "", "list [a, b] please"])
def test_questions(text: str) -> None:
    assert not looks_like_input(text)


@pytest.mark.parametrize(
    ("positional", "options", "expected"),
    [
        ([], ["Why?"], (None, ("Why?",))),
        (["photo.jpg"], ["Why?"], ("photo.jpg", ("Why?",))),
        (["photo.jpg", "Why?", "How?"], ["Who?"], ("photo.jpg", ("Why?", "How?", "Who?"))),
        (["rows.jsonl"], [], ("rows.jsonl", ())),
        (["-"], [], ("-", ())),
    ],
)
def test_query(positional: list[str], options: list[str], expected: tuple[str | None, tuple[str, ...]]) -> None:
    assert parse_query(positional, options) == expected


@pytest.mark.parametrize(
    ("positional", "options", "message"),
    [
        ([], [], 'no question; ask one with -q: md3 query photo.jpg -q "What is this?"'),
        (["photo.jpg"], [], 'no question about photo.jpg; ask one with -q: -q "What is this?"'),
        (["list.txt"], [], "no question about list.txt"),
        (["Why?"], [], "if it is the question, ask it without an image: md3 query -q 'Why?'"),
        (["Why?"], ["How?"], "'Why?' is no file, folder, glob, URL or -"),
        (["Why?", "photo.jpg"], [], "INPUT comes first: md3 query INPUT -q 'Why?'"),
        (["photo.jpg", " "], [], "a question is empty"),
        (["list.txt", "photo.jpg"], ["Why?"], "'photo.jpg' is a file, not a question; quote the glob"),
        ([], [""], "a question is empty"),
    ],
)
def test_query_that_makes_no_sense(positional: list[str], options: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_query(positional, options)
    assert message in str(error.value)


def test_objects() -> None:
    check_objects(["car", "pictures"])  # a folder of that name may be there: people name folders after things
    with pytest.raises(UsageError, match=r"'photo\.jpg' is a file, not an OBJECT; quote the glob"):
        check_objects(["car", "photo.jpg"])
    with pytest.raises(UsageError, match="'what is this' is a file, not an OBJECT; write its texts out"):
        check_objects(["what is this"])
    for name in ("@labels.txt", "@gone"):
        with pytest.raises(UsageError, match=f"'{name}' is not an OBJECT; files are not read with @"):
            check_objects([name])
    with pytest.raises(UsageError, match="an OBJECT is empty"):
        check_objects([" "])


def test_row_manifests() -> None:
    assert all(may_carry_rows(text) for text in ("-", "a.csv", "b.TSV", "c/d.jsonl", "e.parquet"))
    assert not any(may_carry_rows(text) for text in ("a.txt", "pictures", "photo.jpg"))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("caption", [(Task.CAPTION, None)]),
        ("caption:long", [(Task.CAPTION, "long")]),
        ("detect:car, red person", [(Task.DETECT, "car"), (Task.DETECT, "red person")]),
        ("point:nose", [(Task.POINT, "nose")]),
        ("segment:dog", [(Task.SEGMENT, "dog")]),
        ("query:Is it a, b: or c?", [(Task.QUERY, "Is it a, b: or c?")]),
    ],
)
def test_tasks(spec: str, expected: list[tuple[Task, str | None]]) -> None:
    assert parse_task(spec) == expected


@pytest.mark.parametrize(
    "spec", ["", "caption:", "caption:huge", "detect", "detect:", "detect:,", "query", "query: ", "x:y"]
)
def test_tasks_that_make_no_sense(spec: str) -> None:
    with pytest.raises(ValueError, match=r"one of|missing"):
        parse_task(spec)
