"""What the records answer, matched to what the ground truth knows.

Only what was asked is scored: an image or a category that no record asks about is no miss. What
was asked and failed is one. Which names are the same, `md3cli.name_matching` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from md3cli.errors import InputError
from md3cli.exporters.doubled import identity_of
from md3cli.name_matching import NAMES_SHOWN, Matches, ambiguity_notes
from md3cli.records import RecordDict, printable

RequestKey = tuple[str | None, str, str, str]  # image, task, prompt, length


def request_key(record: RecordDict) -> RequestKey:
    """What a record answers: image, task, prompt and caption length."""
    return record["image"], str(record["task"]), str(record.get("prompt") or "").strip(), record.get("length") or ""


def final_records(records: Iterable[RecordDict]) -> list[RecordDict]:
    """One record for each request: a later record of the same id and image supersedes, a repeat (other id) is left out.

    Raises:
        InputError: a record has no id, image or task.
    """
    by_id: dict[str, RecordDict] = {}
    for number, record in enumerate(records, start=1):
        if not {"id", "image", "task"} <= record.keys():
            raise InputError(f"record {number:,} is damaged: it has no id, no image or no task")
        by_id[identity_of(record)] = record
    first: dict[RequestKey, RecordDict] = {}
    for record in by_id.values():
        first.setdefault(request_key(record), record)
    return list(first.values())


def coverage_notes(what: str, asked: Iterable[str], known: Iterable[str], matches: Matches) -> Iterator[str]:
    """Yield what is on one side only, or not clear, in sentences: `what` is the noun."""
    yield from ambiguity_notes(what, matches)
    unknown = [name for name in dict.fromkeys(asked) if name not in matches.found and name not in matches.ambiguous]
    found = set(matches.found.values())
    unasked = [name for name in dict.fromkeys(known) if name not in found]
    if unknown:
        who, be = _many(unknown, what)
        yield f"{who} of the records {be} not in the ground truth and not scored: {_some(unknown)}"
    if unasked:
        who, be = _many(unasked, what, is_past=True)
        yield f"{who} of the ground truth {be} not asked about: {_some(unasked)}"


def _many(names: list[str], what: str, *, is_past: bool = False) -> tuple[str, str]:
    """How many, with the noun and the verb that fit."""
    if len(names) == 1:
        return f"1 {what}", "was" if is_past else "is"
    return f"{len(names):,} {what}s", "were" if is_past else "are"


def _some(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:NAMES_SHOWN])
    return shown + (", …" if len(names) > NAMES_SHOWN else "")


def has_failed(record: Mapping[str, Any]) -> bool:
    """Whether the request failed: its answer counts as empty."""
    return record.get("error") is not None
