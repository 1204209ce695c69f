"""How right a record about a scene is: the scores of the benchmark, one function for each skill."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from world import KINDS
from world_draw import Instance, Mask, Picture
from world_text import caption_objects, matching

from md3cli.exporters.masks import fill
from md3cli.exporters.objects import segments

BoxXyxy = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Detection:
    """A predicted box in pixels, of a scene and a kind, with its score."""

    image_id: int
    category_id: int
    box_xyxy: BoxXyxy
    score: float


def boxes_of(record: Mapping[str, Any]) -> list[tuple[BoxXyxy, float]]:
    """Boxes (0-1, clipped) and scores of a detect record."""
    found = []
    for thing in record["objects"]:
        left, top, right, bottom = (
            min(1.0, max(0.0, float(thing[key]))) for key in ("x_min", "y_min", "x_max", "y_max")
        )
        found.append(((left, top, right, bottom), float(thing["score"])))
    return found


def points_right(points: Sequence[tuple[float, float]], wanted: Sequence[Instance], picture: Picture) -> bool:
    """True for the right number of points, each on a different one of the wanted shapes."""
    rows, cols = picture.owners.shape
    hit = {int(picture.owners[min(rows - 1, int(y * rows)), min(cols - 1, int(x * cols))]) for x, y in points}
    return len(points) == len(wanted) and hit == {instance.number for instance in wanted}


def record_points(record: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The points of a point record, clipped to the picture."""
    return [_clipped(point["x"], point["y"]) for point in record["points"]]


def grounded_points(record: Mapping[str, Any]) -> list[tuple[float, float]]:
    """All points that a reasoning grounds, in order."""
    return [_clipped(*point) for chunk in record["reasoning"]["grounding"] for point in chunk["points"]]


def _clipped(x: float, y: float) -> tuple[float, float]:
    return min(1.0, max(0.0, float(x))), min(1.0, max(0.0, float(y)))


def caption_right(text: str, picture: Picture) -> bool:
    """True when a short caption names exactly the scene's shapes, repeats included."""
    return sorted(caption_objects(text)) == sorted(instance.name for instance in picture.instances)


def segment_iou(record: Mapping[str, Any], mask: Mask) -> float:
    """Overlap of the drawn paths with the pixels that can be seen of the shape."""
    height, width = mask.shape
    drawn: Mask = np.zeros_like(mask)
    for segment in segments(dict(record), width, height):
        if segment.has_mask:
            patch = fill(segment.rings, width, height).patch()
            rows, cols = patch.pixels.shape
            drawn[patch.top : patch.top + rows, patch.left : patch.left + cols] |= patch.pixels
    union = int((drawn | mask).sum())
    return int((drawn & mask).sum()) / union if union else 0.0


def average_precision(pictures: Mapping[int, Picture], detections: Iterable[Detection]) -> dict[str, float]:
    """AP at IoU 0.5 and mean AP over 0.50-0.95, as pycocotools computes them over kinds."""
    annotations: list[dict[str, Any]] = []
    for image_id, picture in pictures.items():
        for instance in picture.instances:
            box = _pixels(instance.box_xyxy, picture)
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": KINDS.index(instance.kind) + 1}
            annotations.append({**entry, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i, "width": p.scene.width, "height": p.scene.height} for i, p in pictures.items()],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": kind} for i, kind in enumerate(KINDS)],
    }
    rows = [
        {"image_id": d.image_id, "category_id": d.category_id, "bbox": _wh(d.box_xyxy), "score": d.score}
        for d in detections
    ]
    if not rows:
        return {"AP50": 0.0, "AP": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(rows), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {"AP50": float(judge.stats[1]), "AP": float(judge.stats[0])}


def _pixels(box_xyxy: BoxXyxy, picture: Picture) -> list[float]:
    width, height = picture.scene.width, picture.scene.height
    left, top, right, bottom = box_xyxy
    return _wh((left * width, top * height, right * width, bottom * height))


def _wh(box_xyxy: BoxXyxy) -> list[float]:
    left, top, right, bottom = box_xyxy
    return [left, top, right - left, bottom - top]


def iou(a: BoxXyxy, b: BoxXyxy) -> float:
    """Overlap of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / total if total > 0 else 0.0


def is_true_positive(found: Sequence[tuple[BoxXyxy, float]], kind: str, picture: Picture) -> list[bool]:
    """For each box, best score first matched: does it lie on (IoU ≥ 0.5) a shape not yet taken?"""
    free = list(matching(kind, picture.instances))
    right = [False] * len(found)
    for place in sorted(range(len(found)), key=lambda i: -found[i][1]):
        best = max(free, key=lambda instance: iou(found[place][0], instance.box_xyxy), default=None)
        if best is not None and iou(found[place][0], best.box_xyxy) >= 0.5:
            right[place] = True
            free.remove(best)
    return right


def mean_iou(found: Sequence[tuple[BoxXyxy, float]], kind: str, picture: Picture) -> list[float]:
    """For each shape of a kind the overlap of the box that fits it best, 0 when there is none."""
    wanted = matching(kind, picture.instances)
    return [max((iou(box, instance.box_xyxy) for box, _ in found), default=0.0) for instance in wanted]


def draw_reliability(scores: Sequence[float], right: Sequence[bool], path: str) -> float:
    """Draw precision against score in ten bins; returns the expected calibration error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    score: NDArray[np.float64] = np.asarray(scores, dtype=np.float64)
    hit: NDArray[np.float64] = np.asarray(right, dtype=np.float64)
    bins = np.minimum(9, (score * 10).astype(int))
    rows = [(score[bins == b].mean(), hit[bins == b].mean(), int((bins == b).sum())) for b in np.unique(bins)]
    error = sum(abs(s - p) * n for s, p, n in rows) / max(1, len(score))
    figure, axis = pyplot.subplots(figsize=(4.5, 4.5))
    axis.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axis.scatter([s for s, _, _ in rows], [p for _, p, _ in rows], s=[8 + 200 * n / len(score) for *_, n in rows])
    axis.plot([s for s, _, _ in rows], [p for _, p, _ in rows])
    axis.set(xlabel="score", ylabel="share of boxes with IoU ≥ 0.5", xlim=(0, 1.02), ylim=(0, 1.02))
    axis.set_title(f"detect: reliability, calibration error {error:.3f}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return float(error)
