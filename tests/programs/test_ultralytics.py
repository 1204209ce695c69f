"""Ultralytics trains one real epoch on `yolo`: no picture is corrupt to it, it finds every label, originals stay.

The pictures have the names and the bytes that data sets break on. What Ultralytics has made of them is read from its
own scan (`labels.cache`), and compared with the records box by box.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import pytest
from finished_runs import Run, run
from training_sets import (
    LABELS,
    NAMES,
    boxes_in_pixels,
    digest_of,
    export,
    make_run,
    names_of_pictures,
    size_of,
    worst_edges,
)

__all__ = ["run"]
pytestmark = programs.MARKS
VERSIONS = ("ultralytics", "ultralytics_8_3")
EXAMPLES = Path(programs.__file__).parents[2] / "examples"
OFFLINE = {"YOLO_OFFLINE": "true", "OMP_NUM_THREADS": "1"}
OPTIONS = (
    (),
    ("--link",),
    ("--split", "train=0.6,val=0.4"),
    ("--flat", "--link", "--split", "train=0.5,val=0.3,test=0.2", "--split-by", "folder"),
)


@pytest.fixture(params=["detect", "segment"])
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


TRAIN = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from yolo_command import lend_nms
lend_nms()
from ultralytics import YOLO
from ultralytics.data.utils import check_det_dataset, img2label_paths, load_dataset_cache_file

data, task, runs = sys.argv[2:]
model = YOLO({"detect": "yolo11n.yaml", "segment": "yolo11n-seg.yaml"}[task])
words = dict(data=data, imgsz=64, batch=8, workers=0, device="cpu", plots=False, project=runs, exist_ok=True)
model.train(**words, epochs=1, amp=False)
trained = model.trainer.metrics["metrics/mAP50(B)"]
if "test" in check_det_dataset(data):
    model.val(**words, split="test")
sets = {}
for name in ("train", "val", "test"):
    folder = check_det_dataset(data).get(name)
    if folder is None:
        continue
    folder = Path(folder)
    cache_path = next(path for path in Path(data).parent.rglob("*.cache")
                      if Path(img2label_paths([str(folder / "x.jpg")])[0]).parent == path.with_suffix(""))
    cache = load_dataset_cache_file(cache_path)
    found, missing, empty, corrupt, total = cache["results"]
    pictures = []
    for one in cache["labels"]:
        path = Path(one["im_file"])
        boxes = [[int(c), *map(float, box)] for c, box in zip(one["cls"].flatten().tolist(), one["bboxes"].tolist())]
        pictures.append({"file": path.relative_to(Path(data).parent.resolve()).as_posix(),
                         "shape": list(one["shape"]), "boxes": boxes, "num_polygons": len(one["segments"]),
                         "has_label": Path(img2label_paths([str(path)])[0]).is_file()})
    sets[name] = {"folder": str(folder), "missing": missing, "empty": empty, "corrupt": corrupt, "total": total,
                  "messages": cache["msgs"], "pictures": pictures}
names = model.names if isinstance(model.names, dict) else dict(enumerate(model.names))
print(json.dumps({"sets": sets, "names": list(names.values()), "map": trained}))
"""


def train(version: str, out: Path, task: str) -> dict[str, Any]:
    """Train one epoch on `out`; what Ultralytics has found there, for each of its sets."""
    program = programs.program(version, "--no-deps")
    support = Path(programs.__file__).parent
    runs = out.with_name("epochs")
    told: dict[str, Any] = program.run(TRAIN, support, out / "data.yaml", task, runs, environment=OFFLINE)
    return told


