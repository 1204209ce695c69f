"""The shape of a record: what a line of a records file must be to count as one.

Two judges stand here. `WHOLE_LINES` accepts lines exactly as md3 writes them, a block at a time and a microsecond a
line. `read_record` accepts what the product contract allows (section 3): a run that goes on keeps such lines and does
all others again. A third one, the most lenient, changes values and has checks of its own (tidied.py). Nothing here
opens a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Any, NamedTuple

from md3cli.records import CAPTION_LENGTHS, ERROR_TYPES, SCHEMA, RecordDict, Request, Task, strict_json

LINE_LIMIT_BYTES = 1 << 26  # a line is read whole: this bounds it, and a longer one is no record
CORNERS = ("x_min", "y_min", "x_max", "y_max")

# -- what values are, as md3 writes them and as the contract allows them ---------------------------------


class _Kind(NamedTuple):
    """A kind of value: a pattern of its text in a line of md3, and whether a parsed value is one."""

    pattern: str  # possessive throughout: a line that does not match is given up at once, whatever it holds
    fits: Callable[[Any], bool]


_WHOLE_LIMIT = 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    is_whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < _WHOLE_LIMIT
    return is_whole or (isinstance(value, float) and math.isfinite(value))


def _is_count(value: Any) -> bool:
    """Return whether it is a whole number from 0; other tools write 160.0 for 160."""
    return _is_number(value) and value >= 0 and value == int(value)


def _hex(digits: int) -> _Kind:
    pattern = re.compile(f"[0-9a-f]{{{digits}}}")
    return _Kind(f'"{pattern.pattern}"', lambda value: _is_text(value) and pattern.fullmatch(value) is not None)


def _one_of(*allowed: str) -> _Kind:
    return _Kind(f'"(?:{"|".join(allowed)})"', lambda value: isinstance(value, str) and value in allowed)


def _list_of(item: _Kind) -> _Kind:
    pattern = rf"\[(?:{item.pattern}(?:,(?!\])|(?=\])))*+\]"
    return _Kind(pattern, lambda value: isinstance(value, list) and all(map(item.fits, value)))


_Members = Mapping[str, _Kind]


def _members(needed: _Members, optional: _Members) -> str:
    """Return the pattern of an object's members; those without a pattern are left to `read_record`."""
    parts = [f'"{key}":{kind.pattern}' for key, kind in needed.items()]
    return ",".join(parts) + "".join(f'(?:,"{key}":{kind.pattern})?+' for key, kind in optional.items() if kind.pattern)


def _object_of(needed: _Members, optional: _Members | None = None) -> _Kind:
    """Read an object with all keys that are needed and none unknown; null counts as absent where a key is optional."""
    known = {**needed, **(optional or {})}

    def fits(value: Any) -> bool:
        if not isinstance(value, dict) or not needed.keys() <= value.keys() <= known.keys():
            return False
        return all(known[key].fits(item) or (item is None and key not in needed) for key, item in value.items())

    return _Kind(rf"\{{{_members(needed, optional or {})}\}}", fits)


_TEXT = _Kind(r'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u00[01][0-9a-f]))*+"', _is_text)
_TEXT_OR_NULL = _Kind(f"(?:null|{_TEXT.pattern})", lambda value: value is None or isinstance(value, str))
_COUNT = _Kind("(?:0|[1-9][0-9]{0,14}+)", _is_count)
# A number of md3 has fewer digits than could be infinite.
_NUMBER = _Kind(rf"-?+{_COUNT.pattern}(?:\.[0-9]++)?+(?:e[+-][0-9]{{2}})?+", _is_number)
_TRUTH = _Kind("(?:true|false)", lambda value: isinstance(value, bool))
_FINISH = _one_of("stop", "length")
_SHA256 = _hex(64)
_SCORED = {"score": _NUMBER}
_BOX = dict.fromkeys(CORNERS, _NUMBER)
_GROUNDING = _object_of({"start_idx": _COUNT, "end_idx": _COUNT, "points": _list_of(_list_of(_NUMBER))})
_REASONING = _object_of({"text": _TEXT, "grounding": _list_of(_GROUNDING)}, {"finish_reason": _FINISH})
_CHOICES = _Kind("", lambda value: isinstance(value, dict) and all(map(_is_number, value.values())))
_OBJECT = _object_of({"label": _TEXT, **_BOX}, _SCORED)
_POINT = _object_of({"label": _TEXT, "x": _NUMBER, "y": _NUMBER}, _SCORED)
_SEGMENT = _object_of({"label": _TEXT, "svg_path": _TEXT, "bbox": _object_of(_BOX)}, {"parse_error": _TEXT, **_SCORED})
_ERROR = _object_of({"type": _one_of(*sorted(ERROR_TYPES)), "message": _TEXT, "retry": _TRUTH})
_USED = {"finish_reason": _FINISH, "tokens": _object_of({"prompt": _COUNT, "output": _COUNT})}
_REGION = _object_of({**_BOX, "label": _TEXT, "of": _TEXT, "index": _COUNT})
_SIDE = _Kind(f'(?:"auto"|{_COUNT.pattern})', lambda value: value == "auto" or _is_count(value))
_TILES = {"tiles": _object_of({"size": _SIDE, "overlap": _NUMBER, "count": _COUNT})}
# What an answer holds, by task: needed and optional members; the last needed one is the result itself.
RESULTS: Mapping[Task, tuple[_Members, _Members]] = {
    Task.CAPTION: ({"length": _one_of(*CAPTION_LENGTHS), "caption": _TEXT}, {}),
    Task.QUERY: ({"answer": _TEXT}, {"choices": _CHOICES, "reasoning": _REASONING}),
    Task.DETECT: ({"objects": _list_of(_OBJECT)}, {}),
    Task.POINT: ({"points": _list_of(_POINT)}, {}),
    Task.SEGMENT: ({"segments": _list_of(_SEGMENT)}, {}),
}
_ALWAYS: _Members = {
    "schema": _one_of(SCHEMA),
    "id": _hex(32),
    "image": _TEXT_OR_NULL,
    "task": _one_of(*Task),
    "prompt": _TEXT_OR_NULL,
    "model": _TEXT,
    "meta": _Kind("", lambda value: isinstance(value, dict)),
}

