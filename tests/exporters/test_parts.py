"""What is said about parts of pictures, in every format: it goes to the object and not to the picture."""

from __future__ import annotations

import csv
import json
import random
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from finished_runs import CAR, COLOUR, HEIGHT, HOSTILE, NAME, SMALL, WIDTH, Run, about, family, record
from PIL import Image
from pycocotools.coco import COCO

from md3cli.exporters import ExportOptions, export_records
from md3cli.exporters.parts import NO_PARTS, part_texts
from md3cli.refine.collection import Collection
from md3cli.refine.refinement import Refinement
from md3cli.refine.selection import Selection


def coco(run: Run, **options: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run.export("coco", "out.json", overwrite=True, **options)[1].read_text())
    return document


def attributes(document: dict[str, Any]) -> list[dict[str, str]]:
    return [annotation.get("attributes", {}) for annotation in document["annotations"]]


def test_coco_has_answers_at_the_annotation_of_their_object(run: Run) -> None:
    run.write(family())
    report, path = run.export("coco", "out.json")
    document = json.loads(path.read_text())
    small = {COLOUR: "red", "caption short": "A small car."}
    assert attributes(document) == [small, {COLOUR: HOSTILE}, {}, {"Is it round?": "Yes"}]
    assert document["images"][0]["captions"] == ["Cars."]
    assert [category["name"] for category in document["categories"]] == ["car", "wheel", "ring"]
    assert len(COCO(str(path)).getAnnIds(catIds=[1])) == 2
    assert not any("part" in note for note in report.notes)


@pytest.mark.parametrize(("question", "is_told"), [("Look. Is it old?", True), ("$?", True), ("Is it 5$?", False)])
def test_coco_says_which_questions_stop_fiftyone(run: Run, question: str, is_told: bool) -> None:
    run.write([*family(), about(family()[0], 0, question, answer="Yes")])
    for is_of_results in (False, True):
        report, _ = run.export("coco", "out.json", coco_results=is_of_results, overwrite=True)
        told = f"FiftyOne opens attributes whose names have a dot with extra_attrs=False only (first: {question})"
        assert (told in report.notes) == (is_told and not is_of_results)


def test_order_does_not_matter(run: Run) -> None:
    records = family()
    for seed in range(5):
        run.write(random.Random(seed).sample(records, len(records)))
        found = {frozenset(one) for one in attributes(coco(run))}
        assert found == {
            frozenset(),
            frozenset({COLOUR}),
            frozenset({COLOUR, "caption short"}),
            frozenset({"Is it round?"}),
        }


@pytest.mark.parametrize("refinement", [Refinement(min_score=0.5), Refinement(nms=0.5)])
def test_what_is_said_of_a_hidden_object_is_told_and_not_given_to_another(run: Run, refinement: Refinement) -> None:
    hidden = CAR | {"x_min": 0.11, "score": 0.1}
    cars = record(NAME, "detect", "car", objects=[hidden, CAR])
    run.write([cars, about(cars, 1, COLOUR, answer="blue"), about(cars, 0, "Is it old?", answer="Yes")])
    out = run.folder / "out.json"
    report = export_records(Collection.of([run.records], chosen=refinement), "coco", out, ExportOptions())
    assert attributes(json.loads(out.read_text())) == [{COLOUR: "blue"}]
    assert "1 text was left out: the objects that they are about are not shown" in report.notes


def test_equal_boxes_are_told_apart_by_their_places() -> None:
    cars = record(NAME, "detect", "car", objects=[CAR, CAR])
    texts = part_texts([cars, about(cars, 1, COLOUR, answer="red"), about(cars, 0, COLOUR, answer="blue")], 100, 100)
    assert texts.of_found == {0: {1: {COLOUR: "red"}, 0: {COLOUR: "blue"}}}


def test_pictures_without_parts_cost_nothing() -> None:
    assert part_texts([record(NAME, "detect", "car", objects=[CAR])], 100, 100) is NO_PARTS


