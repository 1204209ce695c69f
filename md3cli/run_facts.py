"""What an earlier start left in run.json, read back: each value of its type, or as good as absent.

The file may come from a stranger, from an editor or from a failing disk. Nothing here writes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from md3cli.errors import OutputMismatchError
from md3cli.records import printable

SIZE_LIMIT_BYTES = 1 << 26
_DEPTH_LIMIT = 20  # a manifest's requests are nested four deep
_STAGES_LIMIT = 100
_POINTS_LIMIT = 10_000


def read_facts(path: Path, schema: str) -> dict[str, Any]:
    """Return the document at `path`; empty where it is missing or not ours (then the records decide).

    Raises:
        OutputMismatchError: it is larger than any that md3 writes.
    """
    document = read_document(path)
    is_ours = document.get("schema") == schema and isinstance(document.get("identity"), dict)
    return document if is_ours and _is_flat(document["identity"]) else {}


def read_document(path: Path) -> dict[str, Any]:
    """Return the JSON object at `path`, whoever wrote it; empty where there is none.

    Raises:
        OutputMismatchError: it is larger than any that md3 writes.
    """
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > SIZE_LIMIT_BYTES:
            raise OutputMismatchError(
                f"{printable(str(path))} has more than {SIZE_LIMIT_BYTES >> 20} MiB, which no run writes; "
                "move it away, or choose another -o"
            )
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _is_flat(value: Any) -> bool:
    """Whether lists and objects are nested no deeper than ours; level by level, so that nothing recurses."""
    level = [value]
    for _ in range(_DEPTH_LIMIT):
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in nested for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return True
    return False


def _number(value: Any) -> float | None:
    """A finite number from 0 that is no flag; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) and value >= 0 else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def stages_of(document: dict[str, Any]) -> dict[str, float]:
    """Seconds by stage."""
    stages = document.get("stages")
    found = {name: _number(value) for name, value in stages.items()} if isinstance(stages, dict) else {}
    return {name: value for name, value in list(found.items())[:_STAGES_LIMIT] if value is not None}


def timeline_of(document: dict[str, Any]) -> list[tuple[float, int]]:
    """Seconds and records done, as far as both are numbers."""
    timeline = document.get("timeline")
    pairs = timeline[-_POINTS_LIMIT:] if isinstance(timeline, list) else []
    numbers = [tuple(map(_number, pair)) for pair in pairs if isinstance(pair, list) and len(pair) == 2]
    return [(at_s, int(done)) for at_s, done in numbers if at_s is not None and done is not None]


def starts_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Notes of earlier starts: of each what is a text, a number, null, or a list of such."""
    starts = document.get("starts")
    notes = [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    return [{key: value for key, value in note.items() if _is_plain(value)} for note in notes]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(item is None or isinstance(item, str) or _number(item) is not None for item in value)
    return value is None or isinstance(value, str) or _number(value) is not None


def counts_of(document: dict[str, Any]) -> dict[str, Any] | None:
    """Requests by outcome; None where they are not counts."""
    counts = document.get("counts")
    if not isinstance(counts, dict) or not isinstance(counts.get("errors"), dict):
        return None
    values = [counts.get("ok"), counts.get("failed"), *counts["errors"].values()]
    return counts if all(_number(value) is not None for value in values) else None
