"""What the ground truth says, brought onto the page: verdicts on shapes, missed objects, scores, curves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from md3cli.evaluate.section import Curves, Section, Verdict
from md3cli.evaluate.table import number
from md3cli.report.items import Entry, Item, Shape, missed_shape
from md3cli.report.page import Table
from md3cli.report.plots import Column, Line, Lines, share_ticks, unit_dot, unit_path

LABELS_DRAWN = 9
ROWS_SHOWN = 30


def verdicts_of(sections: Sequence[Section]) -> dict[str, Verdict]:
    """All verdicts by record id."""
    return {record: verdict for section in sections for record, verdict in section.verdicts.items()}


def with_verdicts(items: Iterable[Item], verdicts: Mapping[str, Verdict]) -> Iterator[Item]:
    """The same items; records the ground truth knows carry its verdict."""
    for item in items:
        for place, entry in enumerate(item.entries):
            verdict = verdicts.get(entry.record.get("id", ""))
            if verdict is not None:
                item.entries[place] = _judged(entry, verdict, item.frame)
        yield item


def _judged(entry: Entry, verdict: Verdict, frame: tuple[float, float]) -> Entry:
    words = {True: "right", False: "wrong", None: None}
    shapes: Iterable[Shape] = entry.shapes
    if len(verdict.objects) == len(entry.shapes):
        shapes = (replace(shape, verdict=words[v]) for shape, v in zip(entry.shapes, verdict.objects, strict=True))
    missed = tuple(missed_shape(entry.prompt, box, frame) for box in verdict.missed)
    return replace(entry, verdict=words[verdict.is_right], shapes=tuple(shapes), missed=missed)


def score_table(section: Section) -> Table:
    """A section's scores, with a row for each label or question."""
    names = [name for name, value in section.scores.items() if value is not None]
    rows = [("all", *(number(section.scores[name]) for name in names))]
    if len(section.by_name) > 1:
        shown = list(section.by_name.items())[:ROWS_SHOWN]
        rows += [(label, *(number(scores.get(name)) for name in names)) for label, scores in shown]
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in section.counts.items())
    title = f"{section.name[:1].upper()}{section.name[1:]} by ground truth"
    return Table(title, counts, ("", *(name.replace("_", " ") for name in names)), tuple(rows))


def score_plots(section: Section) -> list[Lines]:
    """Precision over recall and reliability, where the section has them."""
    curves = section.curves
    if curves is None:
        return []
    plots = [_precision_recall(section.name, curves)] if curves.precision else []
    return plots + ([_reliability(section.name, curves)] if curves.reliability else [])


def _precision_recall(name: str, curves: Curves) -> Lines:
    labels = [label for label in curves.precision if label != "all"][:LABELS_DRAWN]
    shown = ["all", *labels] if len(labels) > 1 else ["all"]
    lines = [
        Line(label, unit_path(zip(curves.recall, curves.precision[label], strict=True)), f"c{place}")
        for place, label in enumerate(shown)
    ]
    return Lines(f"Precision over recall: {name}", "at IoU 0.5", tuple(lines), *share_ticks())


def _reliability(name: str, curves: Curves) -> Lines:
    points = [(b.mean_score, b.share_right) for b in curves.reliability]
    ideal = Line("ideal", unit_path([(0, 0), (1, 1)]), "ideal")
    lines = (Line("this run", unit_path(points), "c0"), ideal)
    dots: list[Column] = [
        unit_dot(
            b.mean_score, b.share_right, f"{b.share_right:.2f} of {b.count:,} objects right at score {b.mean_score:.2f}"
        )
        for b in curves.reliability
    ]
    return Lines(f"Is the score right? {name}", "share right over score", lines, *share_ticks(), dots=tuple(dots))
