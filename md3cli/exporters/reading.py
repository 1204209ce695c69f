"""Records from a JSON Lines file, one at a time, whatever its length.

Knows the file's shape (one object a line, perhaps a torn tail) and nothing of formats. In: the
path of `records.jsonl`. Out: record dicts as in the product's section on the record, in file
order, every string valid UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, NamedTuple

from md3cli.errors import InputError
from md3cli.records import SCHEMA, RecordDict, printable

SIZE_LIMIT_PIXELS = 2**30
LINE_LIMIT_BYTES = 64 * 2**20  # a line is read whole: this bounds it
_BOX = ("x_min", "y_min", "x_max", "y_max")
_POINT = ("x", "y")
_TEXTS = ("id", "image", "image_b64", "task", "prompt", "caption", "answer", "finish_reason", "model", "sha256")
_NUMBER, _TEXT, _OBJECT = (int, float), (str, NoneType), (dict, NoneType)


class PlacedRecord(NamedTuple):
    """A record and the offset in bytes of its line."""

    offset: int
    record: RecordDict


def read_records(path: Path) -> Iterator[RecordDict]:
    """The records of `path` in order.

    Raises:
        InputError: the file cannot be read, or a line is no record; names the line.
    """
    with open_records(path) as file:
        for _, record in placed_records(file, path):
            yield record


def open_records(path: Path) -> BinaryIO:
    """`path` opened for reading."""
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read the records {printable(str(path))}: {error.strerror or error}") from error


def placed_records(file: BinaryIO, path: Path) -> Iterator[PlacedRecord]:
    """Records with their offsets. A last line without a newline that is no JSON is a torn tail: left out."""
    offset = number = 0
    while line := file.readline(LINE_LIMIT_BYTES):
        number += 1
        if line.strip():
            try:
                yield PlacedRecord(offset, parse_record(line))
            except ValueError as error:
                if not line.endswith(b"\n") and len(line) < LINE_LIMIT_BYTES:
                    return
                where = f"{printable(str(path))}, line {number}"
                raise InputError(f"{where}: {error}; mend or remove the line, or run the command again") from error
        offset += len(line)


def parse_record(line: bytes) -> RecordDict:
    """One line as a record.

    Raises:
        ValueError: not JSON, not an object, not of this schema, or of a wrong shape; the message says which.
    """
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("not valid JSON") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f'not a record of md3 (it has no "schema":"{SCHEMA}")')
    try:
        _check_shape(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("a damaged record: its image, size or results are not as md3 writes them") from error
    if b"\\ud" in line or b"\\uD" in line:  # half a surrogate pair cannot be written again: shown as ?
        record = json.loads(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
    checked: RecordDict = record
    return checked


def _check_shape(record: RecordDict) -> None:
    """Raise KeyError, TypeError or AttributeError where the exporters could not use a record.

    Records may be edited by hand or come from strangers: a wrong one must be named, not trip the
    code that draws it. The size is bounded because masks are drawn at it.
    """
    for key in _TEXTS:
        if not isinstance(record.get(key), _TEXT):
            raise TypeError(key)
    for key in ("error", "meta", "tokens"):
        if not isinstance(record.get(key), _OBJECT):
            raise TypeError(key)
    if "width" in record:
        width, height = record["width"], record["height"]
        if not (type(width) is type(height) is int and min(width, height) > 0 and width * height <= SIZE_LIMIT_PIXELS):
            raise TypeError("width")
    for found in record.get("objects") or ():
        _check_numbers(found, _BOX)
    for found in record.get("segments") or ():
        _check_numbers(found["bbox"], _BOX)
        if not isinstance(found["svg_path"], str):
            raise TypeError("svg_path")
    for found in record.get("points") or ():
        _check_numbers(found, _POINT)


def _check_numbers(found: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        if not isinstance(found[key], _NUMBER):
            raise TypeError(key)
    if not isinstance(found.get("score", 0.0), _NUMBER):
        raise TypeError("score")
