"""What records say against somebody's boxes: which are missing, doubtful, moved or misnamed, the surest finding first.

Only what was asked and answered counts: of a picture or a class that no record asks about there is no finding. Boxes
of one name are first matched one to one, as `md3 eval` matches them (matching.py); a finding is made of what is left on
either side, and each box stands in one finding at most. Pure: records and truth in, findings out.

Sureness is 0 to 1. `missing`: the score of what was found, less where it lies on a box of another name. `moved`: that
score, less as the two boxes overlap more. `misnamed`: that score and how far the two overlap. `doubtful`: how often
boxes of its name are found, times how sure the records are of this picture, less what speaks for the box: in a picture
where the records hesitate, what they do not see may well be there.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from md3cli.errors import InputError
from md3cli.evaluate.located import NO_SIZE, Pair, has_failed, locate, under_names_of
from md3cli.evaluate.matching import IOU_THRESHOLD, Prediction, boxes_of, match_by_overlap
from md3cli.evaluate.truth import Instances, TruthObject
from md3cli.finished.names import some_of
from md3cli.records import RecordDict, Task, compact_json, counted
from md3cli.refine.labels import Labels
from md3cli.refine.parts import is_of_part
from md3cli.refine.refinement import iou
from md3cli.refine.selection import found_in

SCHEMA = "md3-audit/1"
Kind = Literal["missing", "doubtful", "moved", "misnamed"]
KINDS: tuple[Kind, ...] = ("missing", "doubtful", "moved", "misnamed")
CORNERS = ("x_min", "y_min", "x_max", "y_max")
AUDITED = frozenset({Task.DETECT, Task.SEGMENT})

LEAST_OVERLAP = 0.1  # IoU from which a box and what was found of its name may be one thing, moved
SAME_PLACE = 0.7  # IoU from which they are one place, however sure
ALIKE = 0.7  # IoU at one centre from which two boxes beside each other may be one thing, moved
NEAR = 1.5  # of their mean side: so far apart their centres may then be, across and down

Box = tuple[float, float, float, float]  # x_min, y_min, x_max, y_max, 0-1


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two boxes of a finding: an annotation of the ground truth, or an object of a record.

    `facts` says which it is: the annotation's `id` where it has one; the record's id and the object's index and score.
    """

    label: str
    box: Box
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the side in plain types."""
        return {"label": self.label, "box": _corners(self.box), **self.facts}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in the ground truth that records speak against; at least one of the two sides is there.

    `image` is the records' name of the picture, `record` one of its records, `overlap` the IoU of the two sides.
    """

    kind: Kind
    image: str
    score: float
    annotation: Side | None
    found: Side | None
    overlap: float | None = None
    record: RecordDict = field(default_factory=dict, compare=False)

    @property
    def id(self) -> str:
        """Return a name of the finding that stays the same as long as both sides say the same."""
        said = [
            self.kind,
            self.image,
            *(None if side is None else side.to_json() for side in (self.annotation, self.found)),
        ]
        return hashlib.sha256(compact_json(said)).hexdigest()[:32]

    @property
    def shown(self) -> Side:
        """Return the side that the finding is about: the annotation, or for what is missing the object."""
        side = self.annotation or self.found
        assert side is not None
        return side

    def to_json(self) -> dict[str, Any]:
        """Return the finding as a line of JSON says it."""
        about: dict[str, Any] = {"schema": SCHEMA, "id": self.id, "kind": self.kind, "image": self.image}
        about["label"] = self.shown.label
        about |= {"box": _corners(self.shown.box), "score": round(self.score, 3)}
        if self.overlap is not None:
            about["iou"] = round(self.overlap, 3)
        about["annotation"] = None if self.annotation is None else self.annotation.to_json()
        return about | {"found": None if self.found is None else self.found.to_json()}


@dataclass(frozen=True, slots=True)
class Audit:
    """All findings, the surest first; `notes` say in sentences what was not looked at."""

    findings: tuple[Finding, ...]
    num_images: int
    num_annotations: int
    notes: tuple[str, ...]


