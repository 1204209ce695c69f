"""Braces against bash itself, and hostile ones within bounds."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import InputError
from md3cli.source.braces import MOST_LEVELS, MOST_PATHS, expanded, has_braces


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("s/{00000..00002}.tar", ["s/00000.tar", "s/00001.tar", "s/00002.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{2..-1}", ["2", "1", "0", "-1"]),
        ("{-01..1}", ["-01", "000", "001"]),
        ("{0..9..4}", ["0", "4", "8"]),
        ("{9..0..-4}", ["9", "5", "1"]),
        ("{a..c}{1,2}", ["a1", "a2", "b1", "b2", "c1", "c2"]),
        ("x{a,b{1..2}c,}y", ["xay", "xb1cy", "xb2cy", "xy"]),
        ("{train,val}/*.tar", ["train/*.tar", "val/*.tar"]),
        ("{a,{b,c}", ["{a,b", "{a,c"]),
        ("{{a,b}}", ["{a}", "{b}"]),
    ],
)
def test_what_stands_for_more(text: str, paths: list[str]) -> None:
    assert list(expanded(text)) == paths
    assert has_braces(text)


@pytest.mark.parametrize(
    "text", ["", "a.jpg", "{x}", "{}", "a}{b", "{1..}", "{a..bc}", "{1..b}", "{", "}", "{1.2}", "٣"]
)
def test_what_stands_for_itself(text: str) -> None:
    assert list(expanded(text)) == [text]
    assert not has_braces(text)


WORDS = st.recursive(
    st.sampled_from(["a", "b", "-", "0", "00", "", "{1..3}", "{03..1}", "{a..c}", "{2..9..3}", "{x}", "{}"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}"),
    ),
    max_leaves=6,
)


@pytest.mark.skipif(shutil.which("bash") is None, reason="compares with bash, which is not here")
@pytest.mark.process
@given(st.lists(WORDS, min_size=1, max_size=20))
def test_bash_says_the_same(words: list[str]) -> None:
    words = [f"w{word}" for word in words]  # a word of nothing is no word for bash
    script = "".join(f"printf '%s ' {word}; echo\n" for word in words)
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert [list(expanded(word)) for word in words] == [line.split() for line in said.splitlines()]


@given(st.text("{},.a01-", max_size=40))
def test_any_text_ends(text: str) -> None:
    try:
        paths = list(expanded(text))
    except InputError:
        return
    assert 0 < len(paths) <= MOST_PATHS
    assert has_braces(text) or paths == [text]


@pytest.mark.parametrize(
    "text",
    ["{0..99999999999}", "{0..9}" * 6, "{a,b}" * 10_000, "{1..2}" * 19, f"{{0..{'9' * 100}}}", "{1,{0..999999}}"],
)
def test_what_names_too_many_is_refused_before_it_is_spelled_out(text: str) -> None:
    with pytest.raises(InputError, match=r"paths, more than 262,144; give a pattern instead"):
        next(expanded(text))


def test_braces_in_braces_have_a_bound() -> None:
    assert len(list(expanded("{a," * MOST_LEVELS + "b" + "}" * MOST_LEVELS))) == MOST_LEVELS + 1
    with pytest.raises(InputError, match="more than 16 braces in braces"):
        list(expanded("{a," * 5000 + "b" + "}" * 5000))


@pytest.mark.parametrize("text", ["{" * 100_000, "{}" * 50_000, "{" * 50_000 + "}" * 50_000, "{1..1}" * 20_000])
def test_a_flood_of_braces_ends(text: str) -> None:
    assert len(list(expanded(text))) == 1
    has_braces(text)
