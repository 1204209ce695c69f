"""FiftyOne opens our COCO, YOLO and VOC folders: every picture, every box where the records have it; and crops."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import programs
import pytest
from finished_runs import (
    COLOUR,
    HEIGHT,
    HOSTILE,
    NAME,
    NAMES,
    WIDTH,
    Record,
    Run,
    about,
    draw_pictures,
    failure,
    family,
    record,
)
from PIL import Image

from md3cli.exporters import ExportOptions, export_records
from md3cli.exporters.splits import Splits
from md3cli.finished.run_json import seal_of

pytestmark = programs.MARKS

TURNED = "turned.jpg"
# No backslash: in COCO, FiftyOne takes it for a slash.
PICTURES = (*NAMES, TURNED, "hash # 50% off.png", " lead/trail .png")
LABELS = ("zebra", 'a "car" <b>é')  # not in the order of the alphabet
POINT = {"label": "nose", "x": 1 / 3, "y": 0.9, "score": 0.5}
RING = {"label": "ring", "svg_path": "M 0 0 L 1 0 L 1 1 Z", "score": 0.7}
# What is loaded from folders, as JSON: for each a list of (digest of the picture, objects by field).
LOAD = """
import hashlib, json, sys
from pathlib import Path
import fiftyone as fo

def shown(thing):
    mask = None if getattr(thing, "mask", None) is None else int(thing.mask.sum())
    numbers = thing.points[0] if isinstance(thing, fo.Keypoint) else thing.bounding_box
    return [thing.label, [float(number) for number in numbers], mask]

def objects(sample):
    for name in sample.field_names:
        for kind in ("detections", "keypoints"):
            found = getattr(sample[name], kind, None) if isinstance(sample[name], fo.Label) else None
            if found:
                yield name, [shown(thing) for thing in found]

loaded = []
for kind, options in json.loads(sys.argv[1]):
    dataset = fo.Dataset.from_dir(dataset_type=getattr(fo.types, kind), **options)
    digests = {sample.id: hashlib.sha256(Path(sample.filepath).read_bytes()).hexdigest() for sample in dataset}
    loaded.append([[digests[sample.id], dict(objects(sample))] for sample in dataset])
print(json.dumps(loaded))
"""

Found = tuple[str, list[float]]


@pytest.fixture(scope="module")
def fiftyone() -> programs.Program:
    return programs.program("fiftyone")


@pytest.fixture(scope="module")
def database(fiftyone: programs.Program) -> Iterator[dict[str, str]]:
    """Settings of a FiftyOne without telemetry, whose database runs until the last test.

    FiftyOne would start one for each script, and gives up after a minute: too soon on a busy machine.
    """
    quiet = {"FIFTYONE_DO_NOT_TRACK": "true", "FIFTYONE_DATABASE_VALIDATION": "false"}
    with tempfile.TemporaryDirectory(prefix="md3-fiftyone-", ignore_cleanup_errors=True) as folder:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        (command,) = fiftyone.folder.rglob("fiftyone/db/bin/mongod*")
        log = Path(folder, "log")
        words = [command, "--dbpath", folder, "--bind_ip", "127.0.0.1", "--port", str(port), "--nounixsocket"]
        with log.open("wb") as said, subprocess.Popen(words, stdout=said, stderr=said) as server:
            try:
                while not is_listening(port):
                    if server.poll() is not None:
                        pytest.skip(f"FiftyOne's MongoDB does not start here: {log.read_text()[-300:]}")
                    time.sleep(0.1)
                uri = f"mongodb://127.0.0.1:{port}"
                yield {"FIFTYONE_DATABASE_URI": uri, "FIFTYONE_SHOW_PROGRESS_BARS": "false", **quiet}
            finally:
                server.terminate()


def is_listening(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def boxes_of(name: str, label: str) -> list[tuple[float, float, float, float]]:
    """Return what is on a picture: corners in 0-1; some leave the picture."""
    draws = random.Random(name + label)
    starts = [(draws.uniform(-0.1, 0.6), draws.uniform(-0.1, 0.6)) for _ in range(0 if name == "empty.png" else 3)]
    return [(x, y, x + draws.uniform(0.1, 0.6), y + draws.uniform(0.1, 0.6)) for x, y in starts]


def records_of(name: str) -> Iterator[Record]:
    for label in LABELS:
        edges = [dict(zip(("x_min", "y_min", "x_max", "y_max"), box, strict=True)) for box in boxes_of(name, label)]
        yield record(name, "detect", label, objects=[{"label": label, **one, "score": 0.9} for one in edges])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with boxes, exported in all layouts; one with masks and points too."""
    folder = tmp_path_factory.mktemp("exported")
    run = Run(folder / "run", folder / "pictures é #")
    draw_pictures(run.root, PICTURES)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn to the right
    Image.new("RGB", (HEIGHT, WIDTH), (1, 2, 3)).save(run.root / TURNED, exif=turned)
    boxes = [line for name in PICTURES for line in records_of(name)]
    run.write([failure("broken.jpg", "detect", LABELS[0]), *boxes, failure(PICTURES[0], "detect", "tail")])
    run.export("coco", "coco.json", root=run.root)
    for format in ("yolo", "voc"):
        run.export(format, format, root=run.root)
        run.export(format, f"{format} flat", root=run.root, is_flat=True)
    for format in ("yolo", "coco"):
        run.export(format, f"{format} sets", root=run.root, splits=Splits((("train", 0.5), ("val", 0.5))))
    run.export("crops", "crops", root=run.root)
    bbox = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.9, "y_max": 0.7}
    mixed = [record("empty.png", "segment", "ring", segments=[{**RING, "bbox": bbox}])]
    run.write([*mixed, record("empty.png", "point", "nose", points=[POINT])])
    run.export("coco", "mixed.json", root=run.root, keypoints=True)
    return run


