"""What may be typed with `--then` and `--pad`, and what is refused before a model is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from program import Program, make_pictures, records_of

ASKED = "query:What colour is the {label}?"


@pytest.fixture
def md3(md3: Program, tmp_path: Path) -> Program:
    make_pictures(tmp_path / "pictures", 2)
    return md3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "caption", "--then", ASKED], "detect and segment"),
        (["--task", "point:nose", "--then", ASKED], "detect and segment"),
        (["--task", "query:Why?", "--then", ASKED], "--task detect:OBJECT"),
        (["--task", "detect:car", "--then", "query:Which {name}?"], "{name}"),
        (["--task", "detect:car", "--then", "query:Which {label?"], "{{"),
        (["--task", "detect:car", "--then", "fly:x"], "fly"),
        (["--task", "detect:car", "--then", "detect"], "object is missing"),
        (["--task", "detect:car", "--then", ASKED, "--then", ASKED], "ask the same"),
        (["--task", "detect:car", "--pad", "0.2"], "--then"),
        (["--task", "detect:car", "--then", ASKED, "--pad", "-1"], "-1"),
        (["--task", "detect:car", "--then", ASKED, "--pad", "5"], "5%"),
        (["--task", "detect:car", "--then", "detect:auto=car"], "calls it 'car'; give it one name"),
        (["--task", "detect:car", "--then", "detect:a=wheel", "--then", "point:b=wheel"], "as a and b"),
    ],
)
def test_what_cannot_follow_is_one_error(md3: Program, words: list[str], said: str) -> None:
    result = md3("run", "pictures", *words, "-o", "o.jsonl")
    assert result.exit_code == 2
    assert said in result.stderr
    assert not Path("o.jsonl").exists()


def test_a_parent_then_its_children_by_object_and_question(md3: Program) -> None:
    more = ("--then", "caption:short", "--pad", "50%", "--no-reasoning", "-o", "o.jsonl")
    result = md3("run", "pictures", "--task", "detect:cars=2 things", "--task", "caption", "--then", ASKED, *more)
    assert result.exit_code == 0, result.stderr
    records = records_of(Path("o.jsonl"))
    assert len(records) == 2 * (1 + 2 * 2 + 1)
    parent, *children, caption = records[:6]
    assert [(child["region"]["index"], child["task"]) for child in children] == [
        (0, "query"),
        (0, "caption"),
        (1, "query"),
        (1, "caption"),
    ]
    assert {child["region"]["of"] for child in children} == {parent["id"]}
    assert {child["region"]["label"] for child in children} == {"cars"}
    assert children[0]["prompt"] == "What colour is the cars?"
    assert children[2]["region"]["x_max"] == parent["objects"][1]["x_max"]
    assert caption["task"] == "caption"
    assert "region" not in caption
    for key in ("image", "width", "height", "sha256"):
        assert {record[key] for record in records[:6]} == {parent[key]}


def test_boxes_found_in_a_region_lie_in_the_whole_picture(md3: Program) -> None:
    result = md3("run", "pictures", "--task", "detect:car", "--then", "detect:wheel", "--pad", "0", "-o", "o.jsonl")
    assert result.exit_code == 0, result.stderr
    parent, child, *_ = records_of(Path("o.jsonl"))
    outer, inner = parent["objects"][0], child["objects"][0]
    assert outer["x_min"] <= inner["x_min"] < inner["x_max"] <= outer["x_max"] + 1 / child["width"]
    assert outer["y_min"] <= inner["y_min"] < inner["y_max"] <= outer["y_max"] + 1 / child["height"]
    assert inner["label"] == "wheel"


@pytest.mark.parametrize("options", [[], ["--template"]])
def test_what_is_found_in_a_region_is_called_by_the_name_typed(md3: Program, options: list[str]) -> None:
    then = ("--then", "detect:round=wheel", "--then", "point:part=door of {label}", "--then", "detect:=a=b")
    result = md3("run", "pictures", "--task", "detect:car", *then, *options, "-o", "o.jsonl")
    assert result.exit_code == 0, result.stderr
    _, wheel, door, literal, *_ = records_of(Path("o.jsonl"))
    assert (wheel["prompt"], wheel["objects"][0]["label"]) == ("wheel", "round")
    assert (door["prompt"], door["points"][0]["label"]) == ("door of car", "part")
    assert (literal["prompt"], literal["objects"][0]["label"]) == ("a=b", "a=b")


def test_a_listed_name_asks_all_its_prompts_of_a_region(md3: Program) -> None:
    Path("l.toml").write_text('[[label]]\nname = "round"\nprompts = ["wheel", "tyre"]\n')
    words = ("--task", "detect:car", "--labels", "l.toml", "--then", "detect:round", "-o", "o.jsonl")
    result = md3("run", "pictures", *words)
    assert result.exit_code == 0, result.stderr
    assert [record["prompt"] for record in records_of(Path("o.jsonl"))[:3]] == ["car", "wheel", "tyre"]
    Path("l.toml").write_text('[[label]]\nname = "round"\nprompts = ["{wheel}"]\n')
    assert "{wheel} is filled by nothing" in md3("run", "pictures", *words, "--overwrite").stderr


def test_objects_that_are_not_shown_are_not_asked_about(md3: Program) -> None:
    words = ("run", "pictures", "--task", "detect:car", "--task", "segment:dog", "--then", "caption", "-o", "o.jsonl")
    assert md3(*words, "--min-score", "0.8").exit_code == 0  # the stub's boxes have 0.9, its segments 0.7
    found = [record["region"]["label"] for record in records_of(Path("o.jsonl")) if "region" in record]
    assert found == ["car", "car"]
    assert md3(*words, "--min-score", "0.5").exit_code == 0
    found = [record["region"]["label"] for record in records_of(Path("o.jsonl")) if "region" in record]
    assert found == ["car", "dog", "car", "dog"]


def test_doubles_of_two_prompts_of_a_name_are_asked_about_once(md3: Program) -> None:
    words = ("--task", "detect:car=red car", "--task", "detect:car=blue car", "--then", "caption", "-o", "o.jsonl")
    assert md3("run", "pictures", *words).exit_code == 0
    records = records_of(Path("o.jsonl"))
    assert [("region" in record, record["prompt"]) for record in records[:3]] == [
        (False, "red car"),
        (True, None),
        (False, "blue car"),
    ]


def test_a_start_that_asks_something_else_then_is_refused_in_words(md3: Program) -> None:
    words = ("run", "pictures", "--task", "detect:car", "-o", "o.jsonl", "--then")
    assert md3(*words, "caption").exit_code == 0
    result = md3(*words, "query:What colour is it?")
    assert result.exit_code == 2
    assert "of each object found" in result.stderr


def test_runs_without_then_have_the_identity_they_had(md3: Program) -> None:
    assert md3("detect", "pictures", "car", "-o", "o.jsonl").exit_code == 0
    written = Path("o.jsonl.run.json").read_text()
    assert not any(f'"{key}"' in written for key in ("then", "pad", "region", "tiles"))


def test_what_the_settings_ask_then_waits_where_the_command_finds_no_boxes(
    md3: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MD3_THEN", "caption:short")
    for words in (["point:a"], ["point:b", "--add"]):
        assert md3("run", "pictures", "--task", *words, "-o", "o.jsonl").exit_code == 0
    assert md3("run", "pictures", "--task", "point:a", "-o", "new.jsonl", "--add").exit_code == 0
    assert md3("run", "pictures", "--task", "point:a", "-o", "new.jsonl").exit_code == 0, "it is the same run"
    refused = md3("run", "pictures", "-o", "o.jsonl", "--add")
    assert (refused.exit_code, "nothing to do for pictures" in refused.stderr) == (2, True)


def test_a_typed_then_waits_for_no_output_that_is_not_there(md3: Program) -> None:
    refused = md3("run", "pictures", "--task", "point:a", "--then", "caption:short", "-o", "new.jsonl", "--add")
    assert (refused.exit_code, "none of them is asked" in refused.stderr) == (2, True)
    assert not Path("new.jsonl").exists()
