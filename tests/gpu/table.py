"""The table that the script prints: 100 columns, one figure a line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

WIDTH, NAME_WIDTH = 100, 60
MOST_ERRORS = 8  # of a part that are printed; results.json has them all
GOAL_WIDTH = 62
_GOAL_LINE = f"{{:{GOAL_WIDTH}}}{{:>9}}{{:>6}}{{:>9}}  {{}}"
_LINE = f"{{:9}}{{:{NAME_WIDTH}}}{{:>11}}{{:>11}} {{:8}}"


def table_of(data: dict[str, Any]) -> str:
    """All figures of `results.json` with their predictions; what went wrong beneath its part."""
    lines = [f"{data['card']}, torch {data['torch']}, predictions {data['predictions'] or 'none'}"[:WIDTH], ""]
    lines += [_line("part", "figure", "value", "predicted", "unit"), "-" * WIDTH]
    for name, part in data["parts"].items():
        lines.append(_line(name, part["status"], "", "", ""))
        lines += [_figure_line(figure, entry) for figure, entry in part["figures"].items()]
        lines += _error_lines(part.get("errors", []))
    return "\n".join([*lines, "-" * WIDTH, *_goal_lines(data)])


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
    """Every goal of results.json: what was asked, what was found, and what that reaches."""
    if not data.get("goals"):
        return
    yield _GOAL_LINE.format("goal", "asked", "aim", "value", "reached")
    for goal in data["goals"]:
        is_most = "at_most" in goal
        bound = f"{'<=' if is_most else '>='} {_number(goal['at_most' if is_most else 'at_least'])}"
        yield _GOAL_LINE.format(
            _cut(goal["figure"]), bound, _number(goal["aim"]), _number(goal["value"]), goal["reached"]
        ).rstrip()


def _cut(name: str) -> str:
    return name if len(name) <= GOAL_WIDTH else name[: GOAL_WIDTH - 1] + "~"
