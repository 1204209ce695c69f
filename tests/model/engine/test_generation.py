"""Segment paths: the golden words, the path or the error, never an exception."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from md3cli.model.engine.generation import parse_path
from md3cli.model.engine.prompts import Tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"
TOKENIZER = Tokenizer(tokenizers.Tokenizer.from_file(str(GOLDEN / "case-a" / "checkpoint" / "tokenizer.json")))
UNITS = json.loads((GOLDEN / "units.json").read_text())["svg"]["cases"]


def ids_of(words: str) -> list[int]:
    return [id for word in words.split() for id in TOKENIZER.encode(word)]


@pytest.mark.parametrize("case", UNITS, ids=lambda case: " ".join(case["path_tokens"]) or "empty")
def test_unit_cases(case: dict) -> None:
    path = parse_path(case["ids"], TOKENIZER)
    assert path.svg_path == case["svg_path"]
    assert list(path.words) == case["path_tokens"]
    assert path.error == case.get("parse_error")


def test_golden_segments() -> None:
    results = [
        entry["result"]
        for expected in sorted(GOLDEN.glob("**/expected*.json"))
        for entry in json.loads(expected.read_text())["requests"]
        if "svg_path" in entry["result"]
    ]
    assert results
    for result in results:
        path = parse_path(result["text_ids"], TOKENIZER)
        assert (path.svg_path, path.error) == (result["svg_path"], result.get("parse_error"))


def test_numbers_have_at_most_three_decimals() -> None:
    assert parse_path(ids_of("M 1 2 L - 3 4 Z"), TOKENIZER).svg_path == "M 0.001 0.002 L -0.003 0.004 Z"


@pytest.mark.parametrize("words", ["M - L", "M - - 1", "x M", "- 1", "M 1 ! 2"])
def test_bad_words_are_errors_of_the_path(words: str) -> None:
    path = parse_path(ids_of(words), TOKENIZER)
    assert path.svg_path == ""
    assert path.error


@given(st.lists(st.integers(0, 500), max_size=40))
def test_any_ids_are_a_path_or_an_error(ids: list[int]) -> None:
    path = parse_path(ids, TOKENIZER)
    assert path.error is None or (path.error and path.svg_path == "")
