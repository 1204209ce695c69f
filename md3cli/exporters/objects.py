"""What a record found, in pixels of the upright image: boxes, masks and points.

Records hold 0-1 floats as the model gave them; here, and only here, they become pixels, clamped to the image. A box
without extent after that is dropped: no reader takes one. Pure functions; knows nothing of files or formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from md3cli.exporters.svg_path import segment_polygons
from md3cli.records import RecordDict

Ring = list[tuple[float, float]]
Texts = Mapping[str, str]  # what was said about a part of a picture, by question
NO_TEXTS: Texts = MappingProxyType({})


class PixelBox(NamedTuple):
    """A box in pixels: left, top, width, height, all inside the image, width and height above 0."""

    label: str
    x: float
    y: float
    width: float
    height: float
    score: float | None
    is_truncated: bool  # the model's box went over the border
    texts: Texts = NO_TEXTS

    @property
    def ring(self) -> Ring:
        """Return the four corners, clockwise from the top left."""
        right, bottom = self.x + self.width, self.y + self.height
        return [(self.x, self.y), (right, self.y), (right, bottom), (self.x, bottom)]

    @property
    def corners(self) -> list[float]:
        """Return `flat(ring)`, with a third of the rounding: there may be millions."""
        left, top = round(self.x, 2), round(self.y, 2)
        right, bottom = round(self.x + self.width, 2), round(self.y + self.height, 2)
        return [left, top, right, top, right, bottom, left, bottom]


class PixelSegment(NamedTuple):
    """A mask as closed rings in pixels (non-zero fill, as SVG draws them) and its box.

    `rings` is the box's own ring where the model's path was invalid (`has_mask` is False).
    """

    box: PixelBox
    rings: list[Ring]
    has_mask: bool
    svg_path: str


class PixelPoint(NamedTuple):
    """A point in pixels, inside the image."""

    label: str
    x: float
    y: float
    score: float | None


def label_of(found: Mapping[str, Any], record: RecordDict) -> str:
    """Return the label of an object, point or segment: its own, else the record's prompt."""
    return str(found.get("label") or record.get("prompt") or "object")


def boxes(
    record: RecordDict, width: int, height: int, texts: Mapping[int, Texts] = MappingProxyType({})
) -> Iterator[PixelBox]:
    """Yield the boxes of a detect record; `texts` are about its objects, by their places."""
    for place, found in enumerate(record.get("objects") or ()):
        box = clamped_box(found, label_of(found, record), found.get("score"), width, height)
        if box is not None:
            yield box._replace(texts=texts[place]) if place in texts else box


def clamped_box(
    corners: Mapping[str, Any], label: str, score: float | None, width: int, height: int
) -> PixelBox | None:
    """Return `corners` (x_min ... y_max, 0-1) cut to the image; None where nothing of it is inside."""
    left, top, right, bottom = corners["x_min"], corners["y_min"], corners["x_max"], corners["y_max"]
    x_min, y_min, x_max, y_max = _clamped(left), _clamped(top), _clamped(right), _clamped(bottom)
    box_width, box_height = (x_max - x_min) * width, (y_max - y_min) * height
    if not (box_width > 0 and box_height > 0):  # written so that NaN is dropped too
        return None
    is_truncated = x_min != left or y_min != top or x_max != right or y_max != bottom
    return PixelBox(label, x_min * width, y_min * height, box_width, box_height, score, is_truncated)


def _clamped(share: float) -> float:
    return 0.0 if share < 0 else 1.0 if share > 1 else share


def segments(
    record: RecordDict, width: int, height: int, texts: Mapping[int, Texts] = MappingProxyType({})
) -> Iterator[PixelSegment]:
    """Yield the masks of a segment record; rings are cut to the image. `texts` as for `boxes`."""
    for place, found in enumerate(record.get("segments") or ()):
        box = clamped_box(found["bbox"], label_of(found, record), found.get("score"), width, height)
        if box is None:
            continue
        box = box._replace(texts=texts[place]) if place in texts else box
        pixel_rings = ([(x * width, y * height) for x, y in ring] for ring in segment_polygons(found))
        rings = [cut for ring in pixel_rings if abs(signed_area(cut := clip_ring(ring, width, height))) > 0]
        yield PixelSegment(box, rings or [box.ring], bool(rings), str(found["svg_path"]))


def points(record: RecordDict, width: int, height: int) -> Iterator[PixelPoint]:
    """Yield the points of a point record, moved to the border where they lie outside."""
    for found in record.get("points") or ():
        x, y = _clamped(found["x"]), _clamped(found["y"])
        if x == x and y == y:  # not NaN
            yield PixelPoint(label_of(found, record), x * width, y * height, found.get("score"))


def signed_area(ring: Ring) -> float:
    """Return the area by the shoelace formula, positive for a ring that runs clockwise on the screen."""
    following = ring[1:] + ring[:1]
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(ring, following, strict=True)) / 2


def flat(ring: Ring) -> list[float]:
    """Return `x1, y1, x2, y2, …` to a hundredth of a pixel, as COCO writes polygons."""
    return [round(value, 2) for point in ring for value in point]


def clip_ring(ring: Ring, width: float, height: float) -> Ring:
    """Cut `ring` to the image, one side after the other (Sutherland and Hodgman, 1974)."""
    for axis, limit, keeps_below in ((0, 0.0, False), (0, width, True), (1, 0.0, False), (1, height, True)):
        if all((point[axis] <= limit) if keeps_below else (point[axis] >= limit) for point in ring):
            continue
        ring = _clip_side(ring, axis, limit, keeps_below)
    return ring


def _clip_side(ring: Ring, axis: int, limit: float, keeps_below: bool) -> Ring:
    kept: Ring = []
    for start, end in zip(ring[-1:] + ring[:-1], ring, strict=True):
        is_start_in = start[axis] <= limit if keeps_below else start[axis] >= limit
        is_end_in = end[axis] <= limit if keeps_below else end[axis] >= limit
        if is_start_in != is_end_in:
            share = (limit - start[axis]) / (end[axis] - start[axis])
            other = start[1 - axis] + (end[1 - axis] - start[1 - axis]) * share
            kept.append((limit, other) if axis == 0 else (other, limit))
        if is_end_in:
            kept.append(end)
    return kept


def joined_ring(rings: list[Ring]) -> Ring:
    """Join all rings to one polygon, tied by bridges without width, for formats that know one polygon an object.

    Filled, it covers what the rings cover: a bridge is walked once each way.
    """
    first = rings[0]
    if len(rings) == 1:
        return first
    joined = [*first, first[0]]
    for ring in rings[1:]:
        joined += [*ring, ring[0], first[0]]
    return joined
