"""What is typed, as values: sizes, counts, shares, shards, places; positionals and `--task`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from md3cli.commands.parse import (
    check_objects,
    checked,
    looks_like_input,
    may_carry_rows,
    number_or_auto,
    parse_bytes,
    parse_choices,
    parse_count,
    parse_extension,
    parse_fail_on,
    parse_pad,
    parse_pair,
    parse_query,
    parse_shard,
    parse_spatial_ref,
    parse_split,
)
from md3cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1G", 2**30),
        ("1GiB", 2**30),
        ("20 GB", 20 * 10**9),
        ("500M", 500 * 2**20),
        ("1.5k", 1536),
        ("12", 12),
        ("3 tb", 3 * 10**12),
        ("7B", 7),
    ],
)
def test_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("268M", 268_000_000), ("50000", 50_000), ("1.5G", 1_500_000_000)])
def test_counts(text: str, expected: int) -> None:
    assert parse_count(text) == expected


@pytest.mark.parametrize("text", ["", "G", "-1", "1 X", "1e9", "0x10", "10 M B", "٣"])
def test_no_amounts(text: str) -> None:
    for parse in (parse_bytes, parse_count):
        with pytest.raises(ValueError, match="write it like"):
            parse(text)
    with pytest.raises(ValueError, match="write it like"):
        parse_count("5MB")


@pytest.mark.process
@given(number=st.integers(0, 10**15))
def test_plain_numbers_stay_what_they_are(number: int) -> None:
    assert parse_bytes(str(number)) == parse_count(str(number)) == number


@pytest.mark.parametrize(
    ("text", "failed", "is_met"),
    [
        ("any", 1, True),
        ("any", 0, False),
        ("none", 200, False),
        ("5%", 10, False),
        ("5%", 11, True),
        ("0.5 %", 2, True),
    ],
)
def test_fail_on_counts_of_200(text: str, failed: int, is_met: bool) -> None:
    assert parse_fail_on(text).is_met(failed, 200) is is_met


@pytest.mark.parametrize("text", ["", "some", "5", "101%", "-1%", "%"])
def test_no_fail_on(text: str) -> None:
    with pytest.raises(ValueError, match="is not one of: none, any, or a share like 5%"):
        parse_fail_on(text)


def test_shards_count_from_zero_or_one() -> None:
    assert [parse_shard(f"{i}/4") for i in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert parse_shard("4/4") == (0, 4)
    for text in ("5/4", "0/0", "1", "-1/4", "a/b", "1/4/2"):
        with pytest.raises(ValueError, match="is not a shard"):
            parse_shard(text)


def test_spatial_refs() -> None:
    assert parse_spatial_ref("0.25,1") == (0.25, 1.0)
    assert parse_spatial_ref("0,0.1, 0.5,0.6") == (0.0, 0.1, 0.5, 0.6)
    for text in ("", "1", "0.1,0.2,0.3", "0.1,1.5", "nan,0", "a,b", "0.5,0,0.4,1"):
        with pytest.raises(ValueError, match=r"is not a point X,Y or a box|is no box"):
            parse_spatial_ref(text)


def test_number_or_auto() -> None:
    assert (number_or_auto("auto"), number_or_auto("12")) == (None, 12)
    for text in ("0", "-1", "1.5", "many", ""):
        with pytest.raises(ValueError, match="is neither auto nor a number of at least 1"):
            number_or_auto(text)


def test_checked_reads_the_text_and_names_what_is_wrong() -> None:
    read = checked(parse_count)
    assert read("5k") == 5000
    with pytest.raises(typer.BadParameter, match="'x' is not a number"):
        read("x")


def test_choices_are_at_least_two_different_answers() -> None:
    assert parse_choices("yes, no,not sure") == ("yes", "no", "not sure")


@pytest.mark.parametrize("text", ["", "yes", "yes,,no", "yes,yes "])
def test_other_choices_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="two different answers"):
        parse_choices(text)


# -- positionals and --task -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "photo.jpg").write_bytes(b"x")
    (tmp_path / "what is this").write_bytes(b"x")
    return tmp_path


FILES = ["photo.jpg", "pictures", "gone.png", "a/b", "rows.CSV", "what is this"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("text", [*FILES, "-", "*.jpg", "x[0-9].dat", "https://a/b", "s3://a/b"])
def test_inputs(text: str) -> None:
    assert looks_like_input(text)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("text", ["What is an encoder?", "why?", "cat", "is it 3/4 full?", "", "list [a, b] please"])
def test_questions(text: str) -> None:
    assert not looks_like_input(text)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("positional", "options", "expected"),
    [
        ([], ["Why?"], (None, ("Why?",))),
        (["photo.jpg"], ["Why?"], ("photo.jpg", ("Why?",))),
        (["photo.jpg"], ["what is this"], ("photo.jpg", ("what is this",))),  # -q is a question, whatever is there
        (["photo.jpg", "Why?", "How?"], ["Who?"], ("photo.jpg", ("Why?", "How?", "Who?"))),
        (["rows.jsonl"], [], ("rows.jsonl", ())),
        (["-"], [], ("-", ())),
    ],
)
def test_query(positional: list[str], options: list[str], expected: tuple[str | None, tuple[str, ...]]) -> None:
    assert parse_query(positional, options) == expected


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("positional", "options", "message"),
    [
        ([], [], 'no question; ask one with -q: md3 query photo.jpg -q "What is this?"'),
        (["photo.jpg"], [], 'no question about photo.jpg; ask one with -q: -q "What is this?"'),
        (["list.txt"], [], "no question about list.txt"),
        (["Why?"], [], "if it is the question, ask it without an image: md3 query -q 'Why?'"),
        (["Why?"], ["How?"], "'Why?' is no file, folder, glob, URL or -"),
        (["Why?", "photo.jpg"], [], "INPUT comes first: md3 query INPUT -q 'Why?'"),
        (["photo.jpg", " "], [], "a question is empty"),
        (["list.txt", "photo.jpg"], ["Why?"], "'photo.jpg' is a file, not a question; quote the glob"),
        ([], [""], "a question is empty"),
        (
            [],
            ["@questions.txt"],
            "'@questions.txt' is not a question; files are not read with @: name the file with --pr",
        ),
        (
            ["photo.jpg", "what is this"],
            [],
            "'what is this' is a file, not a question; where it lists what to ask, name ",
        ),
    ],
)
def test_query_that_makes_no_sense(positional: list[str], options: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_query(positional, options)
    assert message in str(error.value)


@pytest.mark.usefixtures("folder")
def test_objects() -> None:
    check_objects(["car", "pictures"])  # a folder of that name may be there: people name folders after things
    with pytest.raises(UsageError, match=r"'photo\.jpg' is a file, not an OBJECT; quote the glob"):
        check_objects(["car", "photo.jpg"])
    with pytest.raises(
        UsageError, match=r"'what is this' is a file, not an OBJECT; .* --labels FILE or --prompts FILE"
    ):
        check_objects(["what is this"])
    for name in ("@labels.txt", "@gone"):
        with pytest.raises(
            UsageError, match=f"'{name}' is not an OBJECT; files are not read with @.* --labels FILE or --prompts"
        ):
            check_objects([name])
    with pytest.raises(UsageError, match="an OBJECT is empty"):
        check_objects([" "])


def test_listed_questions() -> None:
    assert parse_query([], ["Why?"], ["How?"]) == (None, ("Why?", "How?"))
    assert parse_query([], [], ["@x stands in the file, so it is meant"])[1]
    assert parse_query(["-", "Who?"], ["Why?"], ["How?"]) == ("-", ("Who?", "Why?", "How?"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt=question", ("prompt", "question")),
        (" a b = c ", ("a b", "c")),
        ("note=1=2", ("note", "1=2")),
    ],
)
def test_pairs(text: str, expected: tuple[str, str]) -> None:
    assert parse_pair(text) == expected


@pytest.mark.parametrize("text", ["", "prompt", "=question", "prompt=", " = ", "="])
def test_no_pairs(text: str) -> None:
    with pytest.raises(ValueError, match="is not two names with = between"):
        parse_pair(text)


@pytest.mark.usefixtures("folder")
def test_row_manifests() -> None:
    assert all(may_carry_rows(text) for text in ("-", "a.csv", "b.TSV", "c/d.jsonl", "e.parquet"))
    assert not any(may_carry_rows(text) for text in ("a.txt", "pictures", "photo.jpg"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10%", 0.1), ("0.1", 0.1), ("0", 0.0), ("1", 1.0), ("150 %", 1.5), (".5", 0.5), ("1000%", 10)],
)
def test_pads(text: str, expected: float) -> None:
    assert parse_pad(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [("20", "write 20% if that is meant"), ("1001%", "more than 1000%"), ("-1", "no share"), ("nan", "no share"),
     ("1e3", "no share"), ("", "no share"), ("%", "no share"), ("10%%", "no share")],
)  # fmt: skip
def test_pads_that_are_none(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_pad(text)


def test_splits() -> None:
    assert parse_split("train=0.8,val=0.2") == (("train", 0.8), ("val", 0.2))
    assert parse_split("train=.7, val=.2, test=.1") == (("train", 0.7), ("val", 0.2), ("test", 0.1))
    assert parse_split("all=1") == (("all", 1.0),)


@pytest.mark.parametrize(
    ("text", "words"),
    [("train=0.8", "add up to 0.8"), ("train=0.8,val=0.3", "add up to 1.1"), ("train=0.5,Train=0.5", "twice"),
     ("../x=0.5,val=0.5", "no set and share"), ("train", "no set and share"), ("train=-1,val=2", "no set and share"),
     ("train=nan,val=1", "no set and share"), ("", "no set and share"), ("a=1,", "no set and share")],
)  # fmt: skip
def test_splits_that_are_none(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_split(text)


@pytest.mark.parametrize(("text", "expected"), [(".caption", ".caption"), ("txt", ".txt"), (".en.txt", ".en.txt")])
def test_extensions(text: str, expected: str) -> None:
    assert parse_extension(text) == expected


@pytest.mark.parametrize("text", [".jpg", "PNG", "", ".", "../x", "a/b", ".tar", "a b", ".x.y.z"])
def test_extensions_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="no extension"):
        parse_extension(text)
