"""What positional arguments and `--task` mean; pure parsing, shared by the commands.

Raises UsageError for what makes no sense, always with the line to type instead.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

from md3cli.errors import UsageError
from md3cli.records import CAPTION_LENGTHS, Task, printable

STDIN = "-"
ROW_MANIFESTS = frozenset({".csv", ".tsv", ".jsonl", ".parquet"})  # their rows may carry questions and tasks
PICTURES_OR_LISTS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".tif", ".tiff"}
    | {".bmp", ".avif", ".heic", ".heif", ".tar", ".txt"}
)
URL_SCHEMES = ("http://", "https://", "s3://", "gs://", "hf://")


class QueryArguments(NamedTuple):
    """INPUT of a query, None for a question without a picture, and the questions."""

    input: str | None
    questions: tuple[str, ...]


class TaskSpec(NamedTuple):
    """One request of a `--task`: `argument` is a caption's length, a question or an object."""

    task: Task
    argument: str | None


def may_carry_rows(text: str) -> bool:
    """Whether INPUT is of a kind whose rows can say what to ask."""
    return text == STDIN or PurePath(text).suffix.lower() in ROW_MANIFESTS


def looks_like_input(text: str) -> bool:
    """Whether `text` is a path, glob, URL or `-`, rather than a question."""
    if text == STDIN or text.startswith(URL_SCHEMES) or os.path.lexists(text):
        return True
    if PurePath(text).suffix.lower() in ROW_MANIFESTS | PICTURES_OR_LISTS:
        return True
    has_space = any(char.isspace() for char in text)
    return not has_space and (any(char in text for char in "*[/") or (os.sep in text))


def parse_query(positional: Sequence[str], options: Sequence[str]) -> QueryArguments:
    """`[INPUT] [QUESTION...]` and the questions of `-q`.

    Raises:
        UsageError: no question, a lone positional that is no INPUT, or a question that is a file: the shell has
            expanded a glob.
    """
    if any(not question.strip() for question in (*positional[1:], *options)):
        raise UsageError("a question is empty; write it after -q")
    if not positional:
        if not options:
            raise UsageError('no question; ask one with -q: md3 query photo.jpg -q "What is this?"')
        return QueryArguments(None, tuple(options))
    first = positional[0]
    if not looks_like_input(first):
        raise UsageError(_not_an_input(first, is_alone=len(positional) == 1))
    for text in positional[1:]:
        _refuse_file(text, "a question")
    questions = (*positional[1:], *options)
    if not questions and not may_carry_rows(first):
        raise UsageError(f'no question about {printable(first)}; ask one with -q: -q "What is this?"')
    return QueryArguments(first, questions)


def _not_an_input(text: str, *, is_alone: bool) -> str:
    found = f"{printable(text)!r} is no file, folder, glob, URL or -"
    ask = f"-q {shlex.quote(printable(text))}"
    if is_alone:
        return f"{found}; if it is the question, ask it without an image: md3 query {ask}"
    return f"{found}; INPUT comes first: md3 query INPUT {ask}"


def check_objects(objects: Sequence[str]) -> None:
    """Refuse OBJECTs that are files: the shell has expanded a glob meant for INPUT.

    Raises:
        UsageError: an object is an existing file, or empty.
    """
    for name in objects:
        if not name.strip():
            raise UsageError("an OBJECT is empty; name what to look for")
        _refuse_file(name, "an OBJECT")


def _refuse_file(text: str, wanted: str) -> None:
    """Refuse a file where text is wanted: a picture that the shell has put in a glob's place, or a list of texts."""
    if text.startswith("@") and not any(map(str.isspace, text)):
        raise UsageError(
            f"{printable(text)!r} is not {wanted}; files are not read with @: write the texts out, or put them into "
            "the column 'prompt' of a manifest"
        )
    if not os.path.isfile(text):
        return
    if PurePath(text).suffix.lower() in PICTURES_OR_LISTS - {".txt"}:
        raise UsageError(
            f"{printable(text)!r} is a file, not {wanted}; quote the glob so that the shell leaves it alone: '*.jpg'"
        )
    raise UsageError(
        f"{printable(text)!r} is a file, not {wanted}; write its texts out, or put them into the column 'prompt' of a "
        "manifest; a glob is quoted so that the shell leaves it alone: '*.jpg'"
    )


def parse_task(spec: str) -> list[TaskSpec]:
    """`caption:long`, `detect:car,person` (two requests), `query:Is it raining?`, `point:nose`, `segment:dog`.

    Raises:
        ValueError: none of these.
    """
    name, colon, rest = spec.partition(":")
    if name not in tuple(Task):
        raise ValueError(f"{printable(spec)!r}: no task {printable(name)!r}; one of {', '.join(Task)}")
    task = Task(name)
    if task is Task.CAPTION:
        if colon and rest not in CAPTION_LENGTHS:
            raise ValueError(f"{printable(spec)!r}: a caption is one of {', '.join(CAPTION_LENGTHS)}")
        return [TaskSpec(task, rest if colon else None)]
    if task is Task.QUERY:
        if not rest.strip():
            raise ValueError("a question is missing; write it like query:Is it raining?")
        return [TaskSpec(task, rest)]
    objects = [part.strip() for part in rest.split(",")]
    if not all(objects):
        raise ValueError(f"{printable(spec)!r}: an object is missing; write it like {name}:car,person")
    return [TaskSpec(task, part) for part in objects]
