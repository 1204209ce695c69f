"""How far something is: a moving bar on a terminal, lines with the time of day elsewhere.

`Pace` alone knows rates. It says nothing before it can tell: first answers come late (a device warms up) and then all
at once (a whole batch is ready), so that a rate of them can be wrong by a hundred. Knows nothing of runs but counts.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import IO, Any

LEAST_DONE = 4  # pictures behind the first ones, and seconds, that a rate is made of
LEAST_S = 2.0
SETTLED_BATCHES = 4  # after which batches that come at once are evened out
SURE_FACTOR = 4.0  # between a rate that is too low and one that is too high: their mean is wrong by half of it at most
MOST_MARKS = 64
REDRAW_S = 0.1
BRIEF_DELAY_S = 1.0  # what is over sooner needs no bar
# Between two lines where there is no terminal: until so many seconds have passed, and from then on.
LINE_INTERVALS_S = ((60.0, 10.0), (600.0, 30.0))
LAST_LINE_INTERVAL_S = 60.0


class Pace:
    """How many pictures a second are finished, of those that are worked on: what was there already does not count.

    Two rates enclose the right one. From the start on it is too low, for a device warms up; from the first answer on
    too high, because that brings others with it on which the time before was spent. Where they agree, roughly, their
    mean is told. Once some batches are through, the rate is that of the last half of the time since the first answer,
    and follows what changes.
    """

    def __init__(self, now: float, at_once: int = 1) -> None:
        """Begin at the time `now` (s). `at_once` is how many are worked on at a time."""
        self.at_once = at_once
        self._started_at = self._now = now
        self._done = 0
        self._marks: list[tuple[float, int]] = []  # when so many were finished
        self._apart_s = 0.0  # how far apart two marks are at least

    def restart(self, now: float) -> None:
        """Forget the time so far: it went into loading."""
        self._started_at, self._marks = now, []

    def note(self, num_done: int, now: float) -> None:
        """Note that `num_done` are finished at the time `now`."""
        is_news = num_done > self._done
        self._done, self._now = num_done, now
        if is_news and (not self._marks or now - self._marks[-1][0] >= self._apart_s):
            self._marks.append((now, num_done))
            if len(self._marks) > MOST_MARKS:
                del self._marks[1::2]
                self._apart_s = 2 * (now - self._marks[0][0]) / MOST_MARKS

    @property
    def rate(self) -> float | None:
        """Return pictures a second; None as long as they do not tell."""
        if not self._marks:
            return None
        first_at, num_first = self._marks[0]
        num_behind, behind_s = self._done - num_first, self._now - first_at
        if num_behind < max(LEAST_DONE, self.at_once) or behind_s < LEAST_S:
            return None
        if num_behind >= SETTLED_BATCHES * self.at_once:
            return self._recent_rate((first_at + self._now) / 2)
        too_low, too_high = self._done / (self._now - self._started_at), num_behind / behind_s
        return (too_low * too_high) ** 0.5 if too_high <= SURE_FACTOR * too_low else None

    def _recent_rate(self, since: float) -> float:
        at, num_done = self._marks[bisect_right(self._marks, since, key=lambda mark: mark[0]) - 1]
        return (self._done - num_done) / (self._now - at)


class Progress:
    """Pictures done of all, with rate and time left; call `update_to` as they are finished."""

    def __init__(
        self,
        stream: IO[str],
        total: int | None,
        *,
        is_bar: bool,
        what: str = "",
        unit: str = "images",
        is_brief: bool = False,
    ) -> None:
        """Begin. A bar that `is_brief` comes after a second and goes at the end."""
        self._stream, self._total, self._what, self._unit = stream, total, what, unit
        self._done = self._failed = self._before = self._expected_before = 0
        self._started_at = self._told_at = time.monotonic()
        self._day = time.localtime().tm_yday
        self._pace = Pace(self._started_at)
        self._is_brief, self._is_drawn = is_brief, False
        self._bar: Any = None
        if is_bar:
            from tqdm import tqdm

            form = "{desc}{n_fmt} " + unit + "{postfix} [{elapsed}]"
            if total is not None:
                form = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} " + unit + "{postfix} [{elapsed}]"
            self._bar = tqdm(
                total=total,
                file=stream,
                dynamic_ncols=True,
                bar_format=form,
                leave=not is_brief,
                delay=BRIEF_DELAY_S if is_brief else 0.0,
            )
            self.describe("")

    def expect(self, *, at_once: int | None = None, num_before: int | None = None) -> None:
        """Tell what is known ahead: how many are worked on `at_once`, and how many an earlier start finished."""
        self._pace.at_once = self._pace.at_once if at_once is None else max(1, at_once)
        self._expected_before = self._expected_before if num_before is None else num_before

    def update_to(self, num_done: int, num_failed: int = 0, num_before: int = 0) -> None:
        """Show that so many are finished, of which so many failed.

        Args:
            num_before: of `num_done`, those that an earlier start finished; they do not count into the rate.
        """
        now = time.monotonic()
        self._done, self._failed, self._before = num_done, num_failed, num_before
        self._pace.note(num_done - num_before, now)
        if self._bar is not None:
            if now - self._told_at >= REDRAW_S or num_done == self._total:
                self._told_at = now
                self._draw()
        elif now - self._told_at >= _line_interval_s(self._told_at - self._started_at):
            self._told_at = now
            self._stream.write(self.line() + "\n")
            self._stream.flush()

    def _draw(self) -> None:
        if self._is_brief and time.monotonic() - self._started_at < BRIEF_DELAY_S:
            return
        self._is_drawn = True
        self._bar.n = self._done
        self._bar.set_postfix_str(", ".join(self._facts()), refresh=False)
        self._bar.refresh()

    def restart_clock(self) -> None:
        """Reckon rate and time left from now on."""
        self._pace.restart(time.monotonic())

    def describe(self, text: str) -> None:
        """Put what is going on before the bar; empty: what the bar is about."""
        text = text or self._what
        if self._bar is not None:
            self._bar.set_description_str(f"{text}: " if text else "", refresh=not self._is_brief)

    def line(self) -> str:
        """Return the state as one line: `14:03:27 1,200/5,000 images, 24.1/s, 2:38 left, 3 failed`."""
        done = f"{self._done:,}" if self._total is None else f"{self._done:,}/{self._total:,}"
        what = f"{self._what}: " if self._what else ""
        return ", ".join([f"{self._time_of_day()} {what}{done} {self._unit}", *self._facts()])

    def _time_of_day(self) -> str:
        now = time.localtime()
        return time.strftime("%H:%M:%S" if now.tm_yday == self._day else "%Y-%m-%d %H:%M:%S", now)

    def _facts(self) -> list[str]:
        facts = []
        if rate := self._pace.rate:
            facts.append(f"{shown_rate(rate)}/s")
        if rate and self._total is not None and self._done < self._total:
            num_before = max(self._before, self._expected_before)
            num_left = max(0, self._total - (self._done - self._before) - num_before)
            facts.append(f"{clock(num_left / rate, is_rough=True)} left")
        if self._failed:
            facts.append(f"{self._failed:,} failed")
        return facts

    def close(self) -> None:
        """Leave the last state of the bar standing, or of a brief one nothing."""
        if self._bar is None:
            return
        if not self._is_brief:
            self._draw()
        elif self._is_drawn:
            self._bar.clear()
        self._bar.close()


def _line_interval_s(elapsed_s: float) -> float:
    """Return how long after a line written at `elapsed_s` the next one comes."""
    return next((interval for until, interval in LINE_INTERVALS_S if elapsed_s < until), LAST_LINE_INTERVAL_S)


@contextlib.contextmanager
def told_progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show the progress of what is made of records as long as the block runs.

    What is given is called with how many pictures are done and of how many, or with how many records are read and None.
    """
    shown: dict[bool, Progress] = {}
    with contextlib.ExitStack() as stack:

        def tell(num_done: int, total: int | None) -> None:
            is_reading = total is None
            if is_reading not in shown:
                stack.close()
                shown.clear()
                display = _progress_of(total, what, "records" if is_reading else "images", is_brief=True)
                shown[is_reading] = stack.enter_context(contextlib.closing(display))
            shown[is_reading].update_to(num_done)

        yield tell


