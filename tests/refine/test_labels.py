"""Names for what is asked: OBJECTs as typed, labels files as written by friend and foe, and labels joined."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from program import Program, beside_pictures

from md3cli.errors import UsageError
from md3cli.refine.labels import (
    FILE_LIMIT_BYTES,
    Label,
    Labels,
    labels_with,
    parse_object,
    prompts_of,
    read_labels,
)

plain_text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
words = plain_text.map(str.strip).filter(bool)
shares = st.none() | st.floats(0, 1)


@st.composite
def label_sets(draw: st.DrawFn) -> Labels:
    """Labels whose names and prompts come once; all have an id, or none."""
    prompts = draw(st.lists(words, min_size=1, max_size=8, unique=True))
    names = draw(st.lists(words, min_size=len(prompts), max_size=len(prompts), unique=True))
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=len(prompts), max_size=len(prompts), unique=True))
    has_ids, labels = draw(st.booleans()), []
    while prompts:
        num_prompts = draw(st.integers(1, len(prompts)))
        asked, prompts = prompts[:num_prompts], prompts[num_prompts:]
        limits = {"min_score": draw(shares), "nms": draw(shares)}
        most = draw(st.none() | st.integers(1, 2**31 - 1))
        number = ids[len(labels)] if has_ids else None
        labels.append(Label(name=names[len(labels)], prompts=tuple(asked), max_objects=most, id=number, **limits))
    return Labels(tuple(labels))


def as_toml(labels: Labels) -> str:
    """The file that says the same: texts as JSON strings, which TOML reads alike, but for DEL."""
    lines = []
    for table in labels.to_json():
        lines.append("[[label]]")
        for key, value in table.items():
            shown = repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=True)
            lines.append(f"{key} = {_as_toml_escapes(shown)}")
    return "\n".join(lines) + "\n"


def _as_toml_escapes(text: str) -> str:
    """Pairs of surrogates, JSON's way to write what is beyond 16 bits, as one TOML escape."""
    decoded: Any = json.loads(text) if text.startswith(('"', "[")) else None
    if decoded is None:
        return text
    texts = decoded if isinstance(decoded, list) else [decoded]
    quoted = [
        '"' + "".join(f"\\U{ord(char):08x}" if not char.isascii() or not char.isalnum() else char for char in one) + '"'
        for one in texts
    ]
    return f"[{', '.join(quoted)}]" if isinstance(decoded, list) else quoted[0]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# -- OBJECTs as typed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "prompt"),
    [
        ("car", "car", "car"),
        (" red car ", "red car", "red car"),
        ("car=red car", "car", "red car"),
        (" car = red car ", "car", "red car"),
        ("sum=a=b", "sum", "a=b"),  # at the first =
        ("=a=b", "a=b", "a=b"),  # literally
        ("=car", "car", "car"),
    ],
)
def test_an_object_is_a_prompt_or_a_name_and_a_prompt(text: str, name: str, prompt: str) -> None:
    assert parse_object(text) == (name, prompt)


@pytest.mark.parametrize("text", ["", " ", "=", "car=", " = ", "car= \t"])
def test_an_empty_object_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="OBJECT is empty"):
        parse_object(text)


@given(name=words.filter(lambda text: "=" not in text), prompt=words)
def test_any_prompt_can_be_named_and_be_asked_literally(name: str, prompt: str) -> None:
    assert parse_object(f"{name}={prompt}") == (name, prompt)
    assert parse_object(f"={prompt}") == (prompt, prompt)
    if "=" not in prompt:
        assert parse_object(prompt) == (prompt, prompt)


def test_several_prompts_share_a_name_in_the_order_typed() -> None:
    labels = labels_with(["vehicle=car", "dog", "vehicle=truck", "vehicle=car"], Labels())
    assert labels.to_json() == [
        {"name": "vehicle", "prompts": ["car", "truck"]},
        {"name": "dog", "prompts": ["dog"]},
    ]
    assert [labels.name_of(prompt) for prompt in ("car", "truck", "dog", "cat")] == ["vehicle", "vehicle", "dog", "cat"]


