"""Whether a line of a journal is a whole record of ours: its syntax, its keys and their types, and whose it is.

A flipped bit, a hole of zeros or an editor may have changed any byte. `WHOLE_LINES` accepts lines as md3 writes
them, a block at a time and a microsecond a line; `read_record` judges any other line by the contract. Neither
opens anything.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Any

from md3cli.records import CAPTION_LENGTHS, ERROR_TYPES, SCHEMA, RecordDict, Request, Task

# -- lines as md3 writes them ------------------------------------------------------------------------

# Possessive throughout: a line that does not match is given up at once, whatever it holds.
_TEXT = r'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u00[01][0-9a-f]))*+"'
_COUNT = r"(?:0|[1-9][0-9]{0,14}+)"
_NUMBER = rf"-?+{_COUNT}(?:\.[0-9]++)?+(?:e[+-][0-9]{{2}})?+"  # of fewer digits than could be infinite
_HEX64 = "[0-9a-f]{64}"


def _list_of(item: str) -> str:
    return rf"\[(?:{item}(?:,(?!\])|(?=\])))*+\]"


def _object_of(keys: str) -> str:
    return rf"\{{{keys}\}}"


_CORNERS = ",".join(rf'"{name}":{_NUMBER}' for name in ("x_min", "y_min", "x_max", "y_max"))
_SCORE = rf'(?:,"score":{_NUMBER})?+'
_GROUNDING = _object_of(rf'"start_idx":{_COUNT},"end_idx":{_COUNT},"points":{_list_of(_list_of(_NUMBER))}')
_REASONING = _object_of(rf'"text":{_TEXT},"grounding":{_list_of(_GROUNDING)}(?:,"finish_reason":"(?:stop|length)")?+')
_SEGMENT = _object_of(
    rf'"label":{_TEXT},"svg_path":{_TEXT},"bbox":{_object_of(_CORNERS)}(?:,"parse_error":{_TEXT})?+{_SCORE}'
)
_BOX = _object_of(rf'"label":{_TEXT},{_CORNERS}{_SCORE}')
_POINT = _object_of(rf'"label":{_TEXT},"x":{_NUMBER},"y":{_NUMBER}{_SCORE}')
_TASKS, _LENGTHS, _ERRORS = "|".join(Task), "|".join(CAPTION_LENGTHS), "|".join(sorted(ERROR_TYPES))
_RESULTS = {
    Task.CAPTION: rf'"length":"(?:{_LENGTHS})","caption":{_TEXT}',
    Task.QUERY: rf'"answer":{_TEXT}(?:,"reasoning":{_REASONING})?+',
    Task.DETECT: rf'"objects":{_list_of(_BOX)}',
    Task.POINT: rf'"points":{_list_of(_POINT)}',
    Task.SEGMENT: rf'"segments":{_list_of(_SEGMENT)}',
}
_PROMPT = rf'"prompt":(?:null|{_TEXT})'
_ANSWERED = "|".join(rf'"task":"{task}",{_PROMPT},{result}' for task, result in _RESULTS.items())
_SIZE = rf'"width":{_COUNT},"height":{_COUNT},'
# A key of `meta` that comes again in its line is left to `read_record`.
_META = rf'\{{(?:({_TEXT})(?![^\n]*,\1:):(?:{_TEXT}|{_NUMBER}|true|false|null)(?:,(?=")|(?=\}})))*+\}}'
_META_OF_FAILED = _META.replace(r"\1", r"\2")  # the second group of the pattern
_B64 = r'(?:"image_b64":"[A-Za-z0-9+/]*+=*+",)?+'
_HEAD = rf'\{{"schema":"{re.escape(SCHEMA)}","id":"[0-9a-f]{{32}}",'
_TAIL = rf'"model":{_TEXT},"meta":'
_USED = rf'"finish_reason":"(?:stop|length)","tokens":\{{"prompt":{_COUNT},"output":{_COUNT}\}},'
_WHOLE = (
    rf'{_HEAD}(?:"image":null,(?:{_ANSWERED}),|"image":{_TEXT},{_B64}{_SIZE}(?:{_ANSWERED}),"sha256":"{_HEX64}",)'
    rf'{_USED}{_TAIL}{_META},"error":null\}}\n'
)
_ERROR = rf'\{{"type":"(?:{_ERRORS})","message":{_TEXT},"retry":(?:true|false)\}}'
_FAILED = (
    rf'{_HEAD}"image":(?:null|{_TEXT}),{_B64}(?:{_SIZE}"task":"(?:{_TASKS})",{_PROMPT},"sha256":"{_HEX64}",'
    rf'|"task":"(?:{_TASKS})",{_PROMPT},){_TAIL}{_META_OF_FAILED},"error":{_ERROR}\}}\n'
)
# Matches at any place of a text of whole lines, as many lines from there on as are whole; perhaps none.
WHOLE_LINES = re.compile(f"(?:{_WHOLE}|{_FAILED})*+".encode())

# -- any other line ----------------------------------------------------------------------------------

_Check = Callable[[Any], bool]
_COUNT_LIMIT = 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_number(value: Any) -> bool:
    is_whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < _COUNT_LIMIT
    return is_whole or (isinstance(value, float) and math.isfinite(value))


def _is_count(value: Any) -> bool:
    """A whole number from 0; other tools write 160.0 for 160."""
    return _is_number(value) and value >= 0 and value == int(value)


def _is_hex(digits: int) -> _Check:
    pattern = re.compile(f"[0-9a-f]{{{digits}}}")
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_one_of(*allowed: str) -> _Check:
    return lambda value: isinstance(value, str) and value in allowed


def _is_list(is_item: _Check) -> _Check:
    return lambda value: isinstance(value, list) and all(map(is_item, value))


def _has_keys(needed: Mapping[str, _Check], optional: Mapping[str, _Check] | None = None) -> _Check:
    """An object with all that is needed and nothing unknown; null counts as absent where a key is optional."""
    known = {**needed, **(optional or {})}

    def is_sound(value: Any) -> bool:
        if not isinstance(value, dict) or not needed.keys() <= value.keys() <= known.keys():
            return False
        return all(known[key](item) or (item is None and key not in needed) for key, item in value.items())

    return is_sound


_is_finish = _is_one_of("stop", "length")
_corners: dict[str, _Check] = dict.fromkeys(("x_min", "y_min", "x_max", "y_max"), _is_number)
_scored: dict[str, _Check] = {"score": _is_number}
_is_grounding = _has_keys({"start_idx": _is_count, "end_idx": _is_count, "points": _is_list(_is_list(_is_number))})
_results: Mapping[Task, tuple[Mapping[str, _Check], Mapping[str, _Check]]] = {
    Task.CAPTION: ({"length": _is_one_of(*CAPTION_LENGTHS), "caption": _is_text}, {}),
    Task.QUERY: (
        {"answer": _is_text},
        {
            "choices": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
            "reasoning": _has_keys(
                {"text": _is_text, "grounding": _is_list(_is_grounding)}, {"finish_reason": _is_finish}
            ),
        },
    ),
    Task.DETECT: ({"objects": _is_list(_has_keys({"label": _is_text, **_corners}, _scored))}, {}),
    Task.POINT: ({"points": _is_list(_has_keys({"label": _is_text, "x": _is_number, "y": _is_number}, _scored))}, {}),
    Task.SEGMENT: (
        {
            "segments": _is_list(
                _has_keys(
                    {"label": _is_text, "svg_path": _is_text, "bbox": _has_keys(_corners)},
                    {"parse_error": _is_text, **_scored},
                )
            )
        },
        {},
    ),
}
_picture: dict[str, _Check] = {"width": _is_count, "height": _is_count, "sha256": _is_hex(64)}
_always: dict[str, _Check] = {
    "schema": _is_one_of(SCHEMA),
    "id": _is_hex(32),
    "image": _is_text_or_null,
    "task": _is_one_of(*Task),
    "prompt": _is_text_or_null,
    "model": _is_text,
    "meta": lambda value: isinstance(value, dict),
}
_used: dict[str, _Check] = {
    "finish_reason": _is_finish,
    "tokens": _has_keys({"prompt": _is_count, "output": _is_count}),
}
_is_error = _has_keys(
    {"type": _is_one_of(*ERROR_TYPES), "message": _is_text, "retry": lambda value: isinstance(value, bool)}
)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number too large")
    return value


def read_json(line: bytes) -> Any:
    """Parse a line strictly: UTF-8, no key twice, no NaN, no number that is infinite, no half character.

    Raises:
        ValueError, RecursionError: it is not that.
    """
    text = line.decode()
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_record(line: bytes) -> RecordDict | None:
    """Return the record that a line holds; None where it is not whole (product contract, section 3).

    Whole numbers as `160.0` and absent keys as null, as other tools write them, are taken as they are.
    """
    try:
        record = read_json(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _is_whole(record) else None


def _is_whole(record: RecordDict) -> bool:
    if not isinstance(record.get("task"), str) or record["task"] not in _results or "error" not in record:
        return False
    needed, optional = dict(_always), {"image_b64": _is_text}
    if record["error"] is None:
        result, rest = _results[Task(record["task"])]
        needed |= {**result, **_used}
        optional |= rest
    if record.get("image") is not None and (record["error"] is None or record.get("width") is not None):
        needed |= _picture
    needed["error"] = _is_error if record["error"] is not None else lambda value: value is None
    present = {key: value for key, value in record.items() if value is not None or key in needed}
    return _has_keys(needed, optional)(present)


# -- whose record it is --------------------------------------------------------------------------------

_HEAD_BYTES = f'{{"schema":"{SCHEMA}","id":"'.encode()


def is_record_of(line: bytes, record_id: str, image: str | None, request: Request) -> bool:
    """Return whether a whole line is the record of this request: its id, image, task and prompt are the request's."""
    head = b'%s%s","image":%s,' % (_HEAD_BYTES, record_id.encode(), _as_written(image))
    if line.startswith(head) and line.startswith(
        _asked(request.task, request.prompt), line.find(b'"task":', len(head))
    ):
        return True
    record = read_record(line)  # written by somebody else, or another's
    if record is None or record["id"] != record_id:
        return False
    found = [_as_written(record[key]) for key in ("image", "task", "prompt")]
    return found == [_as_written(value) for value in (image, str(request.task), request.prompt)]


@lru_cache(maxsize=1024)  # a run has few requests, and each is compared with every line
def _asked(task: Task, prompt: str | None) -> bytes:
    return b'"task":"%s","prompt":%s,' % (task.encode(), _as_written(prompt))


def _as_written(value: str | None) -> bytes:
    """A text as `journal.encode_record` puts it on disk."""
    return b"null" if value is None else encode_basestring(value).encode("utf-8", "replace")