@contextlib.contextmanager
def shown_progress(total: int | None, what: str = "") -> Iterator[Progress]:
    """Show progress on stderr as long as the block runs; `total` None: not known."""
    with contextlib.closing(_progress_of(total, what)) as display:
        yield display


def _progress_of(total: int | None, what: str, unit: str = "images", *, is_brief: bool = False) -> Progress:
    is_bar = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return Progress(sys.stderr, total, is_bar=is_bar, what=what, unit=unit, is_brief=is_brief)


@contextlib.contextmanager
def loading(progress: Progress | None, words: str = "loading the model") -> Iterator[None]:
    """Say in `words` that a model is being loaded, and reckon the rate from its end on."""
    if progress is None:
        yield
        return
    progress.describe(words)
    try:
        yield
    finally:
        progress.describe("")
        progress.restart_clock()


def shown_rate(rate: float) -> str:
    """Return a rate with as many digits as say something: `0.042`, `7.3`, `24`, `1,200`."""
    return f"{rate:,.0f}" if rate >= 99.95 else f"{rate:.1f}" if rate >= 0.95 else f"{rate:.2g}"


def clock(seconds: float, *, is_rough: bool = False) -> str:
    """Return seconds as `7.5 s` (`8 s` where `is_rough`), `2:38` or `1:02:05`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if is_rough else f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
