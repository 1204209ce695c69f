"""One line of a records file -> a record as md3 writes it, or a refusal that says what is wrong.

Records may have gone through other tools (pandas, Arrow, a spreadsheet, a text editor) or come from
strangers. What those tools change on the way is put back: `160.0` for 160, null or NaN for an absent
key, a number where a text of digits was. What cannot be used is named here, and does not trip the code
that draws it. Pure functions; the record's shape is section 3 of the product contract.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from md3cli.records import SCHEMA, RecordDict, Task

SIZE_LIMIT_PIXELS = 2**30  # masks are drawn at the picture's size
COORDINATE_LIMIT = 1e6
DEPTH_LIMIT = 64  # of what a record carries along (`meta`, keys of others)
_COUNT_LIMIT = 2**31 - 1
_EXACT_LIMIT = 2**53  # larger integers do not fit the columns of a table
_BOX, _POINT = ("x_min", "y_min", "x_max", "y_max"), ("x", "y")
_RESULT_OF = {
    Task.CAPTION: "caption",
    Task.QUERY: "answer",
    Task.DETECT: "objects",
    Task.POINT: "points",
    Task.SEGMENT: "segments",
}
_NULL_KEYS = frozenset({"image", "prompt", "error"})  # null is a value of these


class NotJson(ValueError):
    """A line is no JSON at all: foreign, or cut off."""


class Damage(Exception):
    """What is wrong with a record; the message names the key."""


def parse_record(line: bytes) -> RecordDict:
    """Return one line as a record.

    Raises:
        NotJson: it is none.
        ValueError: not an object, not of this schema, or of a wrong shape; the message says which.
    """
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NotJson("not valid JSON") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f'not a record of md3 (it has no "schema":"{SCHEMA}")')
    try:
        if b"\\ud" in line or b"\\uD" in line:  # half a surrogate pair cannot be written again: shown as ?
            record = json.loads(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
        return _tidied(record)
    except RecursionError as error:
        raise ValueError("a damaged record: it is nested too deep") from error
    except Damage as error:
        raise ValueError(f"a damaged record: its {error} not as md3 writes it") from error


def _tidied(found: RecordDict) -> RecordDict:
    """The record with what other tools changed put back, and each value of the kind it must be."""
    record: RecordDict = {}
    for key, value in found.items():
        tidy = _TIDY.get(key, _carried)
        value = None if _is_absent(value) else tidy(key, value)
        if value is not None or key in _NULL_KEYS:
            record[key] = value
    record.setdefault("image", None)
    record.setdefault("meta", {})
    record.setdefault("error", None)
    _check_whole(record)
    return record


def _check_whole(record: RecordDict) -> None:
    """Raise Damage where keys that belong together are not there."""
    if record.get("task") not in _RESULT_OF:
        raise Damage("task is")
    width, height = record.get("width"), record.get("height")
    if (width is None) != (height is None):
        raise Damage("width or height is")
    if width is not None and height is not None and not 0 < width * height <= SIZE_LIMIT_PIXELS:
        raise Damage("width or height is")
    if record["error"] is not None:
        return
    if record.get(_RESULT_OF[record["task"]]) is None:
        raise Damage(f"{_RESULT_OF[record['task']]} is")
    if width is None and record["image"] is not None:  # the picture would be in no format that is made of images
        raise Damage("width and height are")


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Damage(f"{key} is")
    return value


def _words(key: str, value: Any) -> str:
    """A text that a tool may have taken for a number: an answer "3" comes back as 3 or 3.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_number = type(value) is int or (isinstance(value, float) and math.isfinite(value))
    return str(value) if is_number else _text(key, value)


def _exact_name(key: str, value: Any) -> str:
    try:
        base64.b64decode(_text(key, value), validate=True)
    except ValueError as error:
        raise Damage(f"{key} is") from error
    return str(value)


def _digest(key: str, value: Any) -> str | None:
    """A digest; one of decimal digits only may have become a number, which cannot be turned back."""
    return None if type(value) in (int, float) else _text(key, value)


def _count(key: str, value: Any) -> int:
    """A whole number from 0, also as `160.0`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value <= _COUNT_LIMIT:
        raise Damage(f"{key} is")
    return value


def _number(key: str, value: Any) -> float:
    """A finite number that a float can hold, as it is."""
    try:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value) if abs(value) > _EXACT_LIMIT else value
    except OverflowError:  # an integer of hundreds of digits
        pass
    raise Damage(f"{key} is")


def _coordinate(key: str, value: Any) -> float:
    """A share of the picture's side; what is far outside is damage, and sums and products stay finite."""
    number = _number(key, value)
    if abs(number) > COORDINATE_LIMIT:
        raise Damage(f"{key} is")
    return number


