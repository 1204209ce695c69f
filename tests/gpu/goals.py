"""What a card must reach, row by row, and what it would be good to reach; judged from the figures of a run.

The rows are for an H100 at full size; other cards and sizes are judged by the same numbers, which say less there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

AIM, GOAL, MISSED, NOT_MEASURED = "aim", "goal", "missed", "not measured"  # what was reached


@dataclass(frozen=True)
class Goal:
    """A figure of a part: what it must reach, and what would be good; more is better, or less where `is_most`."""

    part: str
    figure: str
    bound: float
    aim: float
    is_most: bool = False

    def reached(self, value: float | None) -> str:
        """Which of both a value reaches."""
        if value is None:
            return NOT_MEASURED
        sign = -1 if self.is_most else 1
        if sign * value >= sign * self.aim:
            return AIM
        return GOAL if sign * value >= sign * self.bound else MISSED


def _none_of(part: str, *figures: str) -> tuple[Goal, ...]:
    return tuple(Goal(part, figure, 0, 0, is_most=True) for figure in figures)


GOALS: Sequence[Goal] = (
    Goal("engine", "query 3 tokens, batch 64, bf16", 55, 60),
    Goal("lowbits", "query 3 tokens, batch 64, all float8", 62, 72),
    Goal("engine", "reasoning 30 tokens, batch 64, bf16", 42, 46),
    Goal("lowbits", "reasoning 30 tokens, batch 64, float8 experts", 45, 50),
    Goal("lowbits", "caption 150 tokens, batch 128, float8 experts", 28, 33),
    Goal("engine", "query 3 tokens, batch 1, bf16", 33, 38),
    Goal("lowbits", "query 3 tokens, batch 1, float8 experts", 38, 44),
    Goal("engine", "query 3 tokens, batch 64, bf16, asked again: of the first", 2.7, 3.2),
    Goal("stages", "vision, 36 crops, bf16: share of the limit", 0.60, 0.67),
    Goal("stages", "decode step, 64 rows, bf16: over its read time", 1.35, 1.2, is_most=True),
    Goal("lowbits", "decode step, 1 row, int4: over bf16's", 0.7, 0.6, is_most=True),
    Goal("lowbits", "query 3 tokens, batch 1, int4: card's memory", 8, 7, is_most=True),
    *_none_of("stages", "host syncs, 16 steps of 64 rows, bf16"),
    *_none_of("stages", "steps with other bits than launched one by one, bf16"),
    *_none_of("engine", "captures after the start"),
    Goal("files", "2 megapixels, from files, batch 64, bf16: of cut before", 0.90, 0.97),
    Goal("files", "12 megapixels, from files, batch 64, bf16: of cut before", 0.80, 0.90),
    *_none_of("resizing", "pictures that differ from Pillow's, random sizes"),
    *_none_of("resizing", "pictures that differ from Pillow's, examples"),
    *_none_of(
        "sameness",
        "rows with other bits, in another order",
        "rows with other bits, alone",
        "pictures with other bits, in another place",
        "crops with other bits, in another place",
        "captures after the start",
    ),
    Goal("engine", "detect, batch 64, bf16: over one row, eager", 10, 10),
)  # fmt: skip


def judged(parts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every goal with its value in `parts` of results.json and what that reaches."""
    return [_judged(goal, parts.get(goal.part, {}).get("figures", {}).get(goal.figure, {})) for goal in GOALS]


def _judged(goal: Goal, entry: Mapping[str, Any]) -> dict[str, Any]:
    value = entry.get("value")
    return {
        "part": goal.part,
        "figure": goal.figure,
        "at_most" if goal.is_most else "at_least": goal.bound,
        "aim": goal.aim,
        "value": value,
        "prediction": entry.get("prediction"),
        "reached": goal.reached(value),
    }
