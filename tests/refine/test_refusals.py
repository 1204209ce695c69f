"""Whether a text declines to answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_texts import honest_texts, refusing_texts

from md3cli.refine.refusals import is_refusal

STORY = "The image shows a quiet street in the morning. A woman carries bread home, and a dog is asleep in the shade. "


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_refusals_are_told_from_honest_texts_in_six_languages(seed: int) -> None:
    missed = [text for text in refusing_texts(200, seed) if not is_refusal(text)]
    assert len(missed) <= 0.05 * 200, missed
    alarms = [text for text in honest_texts(1000, seed) if is_refusal(text)]
    assert len(alarms) <= 0.0025 * 1000, alarms  # loops have the other half of what is allowed


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


@given(st.text(max_size=300))
def test_any_text_is_judged(text: str) -> None:
    assert is_refusal(text) in (True, False)


@given(st.text(alphabet="\"„“«»「」 .,abiIcn't", max_size=2000))
def test_quotation_marks_without_their_other_half_are_judged(text: str) -> None:
    assert is_refusal(text) in (True, False)