def test_two_texts_to_one_question_are_both_kept_and_equal_ones_once() -> None:
    cars = record(NAME, "detect", "car", objects=[CAR])
    said = ["red", "blue", "red", "green"]
    records = [
        cars,
        *(about(cars, 0, COLOUR, answer=text) for text in said),
        about(cars, 0, f"{COLOUR} (2)", answer="?"),
    ]
    texts = part_texts(records, 100, 100).of_found[0][0]
    assert texts == {COLOUR: "red", f"{COLOUR} (2)": "blue", f"{COLOUR} (3)": "green", f"{COLOUR} (2) (2)": "?"}


@pytest.mark.parametrize("of", ["7", "f" * 32])
def test_a_part_whose_finder_is_not_here_is_an_annotation_of_its_own(run: Run, of: str) -> None:
    """Of an annotation of somebody's file, or of a selection of the answers alone."""
    answers = [one for one in family() if one["task"] == "query"]
    for one in answers:
        if "region" in one:
            one["region"]["of"] = of
    run.write(answers)
    report, path = run.export("coco", "out.json")
    document = json.loads(path.read_text())
    assert attributes(document) == [{COLOUR: "red"}, {COLOUR: HOSTILE}, {"Is it round?": "Yes"}]
    assert [category["name"] for category in document["categories"]] == ["car", "ring"]
    assert document["annotations"][1]["bbox"] == [12, 20, 48, 40]
    assert "score" not in document["annotations"][0]
    assert "3 boxes were added for parts whose own records are not here" in report.notes


def test_a_part_outside_of_the_picture_is_told(run: Run) -> None:
    outside = CAR | {"x_min": 1.1, "x_max": 1.3}
    cars = record(NAME, "detect", "car", objects=[outside])
    run.write([cars, about(cars, 0, COLOUR, answer="red")])
    report, path = run.export("coco", "out.json")
    assert attributes(json.loads(path.read_text())) == []
    assert any("1 text was left out" in note for note in report.notes)


def test_results_have_no_box_that_nobody_found(run: Run) -> None:
    run.write([one for one in family() if "region" in one])
    report, path = run.export("coco", "out.json", coco_results=True)
    assert [one["bbox"][0] for one in json.loads(path.read_text())] == [60]  # the wheel
    assert any("4 texts were left out" in note for note in report.notes)


@pytest.mark.parametrize("format", ["yolo", "voc", "txt", "crops"])
def test_formats_without_a_place_for_answers_say_so_once(run: Run, format: str) -> None:
    run.write(family())
    report, _ = run.export(format, format)
    told = "4 texts were left out, being about parts of pictures; coco, csv and parquet have them"
    assert report.notes.count(told) == 1


def test_boxes_found_in_a_part_are_boxes_of_the_picture(run: Run) -> None:
    run.write(family()[:-4])
    _, yolo = run.export("yolo", "yolo")
    assert [line.split()[0] for line in (yolo / "labels/a/photo.txt").read_text().splitlines()] == ["0", "0", "1"]
    _, voc = run.export("voc", "voc")
    names = [one.text for one in ET.parse(voc / "Annotations/a/photo.xml").iter("name")]
    assert names == ["car", "car", "wheel"]


def test_texts_of_a_picture_are_its_own(run: Run) -> None:
    run.write(family())
    _, out = run.export("txt", "txt")
    assert (out / "a/photo.txt").read_text() == "Cars., 2"


def test_hf_has_parts_in_a_column_of_their_own(run: Run, tmp_path: Path) -> None:
    run.write([*family(), record("b/photo.jpg", "detect", "car", objects=[])])
    _, out = run.export("hf", "hf")
    rows = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))["train"]
    assert rows[0]["captions"] == ["Cars."]
    assert rows[0]["answers"] == [{"question": "How many?", "answer": "2"}]
    assert [(one["label"], one["question"], one["text"]) for one in rows[0]["regions"]] == [
        ("car", COLOUR, "red"),
        ("car", "caption short", "A small car."),
        ("car", COLOUR, HOSTILE),
        ("ring", "Is it round?", "Yes"),
    ]
    assert rows[0]["regions"][0]["bbox"] == rows[0]["objects"]["bbox"][0]
    assert rows[1]["regions"] == []


