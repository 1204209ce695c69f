"""Overlays drawn while a run goes on: used where nothing has changed since, and never wrong."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from finished_runs import CAR, NAMES, Record, Run, detect_records, record
from PIL import Image

from md3cli.exporters import ExportOptions, overlay
from md3cli.exporters.early import EarlyDrawings
from md3cli.refine.labels import Labels, labels_with
from md3cli.refine.refinement import Refinement

pytestmark = pytest.mark.process
PATIENCE_S = 140.0  # of a child with the lowest priority
LATE = "empty.png"  # the last picture of a run is drawn by the export: no other comes that ends it


@pytest.fixture
def going_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of known labels that writes its records; every picture is worth being drawn early."""
    monkeypatch.setattr("md3cli.exporters.early.UNTIL_WORTH_IT", 0)
    info = json.loads((run.folder / "run.json").read_text())
    info["refinement"] = Refinement(labels_with(["dog", "car"], Labels())).to_json()
    (run.folder / "run.json").write_text(json.dumps(info))
    return run


@pytest.fixture
def early(going_run: Run) -> Iterator[EarlyDrawings]:
    with EarlyDrawings(going_run.records, going_run.folder / "out", ExportOptions(root=going_run.root)) as drawings:
        yield drawings
    assert not drawings.folder.exists()


def drawn_early(early: EarlyDrawings, records: list[Record], at_least: int) -> None:
    """Let the records of a run be drawn, all but the last picture's."""
    early.add(records)
    deadline = time.monotonic() + PATIENCE_S
    while len([p for p in early.folder.glob("*") if not p.suffix]) < at_least and time.monotonic() < deadline:
        time.sleep(0.05)
    early.stop()
    assert len(list(early.folder.glob("*"))) == at_least


def files_of(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture
def drawn_late(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that the export draws itself."""
    names: list[str] = []
    draw = overlay.drawn_file

    def noted(group: overlay.ImageGroup, *args: object) -> bytes | None:
        names.append(group.name)
        return draw(group, *args)  # type: ignore[arg-type]  # handed on

    monkeypatch.setattr(overlay, "drawn_file", noted)
    return names


def both(run: Run, early: EarlyDrawings, drawn_late: list[str]) -> list[str]:
    """Export with and without the early drawings: equal files; return what was drawn again."""
    _, with_early = run.export("overlay", "with", early=early.folder)
    late = sorted(drawn_late)
    _, without = run.export("overlay", "without")
    assert files_of(with_early) == files_of(without)
    assert len(files_of(without)) > 1
    return late


def test_what_was_drawn_early_is_not_drawn_again(going_run: Run, early: EarlyDrawings, drawn_late: list[str]) -> None:
    records = [one for one in detect_records() if one["image"] != LATE] + [
        record(LATE, "detect", name, objects=[]) for name in ("dog", "car")
    ]
    going_run.write(records)
    drawn_early(early, records, len(NAMES) - 1)
    assert both(going_run, early, drawn_late) == [LATE]


def another_picture(run: Run, records: list[Record]) -> None:
    Image.new("RGB", (60, 40), "red").save(run.root / NAMES[0])


def touched_picture(run: Run, records: list[Record]) -> None:
    stat = os.stat(run.root / NAMES[0])
    os.utime(run.root / NAMES[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def another_record(run: Run, records: list[Record]) -> None:
    """A manifest that names a picture again, far below."""
    run.write([*records, record(NAMES[0], "detect", "cat", objects=[{**CAR, "label": "cat"}])])


def another_score(run: Run, records: list[Record]) -> None:
    place = next(n for n, one in enumerate(records) if one["image"] == NAMES[0])
    records[place]["objects"][0] = {**records[place]["objects"][0], "score": 0.123}
    run.write(records)


@pytest.mark.parametrize("change", [another_picture, touched_picture, another_record, another_score])
def test_what_has_changed_since_is_drawn_anew(
    going_run: Run, early: EarlyDrawings, drawn_late: list[str], change: Callable[[Run, list[Record]], None]
) -> None:
    records = [{**one, "objects": list(one["objects"])} for one in detect_records(NAMES[:4]) if "objects" in one]
    going_run.write(records)
    drawn_early(early, records, 3)
    change(going_run, records)
    assert both(going_run, early, drawn_late) == sorted([NAMES[0], NAMES[3]])


def test_other_thresholds_and_another_order_are_drawn_anew(
    going_run: Run, early: EarlyDrawings, drawn_late: list[str]
) -> None:
    records = detect_records(NAMES[:4])
    going_run.write(records)
    drawn_early(early, records, 3)
    info = json.loads((going_run.folder / "run.json").read_text())
    for refinement in (
        Refinement(labels_with(["dog", "car"], Labels()), min_score=0.5),
        Refinement(labels_with(["car", "dog"], Labels())),
    ):
        info["refinement"] = refinement.to_json()
        (going_run.folder / "run.json").write_text(json.dumps(info))
        drawn_late.clear()
        _, changed = going_run.export("overlay", "with", early=early.folder, overwrite=True)
        assert len(drawn_late) == 4
        _, plain = going_run.export("overlay", "without", overwrite=True)
        assert files_of(changed) == files_of(plain)


def test_a_dead_child_costs_only_its_drawings(going_run: Run, early: EarlyDrawings, drawn_late: list[str]) -> None:
    records = detect_records(NAMES[:4])
    going_run.write(records)
    (going_run.folder / "run.json").write_text("no JSON")  # the child cannot begin
    early.add(records)
    early.stop()
    assert list(early.folder.glob("*")) == []


def test_a_run_never_waits(going_run: Run, early: EarlyDrawings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EarlyDrawings, "_serve", lambda self: time.sleep(0.1))
    for _ in range(100):
        early.add(detect_records(NAMES[:4]))
    assert early._waiting.full()
