"""Masks against pycocotools, which defines the encoding."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from md3cli.exporters.masks import MaskPatch, filled_patch, has_holes, mask_area, packed, run_lengths, segmentation
from md3cli.exporters.objects import Ring

SQUARE: Ring = [(10.0, 10.0), (50.0, 10.0), (50.0, 50.0), (10.0, 50.0)]
INNER: Ring = [(20.0, 20.0), (40.0, 20.0), (40.0, 40.0), (20.0, 40.0)]
APART: Ring = [(60.0, 10.0), (70.0, 10.0), (70.0, 20.0), (60.0, 20.0)]
BACKWARDS: Ring = INNER[::-1]


@given(
    pixels=arrays.arrays(bool, st.tuples(st.integers(1, 7), st.integers(1, 7))),
    left=st.integers(0, 3),
    top=st.integers(0, 3),
    right=st.integers(0, 3),
    bottom=st.integers(0, 3),
)
def test_run_lengths_are_those_of_cocoapi(pixels: np.ndarray, left: int, top: int, right: int, bottom: int) -> None:
    whole = np.pad(pixels, ((top, bottom), (left, right)))
    height, width = whole.shape
    text = packed(run_lengths(MaskPatch(pixels, left, top), width, height))
    assert text == coco_mask.encode(np.asfortranarray(whole, np.uint8))["counts"].decode()


@given(counts=st.lists(st.integers(1, 10_000_000), min_size=1, max_size=20))
def test_long_runs_are_packed_as_cocoapi_unpacks_them(counts: list[int]) -> None:
    size = [1, sum(counts)]
    expected = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)
    assert packed(counts) == expected["counts"].decode()


def test_only_rings_that_turn_back_make_holes() -> None:
    assert has_holes([SQUARE, BACKWARDS])
    assert not has_holes([SQUARE, INNER])  # the same way round: filled twice
    assert not has_holes([SQUARE, APART])
    assert not has_holes([SQUARE, APART[::-1]])
    assert not has_holes([SQUARE])


def test_the_hole_is_empty_and_the_rest_is_full() -> None:
    patch = filled_patch([SQUARE, BACKWARDS], 100, 100)
    pixels = np.zeros((100, 100), bool)
    pixels[patch.top : patch.top + patch.pixels.shape[0], patch.left : patch.left + patch.pixels.shape[1]] = (
        patch.pixels
    )
    assert not pixels[22:38, 22:38].any()
    assert pixels[11:19, 11:49].all()
    assert not pixels[:9].any()
    assert not pixels[52:].any()


def test_areas() -> None:
    assert mask_area([SQUARE], 100, 100) == 1600
    assert mask_area([SQUARE, INNER], 100, 100) == 1600
    assert abs(mask_area([SQUARE, BACKWARDS], 100, 100) - 1200) <= 80


@given(
    corners=st.lists(st.tuples(st.floats(-5, 45), st.floats(-5, 35)), min_size=3, max_size=8),
    more=st.lists(st.tuples(st.floats(-5, 45), st.floats(-5, 35)), min_size=3, max_size=8),
)
def test_any_rings_give_a_segmentation_that_cocoapi_reads(corners: Ring, more: Ring) -> None:
    from md3cli.exporters.objects import clip_ring, signed_area

    rings = [ring for ring in (clip_ring(corners, 40, 30), clip_ring(more, 40, 30)) if abs(signed_area(ring)) > 0]
    if not rings:
        return
    written = segmentation(rings, 40, 30)
    if isinstance(written, dict):
        assert coco_mask.decode(written).shape == (30, 40)
    else:
        assert coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(written, 30, 40))).shape == (30, 40)
        assert all(0 <= x <= 40 for ring in written for x in ring[::2])
        assert all(0 <= y <= 30 for ring in written for y in ring[1::2])
