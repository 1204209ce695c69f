"""Progress: a bar on a terminal, lines elsewhere, and rates that are not wrong by much from the first one on."""

from __future__ import annotations

import io
import random
import re
import time
from collections.abc import Iterator

import pytest
from terminal import terminal

from md3cli.console import RunConsole
from md3cli.console.progress import MOST_MARKS, Pace, Progress, clock, loading, shown_rate, told_progress


class Clock:
    """A clock that tests move; time of day and time since the start go alike."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self._localtime = 0.0, time.gmtime
        monkeypatch.setattr("md3cli.console.progress.time.monotonic", lambda: self.now)
        monkeypatch.setattr("md3cli.console.progress.time.localtime", lambda: self._localtime(self.now + 50_000))


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_bar_on_a_terminal() -> None:
    with terminal() as stream, RunConsole().progress(4) as progress:
        assert progress is not None
        progress.update_to(2, 1)
        RunConsole(has_color=False).say("aside")
        progress.update_to(4, 1)
    text = stream.getvalue()
    assert "100%" in text
    assert "4/4 images, 1 failed" in text
    assert "\naside\n" in text.replace("\r", "\n")


def test_a_bar_without_a_total_and_with_a_name() -> None:
    with terminal() as stream, RunConsole().progress(None, "overlay") as progress:
        assert progress is not None
        progress.update_to(3)
    assert "overlay: 3 images [" in stream.getvalue()


def test_lines_come_every_10_s_then_30_s_then_minutes(clocked: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream, 500_000, is_bar=False)
    for second in range(1, 901):
        clocked.now = float(second)
        progress.update_to(48 * second, 3 if second > 15 else 0)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == [
        "13:53:30 480/500,000 images, 48.0/s, 2:53:26 left",
        "13:53:40 960/500,000 images, 48.0/s, 2:53:16 left, 3 failed",
    ]
    at = [int(line.split()[1].partition("/")[0].replace(",", "")) // 48 for line in lines]
    assert at == [*range(10, 61, 10), *range(90, 601, 30), *range(660, 901, 60)]


def test_a_line_of_another_day_has_its_date(clocked: Clock) -> None:
    progress = Progress(io.StringIO(), None, is_bar=False)
    assert progress.line() == "13:53:20 0 images"
    clocked.now += 86_400
    assert progress.line() == "1970-01-02 13:53:20 0 images"


def test_loading_is_said_and_does_not_count(clocked: Clock) -> None:
    with terminal() as stream, RunConsole().progress(4) as progress, loading(progress):
        pass
    assert "loading the model: " in stream.getvalue()
    with terminal() as stream, RunConsole().progress(4) as progress, loading(progress, "loading and compiling"):
        pass
    assert "loading and compiling: " in stream.getvalue()
    plain = Progress(io.StringIO(), 100, is_bar=False)
    with loading(plain):
        clocked.now += 600
    for second in range(1, 11):
        clocked.now = 600.0 + second
        plain.update_to(second)
    assert plain.line().endswith(" 10/100 images, 1.0/s, 1:30 left")
    with loading(None):
        pass


def test_what_was_done_before_counts_neither_into_the_rate_nor_into_what_is_left(clocked: Clock) -> None:
    """900 of 1,000 pictures are done; the feed comes by the first 500 of them at once, and by the others later."""
    progress = Progress(io.StringIO(), 1000, is_bar=False)
    progress.expect(num_before=900)
    for second in range(1, 31):
        clocked.now = float(second)
        progress.update_to(500 + second, 0, 500)
    assert progress.line().endswith(" 530/1,000 images, 1.0/s, 1:10 left")
    progress.update_to(930, 0, 900)
    assert progress.line().endswith(" 930/1,000 images, 1.0/s, 1:10 left")


def test_what_takes_long_shows_records_first_and_then_pictures(clocked: Clock) -> None:
    with terminal() as stream, told_progress("coco") as told:
        told(0, None)
        clocked.now += 2
        told(120_000, None)
        told(0, 2000)
        clocked.now += 2
        told(480, 2000)
    text = stream.getvalue()
    assert "coco: 120000 records" in text
    assert "coco:  24%" in text
    assert text.endswith("\r")  # the bar goes at the end


def test_what_is_soon_done_shows_nothing() -> None:
    with terminal() as stream, told_progress("coco") as told:
        told(0, None)
        told(12, 12)
    assert stream.getvalue().strip() == ""
    with terminal() as stream, RunConsole(has_progress=False).told_progress("coco") as told:
        told(0, None)
    assert stream.getvalue() == ""


def test_a_dumb_terminal_gets_no_bar() -> None:
    with terminal(TERM="dumb") as stream, RunConsole().progress(4) as progress:
        assert progress is not None
        progress.update_to(4, 0)
    assert stream.getvalue() == ""


# -- a first estimate --------------------------------------------------------------------------------


def finished(batch: int, warm_up_s: float, batch_s: float, spread: float, seed: int = 0) -> Iterator[float]:
    """When a device finishes pictures, `batch` at a time in slots that are filled again as they become free.

    The first ones come later by a warm-up; each takes `batch_s` seconds, more or less by the share `spread`. Records
    are written in order.
    """
    chance = random.Random(seed)
    slots, latest = [warm_up_s] * batch, 0.0
    while True:
        slots.sort()
        slots[0] += batch_s * chance.uniform(1 - spread, 1 + spread)
        latest = max(latest, slots[0])
        yield latest


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("batch_s", [0.5, 2.0, 20.0, 120.0])
@pytest.mark.parametrize("warm_up_s", [0.0, 3.0, 40.0])
@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_the_first_estimate_is_not_wrong_by_three(batch: int, warm_up_s: float, batch_s: float, spread: float) -> None:
    times = finished(batch, warm_up_s, batch_s, spread)
    total = 40 * batch
    done_at = [next(times) for _ in range(total)]
    pace, now, num_done = Pace(0.0, batch), 0.0, 0
    while num_done < total // 2:
        now += min(0.5, batch_s / 2)
        while num_done < total and done_at[num_done] <= now:
            num_done += 1
        pace.note(num_done, now)
        if pace.rate:
            left_s, real_s = (total - num_done) / pace.rate, done_at[-1] - now
            assert real_s / 3 < left_s < real_s * 3, (num_done, now)
            break
    assert pace.rate is not None, "half of the run is over, and nothing was said"


def test_the_rate_follows_what_changes() -> None:
    pace, num_done = Pace(0.0), 0
    for second in range(1, 1001):
        num_done += 10 if second <= 500 else 2
        pace.note(num_done, float(second))
    assert pace.rate == pytest.approx(2, rel=0.1)
    assert len(pace._marks) <= MOST_MARKS


def test_a_rate_falls_while_nothing_comes() -> None:
    pace = Pace(0.0)
    for second in range(1, 101):
        pace.note(10 * second, float(second))
    pace.note(1000, 300.0)
    assert pace.rate is not None
    assert pace.rate < 5


@pytest.mark.parametrize(
    ("rate", "text"), [(0.0421, "0.042"), (0.96, "1.0"), (12.24, "12.2"), (99.96, "100"), (19949.2, "19,949")]
)
def test_shown_rate(rate: float, text: str) -> None:
    assert shown_rate(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (7.46, "7.5 s"), (60, "1:00"), (158, "2:38"), (3725, "1:02:05")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_rough_clock_has_no_tenths() -> None:
    assert re.fullmatch(r"\d+ s", clock(7.46, is_rough=True))
