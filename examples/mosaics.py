"""Large pictures made of scenes, and what `--tile` finds in them: how often, how right, at what price.

    python examples/mosaics.py --pictures 60 --tile 378 --tile 600

Each mosaic is 3,000 pixels a side: 25 scenes that the embedded model was not trained on, each at its own size or shrunk
to 600 pixels. The first run looks at each picture as it is, the others also at tiles. AP50 is COCO's (pycocotools) over
small shapes: those whose box has less than the area of 5 % of the picture's side squared. A false positive overlaps no
shape of its kind by half that no better box has taken; a double is one of them that overlaps a shape that is taken. A
seam shape lies across an inner edge of a tile.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from world import KINDS
from world_draw import make_picture

from md3cli.images.tiles import tile_rects
from md3cli.refine.refinement import iou

SIDE, CELLS = 3000, 5
CELL = SIDE // CELLS
SMALL_AREA = (0.05 * SIDE) ** 2
SEED = 190
HALF = 0.5
SURE = 0.8
Box = tuple[float, float, float, float]  # corners in pixels
NO_SHAPE: tuple[Box, int] = ((0, 0, 0, 0), 1)


def make_mosaic(index: int) -> tuple[Image.Image, list[tuple[str, Box]]]:
    """Return a picture and its shapes: kind and box."""
    canvas = Image.new("RGB", (SIDE, SIDE), (150, 150, 150))
    shapes: list[tuple[str, Box]] = []
    for cell in range(CELLS**2):
        picture = make_picture(SEED, index * CELLS**2 + cell)
        scale = min(1.0, CELL / max(picture.image.size))
        width, height = (round(length * scale) for length in picture.image.size)
        left = cell % CELLS * CELL + (CELL - width) // 2
        top = cell // CELLS * CELL + (CELL - height) // 2
        canvas.paste(picture.image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        for shape in picture.instances:
            x_min, y_min, x_max, y_max = shape.box_xyxy
            box = (left + x_min * width, top + y_min * height, left + x_max * width, top + y_max * height)
            shapes.append((shape.kind, box))
    return canvas, shapes


def found_in(folder: Path, options: Sequence[str]) -> tuple[dict[tuple[str, str], list[tuple[float, Box]]], float]:
    """Run `md3 detect` over a folder; return scores and boxes by picture and kind, and the seconds it took."""
    command = [sys.executable, "-m", "md3cli", "detect", str(folder), *KINDS, "-m", "tiny", "--no-cache", "--quiet"]
    started = time.monotonic()
    lines = subprocess.run([*command, "-f", "jsonl", *options], check=True, stdout=subprocess.PIPE).stdout.splitlines()
    found = {}
    for record in map(json.loads, lines):
        corners = ("x_min", "y_min", "x_max", "y_max")
        boxes = [(thing["score"], tuple(thing[key] * SIDE for key in corners)) for thing in record["objects"]]
        found[record["image"], record["prompt"]] = boxes
    return found, time.monotonic() - started


def small_ap50(
    truth: Mapping[str, Sequence[tuple[str, Box]]], found: Mapping[Any, Sequence[tuple[float, Box]]]
) -> float:
    """Return the mean over kinds of the average precision at IoU 0.5, of small shapes."""
    numbers = {name: number for number, name in enumerate(truth, 1)}
    shapes = [(numbers[name], *shape) for name, of_picture in truth.items() for shape in of_picture]
    gt, dt = (
        COCO(),
        [
            {"image_id": numbers[name], "category_id": KINDS.index(kind) + 1, "bbox": _bbox(box), "score": score}
            for (name, kind), boxes in found.items()
            for score, box in boxes
        ],
    )
    gt.dataset = {
        "info": {},
        "images": [{"id": number, "width": SIDE, "height": SIDE} for number in numbers.values()],
        "categories": [{"id": number, "name": kind} for number, kind in enumerate(KINDS, 1)],
        "annotations": [
            {"id": number, "image_id": image, "category_id": KINDS.index(kind) + 1, "bbox": _bbox(box)}
            | {"area": _bbox(box)[2] * _bbox(box)[3], "iscrowd": 0}
            for number, (image, kind, box) in enumerate(shapes, 1)
        ],
    }
    if not dt:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        gt.createIndex()
        judge = COCOeval(gt, gt.loadRes(dt), "bbox")
        judge.params.areaRng, judge.params.areaRngLbl = [[0, SMALL_AREA]], ["small"]
        judge.params.iouThrs, judge.params.maxDets = np.array([HALF]), [150]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"]
    return float(precision[precision > -1].mean())


def _bbox(box: Box) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def judged(
    truth: Mapping[str, Sequence[tuple[str, Box]]], found: Mapping[Any, Sequence[tuple[float, Box]]]
) -> Iterator[tuple[Box, int]]:
    """Yield each shape with the number of boxes that show it; a box that shows none is NO_SHAPE."""
    for (name, kind), boxes in found.items():
        shapes = [box for other, box in truth[name] if other == kind]
        counts = [0] * len(shapes)
        for _, box in sorted(boxes, reverse=True):
            overlaps = [
                (counts[i] == 0, iou(box, shape), i) for i, shape in enumerate(shapes) if iou(box, shape) >= HALF
            ]
            if overlaps:
                counts[max(overlaps)[2]] += 1
            else:
                yield NO_SHAPE
        yield from zip(shapes, counts, strict=True)


def is_across_a_seam(box: Box, size: int | None) -> bool:
    """Return whether an edge of a tile, inside the picture, cuts a shape."""
    if size is None:
        return False
    rects = tile_rects(SIDE, SIDE, size, 0.2)
    edges = {edge for rect in rects for edge in (rect.left, rect.right)} - {0, SIDE}  # rows are as columns
    return any(box[0] < edge < box[2] or box[1] < edge < box[3] for edge in edges)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--tile", type=int, action="append")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, truth = Path(temporary), {}
        for index in range(arguments.pictures):
            image, truth[f"{index}.png"] = make_mosaic(index)
            image.save(folder / f"{index}.png", compress_level=1)
        print(f"{arguments.pictures} pictures, {sum(map(len, truth.values()))} shapes")
        for size in (None, *(arguments.tile or [378])):
            found, seconds = found_in(folder, ("--tile", str(size)) if size else ())
            verdicts = list(judged(truth, found))
            sure = list(judged(truth, {key: [one for one in boxes if one[0] >= SURE] for key, boxes in found.items()}))
            shapes = [one for one in verdicts if one != NO_SHAPE]
            seams = [count for box, count in shapes if is_across_a_seam(box, size)]
            numbers = {
                "tile": size,
                "AP50 of small shapes": round(small_ap50(truth, found), 3),
                "false positives a picture": round((len(verdicts) - len(shapes)) / len(truth), 1),
                "shapes found a picture": round(sum(count > 0 for _, count in shapes) / len(truth), 1),
                f"false positives with --min-score {SURE}": round(sum(one == NO_SHAPE for one in sure) / len(truth), 1),
                "shapes found with it": round(sum(one[1] > 0 and one != NO_SHAPE for one in sure) / len(truth), 1),
                "doubles a picture": round(sum(max(0, count - 1) for _, count in shapes) / len(truth), 2),
                "across seams": len(seams),
                "of them found": sum(count > 0 for count in seams),
                "found twice": sum(count > 1 for count in seams),
                "seconds a picture": round(seconds / len(truth), 2),
            }
            print(json.dumps(numbers))


if __name__ == "__main__":
    main()
