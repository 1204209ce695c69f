"""Counts of records: by hand, and against a sorted list of all scores."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from finished_runs import failure, record, write_records
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from md3cli.cli import app
from md3cli.refine.labels import Labels, labels_with
from md3cli.refine.stats import RecordStats

KEYS = ["records", "ok", "failed", "errors", "tasks", "labels", "scores", "tokens", "quality"]


def objects(*scores: float, label: str = "car") -> list[dict[str, Any]]:
    corners = {"x_min": 0.1, "y_min": 0.1, "x_max": 0.3, "y_max": 0.3}
    return [{"label": label, **corners, "score": score} for score in scores]


RECORDS = [
    record("a.png", "detect", "car", objects=objects(0.9, 0.3)),
    record("a.png", "detect", "dog", objects=[]),
    record("b.png", "detect", "truck", objects=objects(0.5, label="vehicle")),
    record("b.png", "point", "dog", points=[{"label": "dog", "x": 0, "y": 0}]),
    record("b.png", "caption", None, caption="cat " * 9, length="short", finish_reason="length"),
    failure("c.png", "detect", "dog"),
    failure("d.png", "detect", "car") | {"error": {"type": "io", "message": "", "retry": True}},
]


def counted(records: list[dict[str, Any]], labels: Labels | None = None) -> dict[str, Any]:
    stats = RecordStats(labels or Labels())
    for one in records:
        stats.add(one)
    return stats.to_json()


def test_everything_is_counted() -> None:
    found = counted(RECORDS)
    assert list(found) == KEYS
    assert found == {
        "records": 7,
        "ok": 5,
        "failed": 2,
        "errors": {"decode": 1, "io": 1},
        "tasks": {"detect": 5, "point": 1, "caption": 1},
        "labels": {"car": 2, "dog": 1, "vehicle": 1},
        "scores": {"min": 0.3, "median": 0.5, "max": 0.9},
        "tokens": {"prompt": 5 * 738, "output": 5 * 31},
        "quality": {"loop": 1, "refusal": 0, "cut": 1},
    }


def test_labels_that_nothing_was_found_of_are_listed_first_in_their_order() -> None:
    labels = labels_with(["bus", "vehicle=truck", "dog"], Labels())
    assert list(counted(RECORDS, labels)["labels"].items()) == [("bus", 0), ("vehicle", 1), ("dog", 1), ("car", 2)]


def test_nothing_has_no_scores() -> None:
    assert counted([])["scores"] == {"min": None, "median": None, "max": None}
    assert counted([])["quality"] == {"loop": 0, "refusal": 0, "cut": 0}


@given(st.lists(st.integers(1, 999).map(lambda n: n / 1000), min_size=1, max_size=50))
def test_the_median_is_that_of_all_scores(scores: list[float]) -> None:
    found = counted([record("a.png", "detect", "car", objects=objects(*scores))])["scores"]
    assert (found["min"], found["max"]) == (min(scores), max(scores))
    assert abs(found["median"] - statistics.median(scores)) < 1e-4


def stats(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["stats", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_the_command_counts_what_is_selected_and_shown(tmp_path: Path) -> None:
    lines = [one | {"id": f"{n:032x}"} for n, one in enumerate(RECORDS)]
    path = write_records(tmp_path / "r.jsonl", lines)
    assert stats(path) == counted(RECORDS)
    assert stats(path, "--min-score", "0.5")["scores"] == {"min": 0.5, "median": 0.7, "max": 0.9}
    assert stats(path, "--min-score", "0.5")["labels"] == {"car": 1, "dog": 1, "vehicle": 1}
    assert stats(path, "--failed")["errors"] == {"decode": 1, "io": 1}
    assert stats(path, "--quality", "loop")["records"] == 1
    assert stats(path, "--label", "dog", "--ok")["tasks"] == {"detect": 1, "point": 1}
    Path(tmp_path, "l.txt").write_text("bus\nanimal=dog\n")
    assert stats(path, "--labels", tmp_path / "l.txt")["labels"] == {"bus": 0, "animal": 1, "car": 2, "vehicle": 1}
    shown = CliRunner().invoke(app, ["stats", str(path)]).stdout
    assert "records   7: 5 ok, 2 failed (decode 1, io 1)" in shown
