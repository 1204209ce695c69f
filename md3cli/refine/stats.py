"""Counts of records: how many, of what, how sure, how good their texts are. Knows nothing of files and terminals.

Scores have three decimals, so that a table of a thousand counts holds all of them, however many records there are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from md3cli.records import RecordDict
from md3cli.refine.labels import Labels
from md3cli.refine.parts import is_of_part
from md3cli.refine.quality import QUALITIES, qualities_of
from md3cli.refine.refinement import name_of
from md3cli.refine.selection import found_in, scores_of


@dataclass(slots=True)
class RecordStats:
    """Counts of records as they are shown, filled one by one; `labels` counts objects by name, asked ones too.

    `num_of_parts` are about parts of pictures.
    """

    named: Labels = field(default=Labels())
    num_ok: int = 0
    num_of_parts: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    scores: Counter[float] = field(default_factory=Counter)
    quality: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    output_tokens: int = 0

    def __post_init__(self) -> None:
        self.labels.update(dict.fromkeys(self.named.names, 0))

    def add(self, record: RecordDict) -> None:
        """Count one record in."""
        self.tasks[str(record.get("task"))] += 1
        self.num_of_parts += is_of_part(record)
        error = record.get("error")
        if error is not None:
            self.errors[str(error.get("type"))] += 1
        self.num_ok += error is None
        name = name_of(record, self.named)
        if name is not None:
            self.labels[name] += 0
        for thing in found_in(record):
            self.labels[str(thing.get("label") or name)] += 1
        self.scores.update(round(score, 3) for score in scores_of(record))
        self.quality.update(qualities_of(record))
        tokens = record.get("tokens") or {}
        self.prompt_tokens += tokens.get("prompt") or 0
        self.output_tokens += tokens.get("output") or 0

    @property
    def num_failed(self) -> int:
        """The number of records that failed."""
        return self.errors.total()

    def to_json(self) -> dict[str, Any]:
        """Return the document of `md3 stats --json`; the scores are null where nothing has one.

        `regions`, the records about parts of pictures, is there only where there are some.
        """
        scores = sorted(self.scores)
        parts = {"regions": self.num_of_parts} if self.num_of_parts else {}
        return {
            "records": self.num_ok + self.num_failed,
            "ok": self.num_ok,
            "failed": self.num_failed,
            "errors": dict(sorted(self.errors.items())),
            "tasks": dict(self.tasks),
            "labels": dict(self.labels),
            "scores": {
                "min": scores[0] if scores else None,
                "median": self._median() if scores else None,
                "max": scores[-1] if scores else None,
            },
            "tokens": {"prompt": self.prompt_tokens, "output": self.output_tokens},
            "quality": {name: self.quality[name] for name in QUALITIES},
            **parts,
        }

    def _median(self) -> float:
        """Return the middle score, or the mean of the two in the middle."""
        total, seen = self.scores.total(), 0
        middle: list[float] = []
        for score in sorted(self.scores):
            places = range(seen, seen + self.scores[score])
            middle += [score for place in ((total - 1) // 2, total // 2) if place in places]
            seen += self.scores[score]
        return round(sum(middle) / 2, 4)
