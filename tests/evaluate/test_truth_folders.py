"""Ground truth of YOLO and labelme: as they lie on disks, as md3 exports them, and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from truths import box, record, segment, write_records

from md3cli.errors import InputError
from md3cli.evaluate import evaluate, load_truth
from md3cli.evaluate.truth import Instances
from md3cli.exporters import ExportOptions, export_records
from md3cli.finished.run_json import seal_of
from md3cli.refine.collection import Collection

YAML = "train: images\nval: images\nnames:\n  0: car\n  1: dog\n"
LABELS = {"labels/a.txt": "0 0.25 0.5 0.1 0.2\n\n1 0.5 0.5 0.2 0.2 0.9\n", "labels/sub/b.txt": "1 0 0 0.5 0 0.5 1\n"}
PICTURES = ("images/a.jpg", "images/sub/b.png", "images/empty.png")


def write(folder: Path, files: dict[str, str], pictures: tuple[str, ...] = ()) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in pictures:  # never opened
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def boxes(truth: Any) -> dict[Any, Any]:
    assert isinstance(truth, Instances)
    return {key: [tuple(round(v, 6) for v in thing.bbox) for thing in found] for key, found in truth.objects.items()}


YOLO_BOXES = {
    ("images/a.jpg", "car"): [(0.2, 0.4, 0.1, 0.2)],
    ("images/a.jpg", "dog"): [(0.4, 0.4, 0.2, 0.2)],
    ("images/sub/b.png", "dog"): [(0, 0, 0.5, 1)],
}


def test_a_yolo_data_set_is_read_by_its_file_or_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, {"data.yaml": YAML, **LABELS}, PICTURES)
    for path in (folder, folder / "data.yaml"):
        truth = load_truth(path)
        assert boxes(truth) == YOLO_BOXES
        assert truth.categories == ("car", "dog")
        assert [*truth.images] == ["images/a.jpg", "images/empty.png", "images/sub/b.png"]
    ids = [thing.id for found in truth.objects.values() for thing in found]
    assert ids == ["labels/a.txt:1", "labels/a.txt:3", "labels/sub/b.txt:1"]
    assert truth.objects["images/sub/b.png", "dog"][0].mask is not None


def test_label_files_alone_call_pictures_without_suffix(tmp_path: Path) -> None:
    truth = load_truth(write(tmp_path, {"data.yaml": YAML, **LABELS}))
    assert [*truth.images] == ["images/a", "images/sub/b"]
    records = [record("sub/b.png", "detect", "dog", objects=[box(0, 0, 100, 100)])]
    scored = evaluate(write_records(tmp_path / "r.jsonl", records), [truth]).sections[0]
    assert (scored.scores["F1"], scored.counts["images"]) == (1.0, 1)


@pytest.mark.parametrize(
    ("yaml", "folder"),
    [
        ("path: ..\ntrain: set/images\nnames: [car, dog]\n", ""),
        ("train: ../images\nnames: [car, dog]\n", ""),
        ("path: /nowhere\nval: [images]\nnames: [car, dog]\n", ""),
        ("train: list.txt\nnames: [car, dog]\n", ""),
    ],
)
def test_places_are_found_as_trainers_find_them(tmp_path: Path, yaml: str, folder: str) -> None:
    listed = "./images/a.jpg\n./images/sub/b.png\n"
    write(tmp_path / "set", {"data.yaml": yaml, "list.txt": listed, **LABELS}, PICTURES)
    found = boxes(load_truth(tmp_path / "set"))
    assert [*found.values()] == [*YOLO_BOXES.values()]


def test_classes_txt_beside_the_labels_names_them(tmp_path: Path) -> None:
    write(tmp_path / "one", {"labels/classes.txt": "car\ndog\n", **LABELS}, PICTURES)
    assert boxes(load_truth(tmp_path / "one")) == YOLO_BOXES
    flat = {"classes.txt": "car\ndog\n", "a.txt": "0 0.25 0.5 0.1 0.2\n"}
    assert boxes(load_truth(write(tmp_path / "flat", flat, ("a.jpg",)))) == {("a.jpg", "car"): [(0.2, 0.4, 0.1, 0.2)]}


def test_points_of_a_body_are_no_polygon(tmp_path: Path) -> None:
    files = {"data.yaml": YAML + "kpt_shape: [2, 2]\n", "labels/a.txt": "0 0.25 0.5 0.1 0.2 0.1 0.1 0.9 0.9\n"}
    assert boxes(load_truth(write(tmp_path, files, PICTURES)))["images/a.jpg", "car"] == [(0.2, 0.4, 0.1, 0.2)]


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"data.yaml": YAML, "labels/a.txt": "0 0.5 0.5\n"}, r"a\.txt, line 1: .*four finite numbers"),
        ({"data.yaml": YAML, "labels/a.txt": "0 0.5 0.5 nan 0.1\n"}, "four finite numbers"),
        ({"data.yaml": YAML, "labels/a.txt": "\n7 0.5 0.5 0.1 0.1\n"}, "line 2: class 7 has no name"),
        ({"data.yaml": YAML, "labels/a.txt": "car 0.5 0.5 0.1 0.1\n"}, "no line of YOLO's"),
        ({"data.yaml": YAML, "labels/a.txt": "1e999 0.5 0.5 0.1 0.1\n"}, "no line of YOLO's"),
        ({"data.yaml": "names: [car]\n"}, "names no pictures"),
        ({"data.yaml": "train: images\n"}, "has no names of classes"),
        ({"data.yaml": "train: images\nnames: [car, car]\n"}, "two classes are called car"),
        ({"data.yaml": "train: elsewhere\nnames: [car]\n"}, "leads to no pictures and no label files"),
        ({"data.yaml": "a: &a [1]\nb: *a\n"}, "aliases"),
        ({"notes.md": "nothing"}, "is no ground truth that md3 knows: a folder has"),
        ({"a.json": '{"shapes": [{"label": "x"}], "imagePath": "a.png"}'}, r"a\.json is no labelme file .*KeyError"),
        ({"a.json": '{"shapes": '}, "is no labelme file"),
        (
            {"a.json": '{"shapes": [{"label": "x", "points": [[1, NaN], [2, 2], [3, 3]]}], "imagePath": "a"}'},
            "not finite",
        ),
    ],
)
def test_what_is_damaged_is_named(tmp_path: Path, files: dict[str, str], why: str) -> None:
    with pytest.raises(InputError, match=why):
        load_truth(write(tmp_path, files, ("images/a.jpg",) if "data.yaml" in files else ()))


def shape(kind: str, points: list[list[float]], label: str = "car") -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind}


def test_labelme_files_are_read_one_or_a_folder(tmp_path: Path) -> None:
    shapes = [
        shape("rectangle", [[50, 40], [10, 20]]),
        shape("circle", [[100, 50], [100, 60]]),
        shape("polygon", [[0, 0], [20, 0], [20, 10]], "dog"),
        shape("point", [[5, 5]]),
    ]
    document = {
        "shapes": shapes,
        "imagePath": "..\\old\\a.jpg",
        "imageWidth": 200,
        "imageHeight": 100,
        "imageData": None,
    }
    nothing = {"shapes": [], "imagePath": "b.jpg", "imageWidth": 200, "imageHeight": 100}
    files = {"sub/a.json": json.dumps(document), "b.json": json.dumps(nothing), "other.json": "[1]", "more.json": "{}"}
    write(tmp_path, files)
    truth = load_truth(tmp_path)
    expected = {"car": [(10, 20, 40, 20), (90, 40, 20, 20)], "dog": [(0, 0, 20, 10)]}
    assert boxes(truth) == {("sub/a.jpg", name): found for name, found in expected.items()}
    assert ([*truth.images], truth.images["b.jpg"].width) == (["b.jpg", "sub/a.jpg"], 200)
    assert truth.objects["sub/a.jpg", "car"][1].id == "sub/a.json#2"
    assert "points, lines" in truth.notes[0]
    alone = load_truth(tmp_path / "sub/a.json")
    assert boxes(alone) == {("a.jpg", name): found for name, found in expected.items()}


@pytest.mark.parametrize("format", ["yolo", "labelme"])
def test_what_md3_exports_is_the_truth_of_its_records(tmp_path: Path, format: str) -> None:
    for name in ("a.png", "sub/b.jpg"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100)).save(tmp_path / "pictures" / name)
    records = [
        record("a.png", "detect", "car", objects=[box(10, 10, 40, 40), box(100, 10, 20, 40)]),
        record("a.png", "segment", "dog", segments=[segment("M 0 0 L 1 0 L 1 1 L 0 1 Z", 10, 60, 40, 30)]),
        record("sub/b.jpg", "detect", "car", objects=[]),
    ]
    write_records(tmp_path / "r.jsonl", records)
    root = str(tmp_path / "pictures")
    (tmp_path / "r.jsonl.run.json").write_text(json.dumps({"schema": "md3-run/1", "root": root, "seal": seal_of(root)}))
    export_records(Collection.of([tmp_path / "r.jsonl"]), format, tmp_path / "out", ExportOptions())
    scores = {one.name: one for one in evaluate(tmp_path / "r.jsonl", [load_truth(tmp_path / "out")]).sections}
    assert scores["boxes"].scores["F1"] == scores["masks"].scores["F1"] == 1.0
    assert scores["boxes"].counts["images"] == 2
