"""Boxes and masks against COCO instances, scored by faster-coco-eval.

Average precision and recall are the library's, with COCO's own settings (IoU 0.50 to 0.95, at most
100 objects an image), so they compare with published numbers. Precision, recall and reliability
at IoU 0.5 come from our own matching, because the library's drops what lies in crowds among the
right ones.

Which prediction found which object: one to one, at one IoU.

COCO's rule (cocoeval.py of cocoapi): the surest prediction chooses first, among the objects not yet
taken the one it overlaps most; what lies in a crowd is not judged. For points there is no overlap to
compare, so as many as possible are paired (Kuhn, 1955).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from md3cli.errors import MissingExtraError
from md3cli.evaluate.located import Located, Pair, has_failed, locate
from md3cli.evaluate.scores import Curves, ReliabilityBin, Scores, Section, Verdict, f1, ratio
from md3cli.evaluate.truth import Instances, TruthObject
from md3cli.exporters.masks import fill
from md3cli.exporters.objects import clamped_box, segments
from md3cli.records import RecordDict

IOU_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Match:
    """For each prediction right, wrong or None (not judged); indices of the objects nobody found."""

    is_right: tuple[bool | None, ...]
    missed: tuple[int, ...]


def match_by_overlap(overlap: np.ndarray, scores: Sequence[float], is_crowd: Sequence[bool]) -> Match:
    """Match predictions [P] to objects [O] by `overlap` [P, O].

    For a crowd the overlap is intersection over the prediction's own area, as COCO has it.
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
    """Match points [P] to objects [O] by `is_inside` [P, O], as many pairs as there can be."""
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


NUM_RELIABILITY_BINS = 10
ALL_AREAS, MOST_OBJECTS = 0, -1  # places in the library's arrays: every size, 100 objects an image


@dataclass(frozen=True, slots=True)
class Prediction:
    """One object a record found, in pixels; `mask` is COCO run lengths. `number` is its place in the record."""

    number: int
    bbox: tuple[float, float, float, float]  # x, y, width, height
    score: float
    mask: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """A pair with what was predicted and how it matched."""

    pair: Pair
    predictions: tuple[Prediction, ...]
    match: Match


def score_boxes(records: Sequence[RecordDict], truth: Instances) -> Section:
    """Score `detect` records.

    Raises:
        InputError: the records are about other images.
        MissingExtraError: faster-coco-eval is not installed.
    """
    return _score("boxes", "bbox", records, truth)


def score_masks(records: Sequence[RecordDict], truth: Instances) -> Section:
    """Score `segment` records by their masks; raises as `score_boxes`."""
    return _score("masks", "segm", records, truth)


def _score(name: str, iou_type: str, records: Sequence[RecordDict], truth: Instances) -> Section:
    located = locate(records, truth)
    judged = [_judge(pair, iou_type) for pair in located.pairs]
    evaluated = _coco_eval(located, judged, iou_type)
    by_name = {
        category: _average(evaluated, k) | _at_half([one for one in judged if one.pair.category == category])
        for k, category in enumerate(located.categories)
    }
    counts = {
        "images": len(located.images),
        "requests": len(judged),
        "failed": sum(has_failed(pair.record) for pair in located.pairs),
        "objects": sum(_num_objects(one) for one in judged),
        "predictions": sum(len(one.predictions) for one in judged),
    }
    scores = _summary(evaluated) | _at_half(judged)
    curves = _curves(evaluated, located.categories, judged)
    scores["calibration_error"] = _calibration_error(curves.reliability)
    verdicts = {one.pair.record["id"]: _verdict(one) for one in judged if not has_failed(one.pair.record)}
    return Section(name, "AP", scores, counts, by_name, located.notes, curves, verdicts)


# ---- from records and truth to pixels ------------------------------------------------------------


