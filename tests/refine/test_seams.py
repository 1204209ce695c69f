"""What is found in a picture and its tiles becomes one list: each object once, in whatever order tiles come."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from md3cli.images.rects import PixelRect
from md3cli.images.tiles import tile_rects
from md3cli.refine import seams
from md3cli.refine.seams import View, join_tiles

WIDTH, HEIGHT, SIZE, OVERLAP = 1000, 800, 400, 0.25
TILES = tile_rects(WIDTH, HEIGHT, SIZE, OVERLAP)
WHOLE = PixelRect(0, 0, WIDTH, HEIGHT)
Box = tuple[float, float, float, float]
Thing = dict[str, Any]

places = st.tuples(st.integers(0, 960), st.integers(0, 760), st.integers(8, 100), st.integers(8, 100))


def thing(box: Box, score: float = 0.5) -> Thing:
    """A box in pixels of the picture, as the model says it."""
    left, top, right, bottom = box
    x, y = {"x_min": left / WIDTH, "x_max": right / WIDTH}, {"y_min": top / HEIGHT, "y_max": bottom / HEIGHT}
    return {"label": "dot", **x, **y, "score": score}


def cut(box: Box, rect: PixelRect) -> Box:
    return max(box[0], rect.left), max(box[1], rect.top), min(box[2], rect.right), min(box[3], rect.bottom)


def seen_in(rect: PixelRect, boxes: Sequence[Box]) -> list[Thing]:
    """What a perfect model says of a view: the part of each object that it shows."""
    parts = [cut(box, rect) for box in boxes]
    return [thing(part) for part in parts if part[0] < part[2] and part[1] < part[3]]


def views_of(boxes: Sequence[Box], tiles: Sequence[PixelRect] = TILES) -> list[View]:
    return [View(rect, seen_in(rect, boxes)) for rect in tiles]


def pixels(found: Sequence[Thing]) -> list[Box]:
    keys = (("x_min", WIDTH), ("y_min", HEIGHT), ("x_max", WIDTH), ("y_max", HEIGHT))
    return [tuple(round(one[key] * size, 6) for key, size in keys) for one in found]  # type: ignore[misc]


def joined(whole: Sequence[Thing], views: Sequence[View], most: int = 150) -> list[Box]:
    return pixels(join_tiles(whole, views, WIDTH, HEIGHT, most).found)


def boxes_apart(drawn: Sequence[tuple[int, int, int, int]], gap: int = 4) -> list[Box]:
    """Boxes inside the picture, those left out that come near an earlier one."""
    kept: list[Box] = []
    for left, top, width, height in drawn:
        box = (float(left), float(top), float(min(WIDTH, left + width)), float(min(HEIGHT, top + height)))
        near = (box[0] - gap, box[1] - gap, box[2] + gap, box[3] + gap)
        if not any(near[0] < one[2] and one[0] < near[2] and near[1] < one[3] and one[1] < near[3] for one in kept):
            kept.append(box)
    return kept


@given(st.lists(places, max_size=12), st.booleans())
def test_objects_inside_a_tile_come_once(drawn: list[tuple[int, int, int, int]], is_seen_whole: bool) -> None:
    boxes = boxes_apart(drawn)
    found = joined(seen_in(WHOLE, boxes) if is_seen_whole else [], views_of(boxes))
    assert sorted(found) == sorted(boxes)


@given(places, st.integers(100, 900), st.integers(100, 700))
def test_an_object_larger_than_the_overlap_is_joined(drawn: tuple[int, int, int, int], width: int, height: int) -> None:
    box = (float(drawn[0]), float(drawn[1]), float(min(WIDTH, drawn[0] + width)), float(min(HEIGHT, drawn[1] + height)))
    assert joined([], views_of([box])) == [box]


@given(places, st.integers(100, 900), st.integers(100, 700), st.sampled_from([0.0, 0.02, 0.1, 0.6]))
def test_so_it_is_with_any_overlap(drawn: tuple[int, int, int, int], width: int, height: int, overlap: float) -> None:
    box = (float(drawn[0]), float(drawn[1]), float(min(WIDTH, drawn[0] + width)), float(min(HEIGHT, drawn[1] + height)))
    assume(box[2] - box[0] > 20 and box[3] - box[1] > 20)
    assert joined([], views_of([box], tile_rects(WIDTH, HEIGHT, SIZE, overlap))) == [box]


found_things = st.lists(st.tuples(st.sampled_from(range(len(TILES) + 1)), places, st.integers(1, 999)), max_size=30)
Drawn = list[tuple[int, tuple[int, int, int, int], int]]


def views_with(drawn: Drawn) -> tuple[list[Thing], list[View]]:
    """Anything found anywhere: of the whole picture (view 0), and of the tiles."""
    found: dict[int, list[Thing]] = {}
    for view, (left, top, width, height), score in drawn:
        rect = TILES[view - 1] if view else WHOLE
        x, y = rect.left + left % rect.width, rect.top + top % rect.height
        found.setdefault(view, []).append(thing((x, y, x + width, y + height), score / 1000))
    return found.get(0, []), [View(rect, found.get(view, [])) for view, rect in enumerate(TILES, 1)]


@given(found_things, st.randoms())
def test_the_order_of_the_tiles_says_nothing(drawn: Drawn, rng: random.Random) -> None:
    whole, views = views_with(drawn)
    expected = join_tiles(whole, views, WIDTH, HEIGHT, 10)
    rng.shuffle(views)
    assert join_tiles(whole, views, WIDTH, HEIGHT, 10) == expected


@given(found_things, st.booleans())
def test_only_what_lies_near_needs_to_be_compared(drawn: Drawn, are_points: bool) -> None:
    def all_pairs(groups: Sequence[seams._Group], grid: object) -> Iterator[tuple[int, int]]:
        pairs = itertools.combinations(range(len(groups)), 2)
        return ((one, other) for one, other in pairs if groups[one].views.isdisjoint(groups[other].views))

    whole, views = views_with(drawn)
    if are_points:
        whole, views = as_points(whole), [View(rect, as_points(found)) for rect, found in views]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seams, "_touching", all_pairs)
        expected = join_tiles(whole, views, WIDTH, HEIGHT, 150)
    assert join_tiles(whole, views, WIDTH, HEIGHT, 150) == expected


def as_points(found: Sequence[Mapping[str, Any]]) -> list[Thing]:
    return [{"label": "dot", "x": one["x_min"], "y": one["y_min"], "score": one["score"]} for one in found]


@given(st.lists(st.tuples(st.integers(30, 200), st.integers(30, 200), st.integers(8, 90)), max_size=8))
def test_objects_of_one_tile_are_never_merged(drawn: list[tuple[int, int, int]]) -> None:
    boxes = [(float(x), float(y), float(x + side), float(y + side)) for x, y, side in drawn]
    found = joined([], [View(TILES[0], [thing(box) for box in boxes]), *views_of([], TILES[1:])])
    assert sorted(found) == sorted(boxes)


def test_without_tiles_the_whole_pictures_objects_stay_as_they_are() -> None:
    found = [thing((-3, 5, 80, 90), 0.7), thing((0, 5, 80, 90), 0.9)]
    assert join_tiles(found, [], WIDTH, HEIGHT, 150).found == found


def test_a_double_keeps_the_tiles_box_and_the_best_score() -> None:
    whole = [thing((100, 100, 160, 160), 0.9)]
    found = join_tiles(whole, [View(TILES[0], [thing((104, 102, 158, 156), 0.4)])], WIDTH, HEIGHT, 150).found
    assert pixels(found) == [(104, 102, 158, 156)]
    assert found[0]["score"] == 0.9


def test_a_loose_box_around_a_small_object_is_its_double() -> None:
    whole = [thing((95, 95, 165, 165))]  # IoU 0.33
    assert joined(whole, [View(TILES[0], [thing((110, 110, 150, 150))])]) == [(110, 110, 150, 150)]


def test_a_small_object_in_front_of_a_large_one_stays() -> None:
    whole = [thing((50, 50, 300, 300))]
    assert len(joined(whole, [View(TILES[0], [thing((100, 100, 140, 140))])])) == 2


def test_a_piece_goes_where_another_tile_sees_its_place_whole() -> None:
    piece = View(TILES[0], [thing((360, 100, 400, 150))])  # TILES[1] begins at 300, and sees nothing there
    assert joined([], [piece, View(TILES[1], [])]) == []


def test_a_piece_that_no_tile_sees_better_stays() -> None:
    piece = View(TILES[0], [thing((280, 100, 400, 150))])
    assert joined([], [piece, View(TILES[1], [])]) == [(280, 100, 400, 150)]


def test_the_whole_pictures_box_counts_before_halves() -> None:
    box = (250.0, 100.0, 480.0, 250.0)
    found = joined([thing((252, 101, 481, 249))], views_of([box]))
    assert found == [(252, 101, 481, 249)]


def test_at_most_so_many_with_the_best_scores() -> None:
    scores = [0.3, 0.9, 0.5, 0.9]
    whole = [thing((20 + 100 * i, 20, 60 + 100 * i, 60), score) for i, score in enumerate(scores)]
    some = join_tiles(whole, [], WIDTH, HEIGHT, 3)
    assert [one["score"] for one in some.found] == [0.9, 0.5, 0.9]
    assert some.is_short
    assert not join_tiles(whole, [], WIDTH, HEIGHT, 4).is_short


# -- points --------------------------------------------------------------------------------------


def point(x: float, y: float, score: float = 0.5) -> Thing:
    return {"label": "dot", "x": x / WIDTH, "y": y / HEIGHT, "score": score}


@given(st.lists(places, max_size=10), st.booleans())
def test_points_of_objects_inside_a_tile_come_once(drawn: list[tuple[int, int, int, int]], is_seen_whole: bool) -> None:
    boxes = boxes_apart([(x, y, min(w, 60), min(h, 60)) for x, y, w, h in drawn], gap=50)
    centres = sorted((round((b[0] + b[2]) / 2, 6), round((b[1] + b[3]) / 2, 6)) for b in boxes)

    def points_in(rect: PixelRect) -> list[Thing]:
        parts = [cut(box, rect) for box in boxes]
        return [point((p[0] + p[2]) / 2, (p[1] + p[3]) / 2) for p in parts if p[0] < p[2] and p[1] < p[3]]

    whole = points_in(WHOLE) if is_seen_whole else []
    found = join_tiles(whole, [View(rect, points_in(rect)) for rect in TILES], WIDTH, HEIGHT, 150).found
    assert sorted((round(one["x"] * WIDTH, 6), round(one["y"] * HEIGHT, 6)) for one in found) == centres


def test_points_of_one_tile_are_never_merged() -> None:
    found = [point(100, 100), point(101, 100)]
    assert len(join_tiles([], [View(TILES[0], found)], WIDTH, HEIGHT, 150).found) == 2
