"""Rings of a mask -> COCO's two ways of writing it: polygons, or run lengths where it has holes.

A mask is what SVG fills under its default rule: every pixel whose winding number is not zero.
COCO polygons of one object are united, so they cannot say a hole; run lengths can. The encoding
is COCO's (maskApi.c of cocoapi): column by column, starting with a run of zeros. Only the part of
the image that the mask touches is ever drawn.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from md3cli.exporters.objects import Ring, flat, signed_area


class MaskPatch(NamedTuple):
    """A mask's pixels, bool [rows, columns], and where its top left one lies in the image."""

    pixels: np.ndarray
    left: int
    top: int


def segmentation(rings: list[Ring], width: int, height: int) -> list[list[float]] | dict[str, Any]:
    """COCO's `segmentation` for a mask: polygons, or compressed run lengths where it has holes."""
    if has_holes(rings):
        counts = run_lengths(filled_patch(rings, width, height), width, height)
        return {"size": [height, width], "counts": packed(counts)}
    return [flat(ring) for ring in rings]


def mask_area(rings: list[Ring], width: int, height: int) -> float:
    """Area in pixels: exact for one ring, counted for several, which may overlap."""
    if len(rings) == 1:
        return abs(signed_area(rings[0]))
    return float(np.count_nonzero(filled_patch(rings, width, height).pixels))


def has_holes(rings: list[Ring]) -> bool:
    """True where the union of the rings covers more than their non-zero fill."""
    if len({signed_area(ring) > 0 for ring in rings}) < 2:
        return False  # all turn the same way: winding numbers cannot cancel
    winding, is_covered = _wound(rings, *_extent(rings))
    return bool((is_covered & (winding == 0)).any())


def filled_patch(rings: list[Ring], width: int, height: int) -> MaskPatch:
    """The filled mask, cut to the image.

    Each ring counts with its direction. (A ring that crosses itself is filled by PIL's own rule.)
    """
    left, top, right, bottom = _extent(rings)
    winding, _ = _wound(rings, left, top, min(right, width), min(bottom, height))
    return MaskPatch(winding != 0, left, top)


def run_lengths(patch: MaskPatch, width: int, height: int) -> list[int]:
    """Lengths of the runs of zeros and ones in turn, down each column, of the mask in its image."""
    rows, columns = patch.pixels.shape
    padded = np.zeros((columns, rows + 2), np.int8)
    padded[:, 1:-1] = patch.pixels.T
    column, row = np.nonzero(np.diff(padded, axis=1))  # where a run begins or ends, column by column
    borders = (column + patch.left) * height + row + patch.top
    is_joined = borders[1:-1:2] == borders[2::2]  # a run that ends a column and one that begins the next are one
    keep = np.ones(len(borders), bool)
    keep[1:-1:2] &= ~is_joined
    keep[2::2] &= ~is_joined
    counts: list[int] = np.diff(np.concatenate(([0], borders[keep], [width * height]))).tolist()
    return counts if counts[-1] or len(counts) == 1 else counts[:-1]


def packed(counts: list[int]) -> str:
    """Counts as COCO's text: from the fourth on the difference to the one before last, five bits a character."""
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


def _extent(rings: list[Ring]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the pixels that the rings touch."""
    xs, ys = ([point[axis] for ring in rings for point in ring] for axis in (0, 1))
    return math.floor(min(xs)), math.floor(min(ys)), math.ceil(max(xs)), math.ceil(max(ys))


def _wound(rings: list[Ring], left: int, top: int, right: int, bottom: int) -> tuple[np.ndarray, np.ndarray]:
    """Winding numbers int16, and which pixels any ring covers, of a part of the image."""
    size = (max(1, right - left), max(1, bottom - top))
    winding, is_covered = np.zeros(size[::-1], np.int16), np.zeros(size[::-1], bool)
    for ring in rings:
        image = Image.new("1", size)
        # PIL's pixel 0 is centred at 0, ours at 0.5
        ImageDraw.Draw(image).polygon([(x - left - 0.5, y - top - 0.5) for x, y in ring], fill=1)
        inside = np.asarray(image)
        is_covered |= inside
        winding += inside * np.int16(1 if signed_area(ring) > 0 else -1)
    return winding, is_covered
