"""The choices of restricted answers (`md3 query --choices`), which become columns of tables.

A record of such a query holds `"choices": {"yes": 0.91, "no": 0.09}`: a score for each. A cheap
first look at the file finds which there are, so that a table's columns are known before its
first row.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from md3cli.finished.records_file import LINE_LIMIT_BYTES, open_records
from md3cli.records import RecordDict, printable

COLUMN_PREFIX = "choice_"
_KEY = b'"choices"'


def find_choices(records: Path) -> list[str]:
    """All choices of a records file in the order they first occur; only lines that may hold one are parsed."""
    found: dict[str, None] = {}
    with open_records(records) as file:
        while line := file.readline(LINE_LIMIT_BYTES):
            if _KEY in line:
                try:
                    found.update(dict.fromkeys(choice_scores(json.loads(line))))
                except (ValueError, RecursionError):
                    continue  # told, with its number, by the pass that writes
    return list(found)


def choice_scores(record: RecordDict) -> dict[str, float]:
    """The record's score for each choice; empty where the answer was free."""
    choices = record.get("choices") if isinstance(record, dict) else None
    return choices if isinstance(choices, dict) else {}


def column_notes(choices: list[str]) -> Iterator[str]:
    """Yield a sentence where columns differ in case alone: DuckDB and Spark take such names for one."""
    counts = Counter(choice.casefold() for choice in choices)
    alike = [printable(COLUMN_PREFIX + choice) for choice in choices if counts[choice.casefold()] > 1]
    if alike:
        yield f"columns that differ in case alone, which some readers take for one: {', '.join(alike)}"
