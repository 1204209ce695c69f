"""What the page shows of records: one item per picture, one entry per record, shapes to draw.

All that leaves here is plain data: numbers are finite, coordinates are in the units of the drawing (a picture fits in
`FRAME`), text is text. The template escapes text, so that nothing of a model or a file name can become markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from md3cli.errors import InputError
from md3cli.exporters.grouping import image_key
from md3cli.exporters.svg_path import Polygon, segment_polygons
from md3cli.records import RecordDict, printable
from md3cli.refine.parts import part_label, part_name
from md3cli.refine.quality import qualities_of

FRAME = (320.0, 240.0)  # drawing units of a picture's frame: about one CSS pixel on a card
NAME_CHAR, NAME_HEIGHT = 6.0, 10.0  # of a name's letter, about
NAME_ROWS = 3  # above a box and below it, where names may stand
NAME_LETTERS = 28  # of a name at most, as in cards.js
TEXT_LIMIT = 20_000  # characters of an answer or a caption kept on the page


@dataclass(frozen=True, slots=True)
class Shape:
    """One object on the picture, all in drawing units. `name_at` is where its name starts, or ends."""

    label: str
    score: float | None
    name_at: tuple[float, float]
    is_name_before: bool = False  # the name ends at `name_at`: it would leave the picture on the right
    rect: tuple[float, float, float, float] | None = None  # x, y, width, height
    point: tuple[float, float] | None = None
    path: str | None = None  # made from numbers, never the model's text
    verdict: str | None = None  # by ground truth: right, wrong, missed


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of reasoning; `points` (drawing units) are what it is grounded on."""

    text: str
    points: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """What a record about a part of the picture is about: `car 1`, and where it is, in drawing units."""

    name: str
    label: str
    rect: tuple[float, float, float, float]  # x, y, width, height


@dataclass(frozen=True, slots=True)
class Entry:
    """One record on the page."""

    record: RecordDict
    status: str  # ok, empty (asked for objects, found none), failed
    shapes: tuple[Shape, ...] = ()
    text: str | None = None  # caption or answer
    reasoning: tuple[Passage, ...] = ()
    note: str | None = None  # what went wrong, or how it ended
    verdict: str | None = None  # by ground truth: right, wrong
    missed: tuple[Shape, ...] = ()  # what the ground truth has and the record lacks
    part: Part | None = None

    @property
    def task(self) -> str:
        return str(self.record["task"])

    @property
    def prompt(self) -> str:
        return str(self.record.get("prompt") or self.record.get("length") or "")

    @property
    def scores(self) -> list[float]:
        """Return what sorting and the score filter go by: the objects' scores, or that of the choice taken."""
        scores = [shape.score for shape in self.shapes if shape.score is not None]
        return scores or ([max(self.choices.values())] if self.choices else [])

    @property
    def qualities(self) -> tuple[str, ...]:
        """Return what is wrong with the text as a text: loop, refusal, cut."""
        return qualities_of(self.record)

    @property
    def choices(self) -> dict[str, float]:
        """Return the score of each allowed answer, where the answer was not free."""
        choices = self.record.get("choices")
        scores = {str(name): as_score(value) for name, value in choices.items()} if isinstance(choices, dict) else {}
        return {name: score for name, score in scores.items() if score is not None}


@dataclass(slots=True)
class Item:
    """One picture with all that was asked of it (or one question without a picture)."""

    name: str
    width: int | None
    height: int | None
    frame: tuple[float, float]  # the picture's size in drawing units
    entries: list[Entry] = field(default_factory=list)
    thumbnail: str | None = None  # data URI
    missing: str | None = None  # why there is no thumbnail

    @property
    def first(self) -> RecordDict:
        """Return the first record, which says which picture this is."""
        return self.entries[0].record

    @property
    def picture_record(self) -> RecordDict:
        """Return a record with the picture's digest, where there is one."""
        return next((entry.record for entry in self.entries if entry.record.get("sha256")), self.first)


def items(records: Iterable[RecordDict]) -> Iterator[Item]:
    """Yield items in input order; neighbouring records of one picture share an item.

    Records about parts come behind the record that found these, wherever they stood, object by object.

    Raises:
        InputError: a record lacks what its task promises.
    """
    item: Item | None = None
    for record in records:
        if "image" not in record or "task" not in record:
            raise InputError(f"record {printable(str(record.get('id')))} is damaged: it has no image or no task")
        if item is None or record["image"] is None or not _is_same(record, item.first):
            if item is not None:
                yield _in_order(item)
            item = new_item(record)
        elif item.width is None:
            item.width, item.height, item.frame = _size(record)
        item.entries.append(entry_of(record, item.frame))
    if item is not None:
        yield _in_order(item)


