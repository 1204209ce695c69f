"""What the records answer, matched to what the ground truth knows.

Only what was asked is scored: an image or a category that no record asks about is no miss. What
was asked and failed is one. Names are matched as they are, else by their last part where that is
unique; labels to categories whatever their case and spaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from md3cli.errors import InputError
from md3cli.exporters.doubled import identity_of
from md3cli.records import RecordDict, printable

RequestKey = tuple[str | None, str, str, str]  # image, task, prompt, length

NAMES_SHOWN = 5


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


def match_images(asked: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Record images -> ground truth names.

    Raises:
        InputError: not one image of the records is in the ground truth.
    """
    names, truths = dict.fromkeys(asked), dict.fromkeys(known)
    matched = {name: name for name in names if name in truths}
    if not matched:
        by_base = _unique_bases(truths)
        matched = {name: by_base[base] for base, name in _unique_bases(names).items() if base in by_base}
    if names and not matched:
        raise InputError(
            f"no image of the records is in the ground truth: {printable(next(iter(names)))} there, "
            f"{printable(next(iter(truths), 'nothing'))} here; are both about the same folder?"
        )
    return matched


def _unique_bases(names: Iterable[str]) -> dict[str, str]:
    bases: dict[str, list[str]] = {}
    for name in names:
        bases.setdefault(name.rpartition("/")[2], []).append(name)
    return {base: found[0] for base, found in bases.items() if len(found) == 1}


def folded(text: str) -> str:
    """`text` as labels and questions are compared: whatever its case and spaces."""
    return " ".join(text.casefold().split())


def match_labels(labels: Iterable[str], categories: Iterable[str]) -> dict[str, str]:
    """Labels asked for -> categories of the ground truth; labels without one are left out."""
    by_fold = {folded(category): category for category in categories}
    return {label: by_fold[folded(label)] for label in dict.fromkeys(labels) if folded(label) in by_fold}


def coverage_notes(what: str, asked: Iterable[str], known: Iterable[str], matched: Mapping[str, str]) -> Iterator[str]:
    """What is on one side only, in sentences: `what` is the noun."""
    unknown = [name for name in dict.fromkeys(asked) if name not in matched]
    found = set(matched.values())
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
