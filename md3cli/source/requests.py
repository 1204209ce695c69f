"""What a manifest row asks: its columns laid over the command's own requests. Pure: values in, requests out.

A value of the wrong type is a row that cannot be read (`bad_row`). A value of the right type that makes no sense is a
`bad_request`. Knows nothing of files and formats.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from md3cli.errors import InputError, RequestError, RowError
from md3cli.records import CAPTION_LENGTHS, TILED_TASKS, Request, Task, Tiles, printable
from md3cli.remote.address import is_address
from md3cli.source.specs import are_followed, then_requests

PATH_LIMIT_BYTES = 4096
SEED_LIMIT = 2**63
TOKENS_LIMIT = 2**31
TEMPERATURE_LIMIT = 1000
THEN = "then"  # the column of what is asked about each object
_ADDRESS = re.compile(r"(?:https?|s3|gs|hf)://|file:|data:", re.IGNORECASE)
_TASKS_WITH_REFS = frozenset({Task.QUERY, Task.POINT, Task.SEGMENT})


class EmbeddedImage(NamedTuple):
    """A picture that stands in the manifest itself: what md3 calls it, where it stands, what the cell calls it."""

    name: str
    row_group: int
    offset: int
    column: str
    path: str | None = None


def refuse_doubles(columns: Iterable[str], name: str) -> None:
    """Raise InputError where the manifest `name` has a column twice: nobody can tell which of the two counts."""
    seen = set()
    for column in columns:
        if column in seen:
            raise InputError(f"the manifest {name} names the column '{printable(column)[:100]}' twice; rename one")
        seen.add(column)


def row_image(columns: Mapping[str, Any]) -> str | EmbeddedImage:
    """Return the path that a row names, as it is written, or the picture that it holds; empty for a text-only query.

    Raises:
        RowError: there is no such column, or it holds no path.
    """
    if "image" not in columns:
        raise RowError("bad_row", "no 'image' (null for a text-only query)")
    value = "" if columns["image"] is None else columns["image"]
    if isinstance(value, EmbeddedImage):
        return value
    if not isinstance(value, str):
        raise _wrong_type("image", value, "a path")
    if "\0" in value:
        raise RowError("bad_row", "image holds a NUL character")
    if len(value) > PATH_LIMIT_BYTES // 4 and len(os.fsencode(value)) > PATH_LIMIT_BYTES:
        raise RowError("bad_row", f"image is longer than {PATH_LIMIT_BYTES} bytes")
    return value


def refuse_address(name: str, *, may_fetch: bool = False) -> None:
    """Raise RequestError where a row's image is a URL: that a manifest alone names one is no reason to fetch it."""
    if ":" in name and (match := _ADDRESS.match(name)) and not (may_fetch and is_address(name)):
        advice = "add --remote to fetch them" if is_address(name) else "name a local file"
        raise RequestError(f"{match[0].lower()} addresses in a manifest are not fetched; {advice}")


def row_requests(columns: Mapping[str, Any], requests: Sequence[Request], defaults: Request) -> tuple[Request, ...]:
    """Return the requests of a row, at least one.

    A row with a task or a prompt of its own makes one request, or those of the command with that task where it leaves
    the prompt open. Any other row makes all requests of the command. The row's settings override theirs. `defaults`
    gives the settings where the command makes no request of its own.

    Raises:
        RowError: `bad_row` for a value of the wrong type.
        RequestError: `bad_request` for values that make no sense.
    """
    image = columns.get("image")
    result = tuple(requests)
    if len(columns) > 1 or not requests:  # else a bare list of pictures, which may be long
        settings = _settings_of(columns)
        own = _own_requests(columns, requests, requests[0] if requests else defaults, defaults.tiles)
        result = tuple(replace(request, **settings) for request in own) if settings else tuple(own)
    for request in result:
        check_request(request, has_image=bool(image))
    return result


