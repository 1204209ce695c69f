"""Records as other tools leave them (pandas, Arrow, a spreadsheet, a text editor), put back to what md3 writes.

`tidied_record` mends what those change and refuses the rest in words: formats are made from it. Its checks are its own,
apart from those of record_shape.py, which say what a run may keep. Nothing here opens a file.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from md3cli.finished.record_shape import CORNERS, RESULTS, WHOLE_LINE
from md3cli.records import SCHEMA, RecordDict

_CENTRE = ("x", "y")
SIZE_LIMIT_PIXELS = 2**30  # masks are drawn at the picture's size
COORDINATE_LIMIT = 1e6
DEPTH_LIMIT = 64  # of what a record carries along (`meta`, keys of others)
_COUNT_LIMIT = 2**31 - 1
_EXACT_LIMIT = 2**53  # larger integers do not fit the columns of a table
_NULL_KEYS = frozenset({"image", "prompt", "error"})  # null is a value of these


class NotJson(ValueError):
    """A line is no JSON at all: foreign, or cut off."""


class Damage(Exception):
    """What is wrong with a record; the message names the key."""


def tidied_record(line: bytes) -> RecordDict:
    """Return the record of a line with each value of the kind it must be.

    What other tools change is put back: `160.0` for 160, null or NaN for an absent key, a number for a text of digits.
    An answer exactly as md3 writes it needs none of that: 6 us a line instead of 16.

    Raises:
        NotJson: the line is no JSON.
        ValueError: not an object, not of this schema, or of a wrong shape; the message says which.
    """
    if (match := WHOLE_LINE.match(line)) and match.end() == len(line):
        with contextlib.suppress(UnicodeDecodeError):
            record: RecordDict = _scan(line.decode())[0]
            if _is_within_limits(record):
                return record
    return put_back(line)


_scan = json.JSONDecoder().raw_decode  # without `loads`, which looks for encodings and blanks


_WITH_PARTS = frozenset({"reasoning", "region"})  # they hold numbers of their own


def _is_within_limits(record: RecordDict) -> bool:
    """Return whether the numbers of a whole line are those that `put_back` takes."""
    if not 0 < record.get("width", 1) * record.get("height", 1) <= SIZE_LIMIT_PIXELS or record.keys() & _WITH_PARTS:
        return False
    for count in record["tokens"].values():
        if count > _COUNT_LIMIT:
            return False
    found = record.get("objects") or record.get("points") or ()
    if "segments" in record:
        found = [segment["bbox"] for segment in record["segments"]]
    for thing in found:
        for value in thing.values():
            if value.__class__ is not str and not -COORDINATE_LIMIT <= value <= COORDINATE_LIMIT:
                return False
    return True


def put_back(line: bytes) -> RecordDict:
    """Return the record of a line by the plain way of `tidied_record`, whoever wrote it."""
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NotJson("not valid JSON") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f'not a record of md3 (it has no "schema":"{SCHEMA}")')
    record: RecordDict = {}
    try:
        if b"\\ud" in line or b"\\uD" in line:  # half a surrogate pair cannot be written again: shown as ?
            found = json.loads(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
        for key, value in found.items():
            tidy = None if _is_absent(value) else _TIDY.get(key, _carried)(key, value)
            if tidy is not None or key in _NULL_KEYS:
                record[key] = tidy
        record.setdefault("image", None)
        if "meta" not in record or "error" not in record:
            ends = {"meta": record.pop("meta", {}), "error": record.pop("error", None)}  # the last keys of a record
            record |= ends
        _check_completeness(record)
        _name_what_was_found(record)
    except RecursionError as error:
        raise ValueError("a damaged record: it is nested too deep") from error
    except Damage as error:
        raise ValueError(f"a damaged record: its {error} not as md3 writes it") from error
    return record


def _name_what_was_found(record: RecordDict) -> None:
    """Give what a tool left without a label that of its prompt, as a run without names does."""
    label = str(record.get("prompt") or "object")
    for key in ("objects", "points", "segments"):
        found = record.get(key) or ()
        if not all("label" in thing for thing in found):
            record[key] = [{"label": label} | thing for thing in found]


def _check_completeness(record: RecordDict) -> None:
    """Raise Damage where keys that belong together are not there."""
    if record.get("task") not in RESULTS:
        raise Damage("task is")
    width, height = record.get("width"), record.get("height")
    if (width is None) != (height is None):
        raise Damage("width or height is")
    if width is not None and height is not None and not 0 < width * height <= SIZE_LIMIT_PIXELS:
        raise Damage("width or height is")
    if record["error"] is not None:
        return
    result = [*RESULTS[record["task"]][0]][-1]
    if record.get(result) is None:
        raise Damage(f"{result} is")
    if width is None and record["image"] is not None:  # the picture would be in no format that is made of images
        raise Damage("width and height are")


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Damage(f"{key} is")
    return value


def _words(key: str, value: Any) -> str:
    """Read a text that a tool may have taken for a number: an answer "3" comes back as 3 or 3.0."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise Damage(f"{key} is")


def _base64(key: str, value: Any) -> str:
    try:
        base64.b64decode(_text(key, value), validate=True)
    except ValueError as error:
        raise Damage(f"{key} is") from error
    return str(value)


