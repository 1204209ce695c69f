"""Tiles of a large picture: overlapping squares at full resolution, so that what is small in it is seen.

A model sees a picture as one grid of crops with a most number of them, and a larger picture shrunk. Pure; knows a
picture's size and how the model cuts, nothing of requests. What is found in tiles is joined by refine/seams.py.
"""

from __future__ import annotations

import math

from md3cli.errors import RequestError
from md3cli.images.crops import CropConfig, select_tiling
from md3cli.images.rects import PixelRect
from md3cli.records import AUTO_TILES, MIN_TILE_PX, Tiles

MOST_TILES = 10_000  # of one picture; the largest that is decoded by default has 2,916 of the smallest
MIN_SCALE = 0.8  # of a picture's resolution, from which "auto" makes no tiles: they would show little more


def tiles_of(width: int, height: int, tiles: Tiles, cfg: CropConfig) -> tuple[PixelRect, ...]:
    """Return the tiles that a model that cuts as `cfg` says looks at a picture in; one alone is the whole picture.

    Raises:
        RequestError: there would be more than MOST_TILES.
    """
    return tile_rects(width, height, tile_side(width, height, tiles.size, cfg), tiles.overlap)


def tile_rects(width: int, height: int, size: int, overlap: float) -> tuple[PixelRect, ...]:
    """Return squares of `size` pixels a side that cover a picture, row by row, at least one.

    Neighbours share `overlap` (0 to less than 1) of their side or more: the fewest tiles that do so are spread evenly,
    to a pixel, from edge to edge. Along a side that is no longer than `size` there is one tile, as long as the side.

    Raises:
        RequestError: there would be more than MOST_TILES.
    """
    num_cols, num_rows = (_count(length, size, overlap) for length in (width, height))
    if num_cols * num_rows > MOST_TILES:
        raise RequestError(
            f"{width} x {height} pixels make {num_cols * num_rows:,} tiles of {size} pixels, more than "
            f"{MOST_TILES:,}; use larger tiles or a smaller overlap"
        )
    columns, rows = _spread(width, size, num_cols), _spread(height, size, num_rows)
    return tuple(PixelRect(left, top, right, bottom) for top, bottom in rows for left, right in columns)


def _count(length: int, size: int, overlap: float) -> int:
    """Return the fewest tiles along a side."""
    step = max(1, math.floor(size * (1 - overlap)))  # whole pixels, so that rounding never takes from the overlap
    return 1 + max(0, -(-(length - size) // step))


def _spread(length: int, size: int, count: int) -> list[tuple[int, int]]:
    """Return the first pixel of each tile along a side, and the first one behind it."""
    if count == 1:
        return [(0, length)]
    room = length - size
    return [(start, start + size) for start in (index * room // (count - 1) for index in range(count))]


def tile_side(width: int, height: int, size: int | str, cfg: CropConfig) -> int:
    """Return the side of a picture's tiles in pixels: `size` itself, or for "auto" what the model sees unshrunk.

    "auto" is the largest side, a whole number of the model's own crops, whose tiles are not shrunk, and at least
    MIN_TILE_PX: 910 for the real model, and more for a long and narrow picture. Where the model sees the whole
    picture at MIN_SCALE or more, it is the picture's longer side, which makes one tile.
    """
    if size != AUTO_TILES:
        return int(size)
    if scale_seen(width, height, cfg) >= MIN_SCALE:
        return max(width, height)
    sides = (count * cfg.window_px + 2 * cfg.margin_px for count in range(cfg.max_crops, 1, -1))
    unshrunk = (side for side in sides if scale_seen(min(side, width), min(side, height), cfg) >= 1)
    return max(MIN_TILE_PX, next(unshrunk, cfg.crop_size))


def scale_seen(width: int, height: int, cfg: CropConfig) -> float:
    """Return how much of a picture's resolution its crops show along the side that loses most; 1 is all, or more."""
    tiling = select_tiling(width, height, cfg)
    shown = (count * cfg.window_px + 2 * cfg.margin_px for count in (tiling.cols, tiling.rows))
    return min(seen / length for seen, length in zip(shown, (width, height), strict=True))
