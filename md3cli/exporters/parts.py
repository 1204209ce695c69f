"""What was said about parts of one picture, beside the objects that the parts are of.

A part knows the record that found its object, and the object's place and box there. Thresholds take objects out of a
record as it is shown, so the box decides where the place does not fit any more. What is said of an object that is not
shown is counted, not told. A part of a record that is not here (a selection, somebody's COCO file) is a box of its own.
Memory holds one picture's records, as all that works on an `ImageGroup`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from md3cli.exporters.objects import PixelBox, Texts, clamped_box
from md3cli.records import RecordDict
from md3cli.refine.parts import PartText, is_of_part, part_label, part_text

_CORNERS = ("x_min", "y_min", "x_max", "y_max")
_Corners = tuple[float, ...]


class PartTexts(NamedTuple):
    """The texts about parts of one picture.

    `of_found` has them by the place of a record and of a thing in it; `own` are parts whose finder is not here, with
    theirs; `num_hidden` counts those about things that are not shown.
    """

    of_found: Mapping[int, Mapping[int, Texts]]
    own: Sequence[PixelBox] = ()
    num_hidden: int = 0

    def of(self, record: int) -> Mapping[int, Texts]:
        """Return the texts about the things of the record at a place, by their places."""
        return self.of_found.get(record, {})


NO_PARTS = PartTexts({})


@dataclass(slots=True)
class _Said:
    """Texts by question. Another text to the same question (another run, a repeat) has its number behind it."""

    texts: dict[str, str] = field(default_factory=dict)
    _known: set[PartText] = field(default_factory=set)
    _numbers: dict[str, int] = field(default_factory=dict)

    def add(self, said: PartText) -> None:
        if said in self._known:
            return
        self._known.add(said)
        name, number = said.question, self._numbers.get(said.question, 1)
        while name in self.texts:
            number += 1
            name = f"{said.question} ({number})"
        self._numbers[said.question] = number
        self.texts[name] = said.text


def part_texts(records: Sequence[RecordDict], width: int, height: int) -> PartTexts:
    """Return what the records of one picture, of `width` x `height` pixels, say about parts of it."""
    if not any(map(is_of_part, records)):
        return NO_PARTS
    finders = _Finders(records)
    of_found: dict[int, dict[int, _Said]] = {}
    own: dict[tuple[Any, ...], tuple[PixelBox, _Said]] = {}
    num_hidden = 0
    for record in records:
        if (said := part_text(record)) is None:
            continue
        region = record["region"]
        box = clamped_box(region, part_label(region), None, width, height)
        found = finders.find(region)
        if box is None or (found is not None and found.thing is None):
            num_hidden += 1
        elif found is not None and found.thing is not None:
            of_found.setdefault(found.record, {}).setdefault(found.thing, _Said()).add(said)
        else:
            key = (region["of"], region["index"], _corners(region), region["label"])
            own.setdefault(key, (box, _Said()))[1].add(said)
    return PartTexts(
        {place: {thing: said.texts for thing, said in things.items()} for place, things in of_found.items()},
        [box._replace(texts=said.texts) for box, said in own.values()],
        num_hidden,
    )


class _Place(NamedTuple):
    """Where a thing stands: the place of its record, and its own there, None where it is not shown."""

    record: int
    thing: int | None


class _Finders:
    """The records of one picture that found something with an extent, by their ids."""

    def __init__(self, records: Sequence[RecordDict]) -> None:
        self._places = {record.get("id"): place for place, record in enumerate(records) if _found(record) is not None}
        self._records = records
        self._by_corners: dict[int, dict[_Corners, int]] = {}

    def find(self, region: Mapping[str, Any]) -> _Place | None:
        """Return where the thing of a part is; None where the record that found it is not here."""
        place = self._places.get(region["of"])
        if place is None:
            return None
        found, index, corners = _found(self._records[place]) or [], region["index"], _corners(region)
        if index < len(found) and _corners(found[index]) == corners:
            return _Place(place, index)
        if place not in self._by_corners:  # thresholds took things before it out
            self._by_corners[place] = {_corners(thing): number for number, thing in reversed([*enumerate(found)])}
        return _Place(place, self._by_corners[place].get(corners))


def _found(record: RecordDict) -> list[Mapping[str, Any]] | None:
    """Return the boxes or masks of a record; None where it was not asked for such."""
    found = record.get("objects", record.get("segments"))
    return found if isinstance(found, list) else None


def _corners(thing: Mapping[str, Any]) -> _Corners:
    box = thing.get("bbox", thing)
    return tuple(box[name] for name in _CORNERS)
