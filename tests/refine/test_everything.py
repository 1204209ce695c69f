"""Names of things in what a model says."""

from __future__ import annotations

from pathlib import Path

import pytest
from finished_runs import failure, record
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import UsageError
from md3cli.records import RecordDict, are_printable
from md3cli.refine.everything import MOST_NAMES, NAME_LIMIT_CHARS, Vocabulary, listed_in, names_in, read_vocabulary

KINDS = Vocabulary.of(("circle", "square", "star"))
TEXTS = [
    ("cars, two people and a dog", "car, person, dog"),
    ("1. Car\n2. Dog\n3) Two buses", "car, dog, bus"),
    ('["Car", "2 dogs"]', "car, dog"),
    ('```json\n[{"label": "car", "box": [1, 2]}, {"label": "tree"}]\n```', "car, tree"),
    ('{"cars": 2, "dogs": 0, "cat": true}', "car, cat"),
    ('{"objects": ["stop sign", "bus"]}', "stop sign, bus"),
    ('["car", "tree", "dog', "car, tree, dog"),
    ("There is a red circle, a cyan square and two green triangles.", "red circle, cyan square, green triangle"),
    (
        "A dog lies on a sofa next to a black cat with a collar. The walls are white.",
        "dog, sofa, black cat, collar, wall",
    ),
    ("Objects in the image: car, bus, glasses, children.", "car, bus, glasses, child"),
    ("- **Car**: a red car\n- **Bus**: 2", "car, bus"),
    ("Here are the objects:\n* Cars: 3\n* Trees", "car, tree"),
    ("Car - red and fast\nTree - tall", "car, tree"),
    ("No cars, a tree without leaves, and no people.", "tree"),
    ("a pair of glasses, cups of coffee, the top of a hill", "glasses, cup of coffee, hill"),
    ("Car, car, CARS, the car", "car"),
    ("汽车、树，狗", "汽车, 树, 狗"),
    ("Sure! Here are the objects: 1. Laptop 2. Coffee mugs 3. Pen x2", "laptop, coffee mug, pen"),
    ("It\u2019s a photo of a lake with boats. There's a man working.", "lake, boat, man"),
    ("Person (2), 2x taxis, chair / table", "person, taxi, chair, table"),
    ("an orange, a number plate, a set of keys, lots of boats", "orange, number plate, key, boat"),
    ("None.", ""),
    ("The picture", ""),
    ("42, 1., - , x", ""),
    (f"{'very ' * 9}old car, tree", "tree"),
    ("car\x07, t\u202eree\ud800", "car, t ree"),
]


@pytest.mark.parametrize(("text", "names"), TEXTS)
def test_a_text_has_names(text: str, names: str) -> None:
    assert ", ".join(names_in(text)) == names


@pytest.mark.parametrize(
    ("listed", "text", "names"),
    [
        (["square"], "A cyan square, a red circle and two squares.", ["square"]),
        (["square", "cyan square"], "A cyan square, then a square.", ["cyan square", "square"]),
        (["Stop_Sign", "sign"], "Two stop signs beside a sign", ["Stop_Sign", "sign"]),
        (["wine glass"], "There are wine glasses on a table.", ["wine glass"]),
        (["glass", "glasses"], "She wears glasses and holds a glass.", ["glasses", "glass"]),
        (["person", "dog"], "Dogs with people. No dogs.", ["dog", "person"]),
        (["dog", "leaf"], "A tree without leaves, and no dog.", []),
        (["t-shirt"], "T-shirts", ["t-shirt"]),
        (["stop sign"], "stop, sign", []),
        (["sign"], "signature, designs", []),
        (["汽车", "红色汽车"], "一辆红色汽车和汽车", ["红色汽车", "汽车"]),
        (["b", "a"], "a b a b", ["a", "b"]),
    ],
)
def test_a_vocabulary_holds_names_to_itself(listed: list[str], text: str, names: list[str]) -> None:
    assert list(names_in(text, Vocabulary.of(tuple(listed)))) == names