def _digest(key: str, value: Any) -> str | None:
    """Read a digest; one of decimal digits only may have become a number, which cannot be turned back."""
    return None if type(value) in (int, float) else _text(key, value)


def _count(key: str, value: Any, lowest: int = 0) -> int:
    """Read a whole number from `lowest`, also as `160.0`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not lowest <= value <= _COUNT_LIMIT:
        raise Damage(f"{key} is")
    return value


def _number(key: str, value: Any, limit: float = math.inf) -> float:
    """Read a finite number that a float can hold, as it is."""
    try:
        if type(value) in (int, float) and math.isfinite(value) and abs(value) <= limit:
            return float(value) if abs(value) > _EXACT_LIMIT else value
    except OverflowError:  # an integer of hundreds of digits
        pass
    raise Damage(f"{key} is")


# A share of the picture's side; what is far outside is damage, and sums and products stay finite.
_coordinate = partial(_number, limit=COORDINATE_LIMIT)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Damage(what)
    return value


def _is_all_null(value: Mapping[str, Any]) -> bool:
    return all(part is None for part in value.values())  # Arrow's way to say null


def _found(key: str, value: Any, coordinates: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read a list of what was found; null stands for an absent key there, too."""
    if not isinstance(value, list) or not all(isinstance(thing, dict) for thing in value):
        raise Damage(f"{key} are")
    tidied: list[dict[str, Any]] = []
    for thing in value:
        kept: dict[str, Any] = {}
        for name, part in thing.items():
            if part is not None or name in coordinates:
                tidy = _coordinate if name in coordinates else _TIDY_OF_FOUND.get(name, _carried)
                kept[name] = tidy(name, part)
        for name in coordinates:
            if name not in kept:
                raise Damage(f"{name} is")
        tidied.append(kept)
    return tidied


def _segments(key: str, value: Any) -> list[dict[str, Any]]:
    segments = _found(key, value, ())
    for segment in segments:
        box = segment.get("bbox")
        if not isinstance(box, dict) or not isinstance(segment.get("svg_path"), str):
            raise Damage(f"{key} are")
        segment["bbox"] = {name: _coordinate(name, box.get(name)) for name in CORNERS}
    return segments


def _region(key: str, value: Any) -> dict[str, Any] | None:
    region = _object(value, "region is")
    if _is_all_null(region):
        return None
    box = {name: _coordinate(name, region.get(name)) for name in CORNERS}
    of = {"label": _words(key, region.get("label")), "of": _words(key, region.get("of"))}
    return {**box, **of, "index": _count(key, region.get("index"))}


def _tiles(key: str, value: Any) -> dict[str, Any] | None:
    tiles = _object(value, "tiles are")
    if _is_all_null(tiles):
        return None
    size = tiles.get("size")
    size = "auto" if size == "auto" else _count(key, int(str(size)) if str(size).isdecimal() else size)
    return {"size": size, "overlap": _number(key, tiles.get("overlap")), "count": _count(key, tiles.get("count"))}


def _tokens(key: str, value: Any) -> dict[str, int]:
    counts = _object(value, "tokens are")
    return {name: _count(name, count) for name, count in counts.items() if not _is_absent(count)}


def _choices(key: str, value: Any) -> dict[str, float] | None:
    scores = _object(value, "choices are")
    # Arrow gives every record the choices of all: those that were not asked are null.
    return {name: _number(key, score) for name, score in scores.items() if score is not None} or None


def _meta(key: str, value: Any) -> dict[str, Any]:
    carried: dict[str, Any] = _carried(key, _object(value, "meta is"))
    return carried


def _error(key: str, value: Any) -> dict[str, Any] | None:
    if _is_all_null(_object(value, "error is")):
        return None
    error = {**value, "type": _text(key, value.get("type")), "message": _text(key, value.get("message") or "")}
    error["retry"] = value.get("retry") in (True, 1)
    return error


def _reasoning(key: str, value: Any) -> dict[str, Any] | None:
    reasoning = {name: part for name, part in _object(value, "reasoning is").items() if part is not None}
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
    """Return what md3 only passes on, without numbers that JSON does not have (they become null)."""
    if depth > DEPTH_LIMIT:
        raise Damage(f"{key} is")
    if isinstance(value, dict):
        return {name: _carried(key, part, depth + 1) for name, part in value.items()}
    if isinstance(value, list):
        return [_carried(key, part, depth + 1) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_TIDY_OF_FOUND: Mapping[str, Callable[[str, Any], Any]] = {"score": _number, "label": _words}
_TIDY: Mapping[str, Callable[[str, Any], Any]] = {
    "image_b64": _base64,
    **dict.fromkeys(("schema", "image", "task", "length", "finish_reason", "model"), _text),
    "sha256": _digest,
    **dict.fromkeys(("id", "prompt", "caption", "answer"), _words),
    **dict.fromkeys(("width", "height"), partial(_count, lowest=1)),
    "objects": partial(_found, coordinates=CORNERS),
    "points": partial(_found, coordinates=_CENTRE),
    "segments": _segments,
    "tokens": _tokens,
    "choices": _choices,
    "meta": _meta,
    "error": _error,
    "reasoning": _reasoning,
    "region": _region,
    "tiles": _tiles,
}
