"""The words of a score sheet: sections, verdicts, curves. Plain data that goes to JSON as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Scores = dict[str, float | None]  # None: there was nothing to score


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the ground truth says of one record.

    `is_right`: everything found, nothing wrong. `objects`: for each object of the record right,
    wrong or None (not judged: it lies in a crowd). `missed`: boxes (x_min, y_min, x_max, y_max), 0-1.
    """

    is_right: bool
    objects: tuple[bool | None, ...] = ()
    missed: tuple[tuple[float, float, float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Objects whose scores fall together: how sure the model was, how often it was right."""

    mean_score: float
    share_right: float
    count: int


@dataclass(frozen=True, slots=True)
class Curves:
    """Precision over recall at IoU 0.5 by label (`all` is their mean), and reliability by score."""

    recall: tuple[float, ...]
    precision: Mapping[str, tuple[float, ...]]
    reliability: tuple[ReliabilityBin, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """The scores of one kind of answer. `main` names the score that `--fail-under` looks at."""

    name: str
    main: str
    scores: Scores
    counts: Mapping[str, int]
    by_name: Mapping[str, Scores] = field(default_factory=dict)  # by label, or by question
    notes: tuple[str, ...] = ()
    curves: Curves | None = None
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)  # by record id; not part of the JSON

    def to_json(self) -> dict[str, Any]:
        """All but the verdicts."""
        document: dict[str, Any] = {"name": self.name, "main": self.main, "scores": self.scores}
        document |= {"counts": dict(self.counts), "by_name": dict(self.by_name), "notes": list(self.notes)}
        if self.curves is not None:
            document["curves"] = {
                "recall": list(self.curves.recall),
                "precision": {name: list(values) for name, values in self.curves.precision.items()},
                "reliability": [
                    {"mean_score": b.mean_score, "share_right": b.share_right, "count": b.count}
                    for b in self.curves.reliability
                ],
            }
        return document


def without_infinite(value: Any) -> Any:
    """Return a JSON value in which each number that is not finite is None."""
    if isinstance(value, Mapping):
        return {key: without_infinite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`, None where there is no whole."""
    return part / whole if whole else None


def f1(precision: float | None, recall: float | None) -> float | None:
    """The harmonic mean of both."""
    if precision is None or recall is None:
        return None
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