@pytest.fixture(scope="module")
def loaded(fiftyone: programs.Program, database: dict[str, str], exported: Run) -> dict[str, Any]:
    """What FiftyOne made of each folder."""
    folder, root = exported.folder, str(exported.root)
    wanted: dict[str, tuple[str, dict[str, Any]]] = {}
    boxes, all_kinds = ["detections"], ["detections", "segmentations", "keypoints"]
    for layout, file, kinds in (
        ("coco", "coco.json", boxes),
        ("coco train", "coco sets/instances_train.json", boxes),
        ("coco val", "coco sets/instances_val.json", boxes),
        ("mixed", "mixed.json", all_kinds),
    ):
        places = {"data_path": root, "labels_path": str(folder / file)}
        wanted[layout] = "COCODetectionDataset", {**places, "label_types": kinds}
    for name in ("train", "val"):
        wanted[f"yolo {name}"] = "YOLOv5Dataset", {"yaml_path": str(folder / "yolo sets/data.yaml"), "split": name}
    for layout in ("yolo", "yolo flat"):
        wanted[layout] = ("YOLOv5Dataset", {"yaml_path": str(folder / layout / "data.yaml"), "split": "train"})
    for layout in ("voc", "voc flat"):
        places = {"data_path": str(folder / layout / "JPEGImages"), "labels_path": str(folder / layout / "Annotations")}
        wanted[layout] = ("VOCDetectionDataset", places)
    answers = fiftyone.run(LOAD, json.dumps(list(wanted.values())), environment=database)
    return dict(zip(wanted, answers, strict=True))


def found_in(samples: list[tuple[str, dict[str, Any]]], exported: Run) -> dict[str, list[Found]]:
    """Return the boxes of each picture: label, and left, top, right, bottom in pixels; told by the pictures' bytes."""
    names = {hashlib.sha256((exported.root / name).read_bytes()).hexdigest(): name for name in PICTURES}
    assert len(names) == len(PICTURES) == len(samples)
    return {
        names.get(digest, TURNED): [  # a flat set has it upright, with bytes of its own
            (label, [x * WIDTH, y * HEIGHT, (x + width) * WIDTH, (y + height) * HEIGHT])
            for one in fields.values()
            for label, (x, y, width, height), _ in one
        ]
        for digest, fields in samples
    }


def expected(name: str) -> list[Found]:
    edges = [(label, [min(max(edge, 0.0), 1.0) for edge in box]) for label in LABELS for box in boxes_of(name, label)]
    sizes = (WIDTH, HEIGHT) * 2
    return [(label, [edge * side for edge, side in zip(box, sizes, strict=True)]) for label, box in edges]


def largest_difference(found: dict[str, list[Found]]) -> float:
    """Return by how many pixels the boxes of all pictures differ from the records'."""
    assert sorted(found) == sorted(PICTURES)
    differences = [0.0]
    for name, boxes in found.items():
        assert [label for label, _ in boxes] == [label for label, _ in expected(name)], name
        pairs = zip(boxes, expected(name), strict=True)
        differences += [abs(a - b) for one, other in pairs for a, b in zip(one[1], other[1], strict=True)]
    return max(differences)


