"""torchvision's own data sets open `crops`, `coco` and `voc`, and a detector takes one step on what they give.

`CocoDetection` and `VOCDetection` do not turn pictures by their EXIF: of a flat set, which has them upright, every box
is where it belongs. `VOCDetection` adds `.jpg` to each line of a list, so it is shown JPEG files only.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import programs
import pytest
from finished_runs import Run, run
from training_sets import LABELS, NAMES, boxes_in_pixels, export, make_run, names_of_pictures, worst_edges

__all__ = ["run"]
pytestmark = programs.MARKS
JPEGS = tuple(name for name in NAMES if name.endswith(".jpg") and "truth" not in name)  # two hide other kinds
SETS = ("train", "val")

HEAD = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
from yolo_command import lend_nms
lend_nms()
"""

# Each picture of a folder of classes: its file, its class, its size.
CLASSES = """
from torchvision.datasets import ImageFolder

data = ImageFolder(sys.argv[1])
print(json.dumps([[Path(path).relative_to(sys.argv[1]).as_posix(), data.classes[number], data[at][0].size]
                  for at, (path, number) in enumerate(data.samples)]))
"""

# Each picture of COCO documents: its file, its boxes, the pixels of its masks; and the loss of one step.
COCO = """
import torch
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import ssdlite320_mobilenet_v3_large as detector
from torchvision.transforms import v2

change = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
shown, batch = [], []
for folder in map(Path, sys.argv[1:]):
    data = CocoDetection(folder, folder / "_annotations.coco.json", transforms=change)
    names = {one["id"]: one["name"] for one in data.coco.dataset["categories"]}
    for picture, target in wrap_dataset_for_transforms_v2(data, target_keys=("image_id", "boxes", "labels", "masks")):
        boxes = target["boxes"].tolist() if "boxes" in target else []
        file = data.coco.imgs[target["image_id"]]["file_name"]
        assert not boxes or target["boxes"].canvas_size == picture.shape[1:] == target["masks"].shape[1:]
        labels = [names[int(label)] for label in target.get("labels", [])]
        masks = [int(mask.sum()) for mask in target.get("masks", [])]
        shown.append([str(folder / file), [[label, *box] for label, box in zip(labels, boxes)], masks])
        batch += [(picture, target)] if boxes and len(batch) < 2 else []
model = detector(weights=None, weights_backbone=None, num_classes=max(names) + 1)
loss = sum(model(*map(list, zip(*batch))).values())
loss.backward()
assert any(one.grad is not None and one.grad.abs().sum() > 0 for one in model.parameters())
print(json.dumps([shown, float(loss)]))
"""

# Each picture of sets in the layout of the VOC development kit: its file and its boxes.
VOC = """
from torchvision.datasets import VOCDetection

shown = []
for name in sys.argv[2:]:
    data = VOCDetection(sys.argv[1], year="2012", image_set=name)
    for file, (picture, target) in zip(data.images, data):
        size = target["annotation"]["size"]
        assert picture.size == (int(size["width"]), int(size["height"]))
        corners = [[one["name"], *(int(one["bndbox"][edge]) for edge in ("xmin", "ymin", "xmax", "ymax"))]
                   for one in target["annotation"].get("object", [])]
        shown.append([file, [[name, left - 1, top - 1, right, bottom] for name, left, top, right, bottom in corners]])
print(json.dumps(shown))
"""


def load(script: str, *arguments: object) -> Any:
    support = Path(programs.__file__).parent
    return programs.program("torchvision", "--no-deps").run(HEAD + script, support, *arguments)


def named(run: Run, out: Path, shown: list[list[Any]]) -> dict[str, list[Any]]:
    """What is shown of each picture, by the record's name of it."""
    names = names_of_pictures(run, out)
    found = {names[Path(file).relative_to(out).as_posix()]: rest for file, *rest in shown}
    assert len(found) == len(shown)
    return found


def test_every_crop_is_in_its_class(run: Run) -> None:
    make_run(run, "detect")
    out = export(run, "crops", "crops")
    with open(out / "crops.csv", encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == sum(len(boxes_in_pixels(name)) for name in NAMES)
    folders = {row["label"]: row["file"].partition("/")[0] for row in listed}
    assert sorted(folders) == sorted(LABELS)
    sizes = {
        row["file"]: [folders[row["label"]], [int(row[f"{side}_max"]) - int(row[f"{side}_min"]) for side in "xy"]]
        for row in listed
    }
    assert {file: rest for file, *rest in load(CLASSES, out)} == sizes


@pytest.mark.parametrize("task", ["detect", "segment"])
@pytest.mark.parametrize("split", [(), ("--split", "train=0.6,val=0.4")], ids=" ".join)
def test_coco_and_one_step(run: Run, task: str, split: tuple[str, ...]) -> None:
    make_run(run, task)
    out = export(run, "coco", "set", "--roboflow", "--flat", *split)
    shown, loss = load(COCO, *([out / "train", out / "valid"] if split else [out]))
    found = named(run, out, shown)
    assert max(worst_edges({name: boxes for name, (boxes, _) in found.items()}, NAMES)) <= 0.01
    assert 0 < loss < float("inf")
    for boxes, masks in found.values():
        for (_, left, top, right, bottom), pixels in zip(boxes, masks, strict=True):
            width, height = right - left, bottom - top
            assert abs(pixels - width * height) <= width + height + 1  # half a pixel along the border


def test_voc_in_the_layout_of_its_kit(run: Run) -> None:
    make_run(run, "detect", JPEGS)
    out = export(run, "voc", "kit/VOCdevkit/VOC2012", "--flat", "--split", "train=0.6,val=0.4")
    found = named(run, out, load(VOC, run.folder / "kit", *SETS))
    assert max(worst_edges({name: boxes for name, (boxes,) in found.items()}, JPEGS)) <= 1  # VOC has whole pixels
