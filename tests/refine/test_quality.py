"""Whether a text of the model is of use."""

from __future__ import annotations

from typing import Any

import pytest
from finished_runs import failure, record
from hypothesis import given
from hypothesis import strategies as st

from md3cli.refine.quality import QUALITIES, is_looping, is_refusal, qualities_of

STORY = (
    "The image shows a quiet street in the morning, with two bicycles leaning on a wall and a dog asleep in the shade. "
    "A woman carries bread home. Behind her, shutters are still closed, and the light is warm."
)


@pytest.mark.parametrize(
    "text",
    ["cat " * 8, "a b c " * 4, STORY + " and so on" * 6, "I see a red car here. " * 3, "好 " * 9, "-- " * 10],
)
def test_a_text_that_goes_round_is_a_loop(text: str) -> None:
    assert is_looping(text)


@pytest.mark.parametrize(
    "text", ["", "no", "no no no no", "1, 2, 3, 4, 5, 6, 7, 8", STORY, "A dog. A dog. A dog.", "cat " * 7]
)
def test_a_text_that_goes_on_is_none(text: str) -> None:
    assert not is_looping(text)


@given(words=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12), before=st.integers(0, 20))
def test_whatever_comes_often_enough_is_a_loop(words: list[str], before: int) -> None:
    start = " ".join(f"w{n}" for n in range(before))
    assert is_looping(f"{start} {' '.join(words * 8)}")


@given(st.text(max_size=300))
def test_any_text_is_judged(text: str) -> None:
    assert set(qualities_of(record("a.png", "caption", caption=text))) <= set(QUALITIES)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m unable to say.",
        "As an AI, I have no eyes.",
        "I cannot answer.",
        "I don't have the ability to see.",
    ],
)
def test_a_text_that_declines_is_a_refusal(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", ["", STORY, "A sign says: sorry, closed.", STORY * 2 + "I cannot say."])
def test_a_text_that_answers_is_none(text: str) -> None:
    assert not is_refusal(text)


@pytest.mark.parametrize(
    ("one", "found"),
    [
        (record("a.png", "caption", caption="short", finish_reason="length"), ("cut",)),
        (record("a.png", "query", "q", answer="cat " * 9, finish_reason="length"), ("loop", "cut")),
        (record("a.png", "query", "q", answer="x", reasoning={"text": "cat " * 9, "grounding": []}), ("loop",)),
        (record("a.png", "query", "q", answer="x", reasoning={"text": "", "finish_reason": "length"}), ("cut",)),
        (record("a.png", "detect", "q", objects=[], finish_reason="length"), ()),
        (failure("a.png", "caption", "x"), ()),
        (record(None, "query", "q", answer="fine"), ()),
    ],
)
def test_what_of_a_record_is_judged(one: dict[str, Any], found: tuple[str, ...]) -> None:
    before = repr(one)
    assert qualities_of(one) == found
    assert repr(one) == before


def test_a_long_text_is_judged_at_once() -> None:
    """A hundred thousand words take no longer than a second or two: no step looks at all pairs."""
    assert not is_looping(" ".join(f"w{n}" for n in range(100_000)))
