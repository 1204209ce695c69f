"""Which records: one vocabulary of `select`, `export`, `report`, `eval` and `stats`; pure functions.

Knows nothing of files. Source: product contract, section 8.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from md3cli.records import RecordDict
from md3cli.refine.labels import Labels
from md3cli.refine.parts import says_of_part
from md3cli.refine.quality import qualities_of
from md3cli.refine.refinement import FOUND_BY_TASK, name_of
from md3cli.source.walk import PathFilter

Order = Literal["input", "least-sure", "most-sure", "most-objects"]
Outcome = Literal["ok", "failed"]


@dataclass(frozen=True)
class Selection:
    """What a record must be to be taken; every condition that is given must hold, and of a list any value.

    Attributes:
        images: globs over the picture's name, or with a `/` over its whole path.
        score_from, score_to: an object has a score in this range, ends included, as the model gave it.
        wrong: ids of the records that a ground truth calls wrong; None: none was asked.
        sample: so many records, by a hash of their ids seeded with `seed`.
        limit: so many at most, the first in `sort`'s order.
    """

    tasks: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    score_from: float | None = None
    score_to: float | None = None
    outcome: Outcome | None = None
    wrong: frozenset[str] | None = None
    qualities: tuple[str, ...] = ()
    sort: Order = "input"
    sample: int | None = None
    seed: int = 0
    limit: int | None = None

    @property
    def takes_all(self) -> bool:
        """Whether every record is taken, in input order."""
        return self == Selection(seed=self.seed)

    def takes(self, record: RecordDict, labels: Labels) -> bool:
        """Return whether a record, as the model gave it under its names, is taken."""
        failed = record.get("error") is not None
        return (
            (not self.tasks or record.get("task") in self.tasks)
            and (not self.prompts or record.get("prompt") in self.prompts)
            and (self.outcome is None or failed == (self.outcome == "failed"))
            and (self.wrong is None or record.get("id") in self.wrong)
            and (not self.images or self._names.keeps(str(record.get("image") or "")))
            and (not self.labels or self._has_label(record, labels))
            and (not self.qualities or not set(self.qualities).isdisjoint(qualities_of(record)))
            and (self.score_from is self.score_to is None or self._has_score(record))
        )

    @cached_property
    def _names(self) -> PathFilter:
        return PathFilter.of(self.images, ())

    def _has_label(self, record: RecordDict, labels: Labels) -> bool:
        if says_of_part(record):  # words are about the part, as it is called or was asked for
            called = str(record["region"]["label"])
            label = labels.by_name.get(called)
            return not {called, *(() if label is None else label.prompts)}.isdisjoint(self.labels)
        found = {str(thing.get("label")) for thing in found_in(record)}
        known = found or {str(name_of(record, labels)), str(record.get("prompt"))}
        return record.get("task") in FOUND_BY_TASK and not known.isdisjoint(self.labels)

    def _has_score(self, record: RecordDict) -> bool:
        low = -math.inf if self.score_from is None else self.score_from
        high = math.inf if self.score_to is None else self.score_to
        return any(low <= score <= high for score in scores_of(record))

    def rank_of(self, shown: RecordDict) -> tuple[float, ...]:
        """Return what records are sorted by, smallest first; `shown` is the record as it is shown."""
        scores = scores_of(shown)
        if self.sort == "most-objects":
            return (-float(len(found_in(shown))),)
        if self.sort == "input":
            return ()
        sureness = min(scores, default=None)
        if sureness is None:
            return (1.0, 0.0)
        return (0.0, sureness if self.sort == "least-sure" else -sureness)

    def draw_of(self, record: RecordDict) -> int:
        """Return a number by which a sample is drawn, the smallest first: the same wherever the record stands."""
        text = f"{self.seed}\0{record.get('id')}\0{record.get('image')}".encode("utf-8", "replace")
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


def found_in(record: RecordDict) -> list[Mapping[str, Any]]:
    """Return the objects, points or segments of a record."""
    key = FOUND_BY_TASK.get(str(record.get("task")))
    found: Iterable[Mapping[str, Any]] = (record.get(key) if key is not None else None) or ()
    return list(found)


def scores_of(record: RecordDict) -> list[float]:
    """Return the scores of all that a record found."""
    return [thing["score"] for thing in found_in(record) if thing.get("score") is not None]
