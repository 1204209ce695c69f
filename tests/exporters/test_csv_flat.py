"""CSV read back by the csv module and pandas."""

from __future__ import annotations

import csv
import json
from typing import Any

import pandas as pd
import pytest
from finished_runs import CAR, NAMES, Run, detect_records, failure, record

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


def test_what_records_carry_along_has_columns(run: Run) -> None:
    """The union over all records, failed ones too, in the order of first appearance."""
    cells = {"price": 1.5, "=cmd": "+1", "meta": None, "image": "mine", "tags": ["a", {"b": None}], "sold": True}
    run.write([
        record("a", "caption", length="long", caption="x", meta={"shop": "é, ☃", "price": 10**30}),
        record("b", "query", "?", answer="y", reasoning={"text": "as it\nis", "grounding": []}, meta=cells),
        record("c", "query", "?", answer="z", choices={"z": 0.5}),
        failure("d", "detect", "car") | {"meta": {"half@@": "@@", "shop": "s"}},
    ])  # fmt: skip
    run.records.write_text(run.records.read_text(encoding="utf-8").replace("@@", r"\ud800"), encoding="utf-8")
    a, b, c, d = rows_of(run)
    added = [f"meta.{key}" for key in ("shop", "price", "=cmd", "meta", "image", "tags", "sold", "half?")]
    assert list(a) == [*COLUMNS, *added, "choice_z"]
    assert [a[column] for column in added] == ["é, ☃", str(10**30), *[""] * 6]
    assert [b[column] for column in added] == ["", "1.5", "'+1", "", "mine", '["a",{"b":null}]', "true", ""]
    assert [d[column] for column in added] == ["s", *[""] * 6, "?"]
    assert (b["image"], a["length"], b["reasoning"], c["choice_z"]) == ("b", "long", "as it\nis", "0.5")
    spaced = [json.dumps(json.loads(line), indent=None) for line in run.records.read_text().splitlines()]
    run.records.write_text("\n".join(spaced) + "\n")  # another program's blanks
    assert rows_of(run, overwrite=True) == [a, b, c, d]


def test_keys_of_strangers_do_not_multiply(run: Run) -> None:
    long = "k" * 201
    run.write([
        record("a", "caption", caption="x", meta={long: 1, "first": 2}),
        *(record(str(n), "caption", caption="x", meta={f"{n}.{key}": key for key in range(500)}) for n in range(5)),
    ])  # fmt: skip
    report, out = run.export("csv", "out.csv")
    table = pd.read_csv(out)
    columns = [column for column in table if column.startswith("meta.")]
    assert columns == ["meta.first", *(f"meta.{n}.{key}" for n in range(2) for key in range(500))][:1000]
    assert any("it has the first 1,000 whose names are not longer than 200 characters" in note for note in report.notes)


def test_a_byte_order_mark_where_it_is_asked_for(run: Run) -> None:
    run.write([record("a", "caption", caption="größer ☃")])
    plain, marked = (run.export("csv", f"{has_bom}.csv", has_bom=has_bom)[1].read_bytes() for has_bom in (False, True))
    assert marked == b"\xef\xbb\xbf" + plain
    assert plain.startswith(b"image,")


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_columns_that_differ_in_case_alone_are_told(run: Run, format: str) -> None:
    run.write([record(NAMES[0], "query", "?", answer="no", choices={"no": 0.5, "No": 0.3, "yes": 0.2})])
    report, _ = run.export(format, f"out.{format}")
    assert [note for note in report.notes if note.endswith("choice_no, choice_No")]
