"""The page of an audit: a card for each finding, in order, with what each side says and a mark of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_runs import HOSTILE
from truths import box, record, write_records

from md3cli.evaluate.audit import Finding, Side
from md3cli.refine.collection import Collection
from md3cli.report.build import ReportOptions
from md3cli.report.findings import items_of, write_findings

HERE = (0.1, 0.1, 0.5, 0.5)
RECORD = record("a.png", "detect", "car", objects=[box(10, 10, 40, 40)])


def findings(label: str = "car") -> list[Finding]:
    """One of each kind."""
    annotation = Side(label, HERE, {"id": 7})
    found = Side(label, (0.2, 0.1, 0.6, 0.5), {"score": 0.9, "record": "r", "index": 0})
    other = Side(f"{label} other", HERE, {"score": 0.8, "record": "s", "index": 0})
    return [
        Finding("missing", "a.png", 0.9, None, found, None, RECORD),
        Finding("misnamed", "a.png", 0.8, annotation, other, 1.0, RECORD),
        Finding("moved", "a.png", 0.7, annotation, found, 0.6, RECORD),
        Finding("doubtful", "a.png", 0.6, annotation, None, None, RECORD),
    ]


def test_a_card_has_both_boxes_and_is_as_sure_as_its_finding() -> None:
    entries = [item.entries[0] for item in items_of(findings())]
    assert [entry.task for entry in entries] == ["missing", "misnamed", "moved", "doubtful"]
    assert [entry.scores for entry in entries] == [[0.9], [0.8], [0.7], [0.6]]
    assert [[shape.verdict for shape in (*entry.shapes, *entry.missed)] for entry in entries] == [
        [None], [None, "missed"], [None, "missed"], ["missed"],
    ]  # fmt: skip
    assert entries[1].prompt == "car, found as car other"
    assert entries[2].note == "labels: annotation 7, car; records: car 0.900; overlap 0.60"
    assert entries[3].note == "labels: annotation 7, car; records: no car here"
    assert len({entry.record["id"] for entry in entries}) == 4


@pytest.mark.parametrize("label", ["car", *HOSTILE])
def test_a_page_holds_every_finding_and_no_markup_of_labels(tmp_path: Path, label: str) -> None:
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    records = Collection.of([write_records(tmp_path / "r.jsonl", [RECORD])])
    made = write_findings(findings(label), records, tmp_path / "page.html", ReportOptions(root=tmp_path))
    assert (made.num_images, made.num_records, made.num_missing) == (1, 4, 0)
    text = made.page.read_text(encoding="utf-8")
    data: Any = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    (index,) = data["index"]
    assert index["ids"] == [finding.id for finding in findings(label)]
    assert index["scores"] == [0.9, 0.8, 0.7, 0.6]
    assert sum(card["thumbnail"].startswith("data:image/jpeg") for cards in data["cards"] for card in cards) == 4
    assert "<" not in label or label not in text
    assert "solid: found by the records" in text
    assert "<legend>Finding</legend>" in text
