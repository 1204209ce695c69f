"""Label Studio tasks against the rules of its importer; the slow test asks its own validator."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import programs
import pytest
from finished_runs import CAR, NAMES, Run, detect_records, draw_pictures, record

from md3cli.exporters import ExportOptions, export_records, labelstudio
from md3cli.finished.run_json import seal_of
from md3cli.refine.collection import Collection

TAGS = {"rectanglelabels": "RectangleLabels", "polygonlabels": "PolygonLabels", "keypointlabels": "KeyPointLabels"}
HOSTILE = '"><Label value="x"/>&\x00 é'


@pytest.fixture
def mixed_run(run: Run) -> Run:
    """Every task on the same pictures."""
    box = {key: CAR[key] for key in ("x_min", "y_min", "x_max", "y_max")}
    path = {"label": "ring", "svg_path": "M 0 0 L 1 0 L 1 1 Z", "bbox": box, "score": 0.7}
    run.write([
        *detect_records(),
        record(NAMES[0], "detect", HOSTILE, objects=[{**CAR, "label": HOSTILE}]),
        record(NAMES[0], "segment", "ring", segments=[path]),
        record(NAMES[0], "point", "nose", points=[{"label": "nose", "x": 1.0, "y": 0.25, "score": 0.8}]),
        record(NAMES[0], "caption", length="short", caption="a car"),
        record(NAMES[0], "query", "How many?", answer="2"),
    ])  # fmt: skip
    return run


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def test_one_task_for_each_image_with_percent(mixed_run: Run) -> None:
    report, out = mixed_run.export("labelstudio", "tasks.json")
    tasks = read(out)
    assert len(tasks) == report.num_images == len(NAMES)
    assert [unquote(task["data"]["image"].removeprefix("/data/local-files/?d=pictures/")) for task in tasks] == list(
        NAMES
    )
    dog = tasks[0]["predictions"][0]["result"][0]
    assert dog["value"] == {"x": 50, "y": 10, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["dog"]}
    assert (dog["original_width"], dog["original_height"], dog["image_rotation"]) == (120, 80, 0)
    assert (dog["score"], dog["to_name"]) == (0.4, "image")
    assert tasks[NAMES.index("empty.png")]["predictions"][0]["result"] == []


def test_every_result_fits_the_interface(mixed_run: Run) -> None:
    _, out = mixed_run.export("labelstudio", "tasks.json")
    view = ET.parse(out.with_suffix(".xml")).getroot()
    controls = {child.get("name"): child for child in view if child.tag != "Image"}
    for task in read(out):
        (prediction,) = task["predictions"]
        ids = [result["id"] for result in prediction["result"]]
        assert len(set(ids)) == len(ids)
        for result in prediction["result"]:
            control = controls[result["from_name"]]
            assert control.get("toName") == "image" == view[0].get("name")
            if result["type"] in TAGS:
                assert control.tag == TAGS[result["type"]]
                assert set(result["value"][result["type"]]) <= {label.get("value") for label in control}
    texts = {
        r["from_name"]: r["value"]["text"] for r in read(out)[0]["predictions"][0]["result"] if r["type"] == "textarea"
    }
    assert texts == {"caption": ["a car"], "answer": ["How many?\n2"]}


def test_a_folder_gets_both_files_and_a_prefix_its_urls(mixed_run: Run) -> None:
    _, out = mixed_run.export("labelstudio", "project", url_prefix="s3://bucket/")
    assert sorted(path.name for path in out.iterdir()) == [".md3", "interface.xml", "tasks.json"]
    assert read(out / "tasks.json")[1]["data"]["image"] == "s3://bucket/b/photo.jpg"


def test_urls_stay_and_exact_bytes_are_quoted(run: Run) -> None:
    run.write([
        record("https://example.com/a b.jpg", "detect", "car", objects=[]),
        record("\\xff.png", "detect", "car", objects=[], image_b64="/y5wbmc="),
    ])  # fmt: skip
    _, out = run.export("labelstudio", "tasks.json")
    assert [task["data"]["image"] for task in read(out)] == [
        "https://example.com/a b.jpg",
        "/data/local-files/?d=pictures/%FF.png",
    ]


def test_the_setup_is_told_for_local_files_alone(mixed_run: Run) -> None:
    """The document root is the parent of the pictures' folder, which is the storage."""
    root = mixed_run.root.resolve()
    said = "\n".join(mixed_run.export("labelstudio", "tasks.json")[0].notes)
    assert "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true" in said
    assert f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={root.parent}" in said.splitlines()[-2]
    assert f"path {root} " in said
    assert "LOCAL_FILES" not in "".join(mixed_run.export("labelstudio", "other.json", url_prefix="s3://b/")[0].notes)
    spaced = root.with_name("my pictures é")
    root.rename(spaced)
    _, out = mixed_run.export("labelstudio", "third.json", root=spaced)
    assert read(out)[1]["data"]["image"] == "/data/local-files/?d=my%20pictures%20%C3%A9/b/photo.jpg"


