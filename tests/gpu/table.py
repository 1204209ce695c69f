"""The table that the script prints: 100 columns, one figure a line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .predictions import GOALS, Goal

WIDTH, NAME_WIDTH = 100, 60
MOST_ERRORS = 8  # of a part that are printed; results.json has them all
_LINE = f"{{:9}}{{:{NAME_WIDTH}}}{{:>11}}{{:>11}} {{:8}}"


def table_of(data: dict[str, Any]) -> str:
    """All figures of `results.json` with their predictions; what went wrong beneath its part."""
    lines = [f"{data['card']}, torch {data['torch']}, predictions {data['predictions'] or 'none'}"[:WIDTH], ""]
    lines += [_line("part", "figure", "value", "predicted", "unit"), "-" * WIDTH]
    for name, part in data["parts"].items():
        lines.append(_line(name, part["status"], "", "", ""))
        lines += [_figure_line(figure, entry) for figure, entry in part["figures"].items()]
        lines += _error_lines(part.get("errors", []))
    goals = list(_goal_lines(data))
    return "\n".join([*lines, "-" * WIDTH, *goals])


def _error_lines(errors: list[str]) -> Iterator[str]:
    """The end of each of the first few."""
    for error in errors[:MOST_ERRORS]:
        yield from (f"  ! {text}"[:WIDTH] for text in error.splitlines()[-3:])
    if len(errors) > MOST_ERRORS:
        yield f"  ! and {len(errors) - MOST_ERRORS} more"


def _figure_line(name: str, entry: dict[str, Any]) -> str:
    return _line("", name, _number(entry["value"]), _number(entry["prediction"]), entry["unit"])


def _line(*columns: str) -> str:
    part, name, value, prediction, unit = columns
    return _LINE.format(
        part, name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "~", value, prediction, unit
    ).rstrip()


def _number(value: float | None) -> str:
    """Four digits; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e7 else f"{value:.4g}"


def _goal_lines(data: dict[str, Any]) -> Iterator[str]:
    """What must be reached, where it was measured at full size on a GPU."""
    if data["device"] != "cuda" or data["config"] != "full":
        return
    for part in data["parts"].values():
        for name, entry in part["figures"].items():
            if name in GOALS and entry["value"] is not None:
                yield _goal_line(name, entry["value"], GOALS[name])


def _goal_line(name: str, value: float, goal: Goal) -> str:
    """Whether a goal, or where there is none an aim, was reached."""
    bound = goal.at_most if goal.at_most is not None else goal.aim
    assert bound is not None
    words = f"{'goal' if bound == goal.at_most else 'aim'} {'reached' if value <= bound else 'missed'}"
    aim = f", aim {goal.aim:g}" if goal.aim not in (None, bound) else ""
    return f"{words}: {name} {value:.3g}, at most {bound:g}{aim}"