@pytest.mark.parametrize(
    ("layout", "limit"),
    [("coco", 0.001), ("yolo", 0.001), ("yolo flat", 0.001), ("voc", 1.00001), ("voc flat", 1.00001)],
)
def test_every_picture_and_every_box(loaded: dict[str, Any], exported: Run, layout: str, limit: float) -> None:
    assert largest_difference(found_in(loaded[layout], exported)) <= limit


@pytest.mark.parametrize("format", ["coco", "yolo"])
def test_two_sets_are_all_pictures(loaded: dict[str, Any], exported: Run, format: str) -> None:
    train, val = loaded[f"{format} train"], loaded[f"{format} val"]
    assert train
    assert val
    assert largest_difference(found_in([*train, *val], exported)) <= 0.001


def test_masks_and_keypoints(loaded: dict[str, Any]) -> None:
    """The mask is half its box, the point is where the record has it; as a box a point has no size."""
    ((_, fields),) = loaded["mixed"]
    ring, no_size = ["ring", [0.1, 0.2, 0.8, 0.5]], ["nose", [pytest.approx(POINT["x"]), POINT["y"], 0, 0]]
    assert fields["detections"] == [[*ring, None], [*no_size, None]]
    assert fields["segmentations"] == [[*ring, 0.8 * WIDTH * 0.5 * HEIGHT / 2], [*no_size, 0]]
    assert fields["keypoints"] == [["nose", no_size[1][:2], None]]


# What FiftyOne has of the boxes of a document, with their attributes or without.
SAID = """
import json, sys
import fiftyone as fo

places = {"data_path": sys.argv[1], "labels_path": sys.argv[2], "label_types": "detections"}
options = {"dataset_type": fo.types.COCODetectionDataset, **places}
(sample,) = fo.Dataset.from_dir(**options, extra_attrs=sys.argv[3] == "True")
(field,) = (name for name in sample.field_names if isinstance(sample[name], fo.Detections))
ours = ("What colour is the car?", "caption short", "Is it round?")
print(json.dumps([[one.label, {name: one[name] for name in ours if one.has_field(name)}]
                  for one in sample[field].detections]))
"""


CLASSES = """
import json, sys
import fiftyone as fo

dataset = fo.Dataset.from_dir(dataset_type=fo.types.ImageClassificationDirectoryTree, dataset_dir=sys.argv[1])
dataset.compute_metadata()
sizes = [[one.width, one.height] for one in dataset.values("metadata")]
print(json.dumps(list(zip(dataset.values("filepath"), dataset.values("ground_truth.label"), sizes))))
"""


def test_what_is_said_of_an_object_is_with_its_box(
    fiftyone: programs.Program, database: dict[str, str], tmp_path: Path
) -> None:
    """Questions with a dot or a dollar at the head stop it, and the export says what opens them."""
    run = Run(tmp_path / "run", tmp_path / "pictures")
    draw_pictures(run.root, [NAME])
    run.write(family())
    report, path = run.export("coco", "coco.json", root=run.root)
    assert not any("FiftyOne" in note for note in report.notes)
    small = {COLOUR: "red", "caption short": "A small car."}
    found = [["car", small], ["car", {COLOUR: HOSTILE}], ["wheel", {}], ["ring", {"Is it round?": "Yes"}]]
    assert fiftyone.run(SAID, run.root, path, True, environment=database) == found
    for number, question in enumerate(("Look. Is it new?", "$ or €?")):
        run.write([*family(), about(family()[0], 0, question, answer="Yes")])
        report, path = run.export("coco", f"{number}.json", root=run.root)
        assert any("extra_attrs=False only" in note and question in note for note in report.notes)
        bare = [[label, {}] for label, _ in found]
        assert fiftyone.run(SAID, run.root, path, False, environment=database) == bare
        with pytest.raises(AssertionError, match="cannot contain dots"):
            fiftyone.run(SAID, run.root, path, True, environment=database)


