"""English nouns in the singular."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.refine.singular import singular

PAIRS = """cars car people person children child women woman firemen fireman buses bus houses house horses horse
boxes box benches bench dishes dish cherries cherry cookies cookie shoes shoe tomatoes tomato knives
knife glasses glasses scissors scissors bus bus grass grass cactus cactus tennis tennis sheep sheep gas
gas lens lens t-shirts t-shirt tvs tv trees tree ties tie gloves glove crosses cross sunglasses
sunglasses species species men man specimen specimen salespeople salesperson snowmen snowman viruses
virus pictures picture""".split()  # noqa: SIM905 - pairs


@pytest.mark.parametrize(("word", "single"), list(zip(PAIRS[::2], PAIRS[1::2], strict=True)))
def test_a_noun_becomes_one_of_its_kind(word: str, single: str) -> None:
    assert singular(word) == single


@pytest.mark.parametrize("word", ["", "s", "is", "autobús", "汽车", "4s", "James's", "-", "x-"])
def test_what_is_no_english_plural_stays(word: str) -> None:
    assert singular(word) == word


@given(st.text(max_size=30))
def test_no_word_becomes_longer_than_a_letter_more(word: str) -> None:
    """A name that fits may grow in the singular: "people" becomes "person", "mice" "mouse"."""
    assert len(singular(word)) <= len(word) + 1
