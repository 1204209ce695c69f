"""The real model behind the pipeline: found without loading, and one run from the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image
from program import isolate, records_of
from typer.testing import CliRunner, Result

from md3cli.cli import app
from md3cli.config import ModelOptions
from md3cli.errors import CheckpointError
from md3cli.records import Request, Task
from md3cli.run.model_handle import REAL_CROP_CONFIG, crop_config_without_network, find_model, words_beyond

pytestmark = pytest.mark.process

CHECKPOINT = Path(__file__).parents[1] / "golden/case-a/checkpoint"
EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURES = Path(__file__).parents[1] / "golden/case-a/images"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's settings, and an empty working folder."""
    isolate(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)


def md3(*arguments: object) -> Result:
    """The program with the real model, in this process."""
    return CliRunner().invoke(app, [*map(str, arguments)], prog_name="md3")


def test_a_model_is_found_without_torch() -> None:
    check = (
        "import sys\n"
        "from md3cli.config import ModelOptions\n"
        "from md3cli.run.model_handle import find_model\n"
        f"model = find_model(ModelOptions({str(CHECKPOINT)!r}, dtype='fp32'))\n"
        "assert 'torch' not in sys.modules\n"
        "assert model.identity.model.startswith('checkpoint@') and model.identity.dtype == 'fp32'\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_model_that_is_not_there_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        find_model(ModelOptions("no-such-model"))
    done = md3("caption", PICTURES, "-m", "no-such-model", "-o", "out.jsonl")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: model 'no-such-model': no such file or folder")
    assert list(tmp_path.glob("out*")) == []


def test_a_skill_the_model_lacks_is_said_before_anything_is_written(tmp_path: Path) -> None:
    weights = shutil.copytree(CHECKPOINT, tmp_path / "weights")
    document = json.loads((weights / "config.json").read_text())
    document["config"]["tokenizer"]["templates"]["segment"] = None
    (weights / "config.json").write_text(json.dumps(document))
    mixed = ("run", PICTURES, "--task", "caption", "--task", "segment:dog")
    for command in (("segment", PICTURES, "dog"), mixed, (*mixed, "--devices", "cpu", "--workers-per-device", "2")):
        done = md3(*command, "-m", weights, "-o", "out.jsonl")
        assert done.exit_code == 1
        assert done.stderr.startswith("error: segment is not supported by this model")
        assert list(tmp_path.glob("out*")) == []


def test_a_dry_run_cuts_as_the_model_does() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())["config"]["vision"]
    found = crop_config_without_network(ModelOptions(str(CHECKPOINT)))
    assert (found.crop_size, found.max_crops) == (config["crop_size"], config["max_crops"])
    assert crop_config_without_network(ModelOptions("no-such-model")) == REAL_CROP_CONFIG


def test_detect_writes_one_valid_record_for_each_image(tmp_path: Path) -> None:
    command = ("detect", PICTURES, "person", "--model", CHECKPOINT, "--max-objects", 3)
    done = md3(*command)
    assert done.exit_code == 0, done.stderr
    records = records_of(done.stdout)
    assert [record["image"] for record in records] == [f"image{i}.png" for i in range(5)]
    for record in records:
        with Image.open(PICTURES / record["image"]) as picture:
            assert (record["width"], record["height"]) == picture.size
        assert record["error"] is None
        assert record["finish_reason"] in ("stop", "length")
        assert all(0.001 <= found["score"] <= 0.999 for found in record["objects"])
    assert md3(*command, "-o", "out.jsonl", "--batch-size", 1).exit_code == 0
    assert [without_scores(r) for r in records_of(tmp_path / "out.jsonl")] == [without_scores(r) for r in records]


def without_scores(record: dict[str, object]) -> dict[str, object]:
    objects = [{key: value for key, value in found.items() if key != "score"} for found in record["objects"]]  # type: ignore[attr-defined]
    return record | {"objects": objects}


def test_every_task_in_one_pass() -> None:
    specs = ["caption:short", "query:What is it?", "detect:a,b", "point:c", "segment:d"]
    tasks = [part for spec in specs for part in ("--task", spec)]
    done = md3("run", PICTURES / "image0.png", *tasks, "-m", CHECKPOINT, "--max-tokens", 8)
    records = records_of(done.stdout)
    assert [record["task"] for record in records] == ["caption", "query", "detect", "detect", "point", "segment"]
    assert all(record["error"] is None or record["task"] == "segment" for record in records), done.stderr
    assert {record["sha256"] for record in records} == {records[0]["sha256"]}


def test_a_prompt_the_tokenizer_fails_on_is_a_record_and_the_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    runaway = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(document | {"pre_tokenizer": runaway}), encoding="utf-8")
    asked = ("query", PICTURES, "-q", "a" * 60 + "b", "-q", "why", "--limit", "2", "--max-tokens", "2")
    done = md3(*asked, "--model", folder, "--device", "cpu", "--no-progress")
    assert done.exit_code == 3, done.stderr
    errors = [record["error"] and record["error"]["type"] for record in records_of(done.stdout)]
    assert errors == ["bad_request", None] * 2
    assert "panicked" not in done.stderr + capfd.readouterr().err, "the library's own words go to the descriptor"


# -- what the embedded model knows ------------------------------------------------------------------


def beyond(*prompts: str | None, model: str = "tiny") -> str | None:
    return words_beyond(ModelOptions(model), [Request(Task.QUERY, prompt) for prompt in prompts])


def test_nothing_is_told_of_what_the_embedded_model_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    world, text = import_module("world"), import_module("world_text")
    questions = json.loads((EXAMPLES / "scenes" / "questions.json").read_text())
    asked = [row["question"] for row in questions] + [question for question, _ in text.FACTS]
    names = [*world.KINDS, "shape", *(f"{colour} {kind}" for colour in world.COLOURS for kind in world.KINDS)]
    asked += [*names, *map(text.plural, names), "Red Circle", "a star, or a moon?", "{column} {stem}", None]
    assert beyond(*asked) is None


def test_words_that_the_embedded_model_does_not_know_are_told_in_a_line() -> None:
    told = beyond("red circle", "car", "red car", "Is it raining?", "a dog with a hat")
    assert told is not None
    assert told.startswith("tiny knows coloured shapes (circle, square, triangle, ")
    assert told.endswith("), not 'car', 'raining', 'dog' and 2 more words; real pictures need --model moondream3")
    assert beyond("car", model="moondream3") is None


def test_the_line_stands_before_the_run() -> None:
    asked = ("detect", EXAMPLES / "scenes" / "scene_00000.png", "car", "--model", "tiny")
    done = md3(*asked)
    assert done.exit_code == 0
    told = [line for line in done.stderr.splitlines() if line.startswith("warning: tiny knows coloured shapes")]
    assert len(told) == 1
    assert "warning" not in md3(*asked, "--quiet").stderr