def _side(key: str, value: Any) -> int:
    number = _count(key, value)
    if number == 0:
        raise Damage(f"{key} is")
    return number


def _objects(key: str, value: Any) -> list[dict[str, Any]]:
    return _found(key, value, _BOX)


def _points(key: str, value: Any) -> list[dict[str, Any]]:
    return _found(key, value, _POINT)


def _segments(key: str, value: Any) -> list[dict[str, Any]]:
    segments = _found(key, value, ())
    for segment in segments:
        box = segment.get("bbox")
        if not isinstance(box, dict) or not isinstance(segment.get("svg_path"), str):
            raise Damage(f"{key} are")
        segment["bbox"] = {name: _coordinate(name, box.get(name)) for name in _BOX}
    return segments


def _found(key: str, value: Any, coordinates: tuple[str, ...]) -> list[dict[str, Any]]:
    """A list of what was found; null stands for an absent key there, too."""
    if not isinstance(value, list) or not all(isinstance(thing, dict) for thing in value):
        raise Damage(f"{key} are")
    return [_thing(thing, coordinates) for thing in value]


def _thing(thing: Mapping[str, Any], coordinates: tuple[str, ...]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in thing.items():
        if key in coordinates:
            kept[key] = _coordinate(key, value)
        elif key == "score" and value is not None:
            kept[key] = _number(key, value)
        elif key == "label" and value is not None:
            kept[key] = _words(key, value)
        elif value is not None:
            kept[key] = _carried(key, value)
    for key in coordinates:
        if key not in kept:
            raise Damage(f"{key} is")
    return kept


def _tokens(key: str, value: Any) -> dict[str, int]:
    if not isinstance(value, dict):
        raise Damage(f"{key} are")
    return {name: _count(name, count) for name, count in value.items() if not _is_absent(count)}


def _choices(key: str, value: Any) -> dict[str, float] | None:
    if not isinstance(value, dict):
        raise Damage(f"{key} are")
    # Arrow gives every record the choices of all: those that were not asked are null.
    return {name: _number(key, score) for name, score in value.items() if score is not None} or None


def _meta(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Damage(f"{key} is")
    carried: dict[str, Any] = _carried(key, value)
    return carried


def _error(key: str, value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        raise Damage(f"{key} is")
    if all(part is None for part in value.values()):  # Arrow's way to say null
        return None
    error = {**value, "type": _text(key, value.get("type")), "message": _text(key, value.get("message") or "")}
    error["retry"] = value.get("retry") in (True, 1)
    return error


def _reasoning(key: str, value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        raise Damage(f"{key} is")
    reasoning = {name: part for name, part in value.items() if part is not None}
    if not reasoning:
        return None
    grounding = reasoning.get("grounding", [])
    if not isinstance(grounding, list) or not all(isinstance(part, dict) for part in grounding):
        raise Damage(f"{key} is")
    ending = {"finish_reason": _text(key, reasoning["finish_reason"])} if "finish_reason" in reasoning else {}
    text = _text(key, reasoning.get("text", ""))
    return {"text": text, "grounding": [_grounded(key, part) for part in grounding], **ending}


def _grounded(key: str, part: Mapping[str, Any]) -> dict[str, Any]:
    pairs = part.get("points")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise Damage(f"{key} is")
    points = [[_coordinate(key, x), _coordinate(key, y)] for x, y in pairs]
    start, end = _count(key, part.get("start_idx")), _count(key, part.get("end_idx"))
    return {"start_idx": start, "end_idx": end, "points": points}


def _carried(key: str, value: Any, depth: int = 0) -> Any:
    """What md3 only passes on, without numbers that JSON does not have (they become null)."""
    if depth > DEPTH_LIMIT:
        raise Damage(f"{key} is")
    if isinstance(value, dict):
        return {name: _carried(key, part, depth + 1) for name, part in value.items()}
    if isinstance(value, list):
        return [_carried(key, part, depth + 1) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_TIDY: Mapping[str, Callable[[str, Any], Any]] = {
    "image_b64": _exact_name,
    **dict.fromkeys(("schema", "image", "task", "length", "finish_reason"), _text),
    "model": _text,
    "sha256": _digest,
    **dict.fromkeys(("id", "prompt", "caption", "answer"), _words),
    **dict.fromkeys(("width", "height"), _side),
    "objects": _objects,
    "points": _points,
    "segments": _segments,
    "tokens": _tokens,
    "choices": _choices,
    "meta": _meta,
    "error": _error,
    "reasoning": _reasoning,
}
