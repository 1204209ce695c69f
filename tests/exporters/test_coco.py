"""COCO read back by pycocotools, faster-coco-eval, supervision and labelformat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv
from finished_runs import CAR, DOG, HEIGHT, NAMES, WIDTH, Record, Run, detect_records, record
from labelformat.formats.coco import COCOObjectDetectionInput
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from md3cli.errors import ExportError, InputError, UsageError
from md3cli.exporters import FORMATS
from md3cli.exporters.splits import ONE_SET, Splits

DONUT = "M 0 0 L 1 0 L 1 1 L 0 1 Z M 0.25 0.25 L 0.25 0.75 L 0.75 0.75 L 0.75 0.25 Z"  # the inner ring turns back
TRIANGLE = "M 0 0 L 1 0 L 0 1 Z"
CAR_BOX = {key: CAR[key] for key in ("x_min", "y_min", "x_max", "y_max")}


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_bytes())
    return document


def segment(name: str, path: str, label: str = "car") -> Record:
    return record(name, "segment", label, segments=[{"label": label, "svg_path": path, "bbox": CAR_BOX, "score": 0.7}])


def test_pycocotools_loads_every_answered_image_and_box(detect_run: Run) -> None:
    report, out = detect_run.export("coco", "out.json")
    coco = COCO(str(out))
    assert [coco.imgs[key]["file_name"] for key in sorted(coco.imgs)] == list(NAMES)
    assert len(coco.anns) == 2 * (len(NAMES) - 1)
    assert coco.getAnnIds(imgIds=[NAMES.index("empty.png") + 1]) == []
    assert (report.num_images, report.num_failures) == (len(NAMES), 2)


def test_ids_count_from_one_and_categories_keep_the_order_asked(detect_run: Run) -> None:
    _, out = detect_run.export("coco", "out.json")
    document = read(out)
    assert [category["name"] for category in document["categories"]] == ["dog", "car"]  # although both failed first
    for key in ("images", "annotations", "categories"):
        assert [entry["id"] for entry in document[key]] == list(range(1, len(document[key]) + 1))


def test_labels_option_gives_the_order(detect_run: Run) -> None:
    _, out = detect_run.export("coco", "out.json", labels=("car", "bird"))
    assert [category["name"] for category in read(out)["categories"]] == ["car", "bird", "dog"]


def test_boxes_are_clamped_pixels_with_scores(detect_run: Run) -> None:
    _, out = detect_run.export("coco", "out.json")
    dog, car = read(out)["annotations"][:2]
    assert dog["bbox"] == [60.0, 8.0, 60.0, 40.0]  # x_max 1.2 is cut at the border
    assert (dog["area"], dog["iscrowd"], dog["score"]) == (2400.0, 0, 0.4)
    assert car["bbox"] == [12.0, 20.0, 48.0, 40.0]
    mask = COCO(str(out)).annToMask(car)
    assert mask.sum() == 48 * 40


def test_boxes_without_extent_are_dropped(run: Run) -> None:
    outside = {**CAR, "x_min": 1.1, "x_max": 1.3}
    flat = {**CAR, "y_max": CAR["y_min"]}
    run.write([record("empty.png", "detect", "car", objects=[outside, flat])])
    _, out = run.export("coco", "out.json")
    assert read(out)["annotations"] == []
    assert len(read(out)["images"]) == 1


def test_scattered_records_of_one_image_are_merged(run: Run) -> None:
    records = detect_records()
    run.write([*records[::2], *reversed(records[1::2])])
    _, out = run.export("coco", "out.json")
    document = read(out)
    assert len({image["file_name"] for image in document["images"]}) == len(document["images"]) == len(NAMES)
    assert len(document["annotations"]) == 2 * (len(NAMES) - 1)


def evaluate(truth: Path, results: Path, kind: str) -> float:
    coco = COCO(str(truth))
    scoring = COCOeval(coco, coco.loadRes(str(results)), kind)
    scoring.evaluate()
    scoring.accumulate()
    scoring.summarize()
    return float(scoring.stats[0])


def test_perfect_boxes_score_one(detect_run: Run) -> None:
    from faster_coco_eval import COCO as FastCOCO
    from faster_coco_eval import COCOeval_faster

    _, truth = detect_run.export("coco", "gt.json")
    _, results = detect_run.export("coco", "results.json", coco_results=True, coco_ids_from=truth)
    assert evaluate(truth, results, "bbox") == pytest.approx(1.0)
    fast = FastCOCO(str(truth))
    scoring = COCOeval_faster(fast, fast.loadRes(str(results)), "bbox")
    scoring.evaluate()
    scoring.accumulate()
    scoring.summarize()
    assert scoring.stats[0] == pytest.approx(1.0)


@pytest.mark.parametrize("path", [TRIANGLE, DONUT])
def test_perfect_masks_score_one(run: Run, path: str) -> None:
    run.write([segment("empty.png", path)])
    _, truth = run.export("coco", "gt.json")
    _, results = run.export("coco", "results.json", coco_results=True)
    assert evaluate(truth, results, "segm") == pytest.approx(1.0)


def test_a_hole_becomes_run_lengths_and_a_plain_path_polygons(run: Run) -> None:
    run.write([segment("empty.png", DONUT, "ring"), segment("test_a.jpg", TRIANGLE)])
    _, out = run.export("coco", "out.json")
    ring, triangle = read(out)["annotations"]
    assert isinstance(ring["segmentation"], dict)
    assert triangle["segmentation"] == [[12.0, 20.0, 60.0, 20.0, 12.0, 60.0]]
    mask = COCO(str(out)).annToMask(ring).astype(bool)
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[20:60, 12:60] = True
    expected[30:50, 24:48] = False
    assert (mask != expected).sum() <= 2 * (24 + 20)  # the hole's border pixels may go either way
    assert ring["area"] == pytest.approx(mask.sum())
    assert triangle["area"] == pytest.approx(48 * 40 / 2)


def test_an_invalid_path_keeps_its_box(run: Run) -> None:
    run.write([segment("empty.png", "")])
    _, out = run.export("coco", "out.json")
    (annotation,) = read(out)["annotations"]
    assert annotation["segmentation"] == [[12.0, 20.0, 60.0, 20.0, 60.0, 60.0, 12.0, 60.0]]


def test_results_are_a_bare_list_without_rectangles(detect_run: Run) -> None:
    _, out = detect_run.export("coco", "out.json", coco_results=True)
    results = json.loads(out.read_bytes())
    assert results[0] == {"image_id": 1, "category_id": 1, "bbox": [60.0, 8.0, 60.0, 40.0], "score": 0.4}


def test_ids_of_another_file_are_used_by_name(detect_run: Run) -> None:
    truth = detect_run.folder / "gt.json"
    images = [{"id": 700 + n, "file_name": name, "width": 1, "height": 1} for n, name in enumerate(NAMES[:3])]
    truth.write_text(json.dumps({"images": images, "categories": [{"id": 18, "name": "car"}], "annotations": []}))
    _, out = detect_run.export("coco", "out.json", coco_ids_from=truth)
    document = read(out)
    assert [image["id"] for image in document["images"][:4]] == [700, 701, 702, 703]
    assert {category["name"]: category["id"] for category in document["categories"]} == {"car": 18, "dog": 19}
    report, out = detect_run.export("coco", "results.json", coco_ids_from=truth, coco_results=True)
    assert {result["image_id"] for result in json.loads(out.read_bytes())} == {700, 701, 702}
    assert any(f"{len(NAMES) - 3} images are not in" in note for note in report.notes)


@pytest.mark.parametrize(("text", "error"), [("{}", ExportError), ("[1]", ExportError), ("{", InputError)])
def test_a_wrong_ground_truth_is_refused(detect_run: Run, text: str, error: type[Exception]) -> None:
    truth = detect_run.folder / "gt.json"
    truth.write_text(text)
    with pytest.raises(error, match=r"gt\.json"):
        detect_run.export("coco", "out.json", coco_ids_from=truth)


def test_captions_alone_are_caption_annotations(run: Run) -> None:
    run.write([record(name, "caption", length="long", caption=f"a {name}") for name in NAMES])
    _, out = run.export("coco", "out.json")
    coco = COCO(str(out))
    assert coco.anns[2] == {"id": 2, "image_id": 2, "caption": "a b/photo.jpg"}
    _, results = run.export("coco", "results.json", coco_results=True)
    assert len(coco.loadRes(str(results)).anns) == len(NAMES)


def test_captions_beside_boxes_do_not_disturb_readers_of_boxes(detect_run: Run) -> None:
    detect_run.write([*detect_records(), record(NAMES[0], "caption", length="long", caption="a car")])
    _, out = detect_run.export("coco", "out.json")
    assert all("bbox" in annotation for annotation in read(out)["annotations"])
    assert read(out)["images"][0]["captions"] == ["a car"]


def test_points_are_keypoints_on_request_only(run: Run) -> None:
    nose = {"label": "nose", "x": 0.5, "y": 0.25, "score": 0.8}
    run.write([record("empty.png", "point", "nose", points=[nose])])
    report, out = run.export("coco", "plain.json")
    assert read(out)["annotations"] == []
    assert "--keypoints" in report.notes[0]
    _, out = run.export("coco", "keypoints.json", keypoints=True)
    coco = COCO(str(out))
    assert coco.cats[1]["keypoints"] == ["nose"]
    assert (coco.anns[1]["keypoints"], coco.anns[1]["num_keypoints"]) == ([60.0, 20.0, 2], 1)


def test_what_is_only_pointed_at_is_no_category_of_boxes(detect_run: Run) -> None:
    detect_run.write([*detect_records(), record("empty.png", "point", "nose", points=[])])
    _, out = detect_run.export("coco", "out.json", labels=("nose", "car", "dog"))
    assert [category["name"] for category in read(out)["categories"]] == ["car", "dog"]
    _, out = detect_run.export("coco", "keypoints.json", labels=("nose", "car", "dog"), keypoints=True)
    assert [category["name"] for category in read(out)["categories"]] == ["car", "dog", "nose"]


def test_supervision_reads_images_and_classes(detect_run: Run) -> None:
    _, out = detect_run.export("coco", "out.json")
    dataset = sv.DetectionDataset.from_coco(str(detect_run.root), str(out))
    assert dataset.classes == ["dog", "car"]
    assert len(dataset) == len(NAMES)
    _, image, detections = next(iter(dataset))
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert detections.xyxy.tolist() == [[60, 8, 120, 48], [12, 20, 60, 60]]


def test_labelformat_reads_scores(detect_run: Run) -> None:
    _, out = detect_run.export("coco", "out.json")
    labels = list(COCOObjectDetectionInput(out).get_labels())
    assert [len(label.objects) for label in labels].count(0) == 1
    assert [(found.category.name, found.confidence) for found in labels[0].objects] == [("dog", 0.4), ("car", 0.9)]


def test_no_records_give_an_empty_document(run: Run) -> None:
    run.write([])
    _, out = run.export("coco", "out.json")
    assert COCO(str(out)).imgs == {}


def test_the_same_records_give_the_same_bytes(detect_run: Run) -> None:
    _, first = detect_run.export("coco", "first.json")
    _, second = detect_run.export("coco", "second.json")
    assert first.read_bytes() == second.read_bytes()


def test_what_stands_there_is_replaced_only_when_told(detect_run: Run) -> None:
    (detect_run.folder / "out.json").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        detect_run.export("coco", "out.json")
    assert (detect_run.folder / "out.json").read_text() == "mine"
    _, out = detect_run.export("coco", "out.json", overwrite=True)
    assert read(out)["images"]


@pytest.mark.parametrize("format", FORMATS)
def test_the_records_themselves_are_never_replaced(detect_run: Run, format: str) -> None:
    before = detect_run.records.read_bytes()
    with pytest.raises(UsageError, match="is an input of this command"):
        detect_run.export(format, "records.jsonl", overwrite=True)
    assert detect_run.records.read_bytes() == before


def test_text_only_answers_are_counted_out(detect_run: Run) -> None:
    detect_run.write([*detect_records(), record(None, "query", "Why?", answer="because")])
    report, _ = detect_run.export("coco", "out.json")
    assert any("without an image" in note for note in report.notes)


def test_unclamped_records_are_left_as_they_are(detect_run: Run) -> None:
    detect_run.export("coco", "out.json")
    assert json.loads(detect_run.records.read_bytes().splitlines()[2])["objects"] == [DOG]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"image": "\\xff.png"}, {"image": "\\xff.png", "image_b64": "/y5wbmc="}),  # one only looks like the other
        ({"image": "\u00e9.png"}, {"image": "e\u0301.png"}),
    ],
)
def test_pictures_that_look_alike_are_two_images(run: Run, first: dict[str, str], second: dict[str, str]) -> None:
    parts = [(first, CAR), (second, {**CAR, "x_min": 0.2})]
    run.write([record("-", "detect", "car", objects=[box], id=f"r{n}") | name for n, (name, box) in enumerate(parts)])
    _, out = run.export("coco", "out.json")
    document = json.loads(out.read_text(encoding="utf-8"))
    assert len({image["file_name"] for image in document["images"]}) == 2
    assert [(box["image_id"], box["bbox"][0]) for box in document["annotations"]] == [(1, 12.0), (2, 24.0)]


HALVES = Splits((("train", 0.5), ("val", 0.5)))


def test_sets_are_documents_whose_ids_are_told_apart(detect_run: Run) -> None:
    report, out = detect_run.export("coco", "out", splits=HALVES)
    documents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*.json")}
    assert set(documents) == {"instances_train", "instances_val"}
    images = [image for document in documents.values() for image in document["images"]]
    annotations = [found for document in documents.values() for found in document["annotations"]]
    assert sorted(image["file_name"] for image in images) == sorted(NAMES)
    assert report.num_images == len({image["id"] for image in images}) == len(NAMES)
    assert len({found["id"] for found in annotations}) == len(annotations) > 0
    for stem, document in documents.items():
        assert [category["name"] for category in document["categories"]] == ["dog", "car"]
        known = {image["id"] for image in document["images"]}
        assert {found["image_id"] for found in document["annotations"]} <= known
        assert {HALVES.of(image["file_name"], []) for image in document["images"]} == {stem.rpartition("_")[2]}
        COCO(str(out / f"{stem}.json"))


def test_sets_of_captions_are_called_so(run: Run) -> None:
    run.write([record(name, "caption", None, caption="A dog.") for name in ("test_a.jpg", "empty.png")])
    _, out = run.export("coco", "out", splits=HALVES)
    assert {path.name for path in out.glob("*.json")} == {"captions_train.json", "captions_val.json"}


def test_a_folder_is_needed_for_sets(detect_run: Run) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        detect_run.export("coco", "out.json", splits=HALVES)


@pytest.mark.parametrize("is_flat", [False, True])
def test_roboflow_has_the_document_beside_the_pictures(detect_run: Run, is_flat: bool) -> None:
    _, out = detect_run.export("coco", "out", splits=HALVES, is_roboflow=True, is_flat=is_flat)
    num_images = 0
    for name in ("train", "valid"):
        document = json.loads((out / name / "_annotations.coco.json").read_text(encoding="utf-8"))
        files = {path.relative_to(out / name).as_posix() for path in (out / name).rglob("*") if path.is_file()}
        assert files == {"_annotations.coco.json", *(image["file_name"] for image in document["images"])}
        assert not is_flat or not any("/" in image["file_name"] for image in document["images"])
        num_images += len(document["images"])
        for image in document["images"]:
            with Image.open(out / name / image["file_name"]) as picture:
                assert ImageOps.exif_transpose(picture).size == (image["width"], image["height"])
    assert num_images == len(NAMES)


def test_roboflow_in_one_set_leaves_out_what_is_not_there(detect_run: Run) -> None:
    (detect_run.root / "test_a.jpg").unlink()
    (detect_run.root / "empty.png").write_bytes(b"no picture")
    report, out = detect_run.export("coco", "out", is_roboflow=True)
    document = json.loads((out / "_annotations.coco.json").read_text(encoding="utf-8"))
    names = {image["file_name"] for image in document["images"]}
    assert len(names) == report.num_images == len(NAMES) - 2
    assert names == {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {
        "_annotations.coco.json",
        ".md3",
    }


def test_a_document_says_that_it_is_one_set_where_it_could_be_several(detect_run: Run) -> None:
    assert ONE_SET in detect_run.export("coco", "out.json")[0].notes
    assert ONE_SET not in detect_run.export("coco", "results.json", coco_results=True)[0].notes  # a list for scoring
    detect_run.write(detect_records(["test_a.jpg"]))
    assert ONE_SET not in detect_run.export("coco", "one.json")[0].notes


@pytest.mark.parametrize(("format", "options"), [("hf", {}), ("coco", {"is_roboflow": True})])
def test_the_sets_count_the_pictures_that_are_in_them(detect_run: Run, format: str, options: dict[str, bool]) -> None:
    (detect_run.root / "test_a.jpg").unlink()
    (detect_run.root / "empty.png").write_bytes(b"no picture")
    report, out = detect_run.export(format, "out", splits=HALVES, **options)
    folders = {"hf": ("train", "validation"), "coco": ("train", "valid")}[format]
    train, val = (sum(1 for path in (out / name).rglob("*.[jp][pn]g")) for name in folders)
    assert train + val == report.num_images == len(NAMES) - 2
    assert f"sets: train {train}, val {val}" in report.notes


NESTED: list[Any] = []
for _ in range(40):
    NESTED = [NESTED]
STRANGE = {"id": "mine", "file_name": 3, "meta": {"image": None}, "captions": "x", "deep": NESTED, "big": 10**400}


@pytest.mark.parametrize("format", ["coco", "labelstudio"])
def test_what_records_carry_along_stands_under_meta(run: Run, format: str) -> None:
    """Under a key of its own, so that no key of a stranger takes the place of ours."""
    name = NAMES[0]
    run.write([
        record(name, "detect", "car", objects=[CAR], meta={"shop": "é", "price": 1}),
        record(name, "caption", caption="a car", meta={"price": float("nan")}),
        record(name, "query", "?", answer="x", meta=STRANGE),
        record(NAMES[1], "detect", "car", objects=[CAR]),
    ])  # fmt: skip
    _, out = run.export(format, "out.json")
    document = read(out)
    meta = {"shop": "é", "price": None, **STRANGE}
    if format == "labelstudio":
        first, second = (task["data"] for task in document)
        assert first == {"image": second["image"].replace(NAMES[1], NAMES[0]), "meta": meta}
        assert second.keys() == {"image"}
        return
    first, second = document["images"]
    assert first == {"id": 1, "width": WIDTH, "height": HEIGHT, "file_name": name, "captions": ["a car"], "meta": meta}
    assert second == {"id": 2, "width": WIDTH, "height": HEIGHT, "file_name": NAMES[1]}
    assert len(COCO(str(out)).anns) == 2
    assert len(sv.DetectionDataset.from_coco(str(run.root), str(out))) == 2
