"""The pixels of a mask's rings, and COCO's two ways of writing it: polygons, or run lengths where it has holes.

Which pixels a ring covers is COCO's own answer (`rleFrPoly` of cocoapi's maskApi.c, by P. Dollár and
T.-Y. Lin, 2014; pycocotools and faster-coco-eval have the same), computed here again because an
export needs no extra: areas, run lengths, scores and drawings are those that a reader of the polygons
gets. Several rings are filled as SVG fills them by default: a pixel is in the mask where its winding
number is not zero. A ring that crosses itself covers what COCO's rule says, which is even-odd.

COCO polygons of one object are united, so they cannot say a hole; run lengths can: column by column,
starting with a run of zeros. A mask is kept as its runs, so its cost is its outline, never its image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from md3cli.exporters.objects import Ring, flat, signed_area

_STEPS = 5  # points that the rule lays along an outline for each pixel
_CROSSINGS_AT_ONCE = 2**20  # bounds the memory for an outline of very many corners


class MaskPatch(NamedTuple):
    """A mask's pixels, bool [rows, columns], and where its top left one lies in the image."""

    pixels: np.ndarray
    left: int
    top: int


class Mask(NamedTuple):
    """A mask in an image of `width` x `height` pixels.

    `borders` int64 [2 * runs]: where in the image, walked down column by column, the mask begins and
    ends in turn. `has_holes`: the rings together cover more than the mask.
    """

    borders: np.ndarray
    has_holes: bool
    width: int
    height: int

    @property
    def area(self) -> int:
        """Return the number of pixels."""
        return int((self.borders[1::2] - self.borders[::2]).sum())

    def run_lengths(self) -> dict[str, Any]:
        """Return the mask as COCO's compressed run lengths."""
        counts: list[int] = np.diff(np.concatenate(([0], self.borders, [self.width * self.height]))).tolist()
        return {"size": [self.height, self.width], "counts": packed(counts if counts[-1] else counts[:-1] or counts)}

    def patch(self) -> MaskPatch:
        """Return the pixels of the columns that the mask touches."""
        if not len(self.borders):
            return MaskPatch(np.zeros((1, 1), bool), 0, 0)
        left, right = int(self.borders[0]) // self.height, int(self.borders[-1] - 1) // self.height + 1
        changes = np.zeros((right - left) * self.height + 1, np.int8)
        changes[self.borders[::2] - left * self.height] = 1
        changes[self.borders[1::2] - left * self.height] = -1
        inside = np.cumsum(changes[:-1], dtype=np.int8).astype(bool)
        return MaskPatch(inside.reshape(right - left, self.height).T, left, 0)


def fill(rings: list[Ring], width: int, height: int) -> Mask:
    """Fill rings (in pixels, inside the image) with COCO's rule for one and SVG's for several."""
    borders = [_borders(ring, width, height) for ring in rings]
    if len(rings) == 1:
        return Mask(borders[0], False, width, height)
    turns = [1 if signed_area(ring) > 0 else -1 for ring in rings]
    ins = [np.resize([1, -1], len(found)) for found in borders]
    at, place = np.unique(np.concatenate(borders), return_inverse=True)
    num_rings, winding = np.zeros(len(at), np.int64), np.zeros(len(at), np.int64)
    np.add.at(num_rings, place, np.concatenate(ins))
    np.add.at(winding, place, np.concatenate([turn * one for turn, one in zip(turns, ins, strict=True)]))
    is_covered, is_inside = np.cumsum(num_rings) > 0, np.cumsum(winding) != 0
    has_changed = np.diff(is_inside, prepend=False)
    return Mask(at[has_changed], bool((is_covered & ~is_inside).any()), width, height)


def segmentation(rings: list[Ring], mask: Mask) -> list[list[float]] | dict[str, Any]:
    """Return COCO's `segmentation` of `mask`, which fills `rings`: polygons, or run lengths where it has holes."""
    return mask.run_lengths() if mask.has_holes else [flat(ring) for ring in rings]


def packed(counts: list[int]) -> str:
    """Return counts as COCO's text: from the fourth on the difference to the one before last, five bits a character."""
    text: list[str] = []
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            bits = value & 0x1F
            value >>= 5
            more = value != (-1 if bits & 0x10 else 0)
            text.append(chr(48 + (bits | 0x20 if more else bits)))
    return "".join(text)


def _borders(ring: Ring, width: int, height: int) -> np.ndarray:
    """Return where the ring's runs begin and end in turn; of the ring as it is written, to a hundredth of a pixel."""
    corners = np.trunc(_STEPS * np.array(flat(ring)).reshape(-1, 2) + 0.5).astype(np.int64)
    following = np.roll(corners, -1, axis=0)
    found, edges_at_once = np.zeros(0, np.int64), max(1, _CROSSINGS_AT_ONCE // width)
    for first in range(0, len(ring), edges_at_once):
        part = slice(first, first + edges_at_once)
        more = _crossings(corners[part], following[part], width, height)
        at, count = np.unique(np.concatenate((found, more)), return_counts=True)
        found = at[count % 2 == 1]  # a run that begins where another ends is none
    return found


def _crossings(start: np.ndarray, end: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return places in the image at which the edges from `start` to `end` [N, 2] cross the columns' middles."""
    size = np.abs(end - start)
    is_flat = size[:, 0] >= size[:, 1]
    axis = np.where(is_flat, 0, 1)
    rows = np.arange(len(start))
    is_turned = (start[rows, axis] > end[rows, axis])[:, None]  # the rule walks up the longer axis
    start, end = np.where(is_turned, end, start), np.where(is_turned, start, end)
    lowest, highest = np.minimum(start[:, 0], end[:, 0]), np.maximum(start[:, 0], end[:, 0])
    # A column's middle lies between its third and fourth step.
    first = np.maximum(-((2 - lowest) // _STEPS), 0)
    last = np.minimum((highest - 3) // _STEPS, width - 1)
    count = np.maximum(last - first + 1, 0)
    edge = np.repeat(rows, count)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    is_flat = is_flat[edge]
    y = np.zeros(len(edge), np.int64)
    for chosen, height_at in ((is_flat, _flat_heights), (~is_flat, _steep_heights)):
        y[chosen] = height_at(start[edge[chosen]], end[edge[chosen]], _STEPS * column[chosen] + 2)
    row = np.clip(-((2 - y) // _STEPS), 0, height)
    places: np.ndarray = column * height + row
    return places


def _flat_heights(start: np.ndarray, end: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the upper of an edge's heights at steps `x` and `x + 1`; the edge is as wide as high or wider."""
    slope = (end[:, 1] - start[:, 1]) / (end[:, 0] - start[:, 0])
    step = x - start[:, 0]
    heights = [(start[:, 1] + slope * at + 0.5).astype(np.int64) for at in (step, step + 1)]
    upper: np.ndarray = np.minimum(*heights)
    return upper


def _steep_heights(start: np.ndarray, end: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the height of the last step before an edge, walked downwards, goes from one side of `x` to the other."""
    slope = (end[:, 0] - start[:, 0]) / (end[:, 1] - start[:, 1])

    def is_beyond(step: np.ndarray) -> np.ndarray:
        beyond: np.ndarray = ((start[:, 0] + slope * step + 0.5).astype(np.int64) > x) == (slope > 0)
        return beyond

    step = np.ceil((x + 0.5 - start[:, 0]) / slope).astype(np.int64)
    step -= is_beyond(step - 1)  # the estimate may be one off: the rule's own rounding decides
    step += ~is_beyond(step)
    height: np.ndarray = start[:, 1] + step - 1
    return height
