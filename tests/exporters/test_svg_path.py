"""svg_path: what a segment covers, whatever the model wrote."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.exporters.svg_path import flatten, segment_polygons


def area(polygon):
    pairs = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return abs(sum(a * d - c * b for (a, b), (c, d) in pairs)) / 2


@pytest.mark.parametrize(
    ("path", "polygons"),
    [
        ("M 0 0 L 1 0 L 1 1 Z", [[(0, 0), (1, 0), (1, 1)]]),
        ("M0,0 1,0 1,1z", [[(0, 0), (1, 0), (1, 1)]]),
        ("M 0 0 H 1 V 1 H 0 Z", [[(0, 0), (1, 0), (1, 1), (0, 1)]]),
        ("m .5 .5 l .25 0 0 .25 -.25 0 z", [[(0.5, 0.5), (0.75, 0.5), (0.75, 0.75), (0.5, 0.75)]]),
        ("M0 0L4 0 4 4z l 0 4 4 0", [[(0, 0), (4, 0), (4, 4)], [(0, 0), (0, 4), (4, 4)]]),
        ("M 0 0 1 0 1 1 M 2 2 3 2 3 3", [[(0, 0), (1, 0), (1, 1)], [(2, 2), (3, 2), (3, 3)]]),
    ],
)
def test_straight_commands_absolute_relative_and_repeated(path, polygons):
    assert flatten(path) == polygons


@pytest.mark.parametrize(
    ("path", "expected_area"),
    [
        ("M -1 0 A 1 1 0 0 1 1 0 A 1 1 0 0 1 -1 0 Z", math.pi),  # a circle of two half arcs
        ("M -2 0 A 2 1 0 1 0 2 0 A 2 1 0 1 0 -2 0 Z", 2 * math.pi),  # an ellipse, the other way round
        ("M 0 -2 A 2 1 90 0 1 0 2 A 2 1 90 0 1 0 -2 Z", 2 * math.pi),  # tilted by a quarter turn
        ("M 1 0 A .1 .1 0 0 1 -1 0 Z", math.pi / 2),  # radii too small: they grow
        ("M 1 0 A 1 1 0 1 1 0 1 Z", math.pi * 3 / 4 + 0.5),  # the large arc, swept: 3/4 disk and a triangle
        ("M 0 0 Q .5 1 1 0 Z", 1 / 3),
        ("M 0 0 C 0 1 1 1 1 0 Z", 0.6),
        ("M 0 0 Q .5 1 1 0 T 2 0 L 2 -2 0 -2 Z", 4.0),  # T mirrors: a hill and a valley cancel
        ("M 0 0 C 0 1 1 1 1 0 S 2 -1 2 0 L 2 -2 0 -2 Z", 4.0),
    ],
)
def test_curves_cover_the_area_they_should(path, expected_area):
    (polygon,) = flatten(path)
    assert area(polygon) == pytest.approx(expected_area, rel=0.02)


@pytest.mark.parametrize(
    ("path", "num_points"),
    [
        ("", 0),
        ("M", 0),
        ("M 1", 0),
        ("L 1 1 2 2 3 3", 0),  # must begin with a move
        ("M 0 0 1 0 1 1 X 5 5", 3),  # no such command: what stands before is drawn
        ("M 0 0 1 0 1 1 L 5", 3),
        ("M 0 0 1 0 1 1 Z 7", 3),
        ("M 0 0 1 0 1 1e999 2 2", 0),
        ("M 0 0 1 0 1 1 <script>", 3),
    ],
)
def test_damage_ends_the_path_and_never_raises(path, num_points):
    assert sum(map(len, flatten(path))) == num_points


def test_a_segment_is_relative_to_its_box():
    segment = {
        "svg_path": "M 0 0 L 1 0 L 1 1 Z",
        "bbox": {"x_min": 0.25, "y_min": 0.5, "x_max": 0.75, "y_max": 1.0},
    }
    assert segment_polygons(segment) == [[(0.25, 0.5), (0.75, 0.5), (0.75, 1.0)]]


@given(st.text(alphabet="MmLlHhVvCcSsQqTtAaZz0123456789.-+e, x", max_size=80))
def test_any_text_gives_finite_polygons(path):
    for polygon in flatten(path):
        assert len(polygon) >= 3
        assert all(math.isfinite(x) and math.isfinite(y) for x, y in polygon)
