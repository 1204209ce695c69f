"""What people see: the table, progress, the summary; nothing in data steers a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from terminal import terminal

from md3cli.console import Progress, RunConsole, Summary, clock, describe, loading, show_finding, summary_lines
from md3cli.records import is_printable


def record(**changes: Any) -> dict[str, Any]:
    base = {"image": "a/b.jpg", "task": "caption", "prompt": None, "caption": "A dog.", "error": None}
    return base | changes


BOX = {"label": "car", "x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.625, "score": 0.931}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "A dog."),
        ({"task": "query", "answer": "Yes."}, "Yes."),
        ({"task": "detect", "objects": []}, "none"),
        ({"task": "detect", "objects": [BOX]}, "1: 0.93 [0.10 0.20 0.50 0.62]"),
        (
            {"task": "detect", "objects": [BOX] * 8},
            "8: " + ", ".join(["0.93 [0.10 0.20 0.50 0.62]"] * 6) + " and 2 more",
        ),
        ({"task": "point", "points": [{"label": "x", "x": 0.25, "y": 0.5, "score": 0.8}]}, "1: 0.80 (0.25 0.50)"),
        ({"task": "segment", "segments": [{"svg_path": "M 0 0", "score": 0.7}]}, "1: 0.70 M 0 0"),
        ({"task": "segment", "segments": [{"svg_path": "", "parse_error": "odd", "score": 0.7}]}, "1: 0.70 odd"),
        ({"error": {"type": "empty", "message": "0 bytes"}}, "empty: 0 bytes"),
    ],
)
def test_describe(changes: dict[str, Any], text: str) -> None:
    assert describe(record(**changes)) == text


def test_table_has_one_header_and_a_row_a_record() -> None:
    console = RunConsole(has_color=False)
    with terminal() as stream:
        assert console.is_stdout_terminal
        console.show_record(record())
        console.show_record(record(image=None, task="query", prompt="why?", answer="so"))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert lines[0].split() == ["image", "asked", "answer"]
    assert [line.split() for line in lines[1:]] == [["a/b.jpg", "caption", "A", "dog."], ["-", "query", "why?", "so"]]


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


# -- summary --------------------------------------------------------------------------------------------------


def test_summary_of_a_full_run() -> None:
    summary = Summary(
        num_images=1200,
        num_ok=2390,
        failed={"decode": 8, "empty": 2},
        num_done_before=400,
        num_failed_before=3,
        prompt_tokens=1_750_000,
        output_tokens=9_000,
        elapsed_s=110.0,
        load_s=10.0,
        stages_s={"vision": 60.0, "prefill": 15.0, "decode": 25.0},
        skipped={"hidden": 2, "other suffix": 5},
        outputs=["out.json", "out.json.records.jsonl"],
        next_command="md3 report out.json.records.jsonl -o report.html",
    )
    assert [line for line, _ in summary_lines(summary)] == [
        "2,400 requests of 1,200 images: 2,390 ok, 10 failed (decode 8, empty 2)",
        "400 requests done before (3 of them failed)",
        "1:50, 12.0 img/s after 10.0 s of loading the model; 1,750,000 prompt and 9,000 output tokens; "
        "vision 60%, prefill 15%, decode 25%",
        "not taken: 2 hidden, 5 other suffix",
        "written: out.json, out.json.records.jsonl",
        "next: md3 report out.json.records.jsonl -o report.html",
    ]
    assert "vision 60.0 s, prefill 15.0 s, decode 25.0 s" in [
        line for line, _ in summary_lines(summary, is_verbose=True)
    ]


def test_summary_of_one_text_question() -> None:
    summary = Summary(num_ok=1, elapsed_s=1.25, prompt_tokens=11, output_tokens=4)
    assert [line for line, _ in summary_lines(summary)] == [
        "1 request of 0 images: 1 ok",
        "1.2 s; 11 prompt and 4 output tokens",
    ]


# -- progress: a bar on a terminal, plain lines elsewhere ------------------------------------------------------


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
