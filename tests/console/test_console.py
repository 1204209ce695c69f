"""What people see: nothing in data steers a terminal, colour can be refused, quiet is quiet."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from terminal import terminal

from md3cli.console import RunConsole, show_finding
from md3cli.console.summary import Summary
from md3cli.records import is_printable


def record(**changes: Any) -> dict[str, Any]:
    base = {"image": "a/b.jpg", "task": "caption", "prompt": None, "caption": "A dog.", "error": None}
    return base | changes


@pytest.mark.parametrize(
    ("has_color", "environment", "is_coloured"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)
def test_colour_is_for_terminals_and_can_be_refused(
    has_color: bool, environment: dict[str, str], is_coloured: bool
) -> None:
    with terminal(**environment) as stream:
        RunConsole(has_color=has_color).show_record(record(error={"type": "io", "message": "x"}))
    assert ("\x1b" in stream.getvalue()) == is_coloured


def test_no_colour_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    RunConsole().show_record(record(error={"type": "io", "message": "x"}))
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.process
@given(text=st.text())
def test_no_data_reaches_a_terminal_raw(text: str) -> None:
    console = RunConsole(has_color=False)
    with terminal() as stream:
        console.show_record(record(image=text, prompt=text, caption=text))
        console.warn(text)
        show_finding("x", "bad", text, text, has_color=False)
    assert all(is_printable(char) or char == "\n" for char in stream.getvalue())


def test_markup_in_data_is_not_interpreted() -> None:
    with terminal() as stream:
        RunConsole(has_color=False).say("[bold]x[/bold] :smile: [/]")
    assert stream.getvalue() == "[bold]x[/bold] :smile: [/]\n"


def test_quiet_says_nothing() -> None:
    console = RunConsole(is_quiet=True)
    with terminal() as stream:
        console.warn("x")
        console.summarize(Summary(num_ok=1))
        with console.progress(3) as progress:
            assert progress is None
    assert stream.getvalue() == ""
