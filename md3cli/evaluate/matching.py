"""Which of the objects that records found is which object of the ground truth: boxes, masks and points, one to one.

A point is right when it lies on an object of its name: on the object's mask where the ground truth has one, else in its
box. All is in pixels of the picture; what the records of one name found there is matched together, and each prediction
keeps its place among them. Knows no scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from md3cli.errors import MissingExtraError
from md3cli.evaluate.located import Pair
from md3cli.evaluate.truth import TruthObject
from md3cli.exporters.masks import fill
from md3cli.exporters.objects import clamped_box, points, segments
from md3cli.refine.selection import found_in

IOU_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Prediction:
    """One object that a record found, in pixels; the box of a point has no extent. `mask` is COCO run lengths.

    `place` says which record of the pair found it, and where in that record it stands.
    """

    place: tuple[int, int]
    bbox: tuple[float, float, float, float]  # x, y, width, height
    score: float
    mask: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """For each prediction right, wrong or None (not judged); `missed` holds the indices of objects nobody found.

    `partners` tells by right predictions which object is theirs, where they were matched by overlap.
    """

    is_right: tuple[bool | None, ...]
    missed: tuple[int, ...]
    partners: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Judged:
    """A pair with how its predictions matched; `num_hits` of its points lie on an object."""

    pair: Pair
    predictions: tuple[Prediction, ...]
    match: Match
    num_hits: int = 0

    @property
    def num_objects(self) -> int:
        """The number of objects that should be found; those that lie in a crowd need not."""
        return sum(not thing.is_crowd for thing in self.pair.objects)

    @property
    def num_judged(self) -> int:
        """The number of predictions that are right or wrong."""
        return sum(verdict is not None for verdict in self.match.is_right)


# ---- which prediction found which object: one to one ---------------------------------------------


def match_by_overlap(overlap: np.ndarray, scores: Sequence[float], is_crowd: Sequence[bool]) -> Match:
    """Match predictions [P] to objects [O] by `overlap` [P, O], as COCO does (cocoeval.py of cocoapi).

    The surest prediction chooses first: among the objects not yet taken the one that it overlaps most. A prediction in
    a crowd is not judged. For a crowd the overlap is intersection over the prediction's own area.
    """
    is_right: list[bool | None] = [False] * len(scores)
    free = {index for index, crowd in enumerate(is_crowd) if not crowd}
    partners: dict[int, int] = {}
    for prediction in sorted(range(len(scores)), key=lambda index: -scores[index]):
        best = max(free, key=lambda index: (overlap[prediction, index], -index), default=None)
        if best is not None and overlap[prediction, best] >= IOU_THRESHOLD:
            is_right[prediction], partners[prediction] = True, best
            free.discard(best)
        elif any(crowd and overlap[prediction, index] >= IOU_THRESHOLD for index, crowd in enumerate(is_crowd)):
            is_right[prediction] = None
    return Match(tuple(is_right), tuple(sorted(free)), partners)


def match_points(is_inside: np.ndarray, is_crowd: Sequence[bool]) -> Match:
    """Match points [P] to objects [O] by `is_inside` [P, O]: as many pairs as there can be (Kuhn, 1955)."""
    taken_by: dict[int, int] = {}  # object -> point

    def find(point: int, tried: set[int]) -> bool:
        for index in np.flatnonzero(is_inside[point]).tolist():
            if is_crowd[index] or index in tried:
                continue
            tried.add(index)
            if index not in taken_by or find(taken_by[index], tried):
                taken_by[index] = point
                return True
        return False

    is_right: list[bool | None] = [False] * len(is_inside)
    for point in range(len(is_inside)):
        find(point, set())
    for point in taken_by.values():
        is_right[point] = True
    for point, inside in enumerate(is_inside):
        if not is_right[point] and any(crowd and inside[index] for index, crowd in enumerate(is_crowd)):
            is_right[point] = None
    missed = (index for index, crowd in enumerate(is_crowd) if not crowd and index not in taken_by)
    return Match(tuple(is_right), tuple(missed))


# ---- from records and truth to pixels ------------------------------------------------------------


def judge_boxes(pair: Pair) -> Judged:
    """Match the boxes of a pair, those of all its records together.

    Raises:
        MissingExtraError: faster-coco-eval is not installed.
    """
    predictions = tuple(boxes_of(pair))
    return _judge(pair, predictions, [list(one.bbox) for one in predictions], [list(one.bbox) for one in pair.objects])


def judge_masks(pair: Pair) -> Judged:
    """Match the masks of a pair, as `judge_boxes`."""
    predictions = tuple(_masks(pair))
    there = [truth_mask(thing, *pair.size_wh) for thing in pair.objects]
    return _judge(pair, predictions, [one.mask for one in predictions], there)


def _judge(pair: Pair, predictions: tuple[Prediction, ...], found: Sequence[Any], there: Sequence[Any]) -> Judged:
    crowds = [thing.is_crowd for thing in pair.objects]
    overlap = np.zeros((len(found), len(there)))
    if found and there:
        overlap = np.asarray(coco_library().mask.iou(found, there, [int(crowd) for crowd in crowds]))
    return Judged(pair, predictions, match_by_overlap(overlap, [one.score for one in predictions], crowds))


def judge_points(pair: Pair) -> Judged:
    """Match the points of a pair, those of all its records together.

    Raises:
        MissingExtraError: the ground truth has masks and faster-coco-eval is not installed.
    """
    predictions = tuple(_points(pair))
    is_inside = inside_points(pair, predictions)
    crowds = [thing.is_crowd for thing in pair.objects]
    hits = is_inside[:, [not crowd for crowd in crowds]].any(axis=1)
    return Judged(pair, predictions, match_points(is_inside, crowds), num_hits=int(hits.sum()))


def inside_points(pair: Pair, predictions: Sequence[Prediction]) -> np.ndarray:
    """Return which points [P] lie on which of the pair's objects [O], as booleans [P, O]."""
    is_inside = np.zeros((len(predictions), len(pair.objects)), dtype=bool)
    for column, thing in enumerate(pair.objects):
        is_inside[:, column] = _inside(thing, [one.bbox[:2] for one in predictions], pair.size_wh)
    return is_inside


