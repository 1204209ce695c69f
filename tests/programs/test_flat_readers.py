"""Readers that skip sub-folders find every picture and box of `--flat`: supervision, labelformat, globox, datumaro.

Within a pixel, also where a reader takes VOC's pixels, which count from 1, as if they counted from 0: labelformat,
globox and datumaro do. Two do not know EXIF's orientation, so a flat set has such pictures upright.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import programs
import pytest
from finished_runs import Run, run
from training_sets import LABELS, NAMES, export, make_run, names_of_pictures, worst_edges

__all__ = ["run"]
pytestmark = programs.MARKS
HEAD = """
import json, sys
from pathlib import Path
out, format, labels, sets = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","), sys.argv[4].split(",")
"""
SUPERVISION = """
import supervision
load = supervision.DetectionDataset
read = {
    "yolo": lambda name: load.from_yolo(str(out / "images" / name), str(out / "labels" / name), str(out / "data.yaml")),
    "voc": lambda name: load.from_pascal_voc(str(out / "JPEGImages"), str(out / "Annotations")),
    "coco": lambda name: load.from_coco(str(out / name), str(out / name / "_annotations.coco.json")),
}[format]
print(json.dumps([[Path(path).name, [[data.classes[int(number)], *map(float, box)]
                                     for number, box in zip(boxes.class_id, boxes.xyxy)]]
                  for data in map(read, sets) for path, _, boxes in data]))
"""
LABELFORMAT = """
from labelformat import formats
read = {
    "yolo": lambda name: formats.YOLOv8ObjectDetectionInput(out / "data.yaml", name or "train"),
    "voc": lambda name: formats.PascalVOCObjectDetectionInput(out / "Annotations", ",".join(labels)),
    "coco": lambda name: formats.COCOObjectDetectionInput(out / name / "_annotations.coco.json"),
}[format]
print(json.dumps([[one.image.filename, [[it.category.name, it.box.xmin, it.box.ymin, it.box.xmax, it.box.ymax]
                                        for it in one.objects]] for name in sets for one in read(name).get_labels()]))
"""
GLOBOX = """
from globox import AnnotationSet
read = {
    "yolo": lambda name: AnnotationSet.from_yolo_v5(
        out / "labels" / name, image_folder=out / "images" / name, image_extension=".jpg"),
    "voc": lambda name: AnnotationSet.from_pascal_voc(out / "Annotations"),
    "coco": lambda name: AnnotationSet.from_coco(out / name / "_annotations.coco.json"),
}[format]
print(json.dumps([[one.image_id, [[labels[int(it.label)] if format == "yolo" else it.label,
                                   it.xmin, it.ymin, it.xmax, it.ymax] for it in one.boxes]]
                  for name in sets for one in read(name)]))
"""
DATUMARO = """
from datumaro import AnnotationType, Dataset
data = Dataset.import_from(str(out), {"yolo": "yolo", "voc": "voc_detection", "coco": "roboflow_coco"}[format])
names = data.categories()[AnnotationType.label]
print(json.dumps([[Path(one.media.path).name, [[names[it.label].name, *map(float, it.points)]
                                               for it in one.annotations if it.type == AnnotationType.bbox]]
                  for one in data]))
"""
READERS = {"supervision": SUPERVISION, "labelformat": LABELFORMAT, "globox": GLOBOX, "datumaro": DATUMARO}


def read(reader: str, format: str, out: Path, sets: list[str]) -> list[tuple[str, list[list[Any]]]]:
    """What a reader shows of a data set: each picture's name there, and label and edges of each box."""
    program = programs.program("flat_readers")
    found: list[tuple[str, list[list[Any]]]] = program.run(
        HEAD + READERS[reader], out, format, ",".join(LABELS), ",".join(sets)
    )
    return found


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("format", ["yolo", "voc", "coco"])
@pytest.mark.parametrize("split", [(), ("--split", "train=0.6,val=0.4")], ids=" ".join)
def test_every_picture_and_box(run: Run, reader: str, format: str, split: tuple[str, ...]) -> None:
    # globox takes one suffix for all pictures of a YOLO set: those that have it are all there is
    is_one_suffix = (reader, format) == ("globox", "yolo")
    names = [name for name in NAMES if not is_one_suffix or name.endswith(".jpg")]
    make_run(run, "detect", names)
    out = export(run, format, "set", "--flat", *(["--roboflow"] if format == "coco" else []), *split)
    sets = [""] if not split or format == "voc" else ["train", "valid" if format == "coco" else "val"]
    own = {Path(path).name: name for path, name in names_of_pictures(run, out).items()}
    found = read(reader, format, out, sets)
    shown = {own[file]: boxes for file, boxes in found}
    assert len(shown) == len(found)
    left, top, right, bottom = worst_edges(shown, names)
    assert max(left, top, right, bottom) <= (1 if format == "voc" else 0.01)  # VOC has whole pixels
