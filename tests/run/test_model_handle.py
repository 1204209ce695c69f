"""The real model behind the pipeline: found without loading, and one run from the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from program import clean_environment, records_of

from md3cli.config import ModelOptions
from md3cli.errors import CheckpointError
from md3cli.run.model_handle import REAL_CROP_CONFIG, crop_config_without_network, find_model

pytestmark = pytest.mark.process

CHECKPOINT = Path(__file__).parents[1] / "golden/case-a/checkpoint"
PICTURES = Path(__file__).parents[1] / "golden/case-a/images"


def md3(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "md3cli", *map(str, arguments)]
    environment = clean_environment(tmp_path) | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)


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
    done = md3(tmp_path, "caption", PICTURES, "-m", "no-such-model", "-o", "out.jsonl")
    assert done.returncode == 1
    assert done.stderr.startswith("error: model 'no-such-model': no such file or folder")
    assert list(tmp_path.glob("out*")) == []


def test_a_skill_the_model_lacks_is_said_before_anything_is_written(tmp_path: Path) -> None:
    weights = shutil.copytree(CHECKPOINT, tmp_path / "weights")
    document = json.loads((weights / "config.json").read_text())
    document["config"]["tokenizer"]["templates"]["segment"] = None
    (weights / "config.json").write_text(json.dumps(document))
    mixed = ("run", PICTURES, "--task", "caption", "--task", "segment:dog")
    for command in (("segment", PICTURES, "dog"), mixed, (*mixed, "--devices", "cpu", "--workers-per-device", "2")):
        done = md3(tmp_path, *command, "-m", weights, "-o", "out.jsonl")
        assert done.returncode == 1
        assert done.stderr.startswith("error: segment is not supported by this model")
        assert list(tmp_path.glob("out*")) == []


def test_a_dry_run_cuts_as_the_model_does() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())["config"]["vision"]
    found = crop_config_without_network(ModelOptions(str(CHECKPOINT)))
    assert (found.crop_size, found.max_crops) == (config["crop_size"], config["max_crops"])
    assert crop_config_without_network(ModelOptions("no-such-model")) == REAL_CROP_CONFIG


def test_detect_writes_one_valid_record_for_each_image(tmp_path: Path) -> None:
    command = ("detect", PICTURES, "person", "--model", CHECKPOINT, "--max-objects", 3)
    done = md3(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    records = records_of(done.stdout)
    assert [record["image"] for record in records] == [f"image{i}.png" for i in range(5)]
    for record in records:
        with Image.open(PICTURES / record["image"]) as picture:
            assert (record["width"], record["height"]) == picture.size
        assert record["error"] is None
        assert record["finish_reason"] in ("stop", "length")
        assert all(0.001 <= found["score"] <= 0.999 for found in record["objects"])
    assert md3(tmp_path, *command, "-o", "out.jsonl", "--batch-size", 1).returncode == 0
    assert [without_scores(r) for r in records_of(tmp_path / "out.jsonl")] == [without_scores(r) for r in records]


def without_scores(record: dict[str, object]) -> dict[str, object]:
    objects = [{key: value for key, value in found.items() if key != "score"} for found in record["objects"]]  # type: ignore[attr-defined]
    return record | {"objects": objects}


def test_every_task_in_one_pass(tmp_path: Path) -> None:
    specs = ["caption:short", "query:What is it?", "detect:a,b", "point:c", "segment:d"]
    tasks = [part for spec in specs for part in ("--task", spec)]
    done = md3(tmp_path, "run", PICTURES / "image0.png", *tasks, "-m", CHECKPOINT, "--max-tokens", 8)
    records = records_of(done.stdout)
    assert [record["task"] for record in records] == ["caption", "query", "detect", "detect", "point", "segment"]
    assert all(record["error"] is None or record["task"] == "segment" for record in records), done.stderr
    assert {record["sha256"] for record in records} == {records[0]["sha256"]}


def test_a_prompt_the_tokenizer_fails_on_is_a_record_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    runaway = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(document | {"pre_tokenizer": runaway}), encoding="utf-8")
    asked = ("query", PICTURES, "-q", "a" * 60 + "b", "-q", "why", "--limit", "2", "--max-tokens", "2")
    done = md3(tmp_path, *asked, "--model", folder, "--device", "cpu", "--no-progress")
    assert done.returncode == 3, done.stderr
    errors = [record["error"] and record["error"]["type"] for record in records_of(done.stdout)]
    assert errors == ["bad_request", None] * 2
    assert "panicked" not in done.stderr
