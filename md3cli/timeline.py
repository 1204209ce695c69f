"""How far a run was at which time, in memory that does not grow with the run.

A few hundred points at most, about evenly spaced: when there are too many, every second one goes and
the spacing doubles. For the throughput plot of the report; the journal says what is really done.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_POINTS = 240
FIRST_SPACING_S = 0.5


class Timeline:
    """Points (seconds since the run began, records done), later starts behind earlier ones."""

    def __init__(self, earlier: Sequence[tuple[float, int]] = ()) -> None:
        self._points = list(earlier)
        self._start_s, self._start_done = self._points[-1] if self._points else (0.0, 0)
        self._spacing_s = FIRST_SPACING_S

    @property
    def points(self) -> list[tuple[float, int]]:
        """All points, the latest last."""
        return list(self._points)

    def note(self, elapsed_s: float, num_done: int, *, is_last: bool = False) -> None:
        """Note that this start has done `num_done` records after `elapsed_s` seconds; cheap to call often.

        `is_last`: nothing more will be done, so the point counts however near it is; writing the outputs
        afterwards is no part of the throughput.
        """
        point = (round(self._start_s + elapsed_s, 3), self._start_done + num_done)
        if self._points:
            last_s, last_done = self._points[-1]
            if point[1] == last_done if is_last else point[0] < last_s + self._spacing_s:
                return
        self._points.append(point)
        while len(self._points) > MAX_POINTS:
            last = self._points[-1]
            self._points = [*self._points[:-1:2], last]
            self._spacing_s = max(2 * self._spacing_s, last[0] / MAX_POINTS)
