"""Prompts by the real command: files of them, templates, columns under other names, and what is told beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program import Program, make_pictures, records_of

MANIFEST = """\
img,color,promt,max_objects
pictures/p0.png,red,a,5
pictures/p1.png,,b,
pictures/p2.png,{stem},c,
"""
QUESTIONS = "\ufeff# what is asked\r\n\r\nIs it {color}?\r\n  How many {color} things are in {stem}?  \r\n"


@pytest.fixture
def md3(md3: Program, tmp_path: Path) -> Program:
    make_pictures(tmp_path / "pictures", 3)
    (tmp_path / "m.csv").write_text(MANIFEST)
    (tmp_path / "q.txt").write_bytes(QUESTIONS.encode())
    return md3


def prompts(text: str | bytes | Path) -> list[str]:
    return [record["prompt"] for record in records_of(text)]


def test_a_template_over_a_csv_with_a_misspelled_column(md3: Program) -> None:
    """The journey: refused before the model is looked for, told what is meant, then filled, resumed, changed."""
    command = ("query", "m.csv", "--prompts", "q.txt", "--template", "-o", "out.jsonl")
    result = md3(*command)
    assert result.exit_code == 1
    assert "no column 'image'" in result.stderr
    assert "--map image=NAME" in result.stderr
    command = (*command, "--map", "image=img")
    result = md3(*command, "-q", "What is {colr}?")
    assert result.exit_code == 2
    assert "{colr} in a prompt: m.csv has no column 'colr'; did you mean 'color'?" in result.stderr
    assert not md3.models
    assert not Path("out.jsonl").exists()

    result = md3(*command)
    assert result.exit_code == 3  # a row without a colour
    assert "column 'promt' is carried to meta; did you mean prompt?" in result.stderr
    records = records_of(Path("out.jsonl"))
    assert [record["prompt"] for record in records] == [
        "Is it red?",
        "How many red things are in p0?",
        "Is it {color}?",
        "How many {color} things are in {stem}?",
        "Is it {stem}?",  # what a column holds is put in as it is
        "How many {stem} things are in p2?",
    ]
    assert records[2]["error"]["type"] == "bad_request"
    assert records[2]["error"]["message"] == "line 3: {color} has no value: the column 'color' is empty"
    assert records[0]["meta"] == {"color": "red", "promt": "a"}

    before = Path("out.jsonl").read_bytes()
    assert md3(*command).exit_code == 3
    assert (md3.num_answered, Path("out.jsonl").read_bytes()) == (0, before)
    for other, told in (
        ((*command[:4], *command[5:]), "template on, now none"),
        ((*command, "--map", "note=promt"), 'map ["image=img"], now ["image=img", "note=promt"]'),
        ((*command, "--const", "split=train"), 'const none, now ["split=train"]'),
    ):
        result = md3(*other)
        assert result.exit_code == 2, result.stderr
        assert told in " ".join(result.stderr.split())
    assert Path("out.jsonl").read_bytes() == before


def test_ids_are_those_of_the_filled_prompts(md3: Program) -> None:
    filled = md3("detect", "pictures", "{stem} {folder}", "--template").stdout
    rows = [{"image": f"pictures/p{i}.png", "task": "detect", "prompt": f"p{i} pictures"} for i in range(3)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    typed = md3("run", "rows.jsonl", "--root", ".").stdout
    assert prompts(filled) == [row["prompt"] for row in rows]
    (plain,) = {line["id"] for line in records_of(md3("detect", "pictures/p0.png", "p0 pictures").stdout)}
    assert records_of(filled)[0]["id"] == plain
    assert [record["prompt"] for record in records_of(typed)] == prompts(filled)


@pytest.mark.parametrize("task", ["detect", "point", "segment"])
def test_a_file_of_objects(md3: Program, task: str) -> None:
    Path("o.txt").write_text("# things\n\nred car\nthing = blue car\n")
    assert prompts(md3(task, "pictures/p0.png", "dog", "--prompts", "o.txt").stdout) == ["dog", "red car", "blue car"]
    assert prompts(md3(task, "pictures/p0.png", "--prompts", "o.txt").stdout) == ["red car", "blue car"]


def test_a_file_of_tasks(md3: Program) -> None:
    Path("t.txt").write_text("detect:car,dog\nquery:Is it {stem}?\n")
    for command in ("run",):
        result = md3(command, "pictures/p1.png", "--task", "caption", "--prompts", "t.txt", "--template")
        assert prompts(result.stdout) == [None, "car", "dog", "Is it p1?"]
    Path("t.txt").write_text("detcet:car\n")
    result = md3("run", "pictures", "--prompts", "t.txt")
    assert (result.exit_code, "--prompts t.txt: 'detcet:car': no task 'detcet'" in result.stderr) == (2, True)


def test_questions_without_a_picture(md3: Program) -> None:
    Path("q.txt").write_text("Who are you?\n")
    assert prompts(md3("query", "--prompts", "q.txt").stdout) == ["Who are you?"]
    assert prompts(md3("query", "-q", "Why?", "--prompts", "q.txt").stdout) == ["Why?", "Who are you?"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"\n# nothing\n \r\n", "has no prompt; write one a line"),
        (b"caf\xe9\n", "is not UTF-8"),
        (b"x\n" * 600_000, "has more than 1,000,000 bytes"),
    ],
)
def test_a_file_that_lists_nothing_is_refused(md3: Program, content: bytes | None, message: str) -> None:
    if content is not None:
        Path("bad.txt").write_bytes(content)
    result = md3("query", "pictures", "--prompts", "bad.txt")
    assert result.exit_code == 2
    assert "--prompts bad.txt" in result.stderr
    assert message in result.stderr
    assert not md3.models


def test_rows_that_bring_prompts_need_none_typed(md3: Program) -> None:
    options = ("--map", "image=img", "--map", "prompt=promt")
    for command in ("query", "detect", "point"):
        result = md3(command, "m.csv", *options)
        assert prompts(result.stdout) == ["a", "b", "c"], result.stderr
    result = md3("detect", "m.csv", "--map", "image=img")
    assert result.exit_code == 2
    assert "no OBJECT: m.csv has no column 'prompt'; did you mean 'promt'?" in result.stderr
    for line in (("detect", "pictures"), ("detect", "-")):
        assert "no OBJECT; say what to look for" in md3(*line).stderr


def test_constants_reach_records_and_requests(md3: Program) -> None:
    result = md3("detect", "m.csv", "dog", "--map", "image=img", "--const", "max_objects=3", "--const", "split=train")
    assert [record["meta"]["split"] for record in records_of(result.stdout)] == ["train"] * 3
    assert [request.max_objects for _, request in md3.models[-1].engine.seen] == [5, 3, 3]


def test_a_dry_run_and_an_estimate_fill_prompts_too(md3: Program) -> None:
    options = ("--template", "--map", "image=img", "--dry-run")
    counts = json.loads(md3("query", "m.csv", "-q", "Is it {color}?", "-q", "{stem}?", *options).stdout)
    assert (counts["requests"], counts["bad"], sum(counts["crops"].values())) == (6, {"bad_request": 1}, 3)
    for last in ("--dry-run", "--estimate"):
        result = md3("query", "m.csv", "-q", "{colr}", *options, last)
        assert (result.exit_code, "did you mean 'color'?" in result.stderr, md3.models) == (2, True, [])


def test_captions_take_no_prompts(md3: Program) -> None:
    assert md3("caption", "pictures", "--prompts", "q.txt").exit_code == 2


@pytest.mark.parametrize("option", ["--map", "--const"])
def test_pairs_without_a_sign_are_refused(md3: Program, option: str) -> None:
    result = md3("detect", "m.csv", "dog", option, "prompt")
    assert (result.exit_code, "is not two names with = between" in " ".join(result.stderr.split())) == (2, True)


def test_filled_prompts_in_shards(md3: Program) -> None:
    """The same records as in one process; the plan holds what was filled, and another template is refused."""
    command = ["detect", "m.csv", "{color} dog", "{stem}", "--template", "--map", "image=img", "--const", "split=x"]
    md3(*command, "-o", "one.jsonl")
    md3(*command, "-o", "many.jsonl", "--engine", "local", "--shard-size", 2)
    assert Path("many.jsonl").read_bytes() == Path("one.jsonl").read_bytes()
    records = records_of(Path("one.jsonl"))
    assert [record["error"] and record["error"]["type"] for record in records] == [None] * 2 + ["bad_request"] + [
        None
    ] * 3
    assert (records[2]["prompt"], records[3]["prompt"], "sha256" in records[3]) == ("{color} dog", "p1", True)
    Path("many.jsonl").unlink()
    result = md3(*command[:2], "{color} cat", *command[3:], "-o", "many.jsonl", "--engine", "local")
    assert result.exit_code == 2
    command.remove("split=x")
    result = md3(*command, "split=y", "-o", "many.jsonl", "--engine", "local")
    assert (result.exit_code, 'const ["split=x"], now ["split=y"]' in " ".join(result.stderr.split())) == (2, True)


def test_a_folder_with_constant_settings_is_resumed(md3: Program) -> None:
    """Constants are settings of which a record tells nothing: none of them is taken for a damaged one."""
    command = ("detect", "pictures", "{stem}", "--template", "--const", "max_objects=2", "-o", "out.jsonl")
    assert md3(*command).exit_code == 0
    lines = Path("out.jsonl").read_bytes().splitlines(keepends=True)
    Path("out.jsonl").write_bytes(b"".join(lines[:2]))
    assert md3(*command).exit_code == 0
    assert md3.num_answered == 1
    assert Path("out.jsonl").read_bytes() == b"".join(lines)
    Path("out.jsonl.run.json").unlink()  # records alone say too little to refuse a template
    assert md3(*command).exit_code == 0
    assert md3.num_answered == 0


@pytest.mark.parametrize("many", [(), ("--engine", "local", "--shard-size", 2)])
def test_a_filled_prompt_keeps_its_name(md3: Program, many: tuple[object, ...]) -> None:
    """Also in every format, and where nothing was found; a template without a name is no class."""
    options = ("--template", "--map", "image=img", "--prompts", "o.txt", "-o", "out/", "-f", "coco")
    Path("o.txt").write_text("thing={color} dog\n{stem}\nstar\nbrace={{x}}\n")
    md3("detect", "m.csv", *options, *many)
    records = records_of(Path("out/records.jsonl"))
    named = {
        record["prompt"]: {found["label"] for found in record["objects"]}
        for record in records
        if record["error"] is None
    }
    assert named == {
        "red dog": {"thing"},
        "p0": {"p0"},
        "p1": {"p1"},
        "star": {"star"},
        "{x}": {"brace"},
        "{stem} dog": {"thing"},
        "p2": {"p2"},
    }
    expected = ["thing", "star", "brace", "p0", "p1", "p2"]
    assert categories(Path("out/coco.json")) == expected
    bare = [record | {"objects": []} if "objects" in record else record for record in records]
    Path("out/records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bare))
    result = md3("export", "out", "-f", "coco", "-o", "again.json")
    assert result.exit_code == 0, result.stderr
    assert categories(Path("again.json")) == expected


def categories(path: Path) -> list[str]:
    return [category["name"] for category in json.loads(path.read_bytes())["categories"]]


@pytest.mark.parametrize("many", [(), ("--engine", "local", "--shard-size", 2)])
def test_a_template_is_added(md3: Program, many: tuple[object, ...]) -> None:
    """The file is that of a run which asked both at once."""
    options = ("--template", "--map", "image=img")
    first, second = "thing={color} dog", "word={color} cat in {folder}"
    md3("detect", "m.csv", first, second, *options, "-o", "once.jsonl")
    md3("detect", "m.csv", first, *options, "-o", "out.jsonl", *many)
    result = md3("detect", "m.csv", second, *options, "-o", "out.jsonl", *many, "--add")
    assert result.exit_code == 3, result.stderr
    assert Path("out.jsonl").read_bytes() == Path("once.jsonl").read_bytes()
    assert md3("verify", "out.jsonl").exit_code == 0
    result = md3("detect", "m.csv", second, *options[1:], "-o", "out.jsonl", *many, "--add")
    assert (result.exit_code, "template" in result.stderr) == (2, True)