def test_labelme_says_it_in_the_shape(run: Run) -> None:
    run.write(family())
    _, out = run.export("labelme", "labelme")
    document = json.loads((out / "a/photo.json").read_text())
    shapes = document["shapes"]
    assert [shape.get("attributes") for shape in shapes][2:] == [None, {"Is it round?": "Yes"}]
    assert shapes[0]["description"] == f"{COLOUR}: red\ncaption short: A small car."
    assert shapes[1]["attributes"] == {COLOUR: HOSTILE}
    assert document["description"] == "Cars."
    assert len(document["chat_history"]) == 2


def test_cvat_has_attributes_that_the_labels_declare(run: Run) -> None:
    cars = record(NAME, "detect", "car", objects=[CAR])
    long = "x" * 70
    run.write(
        [*family(), cars | {"id": "more"}, *(about(cars, 0, f"{long}{n}", answer="a" * 5000) for n in range(120))]
    )
    report, out = run.export("cvat", "cvat")
    root = ET.parse(out / "annotations.xml").getroot()
    declared = {
        entry["name"]: [attribute["name"] for attribute in entry["attributes"]]
        for entry in json.loads((out / "labels.json").read_text())
    }
    for shape in [*root.iter("box"), *root.iter("polygon")]:
        names = [attribute.get("name") for attribute in shape.iter("attribute")]
        assert set(names) <= set(declared[shape.get("label")])
        assert all(len(name) <= 64 for name in names)
        assert all(len(attribute.text) <= 4096 for attribute in shape.iter("attribute"))
    assert next(a.text for a in root.iter("attribute") if a.get("name") == COLOUR) == "red"
    assert declared["ring"] == ["score", "Is it round?"]
    assert [tag.get("label") for tag in root.iter("tag")] == ["caption", "answer"]
    assert any("at most 100 questions" in note for note in report.notes)


def test_label_studio_has_texts_at_their_regions(run: Run) -> None:
    run.write(family())
    _, out = run.export("labelstudio", "ls", url_prefix="http://x/")
    results = json.loads((out / "tasks.json").read_text())[0]["predictions"][0]["result"]
    about_regions = [one for one in results if one["from_name"] == "about"]
    shapes = {one["id"]: one for one in results if "labels" in one["type"]}
    assert [one["value"]["text"][0] for one in about_regions][::2] == [f"{COLOUR}\nred", "Is it round?\nYes"]
    for one in about_regions:
        shape = shapes[one["id"]]["value"]
        assert {key: value for key, value in one["value"].items() if key != "text"}.items() <= shape.items()
    assert [one["value"]["text"] for one in results if one["from_name"] == "answer"] == [["How many?\n2"]]
    assert 'name="about" toName="image" perRegion="true"' in (out / "interface.xml").read_text()


def test_label_studio_has_a_control_for_boxes_of_parts_alone(run: Run) -> None:
    run.write([one for one in family() if "answer" in one])
    _, out = run.export("labelstudio", "ls", url_prefix="http://x/")
    interface = ET.parse(out / "interface.xml").getroot()
    labels = [label.get("value") for label in interface.find("RectangleLabels") or ()]
    assert labels == ["car", "ring"]


