"""Where the names of things are written on a picture: beside them, never over one another, hiding little.

It stands apart from the overlay, its only user, because it is geometry alone and is tested without a picture.
A name takes the place around its thing that hides the least of all things, counted in shares of them: a plate on a
large box hides nothing to speak of, the same plate on a small one hides it. Where nothing good is left the name is
left out. Finding the best places for all names at once is NP-hard (Marks and Shieber, 1991); one after the other, the
most important first, is good enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_STEP = 0.02  # what a less usual place must hide less, as a share of a thing


class Rect(NamedTuple):
    """A rectangle in pixels, right and bottom outside."""

    left: float
    top: float
    right: float
    bottom: float

    def covers(self, other: Rect) -> bool:
        """Return whether the two share a pixel."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


class Plates:
    """The names' places on one picture of `width` x `height` pixels with all its things, filled one by one."""

    def __init__(self, width: int, height: int, things: Sequence[Rect]) -> None:
        self._width, self._height = width, height
        self._things_N4 = np.array(things, dtype=float).reshape(-1, 4)
        sides_N2 = np.maximum(self._things_N4[:, 2:] - self._things_N4[:, :2], 1.0)
        self._areas_N = sides_N2[:, 0] * sides_N2[:, 1]
        self.taken: list[Rect] = []

    def take(self, thing: Rect, width: float, height: float, most_hidden: float) -> Rect | None:
        """Take the best free place for a plate of `width` x `height` near `thing`.

        Args:
            most_hidden: how much it may hide, in things: 0.5 is half a thing, or a quarter of two.

        Returns:
            None: no place is free, or all hide more.
        """
        ranked = list(self._free_places(thing, width, height))
        if not ranked:
            return None
        costs_P = self._hidden([place for _, place in ranked]) + [_STEP * rank for rank, _ in ranked]
        best = int(costs_P.argmin())
        if costs_P[best] > most_hidden:
            return None
        self.taken.append(ranked[best][1])
        return ranked[best][1]

    def _free_places(self, thing: Rect, width: float, height: float) -> Iterator[tuple[int, Rect]]:
        for rank, (left, top) in enumerate(_corners(thing, width, height)):
            left = min(max(left, 0.0), self._width - width)
            place = Rect(left, top, left + width, top + height)
            is_inside = place.left >= 0 and place.top >= 0 and place.bottom <= self._height
            if is_inside and not any(place.covers(other) for other in self.taken):
                yield rank, place

    def _hidden(self, places: Sequence[Rect]) -> npt.NDArray[np.float64]:
        """Return how much of all things each place hides, as a sum of shares: [P]."""
        places_P14 = np.array(places)[:, None]
        low_PN2 = np.maximum(self._things_N4[:, :2], places_P14[..., :2])
        high_PN2 = np.minimum(self._things_N4[:, 2:], places_P14[..., 2:])
        shared_PN2 = np.maximum(high_PN2 - low_PN2, 0.0)
        hidden_P: npt.NDArray[np.float64] = (shared_PN2[..., 0] * shared_PN2[..., 1] / self._areas_N).sum(axis=1)
        return hidden_P


def _corners(thing: Rect, width: float, height: float) -> Iterator[tuple[float, float]]:
    """Yield the left and top of each place around a thing, the usual first; beside it where it is small."""
    left, top, right, bottom = thing
    beside = [(right, top), (right, top - height), (left - width, top), (left - width, top - height)]
    if right - left < height and bottom - top < height:
        yield from beside
    yield from ((left, top - height), (right - width, top - height), (left, bottom), (right - width, bottom))
    yield from ((left, top), (left, bottom - height))
    yield from beside
