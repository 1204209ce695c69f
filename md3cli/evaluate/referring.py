"""Boxes and masks of what an expression means, as papers on referring expressions score them, 0 to 1.

A sample is a name in a picture ("the man on the left"), and the ground truth says what it means there.

- `acc50`: the share of samples whose surest box has an IoU of at least 0.5 with the one true box (Kazemzadeh et al.,
  EMNLP 2014; Mao et al., CVPR 2016; as RefCOCO is scored). A sample with no true box, or with several, refers to no one
  thing and is left out.
- `miou`: the mean IoU of samples' masks (LISA and GRES call it gIoU). `ciou`: all intersections over all unions, so
  that large things count for more (RefCOCO's oIoU; Yu et al., ECCV 2016). All that the records of a name found is one
  mask, and so is all that is true. Where nothing is true and nothing is found the IoU is 1, and `ciou` gains nothing
  (GRES, Liu et al., CVPR 2023; LISA, Lai et al., CVPR 2024). What lies in a crowd and on no true object counts for
  neither, as LISA's ignored pixels do. A sample whose truth has boxes alone is left out.

A sample whose requests all failed has IoU 0, whatever is true.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from md3cli.errors import InputError
from md3cli.evaluate.located import has_failed
from md3cli.evaluate.matching import IOU_THRESHOLD, Judged, coco_library, truth_mask
from md3cli.evaluate.metrics import Metric
from md3cli.evaluate.scores import Scores, ratio
from md3cli.records import printable

Box = tuple[float, float, float, float]  # x, y, width, height


class Overlap(NamedTuple):
    """How well a sample is found. `intersection` and `union` are areas in pixels."""

    iou: float
    intersection: float
    union: float

    @classmethod
    def of(cls, intersection: float, union: float) -> Overlap:
        """Return the overlap of two areas; of none with none it is 1."""
        return cls(intersection / union if union else 1.0, intersection, union)


def accuracy_at_half(overlaps: Sequence[Overlap]) -> float | None:
    """Return the share of samples with an IoU of 0.5 or more; None where there are none."""
    return ratio(sum(one.iou >= IOU_THRESHOLD for one in overlaps), len(overlaps))


def mean_iou(overlaps: Sequence[Overlap]) -> float | None:
    """Return the mean IoU of samples; None where there are none."""
    return ratio(sum(one.iou for one in overlaps), len(overlaps))


def cumulative_iou(overlaps: Sequence[Overlap]) -> float | None:
    """Return all intersections over all unions; None where there is nothing."""
    return ratio(sum(one.intersection for one in overlaps), sum(one.union for one in overlaps))


_BOX_METRICS = {Metric.ACC50: accuracy_at_half}
_MASK_METRICS = {Metric.MIOU: mean_iou, Metric.CIOU: cumulative_iou}
METRICS = {"bbox": _BOX_METRICS, "segm": _MASK_METRICS}


class Referred:
    """The samples of one kind of shape (`bbox` or `segm`), by what is judged, with the metrics asked of them."""

    def __init__(self, judged: Iterable[Judged], iou_type: str, metrics: Sequence[Metric]) -> None:
        known = METRICS[iou_type]
        self.metrics = [metric for metric in metrics if metric in known]
        self._functions = [known[metric] for metric in self.metrics]
        measure = top_box_overlap if iou_type == "bbox" else mask_overlap
        self._overlaps: Mapping[int, Overlap | None] = {id(one): measure(one) for one in judged} if self.metrics else {}
        self._left_out = "they have not one true box" if iou_type == "bbox" else "their truth has no masks"

    def scores(self, judged: Iterable[Judged]) -> Scores:
        """Return the metrics of some of what is judged."""
        if not self.metrics:
            return {}
        overlaps = [found for one in judged if (found := self._overlaps[id(one)]) is not None]
        return {str(metric): score(overlaps) for metric, score in zip(self.metrics, self._functions, strict=True)}

    def notes(self) -> Iterator[str]:
        """Yield a sentence about what is left out."""
        if num_left_out := sum(one is None for one in self._overlaps.values()):
            names = ", ".join(self.metrics)
            yield f"{names}: {num_left_out:,} of {len(self._overlaps):,} samples are left out: {self._left_out}"


def box_overlap(first: Box, second: Box) -> Overlap:
    """Return the overlap of two boxes (x, y, width, height)."""
    sides = (
        min(first[axis] + first[axis + 2], second[axis] + second[axis + 2]) - max(first[axis], second[axis])
        for axis in (0, 1)
    )
    across, down = (max(0.0, side) for side in sides)
    intersection = across * down
    return Overlap.of(intersection, first[2] * first[3] + second[2] * second[3] - intersection)


def top_box_overlap(judged: Judged) -> Overlap | None:
    """Return the overlap of the surest box, of equal ones the first, with the true one; None where there is not one."""
    there = [thing for thing in judged.pair.objects if not thing.is_crowd]
    if len(there) != 1:
        return None
    if not judged.predictions:
        return Overlap(0.0, 0.0, there[0].bbox[2] * there[0].bbox[3])
    surest = max(judged.predictions, key=lambda prediction: prediction.score)
    return box_overlap(surest.bbox, there[0].bbox)


def mask_overlap(judged: Judged) -> Overlap | None:
    """Return the overlap of all masks found with all true ones; None where a true object has no mask.

    Raises:
        InputError: a true mask is of another size than its picture.
        MissingExtraError: faster-coco-eval is not installed.
    """
    pair = judged.pair
    there = [thing for thing in pair.objects if not thing.is_crowd]
    if not all(thing.mask for thing in there):
        return None
    if all(map(has_failed, pair.records)):  # its size may not be known, and no mask is drawn without one
        return Overlap(0.0, 0.0, sum(thing.area for thing in there))
    found = _merged([prediction.mask for prediction in judged.predictions], pair.size_wh)
    true = _merged([truth_mask(thing, *pair.size_wh) for thing in there], pair.size_wh)
    crowds = [truth_mask(thing, *pair.size_wh) for thing in pair.objects if thing.is_crowd and thing.mask]
    if any(mask["size"] != found["size"] for mask in (true, *crowds)):
        raise InputError(f"a mask of the ground truth is of another size than its picture {printable(pair.image)}")
    return mask_areas(found, true, _merged(crowds, pair.size_wh))


def mask_areas(found: Mapping[str, Any], true: Mapping[str, Any], ignored: Mapping[str, Any]) -> Overlap:
    """Return the overlap of two masks (COCO run lengths of one size) without what is ignored and not true."""
    intersection = _area(found, true)
    num_ignored = _area(found, ignored) - _area(found, ignored, true)
    return Overlap.of(intersection, _area(found) - num_ignored + _area(true) - intersection)


def _area(*masks: Mapping[str, Any]) -> int:
    """Return the number of pixels that are in all of the masks."""
    library = coco_library().mask
    return int(library.area(library.merge(list(masks), 1)))


def _merged(masks: Sequence[Any], size_wh: tuple[int, int]) -> dict[str, Any]:
    """Return all of the masks as one; an empty one of the picture's size where there are none."""
    width, height = size_wh
    library = coco_library().mask
    whole: dict[str, Any] = library.merge(masks) if masks else library.segmToRle(_nothing(width, height), width, height)
    return whole


def _nothing(width: int, height: int) -> dict[str, Any]:
    return {"size": [height, width], "counts": [width * height]}
