"""Places for names: inside the picture, free, and hiding little."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.exporters.plates import Plates, Rect

WIDTH, HEIGHT = 640, 480


@st.composite
def rects(draw: st.DrawFn) -> Rect:
    left, top = draw(st.floats(0, WIDTH - 1)), draw(st.floats(0, HEIGHT - 1))
    return Rect(left, top, draw(st.floats(left, WIDTH)), draw(st.floats(top, HEIGHT)))


@pytest.mark.process
@given(st.lists(st.tuples(rects(), st.integers(1, 700), st.integers(1, 500), st.floats(0, 3)), max_size=20))
def test_places_lie_inside_and_never_over_one_another(asked: list[tuple[Rect, int, int, float]]) -> None:
    plates = Plates(WIDTH, HEIGHT, [thing for thing, *_ in asked])
    given_out = [plates.take(*one) for one in asked]
    found = [place for place in given_out if place is not None]
    assert found == plates.taken
    for place, (_, width, height, _) in zip(given_out, asked, strict=True):
        if place is not None:
            assert 0 <= place.left < place.right <= WIDTH + 1e-9
            assert 0 <= place.top < place.bottom <= HEIGHT
            assert (place.right - place.left, place.bottom - place.top) == pytest.approx((width, height))
    assert not any(one.covers(other) for n, one in enumerate(found) for other in found[:n])


def test_the_usual_place_is_above_and_at_the_border_inside() -> None:
    free, high = Rect(100, 100, 300, 300), Rect(100, 5, 300, 480)
    assert Plates(WIDTH, HEIGHT, [free]).take(free, 80, 20, 0.4) == Rect(100, 80, 180, 100)
    assert Plates(WIDTH, HEIGHT, [high]).take(high, 80, 20, 0.4) == Rect(100, 5, 180, 25)


def test_a_small_thing_beside_is_not_hidden() -> None:
    thing, small = Rect(100, 100, 300, 300), Rect(110, 82, 130, 98)
    place = Plates(WIDTH, HEIGHT, [thing, small]).take(thing, 80, 20, 0.4)
    assert place == Rect(220, 80, 300, 100)


def test_what_would_hide_too_much_gets_no_place() -> None:
    whole, small = Rect(0, 0, 60, 40), Rect(20, 15, 40, 25)
    plates = Plates(60, 40, [whole, small])
    assert plates.take(whole, 58, 38, 0.4) is None
    assert plates.take(whole, 58, 38, 5) == Rect(0, 0, 58, 38)
    assert Plates(60, 40, [small]).take(small, 100, 20, 5) is None  # wider than the picture


def test_a_dot_is_named_at_its_side() -> None:
    dot = Rect(100, 100, 108, 108)
    assert Plates(WIDTH, HEIGHT, [dot]).take(dot, 80, 20, 0.4) == Rect(108, 100, 188, 120)