def test_pictures_of_two_runs_are_below_one_document_root(run: Run, tmp_path: Path) -> None:
    """Each run's folder is a storage; the name before the picture's is not part of its path."""
    other = Run(tmp_path / "other run", tmp_path / "far/other pictures")
    draw_pictures(other.root, ["empty.png"])
    for one in (run, other):
        one.write([record("empty.png", "detect", "car", objects=[])])
        known = {"schema": "md3-run/1", "root": str(one.root), "seal": seal_of(str(one.root))}
        one.folder.mkdir(exist_ok=True)
        (one.folder / "run.json").write_text(json.dumps(known))
    out = tmp_path / "both.json"
    report = export_records(
        Collection.of([], [("one", run.folder), ("two", other.folder)]), "labelstudio", out, ExportOptions()
    )
    paths = [task["data"]["image"].removeprefix("/data/local-files/?d=") for task in read(out)]
    assert paths == ["pictures/empty.png", "far/other%20pictures/empty.png"]
    assert report.notes[-2].endswith(f"DOCUMENT_ROOT={tmp_path.resolve()}")
    assert f"the path {run.root.resolve()} and another with the path {other.root.resolve()} (" in report.notes[-1]


def test_twins_of_two_runs_are_told_apart_by_their_bytes(run: Run, tmp_path: Path) -> None:
    """Two runs, each with a picture of this name, joined without `--as`."""
    other = Run(tmp_path / "other run", tmp_path / "far/other pictures")
    draw_pictures(other.root, ["a.jpg", "empty.png"])
    for one, task in ((run, "detect"), (other, "segment")):
        sha256 = hashlib.sha256((one.root / "empty.png").read_bytes()).hexdigest()
        result = {"detect": {"objects": []}, "segment": {"segments": []}}[task]
        one.write([record("empty.png", task, "car", **result | {"sha256": sha256})])
        known = {"schema": "md3-run/1", "root": str(one.root), "seal": seal_of(str(one.root))}
        (one.folder / "run.json").write_text(json.dumps(known))
    out = tmp_path / "both.json"
    export_records(Collection.of([run.folder, other.folder]), "labelstudio", out, ExportOptions())
    paths = [task["data"]["image"].removeprefix("/data/local-files/?d=") for task in read(out)]
    assert paths == ["pictures/empty.png", "far/other%20pictures/empty.png"]


def test_pictures_that_its_server_cannot_open_are_told(run: Run) -> None:
    (run.root / os.fsdecode(b"\xff.png")).write_bytes((run.root / "empty.png").read_bytes())
    with tarfile.open(run.root / "some.tar", "w") as tar:
        tar.add(run.root / "empty.png", "inside.png")
    names = ["empty.png", "gone.png", "gone too.png", "some.tar/inside.png"]
    odd = record("\\xff.png", "detect", "car", objects=[], image_b64="/y5wbmc=")
    run.write([*(record(name, "detect", "car", objects=[]) for name in names), odd])
    report, out = run.export("labelstudio", "tasks.json")
    assert len(read(out)) == 5
    assert [note for note in report.notes if "not show" in note] == [
        "Label Studio will not show 2 pictures that are not there (first: gone.png)",
        "Label Studio will not show 1 pictures that are inside a tar or a Parquet file (first: some.tar/inside.png)",
        "Label Studio will not show 1 pictures that have names that are not UTF-8 (first: \\xff.png)",
    ]


def test_pictures_outside_the_folder_are_told(run: Run, tmp_path: Path) -> None:
    """A list in this very process may name them, wherever they are."""
    outside = tmp_path / "outside.png"
    outside.write_bytes((run.root / "empty.png").read_bytes())
    run.write([record(name, "detect", "car", objects=[]) for name in ("empty.png", str(outside))])
    report, _ = run.export("labelstudio", "tasks.json", is_confined=False)
    told = f"Label Studio will not show 1 pictures that lie outside the folder (first: {outside})"
    assert [note for note in report.notes if "not show" in note] == [told]


