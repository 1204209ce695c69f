"""A run on disk, read back: its records, what its run.json says, where its pictures are.

For everything that works from finished records (`md3 export`, `report`, `eval`): no model, no
torch. Reads only; the journal is what writes. Records stream, so a million of them cost no memory.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from md3cli.errors import ImageError, InputError
from md3cli.records import ImageItem, RecordDict, Task, printable

RECORDS_NAME = "records.jsonl"
_TASKS = tuple(map(str, Task))


def find_records(path: Path) -> Path:
    """The records file that `path` names: itself, or the one inside a run folder.

    Raises:
        InputError: there is none.
    """
    found = path / RECORDS_NAME if path.is_dir() else path
    if not found.is_file():
        raise InputError(f"no records at {printable(str(found))}; give the .jsonl file or the folder of a run")
    return found


def read_records(path: Path) -> Iterator[RecordDict]:
    """The records of a file in its order; a torn last line (the run still goes on) is left out.

    Raises:
        InputError: the file cannot be read, or a line is no record; names the line.
    """
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n") and not _is_json(line):
                    return
                if line.strip():
                    yield _parse(line, f"line {number} of {printable(path.name)}")
    except OSError as error:
        raise InputError(f"cannot read the records {printable(str(path))}: {error.strerror}") from error


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parse(line: bytes, where: str) -> RecordDict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); is this a records file of md3?") from error
    if not isinstance(record, dict) or record.get("task") not in _TASKS or "image" not in record:
        raise InputError(f"{where} is no md3 record (it needs `image` and a known `task`)")
    return record


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What stands in run.json; empty where there is none (records made elsewhere)."""

    document: dict[str, Any]

    @property
    def root(self) -> Path | None:
        """The folder that record images are relative to."""
        root = self.document.get("root")
        return Path(root) if isinstance(root, str) and root else None

    @property
    def elapsed_s(self) -> float | None:
        """Seconds the run took, all starts together; None while they are not known."""
        spans = [_number(start.get("elapsed_s")) for start in self._list("starts") if isinstance(start, dict)]
        return sum(spans) or None

    @property
    def stages_s(self) -> dict[str, float]:
        """Seconds by stage, all starts together."""
        stages = self.document.get("stages")
        return {str(stage): _number(value) for stage, value in stages.items()} if isinstance(stages, dict) else {}

    @property
    def timeline(self) -> list[tuple[float, float]]:
        """(seconds since the start, records done) pairs in order; empty where the run kept none."""
        pairs = [pair for pair in self._list("timeline") if isinstance(pair, list) and len(pair) == 2]
        return [(_number(seconds), _number(done)) for seconds, done in pairs]

    def _list(self, key: str) -> list[Any]:
        value = self.document.get(key)
        return value if isinstance(value, list) else []


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def load_run_info(records_path: Path) -> RunInfo:
    """run.json of the run that wrote `records_path`.

    Beside `records.jsonl` it is `run.json`; beside `OUT` it is `OUT.run.json`, and beside the
    journal `OUT.records.jsonl` as well.

    Raises:
        InputError: the file is there and is not JSON.
    """
    name = records_path.name
    candidates = ["run.json"] if name == RECORDS_NAME else [f"{name}.run.json"]
    candidates += [name.removesuffix(f".{RECORDS_NAME}") + ".run.json"] if name.endswith(f".{RECORDS_NAME}") else []
    for path in (records_path.with_name(candidate) for candidate in candidates):
        if path.is_file():
            try:
                document = json.loads(path.read_bytes())
            except ValueError as error:
                raise InputError(f"{printable(str(path))} is not JSON ({error}); remove it to go on without") from error
            return RunInfo(document if isinstance(document, dict) else {})
    return RunInfo({})


def picture_of(record: RecordDict, root: Path, *, is_confined: bool = False) -> ImageItem:
    """The picture a record is about, to be opened through `images.read_image`.

    `is_confined`: nothing outside `root` is opened, as for `--root`.

    Raises:
        ImageError: there is no such local picture, or it is outside the root.
    """
    name = record["image"]
    if not isinstance(name, str):
        raise ImageError("not_found", "the record has no picture")
    if urlsplit(name).scheme not in ("", "file") and "://" in name:
        raise ImageError("not_found", f"{printable(name)} is remote")
    name_b64 = record.get("image_b64")
    path = os.path.join(root, _file_name(name, name_b64))
    if is_confined and not Path(path).resolve().is_relative_to(root.resolve()):
        raise ImageError("outside_root", f"{printable(name)} is outside {printable(str(root))}")
    return ImageItem(name=name, path=path, name_b64=name_b64)


def _file_name(name: str, name_b64: str | None) -> str:
    if name_b64 is None:
        return name
    try:
        return os.fsdecode(base64.b64decode(name_b64, validate=True))
    except (binascii.Error, ValueError, TypeError) as error:
        raise ImageError("not_found", f"{printable(name)}: image_b64 is damaged") from error