def audit(records: Sequence[RecordDict], truth: Instances, labels: Labels) -> Audit:
    """Find what `records` (final and refined, see `final_records`) speak against in the boxes of `truth`.

    Raises:
        InputError: no record found boxes, or none is about a picture of the ground truth.
    """
    taken, notes = _audited(under_names_of(truth.rows, truth.path.name, records))
    located = locate(taken, truth, labels)
    by_image: dict[str, list[Pair]] = {}
    sizeless: dict[str, None] = {}
    for pair in located.pairs:
        if pair.size_wh == NO_SIZE and pair.objects:
            sizeless[pair.image] = None
        else:
            by_image.setdefault(pair.image, []).append(pair)
    if sizeless:
        have = counted(len(sizeless), "image has", "images have")
        notes.append(f"{have} no size in records and ground truth: {some_of([*sizeless])}")
    pictures = [_Picture(pairs) for pairs in by_image.values()]
    usual = _Usual(pictures)
    findings = sorted((f for p in pictures for f in p.findings(usual)), key=lambda finding: -finding.score)
    return Audit(tuple(findings), len(pictures), usual.num_things, (*notes, *located.notes))


def _audited(records: Sequence[RecordDict]) -> tuple[list[RecordDict], list[str]]:
    """Return the records that say where something is in a whole picture; and in sentences what the others are."""
    boxed = [record for record in records if record["task"] in AUDITED and record["image"] is not None]
    if not boxed:
        tasks = ", ".join(dict.fromkeys(str(record["task"]) for record in records)) or "nothing"
        raise InputError(f"nothing to audit by: records of detect or segment say where things are, here are {tasks}")
    whole = [record for record in boxed if not is_of_part(record)]
    taken = [record for record in whole if not has_failed(record)]
    counts = {
        "failed, so they say nothing": len(whole) - len(taken),
        "are about parts of pictures, so they do not say what else is there": len(boxed) - len(whole),
    }
    notes = [f"{count:,} of {len(boxed):,} records {what}" for what, count in counts.items() if count]
    found = [thing for record in taken for thing in record.get("objects") or record.get("segments") or ()]
    if found and all(thing.get("score") is None for thing in found):
        notes.append("the records have no scores, so all that was found counts as sure")
    return taken, notes


# ---- one picture ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Thing:
    """A box of the ground truth; `is_found` where something of its name was matched to it."""

    name: str
    box: Box
    truth: TruthObject
    is_found: bool = False

    @property
    def side(self) -> Side:
        return Side(self.name, self.box, {} if self.truth.id is None else {"id": self.truth.id})


@dataclass(frozen=True, slots=True)
class _Seen:
    """An object of a record, as the box it has inside the picture."""

    name: str
    box: Box
    prediction: Prediction
    record: RecordDict

    @property
    def score(self) -> float:
        return self.prediction.score

    @property
    def side(self) -> Side:
        """The object, with its place in the record as that is written."""
        place = self.prediction.place[1]
        thing = found_in(self.record)[place]
        facts = {"score": thing.get("score"), "record": self.record["id"], "index": thing.get("index", place)}
        return Side(self.name, self.box, facts)


