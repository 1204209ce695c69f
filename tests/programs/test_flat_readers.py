"""Readers that skip sub-folders find every picture and box of `--flat`: supervision, labelformat, globox, datumaro.

Within a pixel, also where a reader takes VOC's pixels, which count from 1, as if they counted from 0: labelformat,
globox and datumaro do. Two do not know EXIF's orientation, and multiply YOLO's shares by the sides that a picture has
before it is turned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import programs
import pytest
from finished_runs import Run, run
from training_sets import LABELS, NAMES, SIDES, export, make_run, names_of_pictures, worst_edges

__all__ = ["run"]
pytestmark = programs.MARKS
HEAD = """
import json, sys
from pathlib import Path
out = Path(sys.argv[1])
"""
SUPERVISION = """
import supervision
load = supervision.DetectionDataset
data = {
    "yolo": lambda: load.from_yolo(str(out / "images"), str(out / "labels"), str(out / "data.yaml")),
    "voc": lambda: load.from_pascal_voc(str(out / "JPEGImages"), str(out / "Annotations")),
    "coco": lambda: load.from_coco(str(out), str(out / "_annotations.coco.json")),
}[sys.argv[2]]()
found = {Path(path).name: [[data.classes[int(number)], *map(float, box)]
                           for number, box in zip(boxes.class_id, boxes.xyxy)] for path, _, boxes in data}
print(json.dumps(found))
"""
LABELFORMAT = """
from labelformat import formats
data = {
    "yolo": lambda: formats.YOLOv8ObjectDetectionInput(out / "data.yaml", "train"),
    "voc": lambda: formats.PascalVOCObjectDetectionInput(out / "Annotations", sys.argv[3]),
    "coco": lambda: formats.COCOObjectDetectionInput(out / "_annotations.coco.json"),
}[sys.argv[2]]()
print(json.dumps({one.image.filename: [[it.category.name, it.box.xmin, it.box.ymin, it.box.xmax, it.box.ymax]
                                       for it in one.objects] for one in data.get_labels()}))
"""
GLOBOX = """
from globox import AnnotationSet
data = {
    "yolo": lambda: AnnotationSet.from_yolo_v5(out / "labels", image_folder=out / "images", image_extension=".jpg"),
    "voc": lambda: AnnotationSet.from_pascal_voc(out / "Annotations"),
    "coco": lambda: AnnotationSet.from_coco(out / "_annotations.coco.json"),
}[sys.argv[2]]()
names = sys.argv[3].split(",")
print(json.dumps({one.image_id: [[names[int(it.label)] if sys.argv[2] == "yolo" else it.label,
                                  it.xmin, it.ymin, it.xmax, it.ymax] for it in one.boxes] for one in data}))
"""
DATUMARO = """
from datumaro import AnnotationType, Dataset
format = {"yolo": "yolo", "voc": "voc_detection", "coco": "roboflow_coco"}[sys.argv[2]]
data = Dataset.import_from(str(out), format)
names = data.categories()[AnnotationType.label]
print(json.dumps({Path(one.media.path).name: [[names[it.label].name, *map(float, it.points)] for it in one.annotations
                                              if it.type == AnnotationType.bbox] for one in data}))
"""
READERS = {"supervision": SUPERVISION, "labelformat": LABELFORMAT, "globox": GLOBOX, "datumaro": DATUMARO}
NOT_TURNING = {"labelformat", "globox"}


def read(reader: str, format: str, out: Path) -> dict[str, Any]:
    """What a reader shows of a data set: label and edges of each box, by the picture's name there."""
    program = programs.program("flat_readers")
    found: dict[str, Any] = program.run(HEAD + READERS[reader], out, format, ",".join(LABELS))
    return found


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("format", ["yolo", "voc", "coco"])
def test_every_picture_and_box(run: Run, reader: str, format: str) -> None:
    # globox takes one suffix for all pictures of a YOLO set: those that have it are all there is
    is_one_suffix = (reader, format) == ("globox", "yolo")
    names = [name for name in NAMES if not is_one_suffix or name.endswith(".jpg")]
    make_run(run, "detect", names)
    out = export(run, format, "set", "--flat", *(["--roboflow"] if format == "coco" else []))
    own = {Path(path).name: name for path, name in names_of_pictures(run, out).items()}
    shown = {own[file]: boxes for file, boxes in read(reader, format, out).items()}
    if format == "yolo" and reader in NOT_TURNING:
        shown = {name: turned(boxes) if "turned" in name else boxes for name, boxes in shown.items()}
    left, top, right, bottom = worst_edges(shown, names)
    assert max(left, top, right, bottom) <= (1 if format == "voc" else 0.01)  # VOC has whole pixels


def turned(boxes: list[list[Any]]) -> list[list[Any]]:
    """Boxes that were measured with a picture's sides exchanged."""
    across, down = SIDES[1] / SIDES[0], SIDES[0] / SIDES[1]
    return [[label, a * across, b * down, c * across, d * down] for label, a, b, c, d in boxes]