def test_a_prompt_has_one_name() -> None:
    with pytest.raises(UsageError, match=r"the prompt 'car' comes twice \(as a and b\)"):
        labels_with(["a=car", "b=car"], Labels())
    listed = labels_with(["vehicle=car"], Labels())
    with pytest.raises(UsageError, match="'car' is asked as 'auto', and --labels calls it 'vehicle'"):
        labels_with(["auto=car"], listed)


def test_objects_beside_a_file_choose_of_it_and_add_to_it() -> None:
    listed = labels_with(["vehicle=car", "vehicle=truck", "dog"], Labels())
    assert prompts_of([], listed) == ["car", "truck", "dog"]
    assert prompts_of(["vehicle"], listed) == ["car", "truck"]
    assert prompts_of(["=vehicle", "cat"], listed) == ["vehicle", "cat"]
    assert labels_with(["vehicle", "cat"], listed).names == ("vehicle", "dog", "cat")
    assert labels_with(["vehicle=bus"], listed).by_name["vehicle"].prompts == ("car", "truck", "bus")


# -- files -----------------------------------------------------------------------------------------------


@given(labels=label_sets())
def test_tables_written_as_a_file_read_back_the_same(tmp_path_factory: pytest.TempPathFactory, labels: Labels) -> None:
    path = write(tmp_path_factory.getbasetemp() / "labels.toml", as_toml(labels))
    assert tomllib.loads(path.read_text())["label"] == labels.to_json()
    assert read_labels(path) == labels


def test_every_key_of_a_table_is_read(tmp_path: Path) -> None:
    text = """
    [[label]]
    name = "vehicle"
    prompts = ["car", " truck "]
    min_score = 1
    nms = 0.5
    max_objects = 7
    id = 0
    [[label]]
    name = " dog "
    id = 12
    """
    labels = read_labels(write(tmp_path / "labels.TOML", text))
    first = Label(name="vehicle", prompts=("car", "truck"), min_score=1.0, nms=0.5, max_objects=7, id=0)
    assert labels.labels == (first, Label(name="dog", prompts=("dog",), id=12))


def test_a_text_file_has_an_object_a_line(tmp_path: Path) -> None:
    text = "\ufeff# of our street\r\n\r\nvehicle = car\r\n  vehicle=truck  \r\ndog\r\n=a=b\r\n"
    assert read_labels(write(tmp_path / "labels.txt", text)).to_json() == [
        {"name": "vehicle", "prompts": ["car", "truck"]},
        {"name": "dog", "prompts": ["dog"]},
        {"name": "a=b", "prompts": ["a=b"]},
    ]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: [car, dog]", ["car", "dog"]),
        ("path: x\nnc: 2\nnames:\n- car\n- traffic light\n", ["car", "traffic light"]),
        ("names:\n  10: ten\n  2: two\n  0: zero\n", ["zero", "two", "ten"]),
        ("names: {0: 'yes', 1: on, 2: 007, 3: null}", ["yes", "on", "007", "null"]),  # texts, as they stand there
        ("\ufeffnames:\r\n- a=b\r\n", ["a=b"]),
        ("names: !!python/object/apply:os.mkdir [made]\n", ["made"]),  # a list with a tag, which says nothing here
    ],
)
@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_a_yolo_file_lists_its_classes_by_their_numbers(
    tmp_path: Path, text: str, names: list[str], suffix: str
) -> None:
    assert list(read_labels(write(tmp_path / f"data.{suffix}", text)).names) == names