class _Picture:
    """The boxes of one picture on both sides, matched name by name; then what is left is told in findings."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.record = pairs[0].records[0]
        self.things: list[_Thing] = []
        self.seen: list[_Seen] = []
        self._partners: dict[int, int] = {}  # of seen: things, by number
        self._free: set[int] = set()  # seen that are no box of the ground truth, and lie in no crowd
        self._cut: set[str] = set()  # names whose list of objects was cut off
        for pair in pairs:
            self._add(pair)
        self._overlap = overlaps([one.box for one in self.seen], [one.box for one in self.things])
        self._is_same = np.array([[s.name == t.name for t in self.things] for s in self.seen], dtype=bool)
        self._is_same = self._is_same.reshape(self._overlap.shape)

    def _add(self, pair: Pair) -> None:
        objects = sorted(pair.objects, key=lambda thing: thing.is_crowd)  # crowds last
        crowds = [thing.is_crowd for thing in objects]
        there = [_unit_box(thing.bbox, pair.size_wh) for thing in objects]
        predictions = list(boxes_of(pair))
        seen = [_unit_box(one.bbox, pair.size_wh) for one in predictions]
        match = match_by_overlap(overlaps(seen, there, crowds), [one.score for one in predictions], crowds)
        first_seen, first_thing = len(self.seen), len(self.things)
        for box, thing in zip(there, objects, strict=True):
            if not thing.is_crowd:
                self.things.append(_Thing(pair.category, box, thing))
        for place, (box, one) in enumerate(zip(seen, predictions, strict=True)):
            self.seen.append(_Seen(pair.category, box, one, pair.records[one.place[0]]))
            if place in match.partners:
                self._partners[first_seen + place] = first_thing + match.partners[place]
                self.things[first_thing + match.partners[place]].is_found = True
            elif match.is_right[place] is False:
                self._free.add(first_seen + place)
        if any(record.get("finish_reason") == "length" for record in pair.records):
            self._cut.add(pair.category)

    def findings(self, usual: _Usual) -> Iterator[Finding]:
        """Yield what the records speak against in this picture."""
        taken_things, taken_seen = set(self._partners.values()), set(self._partners)
        pairs = [*self._too_far(), *self._moved(), *self._misnamed()]
        for score, kind, seen, thing in sorted(pairs, key=lambda pair: -pair[0]):
            is_partner = self._partners.get(seen) == thing
            if is_partner or (thing not in taken_things and seen not in taken_seen):
                taken_things.add(thing)
                taken_seen.add(seen)
                yield self._finding(kind, score, thing, seen)
        for thing in range(len(self.things)):
            if thing not in taken_things and self.things[thing].name not in self._cut:
                yield self._finding("doubtful", self._doubt(thing, usual), thing, None)
        yield from self._missing(self._free - taken_seen)

    def _too_far(self) -> Iterator[_Scored]:
        """Yield pairs that were matched and still lie apart."""
        for seen, thing in self._partners.items():
            apart = (SAME_PLACE - self._overlap[seen, thing]) / (SAME_PLACE - IOU_THRESHOLD)
            if apart > 0:
                yield self.seen[seen].score * float(min(apart, 1.0)), "moved", seen, thing

    def _moved(self) -> Iterator[_Scored]:
        """Yield pairs of a name that overlap too little to be matched, or lie beside each other and are alike."""
        for seen, thing in self._left(self._is_same):
            one, other = self.seen[seen], self.things[thing]
            if self._overlap[seen, thing] >= LEAST_OVERLAP:
                yield one.score, "moved", seen, thing
            elif (alike := likeness(one.box, other.box)) >= ALIKE:
                yield one.score * alike, "moved", seen, thing

    def _misnamed(self) -> Iterator[_Scored]:
        for seen, thing in self._left(~self._is_same & (self._overlap >= IOU_THRESHOLD)):
            yield self.seen[seen].score * math.sqrt(self._overlap[seen, thing]), "misnamed", seen, thing

    def _left(self, is_pair: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield those pairs of which neither side was matched."""
        for seen, thing in np.argwhere(is_pair).tolist():
            if seen in self._free and not self.things[thing].is_found:
                yield seen, thing

    def _doubt(self, place: int, usual: _Usual) -> float:
        """Return how sure it is that nothing of its name is there: as sure as what was found in the picture is."""
        thing, scores = self.things[place], [one.score for one in self.seen]
        lowest = min((one.score for one in self.seen if one.name == thing.name), default=1.0)
        mean = sum(scores) / len(scores) if scores else usual.score
        evidence = float((self._overlap[:, place] * self._is_same[:, place] * np.array(scores)).max(initial=0.0))
        return usual.share_found(thing.name) * lowest * mean * (1.0 - evidence)

    def _missing(self, free: set[int]) -> Iterator[Finding]:
        """Yield objects that no box of their name covers; of those that cover each other the surest."""
        told: list[int] = []
        for seen in sorted(free, key=lambda seen: -self.seen[seen].score):
            one = self.seen[seen]
            if (self._overlap[seen] * self._is_same[seen]).max(initial=0.0) >= IOU_THRESHOLD:
                continue  # a second box of what has one
            if any(one.name == self.seen[o].name and iou(one.box, self.seen[o].box) >= IOU_THRESHOLD for o in told):
                continue
            told.append(seen)
            beside = float((self._overlap[seen] * ~self._is_same[seen]).max(initial=0.0))
            yield self._finding("missing", one.score * (1.0 - beside), None, seen)

    def _finding(self, kind: Kind, score: float, thing: int | None, seen: int | None) -> Finding:
        overlap = None if thing is None or seen is None else float(self._overlap[seen, thing])
        annotation = None if thing is None else self.things[thing].side
        found = None if seen is None else self.seen[seen].side
        record = self.record if seen is None else self.seen[seen].record
        return Finding(kind, self.record["image"], score, annotation, found, overlap, record)