@pytest.mark.parametrize(
    ("one", "names"),
    [
        (record("a.png", "caption", caption="A star and a circ", finish_reason="stop"), ("star", "circ")),
        (record("a.png", "query", "q", answer="stars, a circle, squ", finish_reason="length"), ("star", "circle")),
        (record("a.png", "query", "q", answer="stars", finish_reason="length"), ()),
        (record("a.png", "query", "q", answer=""), ()),
        (failure("a.png", "caption", "x"), ()),
    ],
)
def test_a_record_lists_names(one: RecordDict, names: tuple[str, ...]) -> None:
    """A name that the limit of tokens may have cut is none."""
    assert listed_in(one) == names


def test_as_many_names_as_asked_for_come_out() -> None:
    many = ", ".join(f"thing{n}x" for n in range(100))
    assert len(names_in(many)) == MOST_NAMES
    assert names_in(many, most=2) == ("thing0x", "thing1x")
    assert names_in("star, circle, square", KINDS, most=2) == ("star", "circle")


@given(
    st.text()
    | st.lists(
        st.sampled_from(["red ", "cars", ", ", "[", '"', "{", "]", "}", ":", "\n", "1. ", " no ", "of ", "é"])
    ).map("".join)
)
def test_names_of_any_text_are_few_short_and_printable(text: str) -> None:
    names = names_in(text)
    assert len(set(names)) == len(names) <= MOST_NAMES
    for name in names:
        assert 0 < len(name) <= NAME_LIMIT_CHARS
        assert are_printable(name)
        assert name == " ".join(name.split())


@given(
    st.lists(st.sampled_from(["Red", "stars", "circle", "square.", "no", "cat", ", ", "\n", "[", '"'])).map(" ".join)
    | st.text()
)
def test_no_name_is_outside_the_vocabulary(text: str) -> None:
    names = names_in(text, KINDS)
    assert set(names) <= set(KINDS.names)
    assert len(set(names)) == len(names)


@given(
    st.lists(st.text("abc漢 -_'+", min_size=1, max_size=6).filter(lambda name: any(map(str.isalnum, name))), min_size=1)
)
def test_a_vocabulary_knows_its_own_names(listed: list[str]) -> None:
    vocabulary = Vocabulary.of(tuple(listed))
    for name in listed:
        assert names_in(name, vocabulary)
        assert set(names_in(f"I see {name}, {name}.", vocabulary)) <= set(listed)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "a-" * 50_000, "no " * 50_000, "of " * 50_000, "1" * 9_999]
)
def test_a_text_that_means_harm_is_taken_apart_all_the_same(text: str) -> None:
    assert len(names_in(text)) <= MOST_NAMES
    assert names_in(text, KINDS) == ()


def test_a_file_lists_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("\ufeff# kinds\n\ncircle\r\n  Stop   sign \nbus\n", "utf-8")
    assert read_vocabulary(tmp_path / "v.txt") == ("circle", "Stop sign", "bus")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"car\ntree\nCar\n", r"line 3: 'Car' stands in line 1 already"),
        (b"shelf\nshelves\n", r"line 2: 'shelves' stands in line 1 already"),
        (b"# nothing\n\n", r"has no name; write one a line"),
        (b"", r"has no name"),
        (b"a" * 41, r"line 1: .* has more than 40 characters"),
        (b"car\n\x1b[31m\n", r"line 2: .* is no name"),
        (b"car\n---\n", r"line 2: '---' is no name"),
        (b"\xff\xfe", r"is not UTF-8"),
        (b"x" * 1_000_001, r"has more than 1,000,000 bytes"),
        (b"".join(b"n%dq\n" % n for n in range(10_001)), r"has more than 10,000 names"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_vocabulary(tmp_path / "v.txt")


def test_a_vocabulary_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--vocabulary .*no such file"):
        read_vocabulary(tmp_path / "v.txt")
