"""Boxes, masks and points against COCO instances.

Average precision and recall of boxes and masks are faster-coco-eval's, with COCO's own settings (IoU 0.50 to 0.95, at
most 100 objects an image), so they compare with published numbers. Precision, recall and reliability at IoU 0.5 come
from our own matching, because the library's counts predictions that lie in crowds among the right ones.

`hit_rate` asks only whether a point is on some object; precision and recall pair points and objects one to one, so two
points on one object are one too many. `count_error` is the mean distance between the two counts.

Metrics of expressions (referring.py) take the place of average precision where they are asked: each expression is a
category of its own there, of which the library keeps over 100 KB, and 10,000 of them have one object each.

What the records of one name found in a picture is matched together, and each record gets the verdicts of its own.
This file is imported when a run has objects to score: numpy and the masks' code come with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from md3cli.evaluate.located import Located, has_failed, locate
from md3cli.evaluate.matching import Judged, coco_library, judge_boxes, judge_masks, judge_points
from md3cli.evaluate.metrics import Metric
from md3cli.evaluate.referring import Referred
from md3cli.evaluate.scores import Curves, ReliabilityBin, Scores, Section, Verdict, f1, ratio
from md3cli.evaluate.truth import Instances, TruthObject
from md3cli.records import RecordDict
from md3cli.refine.labels import Labels
from md3cli.refine.selection import found_in

NUM_RELIABILITY_BINS = 10
ALL_AREAS, MOST_OBJECTS = 0, -1  # places in the library's arrays: every size, 100 objects an image


def score_boxes(
    records: Sequence[RecordDict], truth: Instances, labels: Labels, metrics: Sequence[Metric] = ()
) -> Section:
    """Score `detect` records, under the names that `labels` give their prompts.

    Raises:
        InputError: the records are about other images.
        MissingExtraError: faster-coco-eval is not installed.
    """
    located = locate(records, truth, labels)
    return _score("boxes", "bbox", located, [judge_boxes(pair) for pair in located.pairs], metrics)


def score_masks(
    records: Sequence[RecordDict], truth: Instances, labels: Labels, metrics: Sequence[Metric] = ()
) -> Section:
    """Score `segment` records by their masks, as `score_boxes`."""
    located = locate(records, truth, labels)
    return _score("masks", "segm", located, [judge_masks(pair) for pair in located.pairs], metrics)


def _score(name: str, iou_type: str, located: Located, judged: Sequence[Judged], metrics: Sequence[Metric]) -> Section:
    referred = Referred(judged, iou_type, metrics)
    if referred.metrics:
        curves = Curves((), {}, _reliability(judged))
        by_name = {k: referred.scores(some) | _at_half(some) for k, some in _by_category(located, judged).items()}
        scores = referred.scores(judged) | _at_half(judged)
    else:
        evaluated = _coco_eval(located, judged, iou_type)
        curves = _curves(evaluated, located.categories, judged)
        categories = enumerate(_by_category(located, judged).items())
        by_name = {category: _average(evaluated, k) | _at_half(some) for k, (category, some) in categories}
        scores = _summary(evaluated) | _at_half(judged)
    scores["calibration_error"] = _calibration_error(curves.reliability)
    section = _section(name, "AP", located, judged, scores, by_name, curves)
    return replace(section, notes=(*section.notes, *referred.notes()))


def score_points(records: Sequence[RecordDict], truth: Instances, labels: Labels) -> Section:
    """Score `point` records, under the names that `labels` give their prompts.

    Raises:
        InputError: the records are about other images.
        MissingExtraError: the ground truth has masks and faster-coco-eval is not installed.
    """
    located = locate(records, truth, labels)
    judged = [judge_points(pair) for pair in located.pairs]
    by_name = {category: _point_scores(some) for category, some in _by_category(located, judged).items()}
    return _section("points", "F1", located, judged, _point_scores(judged), by_name)


def _by_category(located: Located, judged: Sequence[Judged]) -> dict[str, list[Judged]]:
    found: dict[str, list[Judged]] = {category: [] for category in located.categories}
    for one in judged:
        found[one.pair.category].append(one)
    return found


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


# ---- the library ---------------------------------------------------------------------------------


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
    library = coco_library()
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