def test_every_crop_is_in_its_class(fiftyone: programs.Program, database: dict[str, str], exported: Run) -> None:
    out = exported.folder / "crops"
    found = fiftyone.run(CLASSES, out, environment=database)
    with open(out / "crops.csv", encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == sum(len(boxes_of(name, label)) for name in PICTURES for label in LABELS)
    folders = {row["label"]: row["file"].partition("/")[0] for row in listed}
    assert sorted(folders) == sorted(LABELS)
    sizes = {
        row["file"]: [folders[row["label"]], [int(row[f"{side}_max"]) - int(row[f"{side}_min"]) for side in "xy"]]
        for row in listed
    }
    shown = {Path(path).relative_to(out.resolve()).as_posix(): rest for path, *rest in found}
    assert (len(found), shown) == (len(listed), sizes)


# ---- the example --------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parents[2] / "examples/fiftyone_review.py"
TAG = """
import json, sys
import fiftyone as fo

dataset = fo.load_dataset(sys.argv[1])
first, second = (dataset.one(fo.ViewField("image") == name) for name in sys.argv[2:])
first.tags.append("wrong")
first.save()
second.predictions.detections[0].tags.append("wrong")
second.save()
found = {sample.image: [sample.eval_tp, sample.eval_fp, sample.eval_fn] for sample in dataset}
print(json.dumps([found, dataset.values("captions"), dataset.values("points.keypoints.label")]))
"""


def test_the_example_keeps_the_records_of_tagged_pictures(
    fiftyone: programs.Program, database: dict[str, str], tmp_path: Path
) -> None:
    """The least sure comes first; another start goes on with the same data set; what is kept can be exported."""
    run = Run(tmp_path / "my run", tmp_path / "pictures")
    names = ["a/photo.jpg", "photo.jpg", "übung/日本語 ☃ [1].png"]
    draw_pictures(run.root, names)
    box = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6}
    run.write([
        *(
            record(name, "detect", "car", objects=[{"label": "car", **box, "score": score}])
            for name, score in zip(names, (0.9, 0.5, 0.7), strict=True)
        ),
        record(names[2], "caption", length="short", caption="a car"),
        record(names[2], "point", "nose", points=[POINT | {"score": 0.2}]),
        failure(names[1], "detect", "dog"),
        failure("broken.jpg", "detect", "car"),
        record("../outside.png", "detect", "car", objects=[]),
    ])  # fmt: skip
    known = {"schema": "md3-run/1", "root": str(run.root), "seal": seal_of(str(run.root))}
    (run.folder / "run.json").write_text(json.dumps(known))
    (tmp_path / "outside.png").write_bytes((run.root / names[0]).read_bytes())
    truth = truth_of(tmp_path / "truth.json", names[:2], [0.1 * WIDTH, 0.2 * HEIGHT, 0.4 * WIDTH, 0.4 * HEIGHT])

    said = example(fiftyone, tmp_path, run.folder, "--no-app", "--gt", truth, **database)
    assert said[0] == "3 pictures, 1 are not there"
    assert said[-3:] == [f"0.200  {names[2]}", f"0.500  {names[1]}", f"0.900  {names[0]}"]
    counts, captions, labels = fiftyone.run(TAG, run.folder.name, *names[1:], environment=database)
    assert counts == {names[0]: [1, 0, 0], names[1]: [1, 0, 0], names[2]: [0, 1, 0]}
    assert (captions, labels) == ([[], [], ["a car"]], [[], [], ["nose"]])

    out = tmp_path / "wrong.jsonl"
    said = example(fiftyone, tmp_path, run.folder, "--no-app", "-o", out, **database)
    assert said[0] == "going on with the data set my run"
    assert said[-1] == "2 pictures are tagged wrong"
    lines, kept = ([json.loads(line) for line in path.read_text().splitlines()] for path in (run.records, out))
    assert kept == [line for line in lines if line["image"] in names[1:]]
    report = export_records(out, "overlay", tmp_path / "drawn", ExportOptions())
    assert (report.num_images, report.num_failures) == (2, 1)
    with pytest.raises(AssertionError, match="data set my run of something else"):
        example(fiftyone, tmp_path, out, "--no-app", "--name", "my run", **database)
    assert example(fiftyone, tmp_path, out, "--no-app", **database)[0] == "2 pictures, 0 are not there"


def truth_of(path: Path, names: list[str], bbox: list[float]) -> Path:
    """Write a COCO file with one car on each picture."""
    size = {"width": WIDTH, "height": HEIGHT}
    images = [{"id": number, "file_name": name, **size} for number, name in enumerate(names, 1)]
    boxes = [{"id": image["id"], "image_id": image["id"], "category_id": 1, "bbox": bbox} for image in images]
    path.write_text(json.dumps({"images": images, "categories": [{"id": 1, "name": "car"}], "annotations": boxes}))
    return path


def example(program: programs.Program, folder: Path, *arguments: object, **settings: str) -> list[str]:
    """Run fiftyone_review.py with this md3; return the lines of its stdout."""
    (folder / "md3").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m md3cli "$@"\n')
    (folder / "md3").chmod(0o755)
    variables = program.environment | settings
    variables["PATH"] = f"{folder}:{variables['PATH']}"
    done = subprocess.run([program.python, EXAMPLE, *arguments], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
