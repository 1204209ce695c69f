"""In which order a run has come through the requests of its journal: what the rewrite at its end puts them in.

Places are those of found_records.py, new requests follow behind them. Kept as runs of neighbours, of which a
resumed run has two however long it is.
"""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray


class Visits:
    """The places visited, in order."""

    def __init__(self, num_found: int) -> None:
        self._num_found = self._next_new = num_found
        self._firsts, self._counts = array("q"), array("q")
        self._last = -1

    def note(self, place: int | None) -> None:
        """Note that the next request in input order stands at `place`; None: it is new."""
        if place is None:
            place = self._next_new
            self._next_new += 1
        if place == self._last + 1 and self._counts:
            self._counts[-1] += 1
        else:
            self._firsts.append(place)
            self._counts.append(1)
        self._last = place

    def places(self) -> NDArray[np.int64]:
        """Return all of them, in the order of the visits."""
        runs = [np.arange(first, first + count) for first, count in zip(self._firsts, self._counts, strict=True)]
        return np.concatenate(runs) if runs else np.empty(0, np.int64)

    def not_visited(self) -> NDArray[np.int64]:
        """Return the places found at the start that no request of this run has, in their order."""
        is_left = np.ones(self._num_found, bool)
        for first, count in zip(self._firsts, self._counts, strict=True):
            is_left[first : first + count] = False
        return np.flatnonzero(is_left)
