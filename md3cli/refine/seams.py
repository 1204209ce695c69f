"""What was found in a picture and in its tiles, as one list: each object once, whichever views show it.

A view is the whole picture or one of its tiles (images/tiles.py). The rule for boxes, in three steps:

1. **Pieces.** A box that reaches an edge of its tile inside the picture is a piece: the tile may cut the object. It
   goes where another tile has the same place away from its own inner edges, for that tile sees more of the object,
   and decides whether there is one.
2. **Halves.** Pieces that are left are of objects larger than the tiles' overlap. Two of them on the two sides of a
   seam are one object where they meet and agree along the seam (IoU of their extents at least 0.5).
3. **Doubles.** Boxes of different views are one object where their IoU is at least 0.5, or where four fifths of the
   smaller lie in the larger and it is no less than a quarter of it. A box that sees the object whole in a tile counts,
   else the whole picture's, else the halves together.

For points, which have no extent: a tile's point goes where another tile sees its place clearly farther from its own
inner edges; then points of different views within 2 % of the longer side of the larger view are one.

The best match is made first, and no object ever takes in two boxes of one view: what a model tells apart in one look
stays apart. An object has the best score of its boxes. Matching by the intersection over the smaller box, and joining
instead of dropping, follow SAHI (Akyon et al. 2022, arXiv:2202.06934, its `postprocess` package, which merges whatever
overlaps); asking first which tile sees an object whole is ours. Pure; knows nothing of requests and pixels.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from md3cli.images.rects import PixelRect
from md3cli.refine.refinement import iou

Corners = tuple[float, float, float, float]
Found = Sequence[Mapping[str, Any]]

BOX_KEYS = ("x_min", "y_min", "x_max", "y_max")
SAME_IOU = 0.5
SAME_COVERED, SAME_SIZE = 0.8, 0.25  # of the smaller box, and the smaller box of the larger
EDGE = 0.02  # of a tile's longer side: how near a box has to come to an edge to reach it
NEAR = 0.02  # of a view's longer side: how far apart two points of one object may be
WHOLE = 0  # the view that is the whole picture


class View(NamedTuple):
    """A tile and what was found in it, 0-1 of the picture."""

    rect: PixelRect
    found: Found


class Joined(NamedTuple):
    """What was found, each object once, 0-1 of the picture; `is_short` where there was more than was asked for."""

    found: list[dict[str, Any]]
    is_short: bool


def join_tiles(whole: Found, tiles: Iterable[View], width: int, height: int, most: int) -> Joined:
    """Return the objects or points of a picture, each once, at most `most`, those with the best scores.

    They stand in the order of the whole picture's, then of the tiles', row by row; the order of `tiles` says nothing.

    Args:
        whole: what was found in the whole picture, each with a `score`: all with `x_min`, `y_min`, `x_max`, `y_max`,
            or all with `x`, `y`.
        tiles: what was found in each tile.
        width, height: of the picture, in pixels.
        most: at least 1.
    """
    views = sorted(tiles, key=lambda view: (view.rect.top, view.rect.left))
    grid = _Grid(width, height, [view.rect for view in views])
    seen = [_Seen.of(thing, WHOLE, grid) for thing in whole]
    seen += [_Seen.of(thing, place + 1, grid) for place, view in enumerate(views) for thing in view.found]
    groups = [_Group([one]) for one in seen if not one.is_seen_better(grid)]
    for likeness in (_of_points,) if seen and "x" in seen[0].thing else (_of_halves, _of_boxes):
        groups = _matched(groups, grid, likeness)
    best = {id(group) for group in sorted(groups, key=lambda group: -group.score)[:most]}
    return Joined([group.as_found(width, height) for group in groups if id(group) in best], len(groups) > most)


class _Grid:
    """Where the views lie; view 0 is the whole picture, then come the tiles as they are given."""

    def __init__(self, width: int, height: int, tiles: Sequence[PixelRect]) -> None:
        """`tiles` are some or all of a grid: those of one column have the same left and right, and so with rows."""
        self.views = [PixelRect(0, 0, width, height), *tiles]
        self.margin = EDGE * max((max(tile.width, tile.height) for tile in tiles), default=0)
        self._columns = sorted({(tile.left, tile.right) for tile in tiles})
        self._rows = sorted({(tile.top, tile.bottom) for tile in tiles})
        self._view_at = {(tile.left, tile.top): place + 1 for place, tile in enumerate(tiles)}

    def tiles_at(self, corners: Corners) -> Iterator[int]:
        """Yield the tiles that a box touches, or nearly."""
        for top, _ in self._touched(self._rows, corners[1], corners[3]):
            for left, _ in self._touched(self._columns, corners[0], corners[2]):
                if (left, top) in self._view_at:
                    yield self._view_at[left, top]

    def _touched(self, stretches: list[tuple[int, int]], start: float, end: float) -> list[tuple[int, int]]:
        first = bisect_left(stretches, start - self.margin, key=lambda stretch: stretch[1])
        return stretches[first : bisect_right(stretches, end + self.margin, key=lambda stretch: stretch[0])]

    def nearness(self, view: int) -> float:
        """Return how far from a point of a view another one of the same object may be, in pixels."""
        return NEAR * max(self.views[view].width, self.views[view].height)

    def room(self, view: int, corners: Corners) -> tuple[float, float, float, float]:
        """Return the pixels from a box to each edge of a view; no end of them where that is the picture's own edge."""
        rect, picture = self.views[view], self.views[WHOLE]
        inward = (1, 1, -1, -1)
        return tuple(  # type: ignore[return-value]
            math.inf if edge == end else sign * (place - edge)
            for place, edge, end, sign in zip(corners, rect, picture, inward, strict=True)
        )


