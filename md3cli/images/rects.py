"""Whole pixels of boxes: which pixels of a picture a box takes in, with room around it.

For all that cuts a box out of a picture or covers it. Pure; knows nothing of pictures but their size. It stands alone
because rooms far apart need the very same pixels: exporters, and requests about a part of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

# A box on whole pixels is written as floats: 0.29 * 100 is 28.999999999999996, and without this it would grow by a
# pixel. The error of pixels is under 1e-10 for pictures of up to 100,000 a side; what is cut is invisible.
_ROUNDING_PX = 1e-6


class PixelRect(NamedTuple):
    """Whole pixels of an upright picture, at least one; `right` and `bottom` are the first ones outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def grown_to(self, step: int, width: int, height: int) -> PixelRect:
        """Return the rectangle with its sides moved outward to multiples of `step`, cut to the picture."""
        right, bottom = -(-self.right // step) * step, -(-self.bottom // step) * step
        left, top = self.left // step * step, self.top // step * step
        return PixelRect(left, top, min(right, width), min(bottom, height))


def padded_rect(box: Mapping[str, float], width: int, height: int, pad: float = 0.0) -> PixelRect | None:
    """Return the pixels of a box with room around it, rounded outward and then cut to the picture.

    Args:
        box: `x_min`, `y_min`, `x_max`, `y_max`, finite, 0-1 of the picture from the top left; they may lie outside.
        width, height: of the picture, in pixels.
        pad: the room left and right, as a share of the box's own width, and above and below, of its height.

    Returns:
        None: the box has no extent, or nothing of it with its room is inside the picture.

    Source: product contract, section 9, "Pad".
    """
    columns = _pixels(box["x_min"], box["x_max"], width, pad)
    rows = _pixels(box["y_min"], box["y_max"], height, pad)
    if columns is None or rows is None:
        return None
    return PixelRect(columns[0], rows[0], columns[1], rows[1])


def _pixels(start: float, end: float, size: int, pad: float) -> tuple[int, int] | None:
    """Return the first pixel of a stretch with its room, and the first one behind it."""
    room = pad * (end - start)
    if not (start < end and end + room > 0 and start - room < 1):  # written so that NaN is no stretch
        return None
    first = min(max(math.floor((start - room) * size + _ROUNDING_PX), 0), size - 1)
    return first, min(max(math.ceil((end + room) * size - _ROUNDING_PX), first + 1), size)