def row_then(columns: Mapping[str, Any], requests: Sequence[Request], then: tuple[Request, ...]) -> tuple[Request, ...]:
    """Return the templates of what a row that asks `requests` asks about each object found: its own, else `then`.

    Those of its own have the settings of its first request; the row's settings override those of `then`.

    Raises:
        RowError: `bad_row` for a value of the wrong type.
        RequestError: `bad_request` for a `then` that makes no sense, or where the row finds no boxes.
    """
    is_followed = are_followed(requests)
    if is_given(columns, THEN):
        if not is_followed:
            raise RequestError("then asks about what detect and segment find, and this row asks for neither")
        return then_requests(columns[THEN], requests[0])
    if not (is_followed and then):
        return ()
    settings = _settings_of(columns)
    settings.pop("spatial_refs", None)  # a place in the whole picture
    return tuple(replace(request, **settings) for request in then) if settings else then


def _settings_of(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name: read(name, columns[name]) for name, read in _SETTINGS.items() if is_given(columns, name)}


def refused_request(columns: Mapping[str, Any], base: Request) -> Request:
    """Return what the error record of a refused row says was asked: `base`, with what can be read of the row."""
    task = base.task
    with suppress(RowError):
        task = _task(columns["task"]) if is_given(columns, "task") else base.task
    prompt = base.prompt if task is base.task else None
    with suppress(RowError):
        prompt = _text("prompt", columns["prompt"]) if is_given(columns, "prompt") else prompt
    return replace(base, task=task, prompt=prompt)


def check_request(request: Request, *, has_image: bool) -> None:
    """Raise RequestError, which says why, where a request makes no sense."""
    task = request.task
    if task is Task.CAPTION and request.prompt is not None:
        raise RequestError("caption takes no prompt; the task 'query' does")
    if task is not Task.CAPTION and not (request.prompt or "").strip():
        raise RequestError(f"{task} needs a prompt")
    if not has_image and task is not Task.QUERY:
        raise RequestError(f"{task} needs an image; only a query can do without")
    if request.spatial_refs and task not in _TASKS_WITH_REFS:
        raise RequestError(f"{task} takes no spatial_refs")
    if request.spatial_refs and request.tiles is not None:
        raise RequestError("spatial_refs name a place in the whole picture, and no tile has it; ask without tiles")


def is_given(columns: Mapping[str, Any], name: str) -> bool:
    """Return whether a row has a column that is not empty."""
    return columns.get(name) not in (None, "")


def _own_requests(
    columns: Mapping[str, Any], requests: Sequence[Request], base: Request, tiles: Tiles | None
) -> Sequence[Request]:
    task = _task(columns["task"]) if is_given(columns, "task") else None
    prompt = _text("prompt", columns["prompt"]) if is_given(columns, "prompt") else None
    if task is None and prompt is None:
        if not requests:
            raise RequestError("no task: name one in the column 'task' or on the command line")
        return requests
    if task is None:
        tasks = {request.task for request in requests}
        if len(tasks) != 1:
            raise RequestError("a prompt without a task: name one in the column 'task'")
        return [replace(base, prompt=prompt)]
    base = replace(base, tiles=tiles if task in TILED_TASKS else None)
    if prompt is None and task is not Task.CAPTION:
        return [request for request in requests if request.task is task] or [replace(base, task=task, prompt=None)]
    return [replace(base, task=task, prompt=prompt)]


def _task(value: Any) -> Task:
    text = _text("task", value)
    try:
        return Task(text.strip().lower())
    except ValueError:
        raise RequestError(f"unknown task '{printable(text)[:60]}'; tasks are: {', '.join(Task)}") from None


def _wrong_type(name: str, value: Any, wanted: str) -> RowError:
    return RowError("bad_row", f"{name} is {printable(repr(value))[:60]}, not {wanted}")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, value, "text")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, value, "true or false")
    return value


def _length(name: str, value: Any) -> str:
    text = _text(name, value).strip().lower()
    if text not in CAPTION_LENGTHS:
        raise RequestError(f"length is '{printable(text)[:60]}', not one of: {', '.join(CAPTION_LENGTHS)}")
    return text


