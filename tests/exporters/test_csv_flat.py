"""CSV read back by the csv module and pandas."""

from __future__ import annotations

import csv
from typing import Any

import pandas as pd
import pytest
from finished_runs import CAR, NAMES, Run, detect_records, record

from md3cli.exporters.csv_flat import COLUMNS


def rows_of(run: Run, **options: Any) -> list[dict[str, str]]:
    _, out = run.export("csv", "out.csv", **options)
    with out.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_for_each_object_and_each_bare_record(detect_run: Run) -> None:
    rows = rows_of(detect_run)
    assert list(rows[0]) == list(COLUMNS)
    assert len(rows) == 2 + 2 * len(NAMES)
    broken, dog = rows[0], rows[2]
    assert (broken["error_type"], broken["label"]) == ("decode", "")
    assert [dog[key] for key in ("image", "label", "x", "y", "w", "h", "score")] == [
        NAMES[0], "dog", "60.0", "8.0", "60.0", "40.0", "0.4",
    ]  # fmt: skip
    empty = [row for row in rows if row["image"] == "empty.png"]
    assert [(row["label"], row["error_type"]) for row in empty] == [("", ""), ("", "")]


def test_points_masks_and_texts_have_their_columns(run: Run) -> None:
    box = {key: CAR[key] for key in ("x_min", "y_min", "x_max", "y_max")}
    gone = {**box, "x_min": 0.5, "x_max": 0.5}
    paths = [
        {"label": "ring", "svg_path": path, "bbox": bbox, "score": 0.7} for path, bbox in (("M", gone), ("Z", box))
    ]
    run.write([
        record(NAMES[0], "segment", "ring", segments=paths),
        record(NAMES[0], "point", "nose", points=[{"label": "nose", "x": 0.5, "y": 0.25, "score": 0.8}]),
        record(NAMES[0], "caption", length="short", caption="two\nlines"),
        record(None, "query", "Why?", answer="because"),
    ])  # fmt: skip
    mask, point, caption, answer = rows_of(run)
    assert (mask["svg_path"], mask["x"], mask["w"]) == ("Z", "12.0", "48.0")
    assert (point["x"], point["y"], point["w"]) == ("60.0", "20.0", "")
    assert caption["caption"] == "two\nlines"
    assert (answer["image"], answer["prompt"], answer["answer"]) == ("", "Why?", "because")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝"])
def test_formulas_are_disarmed(run: Run, start: str) -> None:
    text = f'{start}cmd|" /C calc"!A0'
    run.write([record(text, "detect", text, objects=[{**CAR, "label": text}]), record("a", "caption", caption=text)])
    found, caption = rows_of(run)
    assert found["image"] == found["prompt"] == found["label"] == "'" + text == caption["caption"]
    assert float(found["x"]) == 12.0


def test_harmless_texts_are_as_they_were(run: Run) -> None:
    run.write([record("a", "caption", caption='a "quoted", 日本語 = text')])
    assert rows_of(run)[0]["caption"] == 'a "quoted", 日本語 = text'


def test_choices_become_columns(run: Run) -> None:
    run.write([
        record("a", "query", "Open?", answer="yes", choices={"yes": 0.9, "=no": 0.1}),
        record("b", "query", "Open?", answer="free"),
    ])  # fmt: skip
    yes, free = rows_of(run)
    assert (yes["answer"], yes["score"], yes["choice_yes"], yes["choice_=no"]) == ("yes", "0.9", "0.9", "0.1")
    assert (free["answer"], free["score"], free["choice_yes"]) == ("free", "", "")


def test_pandas_reads_numbers(detect_run: Run) -> None:
    detect_run.write(detect_records())
    _, out = detect_run.export("csv", "out.csv")
    table = pd.read_csv(out)
    assert table["score"].dtype == "float64"
    assert table["x"].max() == 60.0


def test_long_cells_stay_whole_and_are_told(run: Run) -> None:
    texts = ["a" * 32_767, "b" * 32_768, "c" * 200_000]
    run.write(record(f"{text[0]} ", "caption", caption=text) for text in texts)
    report, out = run.export("csv", "out.csv")
    assert [note for note in report.notes if "2 cells are longer" in note]
    table = pd.read_csv(out)
    assert table["caption"].tolist() == texts
    assert table["image"].tolist() == ["a ", "b ", "c "]  # the blank at the end is part of the name


def test_a_carriage_return_ends_no_row(run: Run) -> None:
    texts = ["a\rb", "c\r\nd", "e\nf", "g\r"]
    run.write(record(f"x{text}.png", "caption", caption=text) for text in texts)
    _, out = run.export("csv", "out.csv")
    assert [row["caption"] for row in rows_of(run, overwrite=True)] == texts
    assert pd.read_csv(out)["caption"].tolist() == texts
    assert not out.read_bytes().endswith(b"\r\n")


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_columns_that_differ_in_case_alone_are_told(run: Run, format: str) -> None:
    run.write([record(NAMES[0], "query", "?", answer="no", choices={"no": 0.5, "No": 0.3, "yes": 0.2})])
    report, _ = run.export(format, f"out.{format}")
    assert [note for note in report.notes if note.endswith("choice_no, choice_No")]
