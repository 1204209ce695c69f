"""Boxes, rings and points in pixels."""

from __future__ import annotations

from finished_runs import record
from hypothesis import given
from hypothesis import strategies as st

from md3cli.exporters.objects import Ring, boxes, clamped_box, clip_ring, joined_ring, points, segments, signed_area

coordinate = st.floats(-2, 3) | st.sampled_from([float("nan"), float("inf"), -float("inf")])


@given(x_min=coordinate, y_min=coordinate, x_max=coordinate, y_max=coordinate)
def test_a_box_is_inside_the_image_or_gone(x_min: float, y_min: float, x_max: float, y_max: float) -> None:
    corners = {"x_min": x_min, "y_min": y_min, "x_max": x_max, "y_max": y_max}
    box = clamped_box(corners, "car", 0.5, 640, 480)
    if box is not None:
        assert box.width > 0 < box.height
        assert 0 <= box.x < box.x + box.width <= 640 + 1e-9
        assert 0 <= box.y < box.y + box.height <= 480 + 1e-9


def test_a_box_over_the_border_is_marked() -> None:
    corners = {"x_min": -0.1, "y_min": 0.0, "x_max": 0.5, "y_max": 1.0}
    over = clamped_box(corners, "car", None, 10, 10)
    inside = clamped_box({**corners, "x_min": 0.0}, "car", None, 10, 10)
    assert over is not None
    assert inside is not None
    assert (over.is_truncated, inside.is_truncated) == (True, False)


def test_the_prompt_stands_in_for_a_missing_label() -> None:
    found = {"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}
    assert [box.label for box in boxes(record("a", "detect", "car", objects=[found]), 10, 10)] == ["car"]


def test_points_outside_move_to_the_border() -> None:
    found = [{"label": "a", "x": -0.5, "y": 1.5}, {"label": "a", "x": float("nan"), "y": 0}]
    assert [(p.x, p.y) for p in points(record("a", "point", "a", points=found), 10, 20)] == [(0, 20)]


def test_a_path_is_drawn_inside_its_box() -> None:
    box = {"x_min": 0.5, "y_min": 0.5, "x_max": 1.0, "y_max": 1.0}
    found = {"label": "a", "svg_path": "M 0 0 H 1 V 1 H 0 Z", "bbox": box, "score": 0.5}
    (segment,) = segments(record("a", "segment", "a", segments=[found]), 100, 200)
    assert segment.has_mask
    assert segment.rings == [[(50, 100), (100, 100), (100, 200), (50, 200)]]


def test_a_path_without_area_falls_back_to_the_box() -> None:
    box = {"x_min": 0.0, "y_min": 0.0, "x_max": 1.0, "y_max": 1.0}
    found = {"label": "a", "svg_path": "M 0 0 L 1 1 L 0.5 0.5 Z", "bbox": box, "score": 0.5}
    (segment,) = segments(record("a", "segment", "a", segments=[found]), 10, 10)
    assert (segment.has_mask, segment.rings) == (False, [segment.box.ring])


ring_points = st.lists(st.tuples(st.floats(-20, 60), st.floats(-20, 60)), min_size=3, max_size=8)


@given(ring=ring_points)
def test_a_clipped_ring_lies_inside(ring: Ring) -> None:
    clipped = clip_ring(ring, 40, 30)
    assert all(-1e-9 <= x <= 40 + 1e-9 and -1e-9 <= y <= 30 + 1e-9 for x, y in clipped)
    assert abs(signed_area(clipped)) <= 40 * 30 * len(ring)  # a ring may wind around the image more than once


def test_clipping_keeps_the_part_inside() -> None:
    square = [(-10.0, 5.0), (20.0, 5.0), (20.0, 50.0), (-10.0, 50.0)]
    assert signed_area(clip_ring(square, 40, 30)) == 20 * 25
    assert clip_ring([(50.0, 5.0), (60.0, 5.0), (60.0, 9.0)], 40, 30) == []


def test_a_joined_ring_covers_what_its_parts_cover() -> None:
    outer = [(0.0, 0.0), (10.0, 0.0), (10.0, 10.0), (0.0, 10.0)]
    hole = [(2.0, 2.0), (2.0, 4.0), (4.0, 4.0), (4.0, 2.0)]
    assert signed_area(joined_ring([outer, hole])) == 100 - 4
    assert joined_ring([outer]) == outer
