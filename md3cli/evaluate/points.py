"""Points against COCO instances: does each lie on an object of its name, is each object pointed at?

An object is its mask where the ground truth has one, else its box. `hit_rate` asks only whether a
point is on some object; precision and recall pair points and objects one to one, so two points on
one object are one too many. `count_error` is the mean distance between the two counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from md3cli.evaluate.boxes import Match, match_points, truth_mask, unit_box
from md3cli.evaluate.located import Pair, has_failed, locate
from md3cli.evaluate.scores import Scores, Section, Verdict, f1, ratio
from md3cli.evaluate.truth import Instances, TruthObject
from md3cli.exporters.objects import points
from md3cli.records import RecordDict


@dataclass(frozen=True, slots=True)
class Judged:
    """A pair with how its points matched; `num_hits` lie on some object, crowds left out."""

    pair: Pair
    match: Match
    num_hits: int

    @property
    def num_objects(self) -> int:
        """Objects that should be pointed at."""
        return sum(not thing.is_crowd for thing in self.pair.objects)

    @property
    def num_points(self) -> int:
        """Points that are judged."""
        return sum(verdict is not None for verdict in self.match.is_right)


def score_points(records: Sequence[RecordDict], truth: Instances) -> Section:
    """Score `point` records.

    Raises:
        InputError: the records are about other images.
        MissingExtraError: the ground truth has masks and faster-coco-eval is not installed.
    """
    located = locate(records, truth)
    judged = [_judge(pair) for pair in located.pairs]
    by_name = {
        category: _scores([one for one in judged if one.pair.category == category]) for category in located.categories
    }
    counts = {
        "images": len(located.images),
        "requests": len(judged),
        "failed": sum(has_failed(pair.record) for pair in located.pairs),
        "objects": sum(one.num_objects for one in judged),
        "predictions": sum(len(one.match.is_right) for one in judged),
    }
    verdicts = {one.pair.record["id"]: _verdict(one) for one in judged if not has_failed(one.pair.record)}
    return Section("points", "F1", _scores(judged), counts, by_name, located.notes, verdicts=verdicts)


def _judge(pair: Pair) -> Judged:
    found = list(points(pair.record, *pair.size_wh))
    is_inside = np.zeros((len(found), len(pair.objects)), dtype=bool)
    for column, thing in enumerate(pair.objects):
        is_inside[:, column] = _inside(thing, [(point.x, point.y) for point in found], pair.size_wh)
    crowds = [thing.is_crowd for thing in pair.objects]
    match = match_points(is_inside, crowds)
    hits = is_inside[:, [not crowd for crowd in crowds]].any(axis=1)
    return Judged(pair, match, int(hits.sum()))


def _inside(thing: TruthObject, at: Sequence[tuple[float, float]], size_wh: tuple[int, int]) -> list[bool]:
    x, y, width, height = thing.bbox
    in_box = [x <= px <= x + width and y <= py <= y + height for px, py in at]
    if not any(in_box) or not thing.has_mask:
        return in_box
    mask = _decoded(truth_mask(thing, *size_wh))
    rows, columns = mask.shape
    return [
        near and bool(mask[min(int(py), rows - 1), min(int(px), columns - 1)])
        for near, (px, py) in zip(in_box, at, strict=True)
    ]


def _decoded(mask: dict[str, Any]) -> np.ndarray:
    from faster_coco_eval import mask as masks  # known to be there: `truth_mask` made the run lengths

    decoded: np.ndarray = masks.decode(mask)
    return decoded


def _scores(judged: Sequence[Judged]) -> Scores:
    right = sum(verdict is True for one in judged for verdict in one.match.is_right)
    num_points, num_objects = sum(one.num_points for one in judged), sum(one.num_objects for one in judged)
    errors = [abs(one.num_points - one.num_objects) for one in judged]
    precision, recall = ratio(right, num_points), ratio(right, num_objects)
    return {
        "hit_rate": ratio(sum(one.num_hits for one in judged), num_points),
        "precision": precision,
        "recall": recall,
        "F1": f1(precision, recall),
        "count_error": ratio(sum(errors), len(errors)),
        "count_exact": ratio(errors.count(0), len(errors)),
    }


def _verdict(one: Judged) -> Verdict:
    missed = tuple(unit_box(one.pair.objects[index], one.pair.size_wh) for index in one.match.missed)
    return Verdict(not missed and False not in one.match.is_right, one.match.is_right, missed)
