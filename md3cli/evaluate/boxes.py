"""Boxes, masks and points against COCO instances.

Average precision and recall of boxes and masks are faster-coco-eval's, with COCO's own settings (IoU 0.50 to 0.95, at
most 100 objects an image), so they compare with published numbers. Precision, recall and reliability at IoU 0.5 come
from our own matching, because the library's counts predictions that lie in crowds among the right ones.

A point is right when it lies on an object of its name: on the object's mask where the ground truth has one, else in its
box. `hit_rate` asks only whether a point is on some object; precision and recall pair points and objects one to one, so
two points on one object are one too many. `count_error` is the mean distance between the two counts.

What the records of one name found in a picture is matched together, and each record gets the verdicts of its own.
This file is imported when a run has objects to score: numpy and the masks' code come with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from md3cli.errors import MissingExtraError
from md3cli.evaluate.located import Located, Pair, has_failed, locate
from md3cli.evaluate.scores import Curves, ReliabilityBin, Scores, Section, Verdict, f1, ratio
from md3cli.evaluate.truth import Instances, TruthObject
from md3cli.exporters.masks import fill
from md3cli.exporters.objects import clamped_box, points, segments
from md3cli.records import RecordDict
from md3cli.refine.labels import Labels
from md3cli.refine.selection import found_in

IOU_THRESHOLD = 0.5
NUM_RELIABILITY_BINS = 10
ALL_AREAS, MOST_OBJECTS = 0, -1  # places in the library's arrays: every size, 100 objects an image


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
    """For each prediction right, wrong or None (not judged); `missed` holds the indices of objects nobody found."""

    is_right: tuple[bool | None, ...]
    missed: tuple[int, ...]


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


def score_boxes(records: Sequence[RecordDict], truth: Instances, labels: Labels) -> Section:
    """Score `detect` records, under the names that `labels` give their prompts.

    Raises:
        InputError: the records are about other images.
        MissingExtraError: faster-coco-eval is not installed.
    """
    located = locate(records, truth, labels)
    return _score("boxes", "bbox", located, [judge_boxes(pair) for pair in located.pairs])


def score_masks(records: Sequence[RecordDict], truth: Instances, labels: Labels) -> Section:
    """Score `segment` records by their masks, as `score_boxes`."""
    located = locate(records, truth, labels)
    return _score("masks", "segm", located, [judge_masks(pair) for pair in located.pairs])


def _score(name: str, iou_type: str, located: Located, judged: Sequence[Judged]) -> Section:
    evaluated = _coco_eval(located, judged, iou_type)
    by_name = {
        category: _average(evaluated, k) | _at_half(_of_category(judged, category))
        for k, category in enumerate(located.categories)
    }
    scores = _summary(evaluated) | _at_half(judged)
    curves = _curves(evaluated, located.categories, judged)
    scores["calibration_error"] = _calibration_error(curves.reliability)
    return _section(name, "AP", located, judged, scores, by_name, curves)


def score_points(records: Sequence[RecordDict], truth: Instances, labels: Labels) -> Section:
    """Score `point` records, under the names that `labels` give their prompts.

    Raises:
        InputError: the records are about other images.
        MissingExtraError: the ground truth has masks and faster-coco-eval is not installed.
    """
    located = locate(records, truth, labels)
    judged = [judge_points(pair) for pair in located.pairs]
    by_name = {category: _point_scores(_of_category(judged, category)) for category in located.categories}
    return _section("points", "F1", located, judged, _point_scores(judged), by_name)


def _of_category(judged: Sequence[Judged], category: str) -> list[Judged]:
    return [one for one in judged if one.pair.category == category]


def _section(
    name: str,
    main: str,
    located: Located,
    judged: Sequence[Judged],
    scores: Scores,
    by_name: Mapping[str, Scores],
    curves: Curves | None = None,
) -> Section:
    records = [record for pair in located.pairs for record in pair.records]
    counts = {
        "images": len(located.images),
        "requests": len(records),
        "failed": sum(map(has_failed, records)),
        "objects": sum(one.num_objects for one in judged),
        "predictions": sum(len(one.match.is_right) for one in judged),
    }
    verdicts = {record: verdict for one in judged for record, verdict in _verdicts(one)}
    return Section(name, main, scores, counts, by_name, located.notes, curves, verdicts)


# ---- which prediction found which object: one to one ---------------------------------------------


def match_by_overlap(overlap: np.ndarray, scores: Sequence[float], is_crowd: Sequence[bool]) -> Match:
    """Match predictions [P] to objects [O] by `overlap` [P, O], as COCO does (cocoeval.py of cocoapi).

    The surest prediction chooses first: among the objects not yet taken the one that it overlaps most. A prediction in
    a crowd is not judged. For a crowd the overlap is intersection over the prediction's own area.
    """
    is_right: list[bool | None] = [False] * len(scores)
    free = {index for index, crowd in enumerate(is_crowd) if not crowd}
    for prediction in sorted(range(len(scores)), key=lambda index: -scores[index]):
        best = max(free, key=lambda index: (overlap[prediction, index], -index), default=None)
        if best is not None and overlap[prediction, best] >= IOU_THRESHOLD:
            is_right[prediction] = True
            free.discard(best)
        elif any(crowd and overlap[prediction, index] >= IOU_THRESHOLD for index, crowd in enumerate(is_crowd)):
            is_right[prediction] = None
    return Match(tuple(is_right), tuple(sorted(free)))


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
    predictions = tuple(_boxes(pair))
    return _judge(pair, predictions, [list(one.bbox) for one in predictions], [list(one.bbox) for one in pair.objects])


def judge_masks(pair: Pair) -> Judged:
    """Match the masks of a pair, as `judge_boxes`."""
    predictions = tuple(_masks(pair))
    there = [_truth_mask(thing, *pair.size_wh) for thing in pair.objects]
    return _judge(pair, predictions, [one.mask for one in predictions], there)


def _judge(pair: Pair, predictions: tuple[Prediction, ...], found: Sequence[Any], there: Sequence[Any]) -> Judged:
    crowds = [thing.is_crowd for thing in pair.objects]
    overlap = np.zeros((len(found), len(there)))
    if found and there:
        overlap = np.asarray(_library().mask.iou(found, there, [int(crowd) for crowd in crowds]))
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


def _boxes(pair: Pair) -> Iterator[Prediction]:
    for place, found in _found(pair):
        box = clamped_box(found, pair.category, found.get("score"), *pair.size_wh)
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


def _truth_mask(thing: TruthObject, width: int, height: int) -> dict[str, Any]:
    mask: dict[str, Any] = _library().mask.segmToRle(thing.segmentation, width, height)
    return mask


def _inside(thing: TruthObject, at: Sequence[tuple[float, float]], size_wh: tuple[int, int]) -> list[bool]:
    x, y, width, height = thing.bbox
    in_box = [x <= px <= x + width and y <= py <= y + height for px, py in at]
    if not any(in_box) or not thing.has_mask:
        return in_box
    mask = _library().mask.decode(_truth_mask(thing, *size_wh))
    rows, columns = mask.shape
    return [
        near and bool(mask[min(int(py), rows - 1), min(int(px), columns - 1)])
        for near, (px, py) in zip(in_box, at, strict=True)
    ]


# ---- the library --------------------------------------------------------------------------------


def _library() -> Any:
    try:
        import faster_coco_eval
    except ImportError as error:
        raise MissingExtraError("md3 eval of objects", "eval") from error
    return faster_coco_eval


def _coco_eval(located: Located, judged: Sequence[Judged], iou_type: str) -> Any:
    """Return a finished COCOeval over the asked pairs alone; ids count from 1 in our own order."""
    image_ids = {name: number for number, name in enumerate(located.images, start=1)}
    category_ids = {name: number for number, name in enumerate(located.categories, start=1)}
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for one in judged:
        ids = {"image_id": image_ids[one.pair.image], "category_id": category_ids[one.pair.category]}
        for thing in one.pair.objects:
            place = {"bbox": list(thing.bbox), "segmentation": thing.segmentation, "area": thing.area}
            annotations.append({"id": len(annotations) + 1, "iscrowd": int(thing.is_crowd), **ids, **place})
        for prediction in one.predictions:
            shape = {"segmentation": prediction.mask} if prediction.mask else {"bbox": list(prediction.bbox)}
            results.append({**ids, **shape, "score": prediction.score})
    sizes = {one.pair.image: one.pair.size_wh for one in judged}
    images = [
        {"id": number, "file_name": name, "width": sizes[name][0], "height": sizes[name][1]}
        for name, number in image_ids.items()
    ]
    categories = [{"id": number, "name": name} for name, number in category_ids.items()]
    library = _library()
    truth = library.COCO({"info": {}, "images": images, "categories": categories, "annotations": annotations})
    evaluated = library.COCOeval_faster(truth, truth.loadRes(results), iou_type)
    if images:
        evaluated.run()
    return evaluated


def _summary(evaluated: Any) -> Scores:
    names = {"AP": "AP_all", "AP50": "AP_50", "AP75": "AP_75", "AR": "AR_third"}
    names |= {f"AP_{size}": f"AP_{size}" for size in ("small", "medium", "large")}
    known = evaluated.stats_as_dict if len(evaluated.params.imgIds) else {}
    return {name: _number(known.get(theirs, -1.0)) for name, theirs in names.items()}


def _average(evaluated: Any, category: int) -> Scores:
    precision = evaluated.eval["precision"][:, :, category, ALL_AREAS, MOST_OBJECTS]
    recall = evaluated.eval["recall"][:, category, ALL_AREAS, MOST_OBJECTS]
    return {"AP": _mean(precision), "AP50": _mean(precision[0]), "AP75": _mean(precision[5]), "AR": _mean(recall)}


def _mean(values: np.ndarray) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def _number(value: float) -> float | None:
    return None if value < 0 else float(value)  # the library says -1 where there was nothing to score


# ---- our own, at IoU 0.5 -------------------------------------------------------------------------


def _at_half(judged: Sequence[Judged]) -> Scores:
    right = sum(verdict is True for one in judged for verdict in one.match.is_right)
    precision = ratio(right, sum(one.num_judged for one in judged))
    recall = ratio(right, sum(one.num_objects for one in judged))
    return {"precision": precision, "recall": recall, "F1": f1(precision, recall)}


def _point_scores(judged: Sequence[Judged]) -> Scores:
    errors = [abs(one.num_judged - one.num_objects) for one in judged]
    hit_rate = ratio(sum(one.num_hits for one in judged), sum(one.num_judged for one in judged))
    counts = {"count_error": ratio(sum(errors), len(errors)), "count_exact": ratio(errors.count(0), len(errors))}
    return {"hit_rate": hit_rate} | _at_half(judged) | counts


def _curves(evaluated: Any, categories: Sequence[str], judged: Sequence[Judged]) -> Curves:
    by_name: dict[str, tuple[float, ...]] = {}
    for k, category in enumerate(categories):
        precision = evaluated.eval["precision"][0, :, k, ALL_AREAS, MOST_OBJECTS]
        if (precision > -1).all():
            by_name[category] = tuple(precision.round(4).tolist())
    if by_name:
        by_name = {"all": tuple(np.mean(list(by_name.values()), axis=0).round(4).tolist())} | by_name
    recall = tuple(float(r) for r in evaluated.params.recThrs.round(2))
    return Curves(recall, by_name, _reliability(judged))


def _reliability(judged: Sequence[Judged]) -> tuple[ReliabilityBin, ...]:
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_RELIABILITY_BINS)]
    for one in judged:
        for prediction, verdict in zip(one.predictions, one.match.is_right, strict=True):
            if verdict is not None:
                place = min(int(prediction.score * NUM_RELIABILITY_BINS), NUM_RELIABILITY_BINS - 1)
                bins[place].append((prediction.score, verdict))
    return tuple(
        ReliabilityBin(
            mean_score=round(sum(score for score, _ in found) / len(found), 4),
            share_right=round(sum(is_right for _, is_right in found) / len(found), 4),
            count=len(found),
        )
        for found in bins
        if found
    )


def _calibration_error(bins: Sequence[ReliabilityBin]) -> float | None:
    """Return how far the scores are from the share that is right (expected calibration error, Naeini et al., 2015)."""
    return ratio(sum(b.count * abs(b.mean_score - b.share_right) for b in bins), sum(b.count for b in bins))


def _verdicts(one: Judged) -> Iterator[tuple[str, Verdict]]:
    """Yield each record's id and verdict, without those that failed; what nobody found stands at the first of them.

    An object without extent was dropped before matching: it is wrong.
    """
    marks: list[list[bool | None]] = [[False] * len(found_in(record)) for record in one.pair.records]
    for prediction, verdict in zip(one.predictions, one.match.is_right, strict=True):
        place, number = prediction.place
        marks[place][number] = verdict
    missed = tuple(_unit_box(one.pair.objects[index], one.pair.size_wh) for index in one.match.missed)
    for record, objects in zip(one.pair.records, marks, strict=True):
        if not has_failed(record):
            yield record["id"], Verdict(not missed and False not in objects, tuple(objects), missed)
            missed = ()


def _unit_box(thing: TruthObject, size_wh: tuple[int, int]) -> tuple[float, float, float, float]:
    (x, y, width, height), (image_width, image_height) = thing.bbox, size_wh
    return x / image_width, y / image_height, (x + width) / image_width, (y + height) / image_height