_Scored = tuple[float, Kind, int, int]  # score, kind, number of what was seen, number of the thing


class _Usual:
    """How well the records find what the ground truth has: of each name how often, and how sure they are on the whole.

    Of few boxes nobody knows much: one that was found and one that was not are added to each name (Laplace).
    """

    def __init__(self, pictures: Sequence[_Picture]) -> None:
        self._found: Counter[str] = Counter()
        self._all: Counter[str] = Counter()
        for thing in (thing for picture in pictures for thing in picture.things):
            self._all[thing.name] += 1
            self._found[thing.name] += thing.is_found
        scores = [one.score for picture in pictures for one in picture.seen]
        self.score = sum(scores) / len(scores) if scores else 1.0
        self.num_things = self._all.total()

    def share_found(self, name: str) -> float:
        """Return the share of the boxes of this name that were found."""
        return (self._found[name] + 1) / (self._all[name] + 2)


def _unit_box(bbox: Sequence[float], size_wh: tuple[int, int]) -> Box:
    """Return x, y, width, height in pixels as corners in 0-1."""
    (x, y, width, height), (image_width, image_height) = bbox, size_wh
    return x / image_width, y / image_height, (x + width) / image_width, (y + height) / image_height


def likeness(one: Box, other: Box) -> float:
    """Return the IoU that two boxes would have at one centre; 0 where they are too far apart to be one thing, moved."""
    (width, height), (other_width, other_height) = ((box[2] - box[0], box[3] - box[1]) for box in (one, other))
    apart = (abs(one[0] + one[2] - other[0] - other[2]) / 2, abs(one[1] + one[3] - other[1] - other[3]) / 2)
    if apart[0] >= NEAR * (width + other_width) / 2 or apart[1] >= NEAR * (height + other_height) / 2:
        return 0.0
    return iou((0.0, 0.0, width, height), (0.0, 0.0, other_width, other_height))


def _corners(box: Box) -> dict[str, float]:
    return {name: round(value, 6) for name, value in zip(CORNERS, box, strict=True)}


def overlaps(found: Sequence[Box], there: Sequence[Box], is_crowd: Sequence[bool] = ()) -> np.ndarray:
    """Return the IoU [found, there] of boxes; for a crowd the intersection over the found box's own area."""
    one, other = (np.array(boxes, dtype=np.float64).reshape(-1, 4) for boxes in (found, there))
    sides = np.minimum(one[:, None, 2:], other[None, :, 2:]) - np.maximum(one[:, None, :2], other[None, :, :2])
    shared = sides.clip(min=0).prod(axis=2)
    areas, other_areas = ((boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1) for boxes in (one, other))
    crowds = np.array(is_crowd or [False] * len(there), dtype=bool)
    whole = np.where(crowds[None, :], areas[:, None], areas[:, None] + other_areas[None, :] - shared)
    result: np.ndarray = np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
    return result