def _found(pair: Pair) -> Iterator[tuple[tuple[int, int], Mapping[str, Any]]]:
    """Yield all that the pair's records found, each with its place: record, and number in the record."""
    for record, answer in enumerate(pair.records):
        for number, found in enumerate(found_in(answer)):
            yield (record, number), found


def boxes_of(pair: Pair) -> Iterator[Prediction]:
    """Yield the boxes that the records of a pair found, of detect and of segment, cut to the picture."""
    for place, found in _found(pair):
        box = clamped_box(found.get("bbox", found), pair.category, found.get("score"), *pair.size_wh)
        if box is not None:
            yield Prediction(place, (box.x, box.y, box.width, box.height), _score_of(box.score))


def _masks(pair: Pair) -> Iterator[Prediction]:
    width, height = pair.size_wh
    for place, found in _found(pair):
        for segment in segments({"segments": [found]}, width, height):
            box = segment.box
            mask = fill(segment.rings, width, height).run_lengths()
            mask["counts"] = mask["counts"].encode()
            yield Prediction(place, (box.x, box.y, box.width, box.height), _score_of(box.score), mask)


def _points(pair: Pair) -> Iterator[Prediction]:
    for place, found in _found(pair):
        for point in points({"points": [found]}, *pair.size_wh):
            yield Prediction(place, (point.x, point.y, 0.0, 0.0), _score_of(point.score))


def _score_of(score: float | None) -> float:
    return 1.0 if score is None else float(score)  # objects without scores are equal


def truth_mask(thing: TruthObject, width: int, height: int) -> dict[str, Any]:
    mask: dict[str, Any] = coco_library().mask.segmToRle(thing.segmentation, width, height)
    return mask


def _inside(thing: TruthObject, at: Sequence[tuple[float, float]], size_wh: tuple[int, int]) -> list[bool]:
    x, y, width, height = thing.bbox
    in_box = [x <= px <= x + width and y <= py <= y + height for px, py in at]
    if not any(in_box) or thing.mask is None:
        return in_box
    mask = coco_library().mask.decode(truth_mask(thing, *size_wh))
    rows, columns = mask.shape
    return [
        near and bool(mask[min(int(py), rows - 1), min(int(px), columns - 1)])
        for near, (px, py) in zip(in_box, at, strict=True)
    ]


def coco_library() -> Any:
    try:
        import faster_coco_eval
    except ImportError as error:
        raise MissingExtraError("md3 eval of objects", "eval") from error
    return faster_coco_eval