def test_csv_and_parquet_gain_columns_only_where_a_record_is_about_a_part(run: Run) -> None:
    run.write([family()[0]])
    assert "region" not in run.export("csv", "none.csv")[1].read_text()
    assert not [name for name in pq.read_schema(run.export("parquet", "none.parquet")[1]).names if "." in name]
    run.write(family())
    rows = list(csv.DictReader(run.export("csv", "out.csv")[1].open(newline="", encoding="utf-8")))
    columns = [name for name in rows[0] if name.startswith("region.")]
    assert columns == [f"region.{key}" for key in ("x_min", "y_min", "x_max", "y_max", "label", "of", "index")]
    asked = next(row for row in rows if row["answer"] == "red")
    assert (asked["region.x_min"], asked["region.label"], asked["region.index"]) == ("0.6", "car", "0")
    assert rows[0]["region.of"] == ""
    table = pq.read_table(run.export("parquet", "out.parquet")[1])
    assert [name for name in table.column_names if name.startswith("region.")] == columns
    assert table["region.index"].to_pylist() == [None, 0, 0, 1, 1, None, 0, None, None]
    assert table["region.x_min"][1].as_py() == SMALL["x_min"]


def test_parquet_says_how_a_picture_was_tiled(run: Run) -> None:
    tiles = {"size": "auto", "overlap": 0.2, "count": 4}
    tiled = record(NAME, "detect", "car", objects=[CAR], tiles=tiles)
    run.write([tiled, tiled | {"id": "2", "tiles": tiles | {"size": 378}}, tiled | {"id": "3", "tiles": None}])
    table = pq.read_table(run.export("parquet", "out.parquet")[1])
    columns = [name for name in table.column_names if "." in name]
    assert columns == ["tiles.size", "tiles.overlap", "tiles.count"]
    assert table.select(columns).to_pylist()[1:] == [
        {"tiles.size": "378", "tiles.overlap": 0.2, "tiles.count": 4},
        dict.fromkeys(columns),
    ]


def test_columns_follow_the_selection(run: Run) -> None:
    run.write(family())
    records = Collection.of([run.records], selection=Selection(tasks=("segment",)))
    out = run.folder / "out.csv"
    export_records(records, "csv", out, ExportOptions())
    assert "region" not in out.read_text()


def test_a_label_exports_objects_with_what_is_said_of_them(run: Run) -> None:
    run.write(family())
    records = Collection.of([run.records], selection=Selection(labels=("car",)))
    export_records(records, "coco", run.folder / "out.json", ExportOptions())
    document = json.loads((run.folder / "out.json").read_text())
    assert [len(one) for one in attributes(document)] == [2, 1]


def test_runs_that_are_told_apart_keep_answers_at_their_objects(run: Run) -> None:
    cars = record(NAME, "detect", "car", objects=[CAR]) | {"id": "a" * 32}
    note = record(NAME, "detect", "car", objects=[CAR]) | {"id": "b" * 32}
    theirs = about(note, 0, COLOUR, answer="blue")
    theirs["region"]["of"] = "7"  # an annotation of a file
    run.write([cars, about(cars, 0, COLOUR, answer="red"), theirs])
    records = Collection.of([], [("day", run.records)])
    export_records(records, "coco", run.folder / "out.json", ExportOptions())
    document = json.loads((run.folder / "out.json").read_text())
    assert attributes(document) == [{COLOUR: "red"}, {COLOUR: "blue"}]
    export_records(records, "jsonl", run.folder / "out.jsonl", ExportOptions())
    finder, answer, other = map(json.loads, (run.folder / "out.jsonl").read_text().splitlines())
    assert answer["region"]["of"] == finder["id"] != "a" * 32
    assert other["region"]["of"] == "7"


def test_names_that_come_later_change_what_parts_are_called(run: Run) -> None:
    run.write(family())
    _, path = run.export("coco", "out.json", labels=["vehicle=car"])
    document = json.loads(path.read_text())
    assert [category["name"] for category in document["categories"]] == ["vehicle", "wheel", "ring"]
    assert len(attributes(document)[0]) == 2


def test_an_overlay_writes_answers_beside_their_boxes(run: Run) -> None:
    run.write(family()[:1])
    _, bare = run.export("overlay", "bare")
    run.write(family())
    _, told = run.export("overlay", "told")
    with Image.open(bare / NAME) as one, Image.open(told / NAME) as other:
        assert one.size == other.size == (WIDTH, HEIGHT)
        assert one.tobytes() != other.tobytes()
