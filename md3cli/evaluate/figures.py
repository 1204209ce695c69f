"""Precision-recall and reliability curves as PNG files, drawn by matplotlib without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from md3cli.errors import MissingExtraError
from md3cli.evaluate.scores import Curves, Section
from md3cli.files import atomic_publish

LABELS_SHOWN = 8
DPI = 150


def draw_figures(section: Section, folder: Path) -> list[Path]:
    """Write `NAME-pr.png` and `NAME-reliability.png`; nothing for sections without curves.

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
    """A figure and its axes, both 0 to 1; the object interface leaves matplotlib's global state alone."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("md3 eval's curves", "eval") from error
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
    """Dollar signs would be read as formulas, a leading underscore hides the line."""
    return " " + label.replace("$", r"\$")


def _save(figure: Any, path: Path) -> Path:
    with atomic_publish(path) as partial:
        figure.savefig(partial, dpi=DPI, format="png", metadata={"Software": None})
    return path
