"""Waiting for other processes of a run: whether they still give signs of life, and telling who is waited for.

The clocks of two machines are never compared. A sign of life is a value that changes, and only how long it has stood
still, by the clock of the process that looks, counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Clock = Callable[[], float]

TELL_INTERVAL_S = 30.0  # between two words on what is waited for
FIRST_WORD_AFTER_S = 5.0


class Signs:
    """The signs of life of others, each by its name, and how long they have stood still here."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        """`clock` gives seconds from any beginning."""
        self._clock = clock
        self._seen: dict[str, tuple[Any, float]] = {}

    def still_for(self, name: str, sign: Any) -> float:
        """Return how many seconds `sign` has been as it is now; 0 where it is new."""
        now = self._clock()
        before, since = self._seen.get(name, (None, now))
        if name not in self._seen or before != sign:
            since = now
        self._seen[name] = (sign, since)
        return now - since


class Teller:
    """Says what is waited for, first after a little while and then now and then; `forget` ends the wait."""

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        first_after_s: float = FIRST_WORD_AFTER_S,
        interval_s: float = TELL_INTERVAL_S,
        growth: float = 1.0,
        clock: Clock = time.monotonic,
    ) -> None:
        """`growth`: the factor from one interval to the next."""
        self._say, self._clock = say, clock
        self._first_after_s, self._interval_s, self._growth = first_after_s, interval_s, growth
        self._began: float | None = None
        self._due_s, self._step_s = first_after_s, interval_s

    @property
    def waited_s(self) -> float:
        """How long this wait has taken; 0 before the first `tell`."""
        return 0.0 if self._began is None else self._clock() - self._began

    def tell(self, words: Callable[[], str] | str) -> None:
        """The wait goes on; `words` says for what, and is asked only when it is time to say it."""
        if self._began is None:
            self._began = self._clock()
        if self.waited_s >= self._due_s:
            self._due_s = self.waited_s + self._step_s
            self._step_s *= self._growth
            self._say(words if isinstance(words, str) else words())

    def forget(self) -> None:
        """Begin anew: what was waited for has come."""
        self._began = None
        self._due_s, self._step_s = self._first_after_s, self._interval_s
