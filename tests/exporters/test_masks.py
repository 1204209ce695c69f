"""Masks against pycocotools, which defines which pixels a polygon covers and how runs are written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from md3cli.exporters.masks import Mask, fill, packed, segmentation
from md3cli.exporters.objects import Ring, clip_ring, flat, signed_area

SQUARE: Ring = [(10.0, 10.0), (50.0, 10.0), (50.0, 50.0), (10.0, 50.0)]
INNER: Ring = [(20.0, 20.0), (40.0, 20.0), (40.0, 40.0), (20.0, 40.0)]
APART: Ring = [(60.0, 10.0), (70.0, 10.0), (70.0, 20.0), (60.0, 20.0)]
BACKWARDS: Ring = INNER[::-1]
SIZES = st.sampled_from([(1, 1), (1, 7), (7, 1), (40, 30), (300, 200), (1000, 3)])


def corners_around(size: tuple[int, int], *, places: st.SearchStrategy[float]) -> st.SearchStrategy[Ring]:
    """Rings whose corners lie at `places`, shares of the image's width and height."""
    corner = st.tuples(places, places).map(lambda at: (at[0] * size[0], at[1] * size[1]))
    return st.lists(corner, min_size=3, max_size=9)


def decoded(mask: Mask) -> np.ndarray:
    pixels = np.zeros((mask.height, mask.width), bool)
    inside, left, top = mask.patch()
    pixels[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return pixels


@pytest.mark.process
@given(
    data=st.data(),
    size=SIZES,
    places=st.sampled_from([st.floats(0, 1), st.floats(-2, 3), st.sampled_from([0.0, 0.5, 1.0])]),
)
def test_a_ring_covers_what_cocoapi_says(
    data: st.DataObject, size: tuple[int, int], places: st.SearchStrategy[float]
) -> None:
    """Inside and outside the picture, crossing itself, with doubled corners, without extent."""
    width, height = size
    ring = data.draw(corners_around(size, places=places))
    expected = coco_mask.frPyObjects([flat(ring)], height, width)[0]
    mask = fill([ring], width, height)
    assert mask.run_lengths() == {"size": [height, width], "counts": expected["counts"].decode()}
    assert mask.area == coco_mask.area(expected)
    assert (decoded(mask) == coco_mask.decode(expected)).all()


@pytest.mark.process
@given(size=SIZES, data=st.data())
def test_two_rings_are_filled_as_svg_fills_them(size: tuple[int, int], data: st.DataObject) -> None:
    width, height = size
    rings = [data.draw(corners_around(size, places=st.floats(0, 1))) for _ in range(2)]
    covered = [coco_mask.decode(one).astype(int) for one in coco_mask.frPyObjects([*map(flat, rings)], height, width)]
    turns = [1 if signed_area(ring) > 0 else -1 for ring in rings]
    expected = sum(turn * pixels for turn, pixels in zip(turns, covered, strict=True)) != 0
    mask = fill(rings, width, height)
    assert (decoded(mask) == expected).all()
    assert mask.area == expected.sum()
    assert mask.has_holes == bool((~expected & (sum(covered) > 0)).any())
    written = segmentation(rings, mask)
    readable = written if isinstance(written, dict) else coco_mask.merge(coco_mask.frPyObjects(written, height, width))
    assert (coco_mask.decode(readable) == expected).all()


def test_a_ring_of_very_many_corners_is_filled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    corners = np.random.default_rng(0).uniform(0, 200, (500, 2)).tolist()
    ring = [(x, y) for x, y in corners]
    whole = fill([ring], 200, 200)
    monkeypatch.setattr("md3cli.exporters.masks._CROSSINGS_AT_ONCE", 1)
    assert fill([ring], 200, 200).run_lengths() == whole.run_lengths()


@given(counts=st.lists(st.integers(1, 10_000_000), min_size=1, max_size=20))
def test_long_runs_are_packed_as_cocoapi_unpacks_them(counts: list[int]) -> None:
    size = [1, sum(counts)]
    expected = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)
    assert packed(counts) == expected["counts"].decode()


def test_only_rings_that_turn_back_make_holes() -> None:
    assert fill([SQUARE, BACKWARDS], 100, 100).has_holes
    assert not fill([SQUARE, INNER], 100, 100).has_holes  # the same way round: filled twice
    assert not fill([SQUARE, APART], 100, 100).has_holes
    assert not fill([SQUARE, APART[::-1]], 100, 100).has_holes
    assert not fill([SQUARE], 100, 100).has_holes


def test_the_hole_is_empty_and_the_rest_is_full() -> None:
    expected = np.zeros((100, 100), bool)
    expected[10:50, 10:50] = True
    expected[20:40, 20:40] = False
    assert (decoded(fill([SQUARE, BACKWARDS], 100, 100)) == expected).all()


def test_areas_count_pixels_without_the_outline() -> None:
    small, hole = [(0.0, 0.0), (10.0, 0.0), (10.0, 10.0), (0.0, 10.0)], [(3.0, 3.0), (3.0, 7.0), (7.0, 7.0), (7.0, 3.0)]
    assert fill([small, hole], 20, 20).area == 84
    assert fill([SQUARE], 100, 100).area == 1600
    assert fill([SQUARE, INNER], 100, 100).area == 1600
    assert fill([SQUARE, BACKWARDS], 100, 100).area == 1200


def test_a_far_ring_is_cut_to_the_picture_and_filled() -> None:
    everything = clip_ring([(-1e9, -1e9), (1e9, -1e9), (1e9, 1e9), (-1e9, 1e9)], 40, 30)
    assert fill([everything], 40, 30).area == 1200