DEEP = 100_000
HOSTILE: dict[str, tuple[str, str | bytes | Callable[[Path], None], str]] = {
    "another suffix": ("labels.json", "[]", "ends in .toml, .txt or .yaml"),
    "nothing": ("labels.toml", "", "has no tables [[label]]"),
    "no lines": ("labels.txt", "# nothing\n\n", "names no label"),
    "no names": ("data.yaml", "nc: 3\n", "has no names of classes"),
    "empty names": ("data.yaml", "names: []\n", "names no label"),
    "a list of lists": ("data.yaml", "names: [[car]]\n", "has no names of classes"),
    "an empty name in YAML": ("data.yaml", "names: [car, '']\n", "has no names of classes"),
    "not YAML": ("data.yaml", "names: [car\n", "is not YAML that can be read"),
    "a list in YAML": ("data.yaml", "- car\n", "has no names of classes"),
    "an alias": ("data.yaml", "a: &a car\nnames: [*a, *a]\n", "aliases (*name) are not read"),
    "an alias to itself": ("data.yaml", "names: &a [*a]\n", "aliases (*name) are not read"),
    "a word for a number": ("data.yaml", "names: {one: car}\n", "'one' in names is not the number of a class"),
    "a negative number": ("data.yaml", "names: {-1: car}\n", "'-1' in names is not the number of a class"),
    "a number of a million digits": (
        "data.yaml",
        "names: {? " + "9" * 900_000 + " : a}\n",
        "is not the number of a class",
    ),
    "a number twice": ("data.yaml", "names: {1: car, 01: dog}\n", "the number of a class comes twice"),
    "a key twice": ("data.yaml", "names: {1: car, 1: dog}\n", "a key comes twice"),
    "a name twice in YAML": ("data.yaml", "names: [car, dog, car]\n", "the name 'car' comes twice"),
    "deep YAML": ("data.yaml", "names: " + "[" * DEEP, "it is nested too deep"),
    "deep maps of YAML": ("data.yaml", "names: " + "{a: " * DEEP, "it is nested too deep"),
    "not TOML": ("labels.toml", "[[label]\n", "is not TOML"),
    "deep TOML": ("labels.toml", "a = " + "[" * DEEP, "is not TOML"),
    "deep tables of TOML": ("labels.toml", "[" + ".".join("a" * 400_000) + "]\n", "nested too deep"),
    "deep tables under quoted names": ("labels.toml", ".".join(["'a'"] * 200_000) + " = 1\n", "nested too deep"),
    "an unknown table": ("labels.toml", "[[labels]]\nname = 'car'\n", "unknown key 'labels'"),
    "label is no table": ("labels.toml", "label = ['car']\n", "has no tables [[label]]"),
    "one table": ("labels.toml", "[label]\nname = 'car'\n", "has no tables [[label]]"),
    "an unknown key": ("labels.toml", "[[label]]\nname = 'car'\nmin_scor = 1\n", "label 1: unknown key 'min_scor'"),
    "no name": ("labels.toml", "[[label]]\nprompts = ['car']\n", "label 1: a name is missing"),
    "a number for a name": ("labels.toml", "[[label]]\nname = 1\n", "label 1: a name is missing"),
    "an empty name": ("labels.toml", "[[label]]\nname = ' '\n", "label 1: a name is missing"),
    "no prompt": ("labels.toml", "[[label]]\nname = 'car'\nprompts = []\n", "prompts is a list of texts"),
    "an empty prompt": ("labels.toml", "[[label]]\nname = 'car'\nprompts = ['']\n", "prompts is a list of texts"),
    "a text for a list": ("labels.toml", "[[label]]\nname = 'car'\nprompts = 'car'\n", "prompts is a list of texts"),
    "a true score": ("labels.toml", "[[label]]\nname = 'a'\nmin_score = true\n", "min_score is a number from 0 to 1"),
    "NaN": ("labels.toml", "[[label]]\nname = 'a'\nmin_score = nan\n", "min_score is a number from 0 to 1"),
    "infinite": ("labels.toml", "[[label]]\nname = 'a'\nnms = inf\n", "nms is a number from 0 to 1"),
    "above 1": ("labels.toml", "[[label]]\nname = 'a'\nnms = 1.01\n", "nms is a number from 0 to 1"),
    "below 0": ("labels.toml", "[[label]]\nname = 'a'\nmin_score = -0.1\n", "min_score is a number from 0 to 1"),
    "a huge number": ("labels.toml", f"[[label]]\nname = 'a'\nnms = {'9' * 400}\n", "nms is a number from 0 to 1"),
    "digits": ("labels.toml", f"[[label]]\nname = 'a'\nid = {'9' * 5000}\n", "is not TOML"),
    "no objects": ("labels.toml", "[[label]]\nname = 'a'\nmax_objects = 0\n", "max_objects is at least 1"),
    "half an object": ("labels.toml", "[[label]]\nname = 'a'\nmax_objects = 1.5\n", "max_objects is a whole number"),
    "a true id": ("labels.toml", "[[label]]\nname = 'a'\nid = true\n", "id is a whole number from 0"),
    "a negative id": ("labels.toml", "[[label]]\nname = 'a'\nid = -1\n", "id is a whole number from 0"),
    "a large id": ("labels.toml", f"[[label]]\nname = 'a'\nid = {2**31}\n", "id is a whole number from 0"),
    "some ids": ("labels.toml", "[[label]]\nname = 'a'\nid = 1\n[[label]]\nname = 'b'\n", "'b' has no id"),
    "an id twice": ("labels.toml", "[[label]]\nname='a'\nid=1\n[[label]]\nname='b'\nid=1\n", "the id '1' comes twice"),
    "a name twice": ("labels.toml", "[[label]]\nname='a'\n[[label]]\nname='a '\nprompts=['b']\n", "the name 'a' comes"),
    "a prompt twice": (
        "labels.toml",
        "[[label]]\nname='a'\n[[label]]\nname='b'\nprompts=['a']\n",
        "the prompt 'a' comes",
    ),
    "a prompt of two names": ("labels.txt", "a=car\nb=car\n", "the prompt 'car' comes twice (as a and b)"),
    "an empty prompt of a line": ("labels.txt", "car\na=\n", "an OBJECT is empty after a="),
    "a long name": ("labels.toml", f"[[label]]\nname = '{'a' * 900_000}'\nnms = 2\n", "nms is a number from 0 to 1"),
    "a long name twice": ("labels.txt", f"x={'a' * 400_000}\ny={'a' * 400_000}\n", "comes twice (as x and y)"),
    "a long key": ("labels.toml", f"[[label]]\nname = 'a'\n{'b' * 900_000} = 1\n", "unknown key 'bbb"),
    "a name that steers": ("labels.toml", '[[label]]\nname = "a\\u001b[1m"\nid = -1\n', "id is a whole number"),
    "not UTF-8": ("labels.txt", b"caf\xe9\n", "is not UTF-8 (byte 3)"),
    "UTF-16": ("labels.toml", "[[label]]\nname = 'a'\n".encode("utf-16"), "is not UTF-8 (byte 0)"),
    "a byte too many": ("labels.txt", b"#" * FILE_LIMIT_BYTES + b"\n", "has more than 1,000,000 bytes"),
    "a FIFO": ("labels.toml", os.mkfifo, "is a folder or a pipe"),
    "a folder": ("labels.toml", Path.mkdir, "is a folder or a pipe"),
    "a link into nothing": ("labels.toml", lambda path: path.symlink_to("gone"), "no such file"),
    "no file": ("labels.toml", lambda path: None, "no such file"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    md3 = beside_pictures(monkeypatch, tmp_path)
    name, content, message = HOSTILE[kind]
    content(Path(name)) if callable(content) else write(Path(name), content)
    result = md3("detect", "img", "--labels", name, "-o", "out.jsonl")
    assert result.exit_code == 2, result.output
    assert not md3.models
    assert not Path("out.jsonl").exists()
    said = " ".join(result.stderr.split())
    assert message in said
    assert f"--labels {name}" in said
    assert len(said) < 400
    assert not any(ord(char) < 32 for char in said)


def test_a_file_of_the_size_limit_is_read(tmp_path: Path) -> None:
    content = b"car\n" + b"#" * (FILE_LIMIT_BYTES - 4)
    assert read_labels(write(tmp_path / "labels.txt", content)).names == ("car",)


# -- what is asked and written ---------------------------------------------------------------------------


@pytest.fixture
def md3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    return beside_pictures(monkeypatch, tmp_path, count=1)


def asked(program: Program) -> list[tuple[str | None, int]]:
    assert program.models[-1].engine is not None
    return [(request.prompt, request.max_objects) for _, request in program.models[-1].engine.seen]


def test_a_file_says_what_is_asked_and_how_many(md3: Program) -> None:
    write(Path("l.toml"), "[[label]]\nname='vehicle'\nprompts=['car','truck']\nmax_objects=3\n[[label]]\nname='dog'\n")
    assert md3("detect", "img", "--labels", "l.toml").exit_code == 0
    assert asked(md3) == [("car", 3), ("truck", 3), ("dog", 150)]
    assert md3("detect", "img", "vehicle", "cat", "--labels", "l.toml", "--max-objects", "9").exit_code == 0
    assert asked(md3) == [("car", 3), ("truck", 3), ("cat", 9)]
    assert md3("run", "img", "--task", "point", "--task", "segment:dog", "--labels", "l.toml").exit_code == 0
    assert [prompt for prompt, _ in asked(md3)] == ["car", "truck", "dog", "dog"]


@pytest.mark.parametrize("task", ["detect", "point", "segment"])
def test_a_name_is_on_what_is_found_and_not_in_the_id(md3: Program, task: str) -> None:
    key = {"detect": "objects", "point": "points", "segment": "segments"}[task]
    named, bare = (json.loads(md3(task, "img", text).stdout) for text in ("vehicle=car", "car"))
    in_spec = json.loads(md3("run", "img", "--task", f"{task}:vehicle=car").stdout)
    assert named[key][0]["label"] == in_spec[key][0]["label"] == "vehicle"
    assert bare[key][0]["label"] == named["prompt"] == "car"
    assert named["id"] == bare["id"] == in_spec["id"]


@pytest.mark.parametrize("task", ["point", "segment"])
def test_doubles_are_of_boxes_alone(md3: Program, task: str) -> None:
    """What would be accepted and change nothing is refused."""
    result = md3(task, "pictures", "dot", "--nms", "0.5", "--model", "none")
    assert (result.exit_code, "--nms is about boxes of detect" in result.stderr) == (2, True)


@pytest.mark.parametrize("option", [["--labels", "l.txt"], ["--min-score", "0.5"], ["--nms", "0.5"]])
def test_a_choice_about_objects_is_refused_where_none_are_asked(md3: Program, option: list[str]) -> None:
    write(Path("l.txt"), "car\n")
    result = md3("caption", "img", *option)
    assert (result.exit_code, f"{option[0]} is about what detect, point and segment find" in result.stderr) == (2, True)
    assert not md3.models


@pytest.mark.parametrize("option", ["--labels", "--prompts"])
def test_a_file_that_says_what_is_asked_is_never_written(md3: Program, option: str) -> None:
    write(Path("l.txt"), "car\n")
    os.link("l.txt", "same.txt")
    for out in ("l.txt", "./l.txt", "same.txt"):
        result = md3("detect", "img", option, "l.txt", "-f", "csv", "-o", out, "--overwrite")
        assert (result.exit_code, "is an input of this command" in " ".join(result.stderr.split())) == (2, True)
        assert not md3.models
    assert Path("l.txt").read_text() == "car\n"


@given(first=label_sets(), second=label_sets())
def test_labels_that_follow_keep_the_first_and_lose_no_prompt(first: Labels, second: Labels) -> None:
    joined = first.followed_by(second)
    assert joined.names[: len(first.labels)] == first.names
    assert set(joined.prompts) == {*first.prompts, *second.prompts}
    assert len(set(joined.names)) == len(joined.names)
    assert len(joined.prompts) == len(set(joined.prompts)) == sum(len(label.prompts) for label in joined.labels)
    assert all(joined.name_of(prompt) == first.name_of(prompt) for prompt in first.prompts)
    ids = [label.id for label in joined.labels if label.id is not None]
    assert len(ids) in (0, len(joined.labels))
    assert len(set(ids)) == len(ids)
    if all(label.id is not None for label in first.labels):
        assert ids[: len(first.labels)] == [label.id for label in first.labels]
