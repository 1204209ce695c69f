"""What is shown of what the model said: names, thresholds and doubles, by one pure function.

Tables, exports, reports and scores all show records that went through `refined`; the journal keeps what the model said.
Source: product contract, section 8. Of doubles the best score stays (non-maximum suppression,
Felzenszwalb et al., 2010).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from md3cli.errors import UsageError
from md3cli.records import RecordDict, Task
from md3cli.refine.labels import Label, Labels, labels_of_tables

FOUND_BY_TASK: Mapping[str, str] = {Task.DETECT: "objects", Task.POINT: "points", Task.SEGMENT: "segments"}
SHARED_NAME_NMS = 0.7  # where several prompts share a name: they find the same things
_MOST_LABELS = 100_000  # in a run.json


@dataclass(frozen=True)
class Refinement:
    """Names and thresholds as chosen; `min_score` and `nms` None are not chosen. A label's own limits win.

    `min_score` hides what has a lower score, 0-1; `nms` is the IoU above which the less sure of two boxes goes.
    """

    labels: Labels = field(default=Labels())
    min_score: float | None = None
    nms: float | None = None
    has_file: bool = False  # the labels are those of a file, whose order counts

    def over(self, earlier: Refinement) -> Refinement:
        """Return this choice, and what `earlier` chose where this one says nothing.

        Labels keep the order of a file; those that were typed come behind those that were there before.
        """
        labels = self.labels.followed_by(earlier.labels)
        return Refinement(
            labels if self.has_file else labels.in_order_of(earlier.labels),
            earlier.min_score if self.min_score is None else self.min_score,
            earlier.nms if self.nms is None else self.nms,
            self.has_file or earlier.has_file,
        )

    def min_score_of(self, name: str) -> float:
        """Return the lowest score that is shown for a name; 0 shows all."""
        label = self.labels.by_name.get(name)
        own = None if label is None else label.min_score
        return own if own is not None else self.min_score or 0.0

    def nms_of(self, name: str, *, is_shared: bool) -> float | None:
        """Return the IoU above which a double goes; None: none does. `is_shared`: several prompts have the name."""
        label = self.labels.by_name.get(name)
        own = label.nms if label is not None and label.nms is not None else self.nms
        is_shared = is_shared or (label is not None and label.is_shared)
        chosen = own if own is not None else SHARED_NAME_NMS if is_shared else None
        return None if chosen is None or chosen >= 1 else chosen

    @cached_property
    def has_thresholds(self) -> bool:
        """Whether a score can hide anything."""
        return bool(self.min_score) or any(label.min_score for label in self.labels.labels)

    @cached_property
    def may_compare(self) -> bool:
        """Whether boxes of a picture may be compared, so that its records must be read together."""
        labels = self.labels.labels
        return self.nms is not None or any(label.nms is not None or label.is_shared for label in labels)

    @cached_property
    def changes_nothing(self) -> bool:
        """Whether a record that is read alone is shown as it is."""
        return not (self.labels.labels or self.has_thresholds or self.may_compare)

    def to_json(self) -> dict[str, Any]:
        """Return the choice as run.json keeps it."""
        thresholds = {"min_score": self.min_score, "nms": self.nms}
        return {"labels": self.labels.to_json(), **thresholds, "has_file": self.has_file}

    @classmethod
    def from_json(cls, document: object) -> Refinement:
        """Read what run.json says, whoever wrote it: what is not of its kind is as good as absent."""
        if not isinstance(document, dict):
            return cls()
        tables, labels = document.get("labels"), Labels()
        is_short = isinstance(tables, list) and len(tables) <= _MOST_LABELS
        if isinstance(tables, list) and is_short and all(isinstance(table, dict) for table in tables):
            with contextlib.suppress(UsageError):
                labels = labels_of_tables(tables, "run.json", may_fill=True)
        has_file = document.get("has_file") is True
        return cls(labels, _share(document.get("min_score")), _share(document.get("nms")), has_file)


def _share(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= 1 else None


def name_of(record: RecordDict, labels: Labels) -> str | None:
    """Return the name under which a record's objects are shown; None for a caption, a question, and what has no prompt.

    It is the name given for the prompt, else that under which it was asked, else the prompt. Where nothing was found,
    a template tells under which name a prompt was asked that it was filled to.
    """
    key, prompt = FOUND_BY_TASK.get(str(record.get("task"))), record.get("prompt")
    if key is None:
        return None
    label = labels.by_prompt.get(str(prompt))
    if label is not None:
        return label.name
    found: Iterable[Mapping[str, Any]] = record.get(key) or ()
    asked_as = next((thing["label"] for thing in found if thing.get("label")), None)
    if asked_as is None and prompt is not None:
        template = labels.may_be_of(str(prompt))
        asked_as = prompt if template is None else template.name
    return None if asked_as is None else str(asked_as)


class _Box(NamedTuple):
    """A box of a detect record: where it stands (record, number there), and what is compared."""

    record: int
    number: int
    score: float
    asked: int
    corners: tuple[float, float, float, float]


def refined(records: Sequence[RecordDict], refinement: Refinement) -> list[RecordDict]:
    """Return the records of one picture as they are shown, in their order; the given ones stay as they are.

    Found objects get the name of their prompt; those with a score below the name's `min_score` go, and of two boxes
    of one name that overlap more than its `nms`, the one with the lower score (of equal ones the first asked stays).
    Boxes are compared as the model gave them, unclamped, and only where the picture's bytes are the same (`sha256`).
    A record whose objects all go stays, with none.
    """
    shown = [named(record, refinement.labels) for record in records]
    # A record alone has doubles only where its name's own limit says so.
    doubles = set(_doubles(shown, refinement)) if len(records) > 1 or refinement.may_compare else set()
    return [_without(record, refinement, place, doubles) for place, record in enumerate(shown)]


def named(record: RecordDict, labels: Labels, template: str | None = None) -> RecordDict:
    """Return the record with the name that `labels` gives its prompt, or its `template`, on all that was found.

    A part of a picture that is called by a prompt gets the name of that prompt, too.
    """
    if record.get("region") is not None:
        record = _with_named_part(record, labels)
    prompt = str(record.get("prompt"))
    label: Label | None = labels.by_prompt.get(prompt) if template is None else labels.by_template.get(template)
    if label is None and template is None and record.get("region") is not None:
        label = labels.may_be_of(prompt)  # of a part, it was filled with what the part is called
    key = FOUND_BY_TASK.get(str(record.get("task")))
    if label is None or key is None or not record.get(key):
        return record
    return record | {key: [thing | {"label": label.name} for thing in record[key]]}


def _with_named_part(record: RecordDict, labels: Labels) -> RecordDict:
    called = str(record["region"].get("label"))
    name = called if called in labels.by_name else labels.name_of(called)
    return record if name == called else record | {"region": record["region"] | {"label": name}}


def numbered(record: RecordDict) -> RecordDict:
    """Return the record with `index` on all that was found: its place in the record as it is written, from 0."""
    key = FOUND_BY_TASK.get(str(record.get("task")))
    if key is None or not record.get(key):
        return record
    return record | {key: [thing | {"index": index} for index, thing in enumerate(record[key])]}


def _without(record: RecordDict, refinement: Refinement, place: int, doubles: set[tuple[int, int]]) -> RecordDict:
    key = FOUND_BY_TASK.get(str(record.get("task")))
    if key is None or not record.get(key) or not (doubles or refinement.has_thresholds):
        return record
    found = record[key]
    kept = [
        thing
        for index, thing in enumerate(found)
        if (place, index) not in doubles and _is_sure(thing, refinement.min_score_of(_label(thing, record)))
    ]
    return record if len(kept) == len(found) else record | {key: kept}


def _is_sure(thing: Mapping[str, Any], least: float) -> bool:
    """Return whether a found thing is shown; one without a score (of another tool) always is."""
    score = thing.get("score")
    return score is None or score >= least


def _label(thing: Mapping[str, Any], record: RecordDict) -> str:
    return str(thing.get("label") or record.get("prompt") or "object")


def _doubles(records: Sequence[RecordDict], refinement: Refinement) -> Iterator[tuple[int, int]]:
    """Yield (record, object) of each box that another of its picture and name makes superfluous."""
    groups: dict[tuple[object, str], list[_Box]] = {}
    prompts: dict[str, set[object]] = {}
    asked = refinement.labels.place_of
    for place, record in enumerate(records):
        if record.get("task") != Task.DETECT:
            continue
        for index, thing in enumerate(record.get("objects") or ()):
            name = _label(thing, record)
            prompts.setdefault(name, set()).add(record.get("prompt"))
            order = asked.get(str(record.get("prompt")), len(asked) + place)
            corners = (thing["x_min"], thing["y_min"], thing["x_max"], thing["y_max"])
            score = thing.get("score")
            box = _Box(place, index, -1.0 if score is None else score, order, corners)
            groups.setdefault((record.get("sha256"), name), []).append(box)
    for (_, name), boxes in groups.items():
        limit = refinement.nms_of(name, is_shared=len(prompts[name]) > 1)
        if limit is not None and len(boxes) > 1:
            yield from ((box.record, box.number) for box in _suppressed(boxes, limit))


def _suppressed(boxes: Sequence[_Box], limit: float) -> Iterator[_Box]:
    """Yield the boxes that overlap one that stays by more than `limit`, the best score first."""
    kept: list[_Box] = []
    for box in sorted(boxes, key=lambda box: (-box.score, box.asked, box.number)):
        if any(iou(box.corners, other.corners) > limit for other in kept):
            yield box
        else:
            kept.append(box)


def iou(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    """Return the intersection of two boxes (x_min, y_min, x_max, y_max) over their union; 0 where one has no area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if not (width > 0 and height > 0):  # written so that NaN overlaps nothing
        return 0.0
    shared = width * height
    union = _area(one) + _area(other) - shared
    return shared / union if union > 0 and math.isfinite(union) else 0.0


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


class RefinedStream:
    """Refines records that come one after another; holds those of a picture until the next one comes.

    Records of a picture that come apart (a manifest that names it in two places) are not compared.
    """

    def __init__(self, refinement: Refinement) -> None:
        self._refinement = refinement
        self._held: list[RecordDict] = []

    def add(self, records: Iterable[RecordDict]) -> list[RecordDict]:
        """Take records and return those that can be shown."""
        ready: list[RecordDict] = []
        for record in records:
            if self._held and not (self._refinement.may_compare and _is_same_picture(self._held[0], record)):
                ready += self.rest()
            self._held.append(record)
            if not self._refinement.may_compare:
                ready += self.rest()
        return ready

    def rest(self) -> list[RecordDict]:
        """Return the records that are still held, at the end."""
        held, self._held = self._held, []
        return refined(held, self._refinement)


def _is_same_picture(one: RecordDict, other: RecordDict) -> bool:
    return all(one.get(key) == other.get(key) for key in ("image", "image_b64"))