def _whole(low: int, limit: int) -> Callable[[str, Any], int]:
    def read(name: str, value: Any) -> int:
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not is_whole:
            raise _wrong_type(name, value, "a whole number")
        if not low <= value < limit:
            raise RequestError(f"{name} is out of range; it must be at least {low} and below {limit}")
        return int(value)

    return read


def _real(is_allowed: Callable[[float], bool], range_text: str) -> Callable[[str, Any], float]:
    def read(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type(name, value, "a number")
        if not is_allowed(value):
            raise RequestError(f"{name} is {printable(repr(value))[:60]}; it must be {range_text}")
        return float(value)

    return read


def _spatial_refs(name: str, value: Any) -> tuple[tuple[float, ...], ...]:
    wanted = "a list of points [x, y] and boxes [x_min, y_min, x_max, y_max]"
    if not isinstance(value, list):
        raise _wrong_type(name, value, wanted)
    return tuple(_spatial_ref(name, item, wanted) for item in value)


def _spatial_ref(name: str, item: Any, wanted: str) -> tuple[float, ...]:
    if not isinstance(item, list) or len(item) not in (2, 4):
        raise _wrong_type(name, item, wanted)
    read = _real(lambda number: 0 <= number <= 1, "from 0 to 1")
    ref = tuple(read(name, number) for number in item)
    if len(ref) == 4 and (ref[0] > ref[2] or ref[1] > ref[3]):
        raise RequestError(f"{name} holds a box turned inside out; the top left corner comes first")
    return ref


_SETTINGS: Mapping[str, Callable[[str, Any], Any]] = {
    "length": _length,
    "reasoning": _flag,
    "spatial_refs": _spatial_refs,
    "max_tokens": _whole(1, TOKENS_LIMIT),
    "max_objects": _whole(1, TOKENS_LIMIT),
    "temperature": _real(lambda number: 0 <= number <= TEMPERATURE_LIMIT, f"from 0 to {TEMPERATURE_LIMIT}"),
    "top_p": _real(lambda number: 0 < number <= 1, "above 0 and at most 1"),
    "seed": _whole(0, SEED_LIMIT),
}


def read_setting(name: str, value: Any) -> Any:
    """Return the value of a setting (`length` … `seed`), checked.

    Raises:
        RowError: `bad_row` for the wrong type.
        RequestError: `bad_request` for a value out of range.
    """
    return _SETTINGS[name](name, value)


ROW_COLUMNS = frozenset({"image", "task", "prompt", THEN, *_SETTINGS})
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_NUMBERS = frozenset({"max_tokens", "max_objects", "temperature", "top_p", "seed"})


def check_value(column: str, value: Any) -> None:
    """Check the value of one column by itself, as `row_requests` does; a column without a meaning may hold anything.

    Raises:
        RowError: `bad_row` for the wrong type, `bad_request` for a value that makes no sense.
    """
    if column == "task":
        _task(value)
    elif column == THEN:
        then_requests(value, Request(Task.DETECT))
    elif column in _SETTINGS:
        read_setting(column, value)


def typed_cell(column: str, cell: str) -> Any:
    """Return a cell of text as a value of its column's type where it can be read so; an empty one is null."""
    text = cell.strip()
    if column in _NUMBERS:
        return _number(text) if text else None
    if column == "reasoning":
        return _FLAGS.get(text.lower(), cell) if text else None
    if column == "spatial_refs":
        return _json_value(text) if text else None
    if column == THEN and text.startswith("["):
        return _json_value(text)
    return cell


def _number(text: str) -> int | float | str:
    for parse in (int, float):
        with suppress(ValueError):
            return parse(text)
    return text


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def are_fit_for_pictures(requests: Sequence[Request]) -> bool:
    """Return whether a row that only names a picture makes all requests, so that none need be checked for each row."""
    try:
        for request in requests:
            check_request(request, has_image=True)
    except RowError:
        return False
    return True