# -- lines as md3 writes them ----------------------------------------------------------------------------

_PROMPT = f'"prompt":{_TEXT_OR_NULL.pattern}(?:,"region":{_REGION.pattern})?+'
_ANSWERED = "|".join(f'"task":"{task}",{_PROMPT},{_members(*result)}' for task, result in RESULTS.items())
_ASKED = f'"task":{_ALWAYS["task"].pattern},{_PROMPT},'
_SIZE = rf'"width":{_COUNT.pattern},"height":{_COUNT.pattern},'
_SIGNED = f'"sha256":{_SHA256.pattern},'
_PLAIN = f"(?:{_TEXT.pattern}|{_NUMBER.pattern}|true|false|null)"
# A key of `meta` that comes again in its line is left to `read_record`.
_META = rf'\{{(?:({_TEXT.pattern})(?![^\n]*,\1:):{_PLAIN}(?:,(?=")|(?=\}})))*+\}}'
_META_OF_FAILED = _META.replace(r"\1", r"\2")  # the second group of the whole pattern
_B64 = r'(?:"image_b64":"[A-Za-z0-9+/]*+=*+",)?+'
_HEAD = rf'\{{"schema":"{re.escape(SCHEMA)}","id":{_ALWAYS["id"].pattern},'
_TAIL = f'"model":{_TEXT.pattern},"meta":'
_WHOLE = (
    f'{_HEAD}(?:"image":null,(?:{_ANSWERED}),|"image":{_TEXT.pattern},{_B64}{_SIZE}(?:{_ANSWERED}),{_SIGNED})'
    rf'{_members(_USED, _TILES)},{_TAIL}{_META},"error":null\}}\n'
)
_FAILED = (
    f'{_HEAD}"image":{_TEXT_OR_NULL.pattern},{_B64}(?:{_SIZE}{_ASKED}{_SIGNED}|{_ASKED}){_TAIL}{_META_OF_FAILED},'
    rf'"error":{_ERROR.pattern}\}}\n'
)
# Matches at any place of a text of whole lines, as many lines from there on as are whole; perhaps none.
WHOLE_LINES = re.compile(f"(?:{_WHOLE}|{_FAILED})*+".encode())
WHOLE_LINE = re.compile(_WHOLE.encode())  # one line with an answer

# -- lines as the contract allows them -------------------------------------------------------------------


def read_record(line: bytes) -> RecordDict | None:
    """Return the record that a line holds; None where the record is not whole (product contract, section 3).

    Whole numbers as `160.0` and absent keys as null, as other tools write them, are taken as they are.
    """
    try:
        record = strict_json(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _is_whole(record) else None


def _is_whole(record: RecordDict) -> bool:
    if not isinstance(record.get("task"), str) or record["task"] not in RESULTS or "error" not in record:
        return False
    has_answer = record["error"] is None
    needed, optional = dict(_ALWAYS), {"image_b64": _TEXT, "region": _REGION}
    needed["error"] = _Kind("", lambda value: value is None) if has_answer else _ERROR
    if has_answer:
        result, rest = RESULTS[Task(record["task"])]
        needed |= {**result, **_USED}
        optional |= {**rest, **_TILES}
    if record.get("image") is not None and (has_answer or record.get("width") is not None):
        needed |= {"width": _COUNT, "height": _COUNT, "sha256": _SHA256}
    present = {key: value for key, value in record.items() if value is not None or key in needed}
    return _object_of(needed, optional).fits(present)


_LINE_START = f'{{"schema":"{SCHEMA}","id":"'.encode()


def is_record_of(line: bytes, record_id: str, image: str | None, request: Request) -> bool:
    """Return whether a whole line is the record of this request: its id, image, task and prompt are the request's."""
    head = b'%s%s","image":%s,' % (_LINE_START, record_id.encode(), _as_written(image))
    if line.startswith(head) and line.startswith(
        _task_and_prompt(request.task, request.prompt), line.find(b'"task":', len(head))
    ):
        return True
    record = read_record(line)  # another program wrote it, or it is another request's
    if record is None or record["id"] != record_id:
        return False
    found = [_as_written(record[key]) for key in ("image", "task", "prompt")]
    return found == [_as_written(value) for value in (image, str(request.task), request.prompt)]


@lru_cache(maxsize=1024)  # a run has few requests, and each is compared with every line
def _task_and_prompt(task: Task, prompt: str | None) -> bytes:
    return b'"task":"%s","prompt":%s,' % (task.encode(), _as_written(prompt))


def _as_written(value: str | None) -> bytes:
    return b"null" if value is None else encode_basestring(value).encode("utf-8", "replace")
