"""The score sheet of a run: sections, verdicts and curves as plain data, as JSON, as text for a terminal, as figures.

Every word from a file is made printable. matplotlib is imported when a figure is drawn. How a score comes about is not
known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from md3cli.errors import MissingExtraError
from md3cli.files import atomic_publish
from md3cli.finished.names import some_of
from md3cli.records import printable

if TYPE_CHECKING:
    from md3cli.evaluate import Comparison, Evaluation

Scores = dict[str, float | None]  # None: there was nothing to score


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the ground truth says of one record.

    `is_right`: everything was found and nothing is wrong. `objects`: each object of the record is right,
    wrong or None (not judged: it lies in a crowd). `missed`: boxes (x_min, y_min, x_max, y_max), 0-1.
    """

    is_right: bool
    objects: tuple[bool | None, ...] = ()
    missed: tuple[tuple[float, float, float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Objects with nearly equal scores: how sure the model was, and how often it was right."""

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
        """Return all but the verdicts."""
        document: dict[str, Any] = {"name": self.name, "main": self.main, "scores": self.scores}
        document |= {"counts": dict(self.counts), "by_name": dict(self.by_name), "notes": list(self.notes)}
        if self.curves is not None:
            document["curves"] = asdict(self.curves)
        return document


@dataclass(frozen=True, slots=True)
class Threshold:
    """The `min_score` that a label gets, F1 (IoU 0.5) with it and as it was; `why` it has no new one, in words."""

    name: str
    min_score: float | None
    f1: float | None
    f1_before: float | None
    num_objects: int
    why: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the threshold in plain types."""
        document: dict[str, Any] = {"name": self.name, "min_score": self.min_score, "F1": self.f1}
        document |= {"F1_before": self.f1_before, "objects": self.num_objects}
        return document if self.why is None else document | {"why": self.why}


@dataclass(frozen=True, slots=True)
class BestThresholds:
    """A threshold a label, and F1 of all together, with them and as it was."""

    thresholds: tuple[Threshold, ...]
    f1: float | None
    f1_before: float | None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return all in plain types."""
        document: dict[str, Any] = {"F1": self.f1, "F1_before": self.f1_before}
        document["labels"] = [threshold.to_json() for threshold in self.thresholds]
        return document | {"notes": list(self.notes)}


def without_infinite(value: Any) -> Any:
    """Return a JSON value in which each number that is not finite is None."""
    if isinstance(value, Mapping):
        return {key: without_infinite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ratio(part: float, whole: float) -> float | None:
    """Return `part / whole`; None where there is no whole."""
    return part / whole if whole else None


def f1(precision: float | None, recall: float | None) -> float | None:
    """Return the harmonic mean of precision and recall."""
    if precision is None or recall is None:
        return None
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


NAMES_SHOWN = 40  # labels or questions in a table
CHANGES_SHOWN = 20
NAME_CHARS = 40


def table(evaluation: Evaluation) -> str:
    """Return all of a score sheet as lines of text, sections first."""
    blocks = ["\n".join(_section(section)) for section in evaluation.sections]
    if evaluation.best is not None:
        blocks.append("\n".join(_best(evaluation.best)))
    if evaluation.comparison is not None:
        blocks.append("\n".join(_comparison(evaluation.comparison)))
    return "\n\n".join(blocks)


def _section(section: Section) -> Iterator[str]:
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in section.counts.items())
    yield f"{section.name}: {counts}"
    names = list(section.scores)
    rows = [("", *names), ("all", *_numbers(section.scores, names))]
    shown = sorted(section.by_name)[:NAMES_SHOWN] if len(section.by_name) > NAMES_SHOWN else list(section.by_name)
    if len(section.by_name) > 1:
        rows += [(_short(name), *_numbers(section.by_name[name], names)) for name in shown]
    yield from aligned(rows)
    if len(shown) < len(section.by_name):
        yield f"  and {len(section.by_name) - len(shown):,} more; --json has all"
    for note in section.notes:
        yield f"  note: {note}"


def _best(best: BestThresholds) -> Iterator[str]:
    chosen = [one for one in best.thresholds if one.why is None]
    yield f"best thresholds, by F1 at IoU 0.5: {len(chosen):,} of {len(best.thresholds):,} labels"
    rows = [("", "min_score", "F1", "F1 before"), ("all", "-", number(best.f1), number(best.f1_before))]
    for one in chosen[:NAMES_SHOWN]:
        rows.append((_short(one.name), number(one.min_score), number(one.f1), number(one.f1_before)))
    if chosen:
        yield from aligned(rows)
    if len(chosen) > NAMES_SHOWN:
        yield f"  and {len(chosen) - NAMES_SHOWN:,} more; --json has all"
    by_reason: dict[str, list[str]] = {}
    for one in best.thresholds:
        if one.why is not None:
            by_reason.setdefault(one.why, []).append(one.name)
    for why, names in by_reason.items():
        yield f"  note: no new min_score ({why}): {some_of(names)}"
    for note in best.notes:
        yield f"  note: {note}"


def _numbers(scores: Scores, names: Sequence[str]) -> list[str]:
    return [number(scores.get(name)) for name in names]


def number(value: float | None) -> str:
    """Return a score in three decimals."""
    return "-" if value is None else f"{value:.3f}"


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= NAME_CHARS else text[: NAME_CHARS - 1] + "…"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield lines with columns of equal width, numbers at the right; a column without a value is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(cell != "-" for cell in column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        yield ("  " + "  ".join([cells[0].ljust(widths[0]), *numbers])).rstrip()


def _comparison(comparison: Comparison) -> Iterator[str]:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in comparison.kinds.items())
    changed = f"{len(comparison.changes):,} changed" + (f" ({kinds})" if kinds else "")
    only = f"{comparison.num_only_before:,} only before, {comparison.num_only_after:,} only now"
    yield f"compared: {comparison.num_same:,} the same, {changed}, {only}"
    if comparison.verdicts:
        yield "  by the ground truth: " + ", ".join(f"{n:,} {name}" for name, n in comparison.verdicts.items())
    for name, changes in comparison.score_changes.items():
        yield f"  {name}: " + ", ".join(f"{score} {change:+.3f}" for score, change in changes.items())
    for change in comparison.changes[:CHANGES_SHOWN]:
        asked = printable(f"{change.image or '(no image)'}  {change.task} {change.prompt}".rstrip())
        verdict = f", {change.verdict}" if change.verdict else ""
        yield f"  {asked}  [{change.kind}{verdict}]"
        yield f"    {_short(change.before)}  ->  {_short(change.after)}"
    if len(comparison.changes) > CHANGES_SHOWN:
        yield f"  and {len(comparison.changes) - CHANGES_SHOWN:,} more; --json has all"


# ---- figures ---------------------------------------------------------------------------------------

LABELS_SHOWN = 8
DPI = 150


def draw_figures(section: Section, folder: Path) -> list[Path]:
    """Write `NAME-pr.png` and `NAME-reliability.png`, and return their paths; a section without curves has none.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    if section.curves is None:
        return []
    drawn = []
    if section.curves.precision:
        drawn.append(_save(_precision_recall(section.name, section.curves), folder / f"{section.name}-pr.png"))
    if section.curves.reliability:
        drawn.append(_save(_reliability(section.name, section.curves), folder / f"{section.name}-reliability.png"))
    return drawn


def _figure(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("md3 eval's curves", "eval") from error
    # The object interface leaves matplotlib's global state alone.
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x_label, ylabel=y_label, xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(color="#dddddd", linewidth=0.6)
    return figure, axes


def _precision_recall(name: str, curves: Curves) -> Any:
    figure, axes = _figure(f"{name}: precision over recall, IoU 0.5", "recall", "precision")
    labels = [label for label in curves.precision if label != "all"]
    for label in labels[:LABELS_SHOWN] if len(labels) > 1 else ():
        axes.plot(curves.recall, curves.precision[label], linewidth=1, label=_plain(label))
    axes.plot(curves.recall, curves.precision["all"], color="black", linewidth=2, label="all")
    axes.legend(fontsize=8, loc="lower left")
    return figure


def _reliability(name: str, curves: Curves) -> Any:
    figure, axes = _figure(f"{name}: is the score right?", "score", "share right at IoU 0.5")
    scores = [b.mean_score for b in curves.reliability]
    most = max(b.count for b in curves.reliability)
    axes.bar(scores, [b.count / most for b in curves.reliability], width=0.05, color="#dbe4f5", label="objects")
    axes.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1, label="ideal")
    axes.plot(scores, [b.share_right for b in curves.reliability], marker="o", color="#2563eb", label="this run")
    axes.legend(fontsize=8, loc="upper left")
    return figure


def _plain(label: str) -> str:
    # matplotlib reads what stands between dollar signs as a formula, and hides a line whose label begins with "_".
    return " " + label.replace("$", r"\$")


def _save(figure: Any, path: Path) -> Path:
    with atomic_publish(path) as partial:
        figure.savefig(partial, dpi=DPI, format="png", metadata={"Software": None})
    return path
