"""Text streams: the golden pieces, nothing taken back, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from md3cli.model.api import TextStream
from md3cli.model.engine.prompts import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = Tokenizer(tokenizers.Tokenizer.from_file(str(GOLDEN / "case-a" / "checkpoint" / "tokenizer.json")))
UNITS = json.loads((GOLDEN / "units.json").read_text())["stream"]["cases"]
ANSWERS = [
    (entry["result"]["token_ids"], entry["stream"])
    for expected in sorted(GOLDEN.glob("**/expected*.json"))
    for entry in json.loads(expected.read_text())["requests"]
    if "stream" in entry
]


def pieces_of(ids: list[int]) -> list[str]:
    stream = TextStream(TOKENIZER.decode)
    return [piece for piece in [*map(stream.push, ids), stream.finish()] if piece]


@pytest.mark.parametrize("case", UNITS, ids=lambda case: "".join(case["pieces"])[:12] or "empty")
def test_unit_cases(case: dict[str, list]) -> None:
    assert pieces_of(case["ids"]) == case["pieces"]


def test_golden_answers() -> None:
    assert len(ANSWERS) > 50
    for ids, pieces in ANSWERS:
        assert pieces_of(ids) == pieces


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_pieces_make_the_text(text: str) -> None:
    assert "".join(pieces_of(TOKENIZER.encode(text))) == text


def test_a_word_is_held_until_it_ends() -> None:
    stream = TextStream(TOKENIZER.decode)
    shown = [stream.push(token) for token in TOKENIZER.encode("one two")]
    assert "".join(shown) == "one "
    assert stream.finish() == "two"
    assert stream.finish() == ""