def _judge(pair: Pair, iou_type: str) -> Judged:
    predictions = tuple(_boxes(pair) if iou_type == "bbox" else _masks(pair))
    if iou_type == "bbox":
        found: list[Any] = [list(prediction.bbox) for prediction in predictions]
        there: list[Any] = [list(thing.bbox) for thing in pair.objects]
    else:
        found = [prediction.mask for prediction in predictions]
        there = [truth_mask(thing, *pair.size_wh) for thing in pair.objects]
    crowds = [thing.is_crowd for thing in pair.objects]
    overlap = np.zeros((len(found), len(there)))
    if found and there:
        overlap = np.asarray(_library().mask.iou(found, there, [int(crowd) for crowd in crowds]))
    return Judged(pair, predictions, match_by_overlap(overlap, [one.score for one in predictions], crowds))


def _boxes(pair: Pair) -> Iterator[Prediction]:
    for number, found in enumerate(pair.record.get("objects") or ()):
        box = clamped_box(found, pair.category, found.get("score"), *pair.size_wh)
        if box is not None:
            yield Prediction(number, (box.x, box.y, box.width, box.height), _score_of(box.score))


def _masks(pair: Pair) -> Iterator[Prediction]:
    width, height = pair.size_wh
    for number, found in enumerate(pair.record.get("segments") or ()):
        for segment in segments({"segments": [found]}, width, height):
            box = segment.box
            mask = fill(segment.rings, width, height).run_lengths()
            mask["counts"] = mask["counts"].encode()
            yield Prediction(number, (box.x, box.y, box.width, box.height), _score_of(box.score), mask)


def _score_of(score: float | None) -> float:
    """A missing score is full trust: all such objects are equal."""
    return 1.0 if score is None else float(score)


def truth_mask(thing: TruthObject, width: int, height: int) -> dict[str, Any]:
    """An annotated object as COCO run lengths."""
    mask: dict[str, Any] = _library().mask.segmToRle(thing.segmentation, width, height)
    return mask


# ---- the library --------------------------------------------------------------------------------


def _library() -> Any:
    try:
        import faster_coco_eval
    except ImportError as error:
        raise MissingExtraError("md3 eval of objects", "eval") from error
    return faster_coco_eval


def _coco_eval(located: Located, judged: Sequence[Judged], iou_type: str) -> Any:
    """A finished COCOeval over the asked pairs alone; ids count from 1 in our own order."""
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
    """COCO's own numbers; sizes nothing has are None."""
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
    """The library says -1 where there was nothing to score."""
    return None if value < 0 else float(value)


# ---- our own, at IoU 0.5 -------------------------------------------------------------------------


def _num_objects(one: Judged) -> int:
    return sum(not thing.is_crowd for thing in one.pair.objects)


def _at_half(judged: Sequence[Judged]) -> Scores:
    right = sum(verdict is True for one in judged for verdict in one.match.is_right)
    wrong = sum(verdict is False for one in judged for verdict in one.match.is_right)
    precision, recall = ratio(right, right + wrong), ratio(right, sum(map(_num_objects, judged)))
    return {"precision": precision, "recall": recall, "F1": f1(precision, recall)}


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
    """Objects in bins of equal width by score; empty bins are left out, what was not judged too."""
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
    """Expected calibration error: how far the scores are from the share that is right (Naeini et al., 2015)."""
    return ratio(sum(b.count * abs(b.mean_score - b.share_right) for b in bins), sum(b.count for b in bins))


def _verdict(one: Judged) -> Verdict:
    """By the record's own object numbers; what was dropped before matching (no extent) is wrong."""
    record = one.pair.record
    objects: list[bool | None] = [False] * len(record.get("objects") or record.get("segments") or ())
    for prediction, verdict in zip(one.predictions, one.match.is_right, strict=True):
        objects[prediction.number] = verdict
    missed = tuple(unit_box(one.pair.objects[index], one.pair.size_wh) for index in one.match.missed)
    return Verdict(not missed and False not in objects, tuple(objects), missed)


def unit_box(thing: TruthObject, size_wh: tuple[int, int]) -> tuple[float, float, float, float]:
    """An annotated object's box as x_min, y_min, x_max, y_max, 0-1."""
    (x, y, width, height), (image_width, image_height) = thing.bbox, size_wh
    return x / image_width, y / image_height, (x + width) / image_width, (y + height) / image_height
