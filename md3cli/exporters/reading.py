"""Records from a JSON Lines file, one at a time, whatever its length.

Knows the file's shape (one object a line, perhaps a torn tail) and nothing of formats. In: the
path of `records.jsonl`. Out: record dicts as in the product's section on the record, in file
order, every string valid UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from md3cli.errors import InputError
from md3cli.records import SCHEMA, RecordDict, printable

LINE_LIMIT_BYTES = 64 * 2**20  # a line is read whole: this bounds it


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
        ValueError: not JSON, not an object, or not of this schema; the message says which.
    """
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("not valid JSON") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f'not a record of md3 (it has no "schema":"{SCHEMA}")')
    if b"\\ud" in line or b"\\uD" in line:  # half a surrogate pair cannot be written again: shown as ?
        record = json.loads(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
    checked: RecordDict = record
    return checked