def test_tasks_that_its_server_refuses_for_their_size_are_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write([record("empty.png", "detect", "car", objects=[])])
    assert "refuse" not in "".join(run.export("labelstudio", "tasks.json")[0].notes)
    monkeypatch.setattr(labelstudio, "UPLOAD_LIMIT_BYTES", 2**20)
    report, out = run.export("labelstudio", "large.json")
    size = out.stat().st_size
    setting = f"DATA_UPLOAD_MAX_MEMORY_SIZE={size + 2**20}"
    assert report.notes[-1] == f"Label Studio will refuse the tasks ({size:,} bytes) unless it starts with {setting}"


def test_without_a_folder_the_pictures_are_not_found(run: Run) -> None:
    run.write([record("empty.png", "detect", "car", objects=[])])
    run.root.rename(run.root.with_name("moved"))
    report, out = run.export("labelstudio", "tasks.json")
    assert "not find the pictures" in report.notes[-1]
    assert read(out)[0]["data"]["image"] == "/data/local-files/?d=empty.png"


def test_keypoint_labels_have_their_place(run: Run) -> None:
    run.write([record("empty.png", "point", label, points=[]) for label in ("nose", "eye")])
    _, out = run.export("labelstudio", "tasks.json")
    places = {label.get("value"): label.get("model_index") for label in ET.parse(out.with_suffix(".xml")).iter("Label")}
    assert places == {"nose": "0", "eye": "1"}


@pytest.mark.parametrize("tasks", [["detect"], ["segment"], ["detect", "segment"]])
def test_labels_are_numbered_in_our_order_once(run: Run, tasks: list[str]) -> None:
    """What stands in two controls would stand twice among the categories of its COCO export."""
    results = {"detect": {"objects": []}, "segment": {"segments": []}}
    run.write([record("empty.png", task, label, **results[task]) for task in tasks for label in ("zebra", "ant")])
    _, out = run.export("labelstudio", "tasks.json")
    labels = [(one.get("value"), one.get("category")) for one in ET.parse(out.with_suffix(".xml")).iter("Label")]
    assert labels[:2] == [("zebra", "0"), ("ant", "1")]
    assert [number for _, number in labels[2:]] == [None] * 2 * (len(tasks) - 1)


def test_what_its_coco_export_loses_is_told_where_there_are_points(run: Run) -> None:
    run.write([record("empty.png", "detect", label, objects=[]) for label in ("car", "dog")])
    assert "COCO" not in "".join(run.export("labelstudio", "boxes.json")[0].notes)
    run.write([
        *(record("empty.png", "detect", label, objects=[]) for label in ("car", "dog")),
        *(record("empty.png", "point", label, points=[]) for label in ("nose", "dog")),
    ])  # fmt: skip
    (note,) = (note for note in run.export("labelstudio", "all.json")[0].notes if "COCO" in note)
    assert note == (
        "Label Studio's COCO export keeps one point of a label in a picture and calls boxes and masks of labels that "
        'points have, too, "default" (dog); its JSON export keeps all'
    )


VALIDATE = """
import json, sys
from label_studio_sdk.label_interface import LabelInterface
interface = LabelInterface(open(sys.argv[2], encoding="utf-8").read())
tasks = json.load(open(sys.argv[1], encoding="utf-8"))
errors = [error for task in tasks for prediction in task["predictions"]
          for error in interface.validate_prediction(prediction, return_errors=True)]
errors += [task["data"] for task in tasks if not interface.validate_task({"data": task["data"]})]
first = next(r for t in tasks for r in t["predictions"][0]["result"] if r["type"] == "rectanglelabels")
first["value"]["rectanglelabels"] = ["unheard of"]
refused = any(interface.validate_prediction(p, return_errors=True) for t in tasks for p in t["predictions"])
print(json.dumps({"errors": errors, "refused": refused, "count": len(tasks)}))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_sdk_finds_nothing_wrong(mixed_run: Run) -> None:
    """Its server's environment has it."""
    _, out = mixed_run.export("labelstudio", "tasks.json")
    answer = programs.program("label_studio").run(VALIDATE, out, out.with_suffix(".xml"))
    assert answer == {"errors": [], "refused": True, "count": len(NAMES)}
