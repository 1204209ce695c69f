"""Which prediction found which object: one to one, at one IoU.

COCO's rule (cocoeval.py of cocoapi): the surest prediction chooses first, among the objects not yet
taken the one it overlaps most; what lies in a crowd is not judged. For points there is no overlap to
compare, so as many as possible are paired (Kuhn, 1955).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