def check_pictures(names: dict[str, str], task: str, told: dict[str, Any], labels: tuple[str, ...] = LABELS) -> None:
    """Each picture is there once, upright and not corrupt, with its label and its boxes, whatever its file is called.

    `names` are the pictures' own names by their places in the set.
    """
    shown = {}
    sets = told["sets"]
    for one in sets.values():
        assert (one["corrupt"], one["missing"]) == (0, 0), one["messages"]
        assert one["total"] > 0
    if sets["train"]["folder"] == sets["val"]["folder"]:
        sets = {"train": sets["train"]}
    assert sum(one["total"] for one in sets.values()) == len(NAMES)
    assert sum(one["empty"] for one in sets.values()) == 2
    for picture in [picture for one in sets.values() for picture in one["pictures"]]:
        name = names[picture["file"]]
        width, height = size_of(name)
        assert picture["has_label"], name
        assert picture["shape"] == [height, width], name
        assert not picture["boxes"] or picture["num_polygons"] == (len(picture["boxes"]) if task == "segment" else 0)
        shown[name] = [
            (labels[number], (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            for number, x, y, w, h in picture["boxes"]
        ]
    assert max(worst_edges(shown, NAMES)) < 0.001


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_one_epoch_and_the_export_again(run: Run, task: str, version: str, options: tuple[str, ...]) -> None:
    """And one more over the data set that was made again, beside the caches that Ultralytics has left there."""
    make_run(run, task)
    before = {name: digest_of(run.root / name) for name in NAMES}
    out = export(run, "yolo", "set", *options)
    for _ in range(2):
        names = names_of_pictures(run, out)
        told = train(version, out, task)
        assert told["names"] == list(LABELS)
        check_pictures(names, task, told)
        assert {name: digest_of(run.root / name) for name in NAMES} == before
        assert list(out.rglob("*.cache"))
        export(run, "yolo", "set", *options, "--overwrite")
    assert 0 <= told["map"] <= 1


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("options", [(), ("--split", "train=0.6,val=0.4")], ids=" ".join)
def test_an_old_cache_is_not_believed(run: Run, version: str, options: tuple[str, ...]) -> None:
    """The classes change places: all files keep their sizes, which is what 8.3 looks at."""
    make_run(run, "detect")
    out = export(run, "yolo", "set", *options)
    train(version, out, "detect")
    turned = LABELS[::-1]
    (run.folder / "labels.txt").write_text("\n".join(turned), encoding="utf-8")
    export(run, "yolo", "set", *options, "--overwrite", "--labels", str(run.folder / "labels.txt"))
    names = names_of_pictures(run, out)
    told = train(version, out, "detect")
    assert told["names"] == list(turned)
    check_pictures(names, "detect", told, turned)


CLASSIFY = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from yolo_command import lend_nms
lend_nms()
from ultralytics import YOLO

model = YOLO("yolo11n-cls.yaml")
model.train(data=sys.argv[2], epochs=1, imgsz=64, batch=16, workers=0, device="cpu", amp=False, plots=False,
            project=sys.argv[3], exist_ok=True)
pictures = [Path(path) for loader in (model.trainer.train_loader, model.trainer.test_loader)
            for path, *_ in loader.dataset.samples]
print(json.dumps(sorted(f"{path.parent.name}/{path.name}" for path in pictures)))
"""


def test_crops_are_classified(run: Run) -> None:
    """`yolo classify` parts them into sets of its own, and finds each one under its label."""
    make_run(run, "detect")
    out = export(run, "crops", "crops")
    program = programs.program("ultralytics", "--no-deps")
    support = Path(programs.__file__).parent
    found = program.run(CLASSIFY, support, out, run.folder / "epochs", environment=OFFLINE)
    with open(out / "crops.csv", encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == sum(len(boxes_in_pixels(name)) for name in NAMES)
    sides = {row["file"]: [int(row[f"{side}_max"]) - int(row[f"{side}_min"]) for side in "xy"] for row in listed}
    assert found == sorted(file for file in sides if min(sides[file]) > 9)  # smaller ones are "corrupt" to it


def test_folder_to_yolo_training(tmp_path: Path) -> None:
    """The example as it stands, with the tiny model: it ends in a mAP, and goes on where it was stopped."""
    program = programs.program("ultralytics", "--no-deps")
    commands = {
        "md3": f'"{sys.executable}" -m md3cli',
        "python": f'"{program.python}"',
        "yolo": f'"{program.python}" "{Path(programs.__file__).with_name("yolo_command.py")}"',
    }
    for name, command in commands.items():
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (tmp_path / name).chmod(0o755)
    variables = program.environment | OFFLINE
    variables["PATH"] = f"{tmp_path}{os.pathsep}{variables['PATH']}"
    for _ in range(2):
        words = ["bash", EXAMPLES / "folder_to_yolo_training.sh", EXAMPLES / "scenes", "out"]
        done = subprocess.run(words, env=variables, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        assert re.fullmatch(r"mAP50 [01]\.\d{3}, mAP50-95 [01]\.\d{3}", done.stdout.splitlines()[-1])
        assert "0 corrupt" in done.stdout + done.stderr
    assert (tmp_path / "out/detector/weights/best.pt").is_file()
    labels = [path.read_text() for path in (tmp_path / "out/dataset/labels").rglob("*.txt")]
    assert len(labels) == len(list((EXAMPLES / "scenes").glob("*.png")))
    assert {line.split()[0] for text in labels for line in text.splitlines()} == {"0", "1", "2"}
