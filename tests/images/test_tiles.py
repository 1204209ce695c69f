"""Tiles of a picture: they cover it, overlap, and are as few as that takes; what "auto" makes of a picture's size."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import RequestError
from md3cli.images.crops import CropConfig
from md3cli.images.tiles import MIN_SCALE, MOST_TILES, scale_seen, tile_rects, tile_side
from md3cli.records import AUTO_TILES, MIN_TILE_PX
from md3cli.run.model_handle import REAL_CROP_CONFIG

lengths = st.integers(1, 9000)
sides = st.integers(378, 3000)
overlaps = st.floats(0, 0.7)
configs = st.sampled_from([REAL_CROP_CONFIG, CropConfig(crop_size=84, patch_size=14, overlap_margin=1, max_crops=6)])


def stretches(length: int, size: int, overlap: float) -> list[tuple[int, int]]:
    return [(rect.left, rect.right) for rect in tile_rects(length, 1, size, overlap)]


@given(lengths, sides, overlaps)
def test_tiles_cover_a_side_from_edge_to_edge(length: int, size: int, overlap: float) -> None:
    found = stretches(length, size, overlap)
    assert (found[0][0], found[-1][1]) == (0, length)
    assert all(right - left == min(size, length) for left, right in found)


@given(lengths, sides, overlaps)
def test_neighbours_share_what_was_asked_for_and_are_spread_evenly(length: int, size: int, overlap: float) -> None:
    found = stretches(length, size, overlap)
    steps = [second[0] - first[0] for first, second in itertools.pairwise(found)]
    assert all(step <= size * (1 - overlap) for step in steps)
    assert not steps or max(steps) - min(steps) <= 1


@given(lengths, sides, overlaps)
def test_no_fewer_tiles_would_do(length: int, size: int, overlap: float) -> None:
    count, step = len(stretches(length, size, overlap)), int(size * (1 - overlap))
    assert count == 1 or (count - 2) * step + size < length


def test_tiles_come_row_by_row() -> None:
    rects = tile_rects(1000, 700, 400, 0.0)
    assert [(rect.left, rect.top) for rect in rects] == [(0, 0), (300, 0), (600, 0), (0, 300), (300, 300), (600, 300)]


def test_a_picture_no_larger_than_a_tile_is_one_tile() -> None:
    assert tile_rects(640, 480, 640, 0.2) == ((0, 0, 640, 480),)


def test_an_overlap_that_makes_too_many_tiles_is_refused_before_they_are_made() -> None:
    with pytest.raises(RequestError, match=r"10,000; use larger tiles or a smaller overlap"):
        tile_rects(60_000, 60_000, 378, 0.999999)


def test_the_largest_picture_of_the_default_limit_has_fewer_tiles() -> None:
    assert len(tile_rects(2**14, 2**14, MIN_TILE_PX, 0.2)) == 2916 < MOST_TILES


@given(lengths, lengths, configs)
def test_auto_makes_tiles_that_the_model_sees_whole(width: int, height: int, cfg: CropConfig) -> None:
    side = tile_side(width, height, AUTO_TILES, cfg)
    rects = tile_rects(width, height, side, 0.2)
    seen_whole = all(scale_seen(rect.width, rect.height, cfg) >= 1 for rect in rects)
    assert seen_whole or side == MIN_TILE_PX or (len(rects) == 1 and scale_seen(width, height, cfg) >= MIN_SCALE)


@given(lengths, lengths)
def test_auto_makes_one_tile_of_what_the_model_sees_whole_anyway(width: int, height: int) -> None:
    cfg = REAL_CROP_CONFIG
    side = tile_side(width, height, AUTO_TILES, cfg)
    if scale_seen(width, height, cfg) >= MIN_SCALE:
        assert len(tile_rects(width, height, side, 0.2)) == 1
    elif max(width, height) > MIN_TILE_PX:
        assert len(tile_rects(width, height, side, 0.2)) > 1


@pytest.mark.parametrize(
    ("width", "height", "side"),
    [(4000, 3000, 910), (911, 911, 911), (4000, 700, 1176), (4000, 300, 378), (1000, 700, 1000), (300, 200, 300)],
)
def test_auto_of_the_real_model(width: int, height: int, side: int) -> None:
    assert tile_side(width, height, AUTO_TILES, REAL_CROP_CONFIG) == side


def test_a_side_that_was_typed_stays() -> None:
    assert tile_side(4000, 3000, 512, REAL_CROP_CONFIG) == 512
