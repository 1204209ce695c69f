"""Pixels of boxes, against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.images.rects import PixelRect, padded_rect

sizes = st.integers(1, 10_000)
shares = st.floats(-0.5, 1.5)
pads = st.sampled_from([0.0, 0.05, 0.1, 0.5, 1.0, 3.0])


def box_of(x_min: float, y_min: float, x_max: float, y_max: float) -> dict[str, float]:
    return {"x_min": x_min, "y_min": y_min, "x_max": x_max, "y_max": y_max}


def exact(start: Fraction, end: Fraction, size: int, pad: Fraction) -> tuple[int, int]:
    """Floor and ceiling without any rounding before."""
    room = pad * (end - start)
    return max(math.floor((start - room) * size), 0), min(math.ceil((end + room) * size), size)


@given(st.data(), sizes, sizes)
def test_a_box_on_whole_pixels_does_not_grow(data: st.DataObject, width: int, height: int) -> None:
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    box = box_of(left / width, top / height, right / width, bottom / height)
    assert padded_rect(box, width, height) == (left, top, right, bottom)


@given(st.data(), sizes, st.sampled_from(["0.1", "0.2", "0.25", "0.5", "1"]))
def test_nor_does_one_whose_room_ends_on_whole_pixels(data: st.DataObject, width: int, pad: str) -> None:
    start, end = sorted(data.draw(st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True)))
    rect = padded_rect(box_of(start / 1000, 0, end / 1000, 1), width, 1, float(pad))
    assert rect is not None
    assert (rect.left, rect.right) == exact(Fraction(start, 1000), Fraction(end, 1000), width, Fraction(pad))


@given(shares, shares, shares, shares, sizes, sizes, pads)
def test_the_pixels_take_in_the_box_and_its_room_and_no_more(
    x: float, y: float, right: float, bottom: float, width: int, height: int, pad: float
) -> None:
    box = box_of(min(x, right), min(y, bottom), max(x, right), max(y, bottom))
    rect = padded_rect(box, width, height, pad)
    room = pad * (box["x_max"] - box["x_min"])
    start, end = (box["x_min"] - room) * width, (box["x_max"] + room) * width
    if rect is None:
        high = box["y_max"] + pad * (box["y_max"] - box["y_min"])
        low = box["y_min"] - pad * (box["y_max"] - box["y_min"])
        assert x == right or y == bottom or end <= 0 or start >= width or high <= 0 or low >= 1
        return
    assert 0 <= rect.left < rect.right <= width
    assert 0 <= rect.top < rect.bottom <= height
    assert rect.left <= max(start, 0) + 1e-5
    assert rect.right >= min(end, width) - 1e-5
    assert rect.left >= min(math.floor(start), width - 1)
    assert rect.right <= max(math.ceil(end), 1)


@given(shares, shares, sizes, pads, pads)
def test_more_room_takes_in_no_less(x: float, right: float, width: int, pad: float, other: float) -> None:
    box = box_of(min(x, right), 0, max(x, right), 1)
    small, large = padded_rect(box, width, 1, min(pad, other)), padded_rect(box, width, 1, max(pad, other))
    if small is not None:
        assert large is not None
        assert large.left <= small.left
        assert small.right <= large.right


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (box_of(0.1, 0.2, 0.5, 0.6), (38, 76, 346, 308)),  # room of 25.6 and 19.2 pixels
        (box_of(-0.5, 0.9, 0.5, 2.0), (0, 379, 384, 480)),  # room of its whole size, not of what is inside
        (box_of(0.5, 0.5, 0.5, 0.9), None),
        (box_of(0.6, 0.5, 0.5, 0.9), None),
        (box_of(1.2, 0.5, 1.5, 0.9), None),
        (box_of(1.0, 0.0, 1.5, 1.0), (608, 0, 640, 480)),
        (box_of(0.5, 0.5, 0.5 + 1e-12, 0.5 + 1e-12), (320, 240, 321, 241)),
        (box_of(float("nan"), 0.5, 0.7, 0.9), None),
    ],
)
def test_room_is_a_share_of_the_boxs_own_size(box: dict[str, float], expected: tuple[int, ...] | None) -> None:
    pad = 0.1
    assert padded_rect(box, 640, 480, pad) == expected


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 100), st.integers(1, 100))
def test_growing_to_blocks(left: int, top: int, width: int, height: int) -> None:
    rect = PixelRect(left, top, min(left + width, 100), min(top + height, 100))
    grown = rect.grown_to(8, 100, 100)
    assert grown.left <= rect.left
    assert grown.right >= rect.right
    assert grown.left % 8 == grown.top % 8 == 0
    assert grown.right % 8 == 0 or grown.right == 100
    assert max(rect.left - grown.left, grown.right - rect.right, rect.top - grown.top) < 8
