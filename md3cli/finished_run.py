"""A run on disk, read back: where its records are and what its run.json says.

For everything that works from finished records (`md3 export`, `report`, `eval`): no model, no
torch. Reads only; run_info.py is what writes. A key that is missing or of another shape is as good
as none: records may come from elsewhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md3cli.errors import InputError
from md3cli.own_runs import is_own
from md3cli.records import printable

RECORDS_NAME = "records.jsonl"
RUN_INFO_LIMIT_BYTES = 64 * 2**20


def find_records(path: Path) -> Path:
    """The records file that `path` names: itself, the one inside a run folder, or the journal beside a document.

    Raises:
        InputError: there is none.
    """
    beside = path.with_name(f"{path.name}.{RECORDS_NAME}") if path.name else path
    found = path / RECORDS_NAME if path.is_dir() else beside if beside.is_file() else path
    if not found.is_file():
        raise InputError(f"no records at {printable(str(found))}; give the .jsonl file or the folder of a run")
    return found


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What stands in run.json; empty where there is none (records made elsewhere)."""

    document: dict[str, Any]

    @property
    def root(self) -> Path | None:
        """The folder (or tar) that record images are relative to; an address is none."""
        root = self.document.get("root")
        is_path = isinstance(root, str) and root and "://" not in root and "\0" not in root
        return Path(str(root)) if is_path else None

    @property
    def is_own(self) -> bool:
        """Whether this user's md3 wrote the root; else it is only claimed, perhaps by a stranger."""
        return is_own(str(self.document.get("root")), self.document.get("seal"))

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
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0
    except OverflowError:  # an integer of hundreds of digits
        return 0.0


def load_run_info(records_path: Path) -> RunInfo:
    """run.json of the run that wrote `records_path`.

    Beside `records.jsonl` it is `run.json`; beside `OUT` it is `OUT.run.json`, and beside the
    journal `OUT.records.jsonl` as well.

    Raises:
        InputError: the file is there and is not JSON.
    """
    for path in run_info_paths(records_path):
        if path.is_file():
            try:
                with path.open("rb") as file:
                    document = json.loads(file.read(RUN_INFO_LIMIT_BYTES))  # of a longer one half is no JSON
            except OSError as error:
                raise InputError(f"cannot read {printable(str(path))}: {error.strerror or error}") from error
            except (ValueError, RecursionError) as error:
                raise InputError(f"{printable(str(path))} is not JSON ({error}); remove it to go on without") from error
            return RunInfo(document if isinstance(document, dict) else {})
    return RunInfo({})


def has_run_info(records_path: Path) -> bool:
    """Return whether the records' own run.json stands beside them, as md3 writes it. Raises as `load_run_info`."""
    return str(load_run_info(records_path).document.get("schema", "")).startswith("md3-run/")


def run_info_paths(records_path: Path) -> Iterator[Path]:
    """Yield the places of the run.json of a records file, the likelier first."""
    name = records_path.name
    yield records_path.with_name("run.json" if name == RECORDS_NAME else f"{name}.run.json")
    if name.endswith(f".{RECORDS_NAME}"):
        yield records_path.with_name(name.removesuffix(f".{RECORDS_NAME}") + ".run.json")
