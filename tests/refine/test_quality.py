"""Whether a text of the model is of use."""

from __future__ import annotations

from typing import Any

import pytest
from finished_runs import failure, record
from hypothesis import given
from hypothesis import strategies as st
from made_texts import honest_texts, looping_texts

from md3cli.refine.quality import QUALITIES, is_looping, qualities_of

STORY = (
    "The image shows a quiet street in the morning, with two bicycles leaning on a wall and a dog asleep in the shade. "
    "A woman carries bread home. Behind her, shutters are still closed, and the light is warm."
)


LOOPS = [
    *(
        "cat " * 8,
        "a b c " * 4,
        STORY + " and so on" * 6,
        "I see a red car here. " * 3,
        "好 " * 9,
        "-- " * 10,
        "!" * 200,
    ),
    *("这是一只猫，" * 4, "猫が寝ている。" * 5, "แมว" * 16, "<image>" * 10, "ha" * 50, '{"label": "car"}, ' * 5),
    "\n".join(f"- Person {n}: red shirt" for n in range(9)),
    "\n".join(f"{n}. a stop sign" for n in range(9)),
    " ".join(f"The {nth} person wears a red shirt." for nth in ("first", "second", "third", "fourth") * 4),
]
NO_LOOPS = [
    *("", "no", "no no no no", "1, 2, 3, 4, 5, 6, 7, 8", STORY, "A dog. A dog. A dog.", "cat " * 7),
    *(f'A wall with "{"LOVE " * 9}" on it.', f"Chapter 1 {'.' * 40} 12", ", ".join(f"Room {n}" for n in range(12))),
    "| | A | B | C |\n|---|---|---|---|\n| red | 1 | | |\n| blue | | 2 | 3 |",
    "Monday 9-17, Tuesday 9-17, Wednesday 9-17, Thursday 9-17, Friday 9-15",
]


@pytest.mark.parametrize("text", LOOPS)
def test_a_text_that_goes_round_is_a_loop(text: str) -> None:
    assert is_looping(text)


@pytest.mark.parametrize("text", NO_LOOPS)
def test_a_text_that_goes_on_is_none(text: str) -> None:
    assert not is_looping(text)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_loops_are_told_from_honest_texts_in_six_languages(seed: int) -> None:
    missed = [text for text in looping_texts(200, seed) if not is_looping(text)]
    assert len(missed) <= 0.05 * 200, missed
    alarms = [text for text in honest_texts(1000, seed) if is_looping(text)]
    assert len(alarms) <= 0.0025 * 1000, alarms  # refusals have the other half of what is allowed


@given(words=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12), before=st.integers(0, 20))
def test_whatever_comes_often_enough_is_a_loop(words: list[str], before: int) -> None:
    start = " ".join(f"w{n}" for n in range(before))
    assert is_looping(f"{start} {' '.join(words * 8)}")


@given(st.text(max_size=300))
def test_any_text_is_judged(text: str) -> None:
    assert set(qualities_of(record("a.png", "caption", caption=text))) <= set(QUALITIES)


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
    assert is_looping("ab" * 500_000)
    assert not is_looping("".join(chr(0x4E00 + n % 19_000) for n in range(50_000)))