def _in_order(item: Item) -> Item:
    """Move what is about parts behind what found these, and names apart."""
    if any(entry.part is not None for entry in item.entries):
        item.entries = _parts_behind(item.entries)
    return with_names_apart(item)


def with_names_apart(item: Item) -> Item:
    """Move names that would be written over one another: below their boxes, or inside."""
    taken: list[_Line] = []
    if sum(len(entry.shapes) for entry in item.entries) > 1:
        for place, entry in enumerate(item.entries):
            shapes = tuple(_with_free_name(shape, taken, item.frame) for shape in entry.shapes)
            item.entries[place] = replace(entry, shapes=shapes)
    return item


def _parts_behind(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries of a picture, each with those about the objects that it found behind it."""
    known = {entry.record.get("id") for entry in entries if entry.part is None}
    about: dict[object, list[Entry]] = {}
    for entry in entries:
        if entry.part is not None and (finder := entry.record["region"]["of"]) in known:
            about.setdefault(finder, []).append(entry)
    ordered: list[Entry] = []
    for entry in entries:
        if entry.part is None or entry.record["region"]["of"] not in known:
            own = about.pop(entry.record.get("id"), [])
            ordered += [entry, *sorted(own, key=lambda one: one.record["region"]["index"])]
    return ordered


class _Line(NamedTuple):
    """Where a name is written, in drawing units: from `left` to `right`, upwards from `base`."""

    left: float
    right: float
    base: float

    def overlaps(self, other: _Line) -> bool:
        is_beside = self.right <= other.left or other.right <= self.left
        return not is_beside and abs(self.base - other.base) < NAME_HEIGHT


def _with_free_name(shape: Shape, taken: list[_Line], frame: tuple[float, float]) -> Shape:
    """Return the shape with its name where none is `taken`, or where it was; its line is taken then."""
    (x, usual), width = shape.name_at, name_width(shape.label)
    left = x - width if shape.is_name_before else x
    bases = [usual]
    if shape.rect is not None:
        top, bottom = shape.rect[1], shape.rect[1] + shape.rect[3]
        bases += [base for base in (bottom + NAME_HEIGHT, top + NAME_HEIGHT, bottom - 3) if 0 < base <= frame[1]]
        rows = [number * NAME_HEIGHT for number in range(1, NAME_ROWS)]  # further off, each side in turn
        farther = [base for row in rows for base in (usual - row, bottom + NAME_HEIGHT + row)]
        bases += [base for base in farther if NAME_HEIGHT - 3 <= base <= frame[1]]
    lines = [_Line(left, left + width, base) for base in bases]
    line = next((line for line in lines if not any(line.overlaps(other) for other in taken)), lines[0])
    taken.append(line)
    return replace(shape, name_at=(x, round(line.base, 2)))


def _is_same(record: RecordDict, other: RecordDict) -> bool:
    """Return whether two records are about one picture, as far as they say."""
    digests = {digest for one in (record, other) if (digest := one.get("sha256"))}
    return len(digests) < 2 and image_key(record) == image_key(other)


def new_item(record: RecordDict) -> Item:
    """Return the picture of a record, without entries yet."""
    width, height, frame = _size(record)
    name = record["image"]
    return Item("" if name is None else printable(str(name)), width, height, frame)


def _size(record: RecordDict) -> tuple[int | None, int | None, tuple[float, float]]:
    width, height = record.get("width"), record.get("height")
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        return None, None, FRAME
    scale = min(FRAME[0] / width, FRAME[1] / height)
    return width, height, (width * scale, height * scale)


def entry_of(record: RecordDict, frame: tuple[float, float]) -> Entry:
    """Return what the page shows of one record; raises as `items`."""
    try:
        if (error := record.get("error")) is not None:
            entry = Entry(record, "failed", note=f"{error['type']}: {error.get('message', '')}")
        else:
            entry = _answered(record, frame)
        if (region := record.get("region")) is None:
            return entry
        return replace(entry, part=Part(part_name(region), part_label(region), _rect(region, frame)))
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        name = printable(f"{record.get('id')} ({record.get('image')})")
        raise InputError(f"record {name} is damaged: {type(cause).__name__} {cause}") from cause


def _answered(record: RecordDict, frame: tuple[float, float]) -> Entry:
    note = "cut off at the limit" if record.get("finish_reason") == "length" else None
    match record["task"]:
        case "caption":
            return Entry(record, "ok", text=record["caption"][:TEXT_LIMIT], note=note)
        case "query":
            reasoning = tuple(_passages(record.get("reasoning") or {}, frame))
            return Entry(record, "ok", text=record["answer"][:TEXT_LIMIT], reasoning=reasoning, note=note)
        case "detect":
            shapes = tuple(_box(thing, frame) for thing in record["objects"])
        case "point":
            shapes = tuple(_point(thing, frame) for thing in record["points"])
        case _:
            shapes = tuple(_segment(thing, frame) for thing in record["segments"])
            note = next((f"mask: {bad}" for s in record["segments"] if (bad := s.get("parse_error"))), note)
    return Entry(record, "ok" if shapes else "empty", shapes=shapes, note=note)


def as_score(value: object) -> float | None:
    """Return a score of a record, or None where it holds none that can be used."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _coordinate(value: Any, extent: float) -> float:
    """Return a 0-1 coordinate in drawing units; a box may leave the picture, but not by far."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"coordinate {value} is not finite")
    return round(min(max(number, -1.0), 2.0) * extent, 2)


def _rect(box: Mapping[str, Any], frame: tuple[float, float]) -> tuple[float, float, float, float]:
    x, y = _coordinate(box["x_min"], frame[0]), _coordinate(box["y_min"], frame[1])
    right, bottom = _coordinate(box["x_max"], frame[0]), _coordinate(box["y_max"], frame[1])
    return x, y, round(max(right - x, 0.0), 2), round(max(bottom - y, 0.0), 2)


def _box(thing: Mapping[str, Any], frame: tuple[float, float]) -> Shape:
    rect = _rect(thing, frame)
    return _named(thing, rect[:2], rect[0] + rect[2], frame, rect=rect)


def _point(thing: Mapping[str, Any], frame: tuple[float, float]) -> Shape:
    x, y = _coordinate(thing["x"], frame[0]), _coordinate(thing["y"], frame[1])
    return _named(thing, (x + 6, y - 2), x - 6, frame, point=(x, y))


def _segment(thing: Mapping[str, Any], frame: tuple[float, float]) -> Shape:
    rect = _rect(thing["bbox"], frame)
    path = "".join(_path_data(polygon, frame) for polygon in segment_polygons(thing)) or None
    return _named(thing, rect[:2], rect[0] + rect[2], frame, rect=rect, path=path)


def missed_shape(label: str, box: tuple[float, float, float, float], frame: tuple[float, float]) -> Shape:
    """Return an object of the ground truth that nothing found; `box` is x_min, y_min, x_max, y_max, 0-1."""
    thing = dict(zip(("x_min", "y_min", "x_max", "y_max"), box, strict=True))
    return replace(_box({"label": label, **thing}, frame), verdict="missed")


def _named(
    thing: Mapping[str, Any], corner: tuple[float, float], right: float, frame: tuple[float, float], **outline: Any
) -> Shape:
    """The shape with its name above its corner: inside where there is no room above, to the left of `right`
    where there is none beside."""
    label, score = str(thing["label"]), as_score(thing.get("score"))
    x, y = max(corner[0], 0.0) + 1.5, corner[1] - 3 if corner[1] > 12 else max(corner[1], 0.0) + 10
    width = name_width(label)
    is_before = x + width > frame[0] and min(right, frame[0]) - width > 0
    return Shape(label, score, (min(right, frame[0]) - 1.5 if is_before else x, y), is_before, **outline)


def name_width(label: str) -> float:
    """Return about how wide a label and its score are written, in drawing units."""
    return NAME_CHAR * (min(len(label), NAME_LETTERS) + 5)


def _path_data(polygon: Polygon, frame: tuple[float, float]) -> str:
    return "M" + " ".join(f"{_coordinate(x, frame[0]):g},{_coordinate(y, frame[1]):g}" for x, y in polygon) + "Z"


def _passages(reasoning: Mapping[str, Any], frame: tuple[float, float]) -> Iterator[Passage]:
    """Yield the reasoning cut where its grounding starts and ends (character offsets of the record)."""
    text, done = str(reasoning.get("text") or "")[:TEXT_LIMIT], 0
    for grounding in sorted(reasoning.get("grounding") or [], key=lambda g: int(g["start_idx"])):
        start = min(max(int(grounding["start_idx"]), done), len(text))
        end = min(max(int(grounding["end_idx"]), start), len(text))
        points = tuple((_coordinate(x, frame[0]), _coordinate(y, frame[1])) for x, y in grounding["points"])
        if start > done:
            yield Passage(text[done:start])
        yield Passage(text[start:end], points)
        done = end
    if done < len(text):
        yield Passage(text[done:])