@dataclass(frozen=True, slots=True)
class _Seen:
    """A box or point in one view; `corners` in pixels of the picture, a point's without extent."""

    view: int
    corners: Corners
    reached: tuple[bool, ...]  # inner edges of its tile: left, top, right, bottom
    thing: Mapping[str, Any]

    @classmethod
    def of(cls, thing: Mapping[str, Any], view: int, grid: _Grid) -> _Seen:
        (_, _, width, height), keys = grid.views[WHOLE], ("x", "y", "x", "y") if "x" in thing else BOX_KEYS
        left, top, right, bottom = (thing[key] for key in keys)
        corners = (left * width, top * height, right * width, bottom * height)
        return cls(view, corners, tuple(room <= grid.margin for room in grid.room(view, corners)), thing)

    @property
    def is_piece(self) -> bool:
        return any(self.reached)

    def is_seen_better(self, grid: _Grid) -> bool:
        """Return whether another tile shows the place farther from its own inner edges, and so decides about it."""
        if self.view == WHOLE:
            return False
        others = (view for view in grid.tiles_at(self.corners) if view != self.view)
        if "x" in self.thing:
            clearly = min(grid.room(self.view, self.corners)) + 2 * grid.margin
            return any(min(grid.room(view, self.corners)) > clearly for view in others)
        return self.is_piece and any(min(grid.room(view, self.corners)) > grid.margin for view in others)


class _Group:
    """What is taken to be one object: boxes or points of different views."""

    def __init__(self, members: Sequence[_Seen]) -> None:
        self.members = members
        self.views = {member.view for member in members}
        self.score = max(member.thing["score"] for member in members)
        self.best = min(members, key=lambda member: (member.is_piece, member.view == WHOLE, -member.thing["score"]))
        halves = members if self.best.is_piece else [self.best]
        lefts, tops, rights, bottoms = zip(*(half.corners for half in halves), strict=True)
        self.corners = (min(lefts), min(tops), max(rights), max(bottoms))
        self.has_halves = len(halves) > 1

    def reach(self, grid: _Grid) -> Corners:
        """Return the box or point with the room within which another one may be of the same object."""
        room = max(grid.nearness(view) for view in self.views) if "x" in self.best.thing else grid.margin
        left, top, right, bottom = self.corners
        return left - room, top - room, right + room, bottom + room

    def shown(self, corners: Corners, grid: _Grid) -> Corners:
        """Return what is left of a box where this group's tiles see no more than a piece of the object."""
        if not self.best.is_piece:
            return corners
        lefts, tops, rights, bottoms = zip(*(grid.views[view] for view in self.views), strict=True)
        return _cut(corners, (min(lefts), min(tops), max(rights), max(bottoms)))

    def as_found(self, width: int, height: int) -> dict[str, Any]:
        """Return the object as a record has it, 0-1 of the picture."""
        found = {**self.best.thing, "score": self.score}
        if self.has_halves:
            sizes = (width, height, width, height)
            found |= {key: place / size for key, place, size in zip(BOX_KEYS, self.corners, sizes, strict=True)}
        return found


Likeness = Callable[[_Group, _Group, _Grid], float]


