"""The `min_score` that serves each label best: where F1 at IoU 0.5 is highest, by a ground truth of COCO instances.

Looks at what the model said, under the names and without the doubles as they are in force, but before any `min_score`:
else a lower one could never be chosen. Thresholds apply after doubles are gone, so one matching of all that was said
tells the counts at every threshold. Apart from the scores, which need no labels file and are asked for far more often.
Source: product contract, section 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from md3cli.errors import InputError
from md3cli.evaluate.located import Pair, final_records, locate
from md3cli.evaluate.matching import Judged, inside_points, judge_boxes, judge_masks, judge_points, match_points
from md3cli.evaluate.scores import BestThresholds, Threshold
from md3cli.evaluate.truth import Instances, Truth
from md3cli.finished.names import some_of
from md3cli.records import RecordDict, Task
from md3cli.refine.collection import Collection, read
from md3cli.refine.labels import Label, Labels, fits_in_file
from md3cli.refine.refinement import Refinement, name_of

SCORE_DECIMALS = 3  # of the scores in records
_JUDGES: Mapping[str, Callable[[Pair], Judged]] = {
    Task.DETECT: judge_boxes,
    Task.SEGMENT: judge_masks,
    Task.POINT: judge_points,
}


class Step(NamedTuple):
    """What a threshold that falls to `score` adds to the number of right and of judged objects."""

    score: float
    right: int
    judged: int


@dataclass(slots=True)
class _Found:
    """All that one task found of a name."""

    task: str
    num_objects: int = 0
    steps: list[Step] = field(default_factory=list)

    def f1_at(self, min_score: float) -> float | None:
        return _f1(*self.counts_at(min_score))

    def counts_at(self, min_score: float) -> tuple[int, int, int]:
        """Return how many are right, judged, and there to be found, when objects below `min_score` are hidden."""
        shown = [step for step in self.steps if step.score >= min_score]
        return sum(step.right for step in shown), sum(step.judged for step in shown), self.num_objects


def best_thresholds(records: Collection, truths: Sequence[Truth]) -> tuple[Labels, BestThresholds]:
    """Return the labels in force, each with its best `min_score`, and how good each is.

    A name that several tasks found is judged by its boxes, else by its masks, else by its points. A label that cannot
    be judged keeps what it has; `Threshold.why` says why.

    Raises:
        InputError: no truth is COCO instances, or they are about other images.
        MissingExtraError: faster-coco-eval is not installed.
    """
    instances = [truth for truth in truths if isinstance(truth, Instances)]
    if not instances:
        raise InputError("--best-thresholds needs boxes, masks or points and their truth: --gt with COCO instances")
    labels = records.refinement.labels
    said = final_records(read(replace(records, refinement=without_min_score(records.refinement))))
    asked = _asked(said, labels)
    known = labels.followed_by(asked) if records.is_order_known else asked.followed_by(labels)
    found = _found(said, instances, labels)
    thresholds = [_threshold(label, found.get(label.name), asked, records.refinement) for label in known.labels]
    chosen = (replace(label, min_score=one.min_score) for label, one in zip(known.labels, thresholds, strict=True))
    best = Labels(tuple(label for label in chosen if fits_in_file(label)))
    after = _f1_of_all(found, replace(records.refinement, labels=best))
    notes = (*_task_notes(said, found, labels), *_nms_notes(records.refinement))
    return best, BestThresholds(tuple(thresholds), after, _f1_of_all(found, records.refinement), notes)


def without_min_score(refinement: Refinement) -> Refinement:
    """Return a refinement that shows objects of every score, under the same names and without the same doubles."""
    labels = Labels(tuple(replace(label, min_score=None) for label in refinement.labels.labels))
    return replace(refinement, labels=labels, min_score=None)


def _asked(records: Sequence[RecordDict], labels: Labels) -> Labels:
    """Return the names and prompts that the records ask for, as they are first seen."""
    prompts: dict[str, dict[str, None]] = {}
    for record in records:
        name = name_of(record, labels)
        if name is not None:
            prompts.setdefault(name, {})[str(record.get("prompt"))] = None
    return Labels(tuple(Label(name=name, prompts=tuple(asked)) for name, asked in prompts.items()))


def _found(records: Sequence[RecordDict], truths: Sequence[Instances], labels: Labels) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    for task, judge in _JUDGES.items():
        of_task = [record for record in records if record["task"] == task]
        for pair in (pair for truth in truths if of_task for pair in locate(of_task, truth, labels).pairs):
            one = found.setdefault(pair.name, _Found(task))
            if one.task == task:
                judged = judge(pair)
                one.num_objects += judged.num_objects
                one.steps += _point_steps(judged) if task == Task.POINT else _steps(judged)
    return found


def _steps(judged: Judged) -> Iterator[Step]:
    """Yield a step an object: the surest choose first, so a verdict does not depend on what is less sure."""
    for prediction, verdict in zip(judged.predictions, judged.match.is_right, strict=True):
        yield Step(min(prediction.score, 1.0), int(verdict is True), int(verdict is not None))


def _point_steps(judged: Judged) -> Iterator[Step]:
    """Yield a step a score: points are paired with as many objects as can be, so each further one may change all."""
    scores = np.array([min(one.score, 1.0) for one in judged.predictions])
    is_inside = inside_points(judged.pair, judged.predictions)
    crowds = [thing.is_crowd for thing in judged.pair.objects]
    right = num_judged = 0
    for score in sorted(set(scores.tolist()), reverse=True):
        verdicts = match_points(is_inside[scores >= score], crowds).is_right
        now_right, now_judged = verdicts.count(True), len(verdicts) - verdicts.count(None)
        yield Step(score, now_right - right, now_judged - num_judged)
        right, num_judged = now_right, now_judged


def _threshold(label: Label, found: _Found | None, asked: Labels, refinement: Refinement) -> Threshold:
    before = None if found is None else found.f1_at(refinement.min_score_of(label.name))
    if not fits_in_file(label):
        why = "blanks around it or its prompts, which no labels file can hold"
    elif label.name not in asked.by_name:
        why = "not asked here"
    elif found is None:
        why = "not in the ground truth"
    elif not found.num_objects:
        why = "in none of these pictures"
    elif not found.steps:
        why = "never found"
    elif (min_score := best_min_score(found.steps, found.num_objects)) is None:
        why = "never found where it is"
    else:
        return Threshold(label.name, min_score, found.f1_at(min_score), before, found.num_objects)
    return Threshold(label.name, label.min_score, before, before, 0 if found is None else found.num_objects, why)


def best_min_score(steps: Sequence[Step], num_objects: int) -> float | None:
    """Return the threshold of the best F1; None where nothing is right.

    What lies between two scores that were seen gives the same objects, so any of it is as good here. The middle is
    taken, rounded to 3 decimals, because new pictures will have scores in between (0 stands below the lowest); of
    several ranges of the best F1 the widest, of equally wide ones the lower. A threshold shows scores that equal it.
    """
    totals: dict[float, list[int]] = {}
    for step in steps:
        total = totals.setdefault(step.score, [0, 0])
        total[0], total[1] = total[0] + step.right, total[1] + step.judged
    scores = sorted(totals, reverse=True)
    right, judged = np.cumsum([totals[score] for score in scores], axis=0).T
    # F1 = 2 right / (judged + there): a quotient of small whole numbers, so that equal ones are equal floats.
    values = 2 * right / (judged + num_objects)
    best = values.max()
    if best <= 0:
        return None
    ranges: list[tuple[float, float]] = []  # (above, up to) of thresholds
    for place, (score, below) in enumerate(zip(scores, [*scores[1:], 0.0], strict=True)):
        if values[place] == best:
            is_same = place > 0 and values[place - 1] == best
            ranges.append((below, ranges.pop()[1] if is_same else score))
    low, high = max(ranges, key=lambda ends: (ends[1] - ends[0], -ends[0]))
    middle = round((low + high) / 2, SCORE_DECIMALS)
    return middle if low < middle <= high else high


def _f1(right: int, judged: int, there: int) -> float | None:
    return 2 * right / (judged + there) if judged and there else None


def _f1_of_all(found: Mapping[str, _Found], refinement: Refinement) -> float | None:
    counts = [one.counts_at(refinement.min_score_of(name)) for name, one in found.items()]
    return _f1(sum(right for right, _, _ in counts), sum(n for _, n, _ in counts), sum(n for _, _, n in counts))


def _task_notes(records: Sequence[RecordDict], found: Mapping[str, _Found], labels: Labels) -> Iterator[str]:
    """Yield notes about labels that other tasks than the one that chose have found, too."""
    others: dict[tuple[str, str], dict[str, None]] = {}
    for record in records:
        name, task = name_of(record, labels), str(record["task"])
        if name is not None and name in found and task != found[name].task:
            others.setdefault((found[name].task, task), {})[name] = None
    for (chosen, other), names in others.items():
        yield f"{chosen} alone chose the min_score of what {other} was asked, too: {some_of(tuple(names))}"


def _nms_notes(refinement: Refinement) -> Iterator[str]:
    """Yield a note about an `--nms` for all, under which thresholds were chosen."""
    if refinement.nms is not None:
        yield f"chosen with --nms {refinement.nms:g}, which the file does not hold"
