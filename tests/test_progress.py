"""Progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from terminal import terminal

from md3cli.console import Progress, RunConsole, clock, loading


def test_progress_is_a_bar_on_a_terminal() -> None:
    with terminal() as stream, RunConsole().progress(4) as progress:
        assert progress is not None
        progress.update_to(2, 1)
        RunConsole(has_color=False).say("aside")
        progress.update_to(4, 1)
    text = stream.getvalue()
    assert "4/4" in text
    assert "failed=1" in text
    assert "\naside\n" in text.replace("\r", "\n")


def test_progress_is_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("md3cli.console.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(stream, 5000, is_bar=False)
    for step in range(1, 26):
        now[0] += 1.0
        progress.update_to(48 * step, 3 if step > 15 else 0)
    assert stream.getvalue().splitlines() == [
        "480/5000 48.0 img/s eta 1:34",
        "960/5000 48.0 img/s eta 1:24 failed 3",
    ]


def test_loading_is_said_and_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal() as stream, RunConsole().progress(4) as progress, loading(progress):
        pass
    assert "loading the model" in stream.getvalue()
    now = [100.0]
    monkeypatch.setattr("md3cli.console.time.monotonic", lambda: now[0])
    plain = Progress(io.StringIO(), 100, is_bar=False)
    with loading(plain):
        now[0] += 60
    now[0] += 2
    plain.update_to(10, 0)
    assert plain.line() == "10/100 5.0 img/s eta 18.0 s"
    with loading(None):
        pass


def test_a_dumb_terminal_gets_no_bar() -> None:
    with terminal(TERM="dumb") as stream, RunConsole().progress(4) as progress:
        assert progress is not None
        progress.update_to(4, 0)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (7.46, "7.5 s"), (60, "1:00"), (158, "2:38"), (3725, "1:02:05")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