def _matched(groups: Sequence[_Group], grid: _Grid, likeness: Likeness) -> list[_Group]:
    """Unite groups that are alike (`likeness` above 0), most alike first, never two that share a view."""
    alike = ((likeness(groups[one], groups[other], grid), one, other) for one, other in _touching(groups, grid))
    owner = list(range(len(groups)))  # of each group: the first of those it is united with
    parts = {place: [place] for place in owner}
    views = [set(group.views) for group in groups]
    for _, one, other in sorted((-value, one, other) for value, one, other in alike if value > 0):
        first, second = sorted((owner[one], owner[other]))
        if views[first] & views[second] or first == second:
            continue
        views[first] |= views[second]
        for part in parts[second]:
            owner[part] = first
        parts[first] += parts.pop(second)
    return [_Group([m for part in sorted(of) for m in groups[part].members]) for _, of in sorted(parts.items())]


def _touching(groups: Sequence[_Group], grid: _Grid) -> Iterator[tuple[int, int]]:
    """Yield the places of groups that share no view and lie near enough to be one object, each pair once."""
    reach = np.array([group.reach(grid) for group in groups]).reshape(-1, 4)
    order = np.argsort(reach[:, 0], kind="stable")
    ends = np.searchsorted(reach[order, 0], reach[order, 2], side="right")  # of those that begin before one ends
    for place, end in enumerate(ends.tolist()):
        one, behind = int(order[place]), order[place + 1 : end]
        is_near = (reach[behind, 1] <= reach[one, 3]) & (reach[behind, 3] >= reach[one, 1])
        for other in behind[is_near].tolist():
            if groups[one].views.isdisjoint(groups[other].views):
                yield min(one, other), max(one, other)


def _of_halves(one: _Group, other: _Group, grid: _Grid) -> float:
    """Return how well two pieces agree along the seam between their tiles; 0 where they are no halves."""
    pieces = (one.members[0], other.members[0])
    if not all(piece.is_piece for piece in pieces):
        return 0.0
    return max(_agreement(sorted(pieces, key=lambda p: grid.views[p.view][axis]), axis, grid) for axis in (0, 1))


def _agreement(pieces: Sequence[_Seen], axis: int, grid: _Grid) -> float:
    """Return the likeness of pieces left and right of a seam (`axis` 0), or above and below it (1), given so."""
    first, second = pieces
    one, other = grid.views[first.view], grid.views[second.view]
    meet = first.corners[axis + 2] >= second.corners[axis] - grid.margin
    if not (one[axis] < other[axis] and first.reached[axis + 2] and second.reached[axis] and meet):
        return 0.0
    low, high = max(one[1 - axis], other[1 - axis]), min(one[3 - axis], other[3 - axis])
    starts = [max(piece.corners[1 - axis], low) for piece in pieces]
    ends = [min(piece.corners[3 - axis], high) for piece in pieces]
    shared, extent = min(ends) - max(starts), max(ends) - min(starts)
    if shared <= 0 or shared < SAME_IOU * extent:
        return 0.0
    return shared / extent + iou(_cut(first.corners, other), _cut(second.corners, one))  # the second decides in a crowd


def _of_boxes(one: _Group, other: _Group, grid: _Grid) -> float:
    """Return the overlap of two boxes that are one object; 0 of others."""
    first, second = other.shown(one.corners, grid), one.shown(other.corners, grid)
    overlap = iou(first, second)
    if overlap >= SAME_IOU:
        return overlap
    small, large = sorted((_area(first), _area(second)))
    shared = overlap * (small + large) / (1 + overlap)
    is_double = shared > 0 and shared >= SAME_COVERED * small and small >= SAME_SIZE * large
    return overlap if is_double else 0.0


def _of_points(one: _Group, other: _Group, grid: _Grid) -> float:
    """Return how near two points that are one object are, from 0 to 1; 0 of others."""
    apart = math.dist(one.corners[:2], other.corners[:2])
    return 1 / (1 + apart) if apart <= max(map(grid.nearness, one.views | other.views)) else 0.0


def _cut(corners: Corners, rect: Corners) -> Corners:
    left, top = max(corners[0], rect[0]), max(corners[1], rect[1])
    return left, top, min(corners[2], rect[2]), min(corners[3], rect[3])


def _area(corners: Corners) -> float:
    return max(0.0, corners[2] - corners[0]) * max(0.0, corners[3] - corners[1])
