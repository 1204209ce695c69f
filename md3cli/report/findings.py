"""What `md3 audit` found, as a page: a card for each finding, the surest first, with both boxes on its picture.

The box of the records is drawn as in every report, that of the labels as what a ground truth has, white and dashed.
Marks work as they do there: each is kept under its finding's id. Apart from build.py, which writes the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from md3cli.evaluate.audit import KINDS, Finding, Side
from md3cli.records import printable
from md3cli.refine.collection import Collection
from md3cli.report.build import ReportOptions, ReportSummary, name_of_run, write_items
from md3cli.report.items import Entry, Item, Shape, missed_shape, new_item, with_names_apart
from md3cli.report.page import Page, Sign, Tile, facets_of, palette_of, today
from md3cli.report.plots import RunStats

_OF_PICTURE = ("image", "image_b64", "width", "height", "sha256", "model")


def write_findings(
    findings: Sequence[Finding], records: Collection, output: Path, options: ReportOptions
) -> ReportSummary:
    """Write the page of `findings`, of `records`; raises as `build.write_report`."""
    kinds = Counter(finding.kind for finding in findings)

    def page_of(stats: RunStats) -> Page:
        """Return the words around the cards; records' own plots would count findings as pictures."""
        facets = facets_of(stats, palette_of(stats.palette_labels))
        return Page(
            title=options.title or f"{name_of_run(records)}: audit",
            facts=[f"{kind} {count:,}" for kind in KINDS if (count := kinds[kind])],
            tiles=[Tile("Images", f"{stats.num_images:,}", "with findings"), Tile("Findings", f"{len(findings):,}")],
            facets=[replace(facet, legend="Finding") if facet.name == "task" else facet for facet in facets],
            signs=[Sign("box", "solid: found by the records"), Sign("missed", "white, dashed: the label's box")],
            has_scores=any(stats.score_bins),
            is_judged=True,
            made=today(),
        )

    return write_items(items_of(findings), records, output, options, page_of)


def items_of(findings: Iterable[Finding]) -> Iterator[Item]:
    """Yield a picture with one entry for each finding, in their order; its score is how sure the finding is."""
    for finding in findings:
        record = {key: finding.record[key] for key in _OF_PICTURE if key in finding.record}
        record |= {"id": finding.id, "task": finding.kind, "prompt": _names(finding), "error": None}
        item = new_item(record)
        found, annotation = (
            None if side is None else _shape(side, finding.score, item.frame)
            for side in (finding.found, finding.annotation)
        )
        dashed = () if annotation is None else (replace(annotation, verdict="missed"),)
        if found is None:
            item.entries.append(Entry(record, "ok", shapes=dashed, note=_note(finding)))
        else:
            item.entries.append(Entry(record, "ok", shapes=(found,), missed=dashed, note=_note(finding)))
        yield with_names_apart(item)


def _shape(side: Side, score: float, frame: tuple[float, float]) -> Shape:
    return replace(missed_shape(side.label, side.box, frame), verdict=None, score=round(score, 3))


def _names(finding: Finding) -> str:
    if finding.kind == "misnamed" and finding.found is not None:
        return f"{finding.shown.label}, found as {finding.found.label}"
    return finding.shown.label


def _note(finding: Finding) -> str:
    """Return what each side says, in a line."""
    parts = []
    if (annotation := finding.annotation) is not None:
        number = annotation.facts.get("id")
        which = "a box" if number is None else f"annotation {printable(str(number))}"
        parts.append(f"labels: {which}, {annotation.label}")
    else:
        parts.append("labels: nothing here")
    if (found := finding.found) is not None:
        score = found.facts.get("score")
        parts.append(f"records: {found.label}" + ("" if score is None else f" {score:.3f}"))
    else:
        parts.append(f"records: no {finding.shown.label} here")
    if finding.overlap is not None:
        parts.append(f"overlap {finding.overlap:.2f}")
    return "; ".join(parts)
