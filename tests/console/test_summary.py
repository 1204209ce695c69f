"""The summary of a run, line by line."""

from __future__ import annotations

import pytest

from md3cli.console.summary import Failure, Summary, summary_lines


def lines(summary: Summary, **options: bool) -> list[str]:
    return [line for line, _ in summary_lines(summary, **options)]


FULL = Summary(
    num_images=1200,
    num_ok=2390,
    failed={"decode": 8, "empty": 2},
    num_done_before=400,
    num_failed_before=3,
    prompt_tokens=1_750_000,
    output_tokens=9_000,
    answering_s=110.0,
    writing_s=3.0,
    load_s=10.0,
    stages_s={"vision": 60.0, "prefill": 15.0, "decode": 25.0, "idle": 0.0},
    skipped={"hidden": 2, "other suffix": 5},
    outputs=["out.json", "out.json.records.jsonl"],
    next_command="md3 report out.json.records.jsonl -o report.html",
)


def test_a_full_run() -> None:
    assert lines(FULL) == [
        "2,390 of 2,400 ok, 10 failed (decode 8, empty 2), 1,200 images in 1:40 (12.0/s), model loaded in 10.0 s, "
        "files written in 3.0 s",
        "400 more were done before (3 of them failed)",
        "not taken: 2 hidden, 5 other suffix",
        "written: out.json, out.json.records.jsonl",
        "next: md3 report out.json.records.jsonl -o report.html",
    ]


def test_tokens_and_stages_are_for_those_who_ask() -> None:
    told = lines(FULL, is_verbose=True)
    assert told[2:4] == [
        "1,750,000 prompt and 9,000 output tokens",
        "vision 60.0 s (60%), prefill 15.0 s (15%), decode 25.0 s (25%)",
    ]
    assert [line for line in told if line not in told[2:4]] == lines(FULL)


def test_a_small_run() -> None:
    summary = Summary(num_images=12, num_ok=24, answering_s=4.384, load_s=3.4)
    assert lines(summary) == ["24 of 24 ok, 12 images in 1.0 s (12.2/s), model loaded in 3.4 s"]


def test_one_question_without_a_picture() -> None:
    assert lines(Summary(num_ok=1, answering_s=1.25)) == ["1 of 1 ok, in 1.2 s"]


@pytest.mark.parametrize(
    ("summary", "line"),
    [
        (Summary(num_done_before=24), "nothing to do: all 24 were done before"),
        (
            Summary(num_done_before=24, num_failed_before=1),
            "nothing to do: all 24 were done before (1 of them failed)",
        ),
        (Summary(), "nothing to do"),
    ],
)
def test_nothing_to_do(summary: Summary, line: str) -> None:
    assert lines(summary) == [line]


@pytest.mark.parametrize(
    "summary",
    [
        Summary(num_images=2000, num_ok=2000, answering_s=3.09, load_s=3.0),
        Summary(num_images=2000, num_ok=2000, answering_s=3.0, load_s=3.1),
        Summary(num_images=2000, failed={"empty": 2000}, answering_s=1.0),
    ],
)
def test_no_rate_where_it_would_say_nothing(summary: Summary) -> None:
    """The time is too short, or the pictures failed before the model saw them."""
    assert "/s)" not in lines(summary)[0]
    assert "2,000 images in" in lines(summary)[0]


def test_failures_are_named_and_cut_to_the_terminal() -> None:
    long = "folder/" * 20 + "name.jpg"
    summary = Summary(num_ok=1, failures=[Failure(long, "decode", "broken")], failures_command="grep x")
    told = [line for line, _ in summary_lines(summary, width=80)]
    assert told[1].endswith("name.jpg: decode: broken")
    assert len(told[1]) <= 80
    assert told[2] == "all failures: grep x"
    assert lines(summary)[1] == f"  {long}: decode: broken"
