"""The examples run as they stand; a stub takes the model's place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from caption_trainers import kohya_set, onetrainer_concept
from finished_runs import draw_pictures
from report_runs import found, record

from md3cli import Moondream

pytestmark = pytest.mark.process

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment whose `md3` is the program with a stub for the model."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "md3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{TESTS}/support/stub_md3.py" "$@"\n')
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for program in folder.iterdir():
        program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def start(environment: dict[str, str], name: str, *arguments: object) -> str:
    """Run an example; what it printed."""
    interpreter = "bash" if name.endswith(".sh") else sys.executable
    command = [interpreter, EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Two pictures: a sure and an unsure box on one, none on the other; and an answer."""
    head = {"schema": "md3/1", "width": 100, "height": 100, "model": "tiny@1", "meta": {}, "error": None}
    box = {"label": "car", "x_min": 0.1, "y_min": 0.1, "x_max": 0.5, "y_max": 0.5, "score": 0.9}
    unsure = {**box, "x_min": 0.6, "x_max": 0.9, "score": 0.2}
    lines = [
        {**head, "id": "1", "image": "a.png", "task": "detect", "prompt": "car", "objects": [box, unsure]},
        {**head, "id": "2", "image": "b.png", "task": "detect", "prompt": "car", "objects": []},
        {**head, "id": "3", "image": "b.png", "task": "query", "prompt": "Open?", "answer": "yes"},
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_folder_to_coco(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "boxes"
    start(environment, "folder_to_coco.sh", out)
    images = json.loads((out / "coco.json").read_bytes())["images"]
    assert len(images) == len([path for path in (out / "overlays").rglob("[!.]*") if path.is_file()]) > 3
    assert (out / "yolo/data.yaml").is_file()


def test_lora_captions(environment: dict[str, str], tmp_path: Path) -> None:
    """Both trainers find one caption for each picture, with the trigger word; another start changes nothing."""
    pictures, out = tmp_path / "my pictures", tmp_path / "lora"
    names = ["a.jpg", "a.png", "B c.JPG", "sub/a.jpg", "sub/ü.webp", "cat.v2.jpeg"]
    draw_pictures(pictures, names)
    (pictures / "notes.txt").write_text("mine")
    for _ in range(2):
        start(environment, "lora_captions.sh", pictures, "sks", "dog", out)
        kohya = list(kohya_set(out / "kohya"))
        concept = dict(onetrainer_concept(out / "onetrainer/sks"))
        assert len(kohya) == len(concept) == len(names)
        assert {path.parent.name for path, _, _ in kohya} == {"10_sks dog"}
        for path, repeats, caption in kohya:
            assert repeats == 10
            assert caption.startswith("sks, a picture ")
            assert concept[out / "onetrainer/sks" / path.name] == [caption]
        assert len({caption for _, _, caption in kohya}) == len(names)
        rows = (out / "imagefolder/train/metadata.jsonl").read_text().splitlines()
        assert len(rows) == len(names)
    assert sorted(path.name for path in pictures.rglob("*.txt")) == ["notes.txt"]


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_filter_with_jq(environment: dict[str, str], tmp_path: Path, records: Path) -> None:
    assert start(environment, "filter_with_jq.sh", records, tmp_path / "sure.json") == "1 boxes\n"
    assert len(json.loads((tmp_path / "sure.json").read_bytes())["images"]) == 2


def test_coco_to_labelstudio(environment: dict[str, str], tmp_path: Path, records: Path) -> None:
    subprocess.run(["md3", "export", records, "-o", tmp_path / "coco.json"], env=environment, check=True)
    said = start(environment, "coco_to_labelstudio.py", tmp_path / "coco.json", tmp_path / "project")
    assert said == f"2 tasks in {tmp_path / 'project'}\n"
    tasks = json.loads((tmp_path / "project/tasks.json").read_bytes())
    assert [len(task["predictions"][0]["result"]) for task in tasks] == [2, 0]
    assert '<Label value="car"' in (tmp_path / "project/interface.xml").read_text()


def test_without_duckdb_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "duckdb.py").write_text("raise ImportError")
    command = [sys.executable, EXAMPLES / "duckdb_over_parquet.py", "records.parquet"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "this example needs DuckDB: pip install duckdb\n")


@pytest.mark.slow
def test_duckdb_over_parquet(environment: dict[str, str], tmp_path: Path, records: Path) -> None:
    """In an environment of its own: DuckDB is no dependency."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "environment"], check=True)
    python = tmp_path / "environment/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "duckdb"], check=True)
    subprocess.run(["md3", "export", records, "-o", tmp_path / "r.parquet"], env=environment, check=True)
    command = [python, EXAMPLES / "duckdb_over_parquet.py", tmp_path / "r.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "│ car     │     2 │      1 │       0.55 │" in done.stdout
    assert "yes" in done.stdout


def test_score_with_pycocotools(environment: dict[str, str], tmp_path: Path, records: Path) -> None:
    subprocess.run(["md3", "export", records, "-o", tmp_path / "gt.json"], env=environment, check=True)
    said = start(environment, "score_with_pycocotools.py", records, tmp_path / "gt.json")
    assert "| area=   all | maxDets=100 ] = 1.000" in said


# ---- scoring and reviewing ----------------------------------------------------------------------


def test_score(environment, tmp_path):
    printed = start(environment, "score.sh", tmp_path / "scores")
    assert printed.startswith("boxes: 24 images, 72 requests, 0 failed")
    assert json.loads((tmp_path / "scores/eval/eval.json").read_text())["sections"][0]["name"] == "boxes"
    assert (tmp_path / "scores/eval/boxes-pr.png").is_file()
    assert "Boxes by ground truth" in (tmp_path / "scores/report.html").read_text()


def test_compare_runs(environment, tmp_path):
    assert start(environment, "compare_runs.sh", tmp_path / "out").startswith("compared: ")


@pytest.fixture
def scored(tmp_path):
    path = tmp_path / "records.jsonl"
    scores = {"a.jpg": 0.9, "b.jpg": 0.2, "c.jpg": 0.5}
    boxes = {name: [found("car", (0, 0, 0.5, 0.5), score)] for name, score in scores.items()}
    lines = [record(name, "detect", "car", objects=objects) for name, objects in boxes.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_least_sure(environment, scored):
    assert start(environment, "least_sure.py", scored, "--count", 2) == "0.200  car  b.jpg\n0.500  car  c.jpg\n"


def test_apply_marks(environment, scored, tmp_path):
    ids = [json.loads(line)["id"] for line in scored.read_text().splitlines()]
    marks = tmp_path / "run.marks.jsonl"
    marks.write_text(json.dumps({"id": ids[0], "mark": "right"}) + "\n" + json.dumps({"id": ids[1], "mark": "wrong"}))

    def kept(*options):
        return [
            json.loads(line)["id"]
            for line in start(environment, "apply_marks.py", scored, marks, *options).splitlines()
        ]

    assert kept() == [ids[0], ids[2]]
    assert kept("--only-right") == [ids[0]]


# ---- training -----------------------------------------------------------------------------------


def losses(out: Path) -> list[float]:
    """What Trainer logged up to its last checkpoint."""
    (state,) = out.glob("trainer/*/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_bytes())["log_history"] if "loss" in entry]


def test_sft_trl(environment, tmp_path):
    """Two steps of trl's trainer; what it saves is a model for md3."""
    pytest.importorskip("trl", reason="needs the extra md3cli[trl]")
    start(environment, "sft_trl.py", "--out", tmp_path, "--steps", 2, "--batch-size", 2)
    model = Moondream.load(tmp_path, device="cpu")
    assert model.query(EXAMPLES / "scenes/scene_00000.png", "How many circles are there?", reasoning=False)["answer"]


def test_finetune_vqa(environment, tmp_path):
    """All weights, a few steps: the loss falls, the folder is a model, and the held-out questions are scored twice."""
    pytest.importorskip("peft", reason="needs the extra md3cli[hf]")
    start(environment, "finetune_vqa.py", "--out", tmp_path, "--scenes", 4, "--steps", 8, "--batch-size", 8)
    first, *_, last = losses(tmp_path)
    assert last < 0.8 * first
    for name in ("before", "after"):
        (section,) = json.loads((tmp_path / name / "eval.json").read_bytes())["sections"]
        assert section["name"] == "answers"
    model, plain = (Moondream.load(one, device="cpu") for one in (tmp_path / "model", "tiny"))
    picture = tmp_path / "train/scene_00000.png"
    answers = [one.query(picture, "What is furthest left?", reasoning=False)["answer"] for one in (model, plain)]
    assert answers[0] != answers[1]


def test_finetune_detection(environment, tmp_path):
    """Adapters, with checkpoints of activations and batches that add up; they load beside the model."""
    pytest.importorskip("peft", reason="needs the extra md3cli[hf]")
    learning = ["--steps", 6, "--batch-size", 4, "--accumulate", 2, "--rank", 8, "--rate", 3e-3, "--checkpointing"]
    start(environment, "finetune_detection.py", "--out", tmp_path, "--scenes", 4, *learning)
    first, *_, last = losses(tmp_path)
    assert last < 0.9 * first
    for name in ("before", "after"):
        (section,) = json.loads((tmp_path / name / "eval.json").read_bytes())["sections"]
        assert section["name"] == "boxes"
    adapted = Moondream.load("tiny", device="cpu", adapter=tmp_path / "adapter")
    plain, pictures = Moondream.load("tiny", device="cpu"), sorted((tmp_path / "train").glob("*.png"))
    assert any(adapted.detect(one, "warm shape") != plain.detect(one, "warm shape") for one in pictures)


@pytest.mark.parametrize("way", ["layers on disk", "two processes"])
def test_several_devices(environment: dict[str, str], tmp_path: Path, way: str) -> None:
    """The embedded model says the colour of a circle, with most layers on disk and shared out over two processes."""
    pytest.importorskip("accelerate", reason="needs the extra md3cli[hf]")
    from placed_answers import drawn

    drawn().save(tmp_path / "shapes.png")
    command = [EXAMPLES / "several_devices.py", "tiny", tmp_path / "shapes.png", "What colour is the circle?"]
    if way == "layers on disk":
        command += ["--memory", "cpu=6MB", "--offload", tmp_path / "offload"]
    else:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command, "--whole-experts"]
    program = [sys.executable, *map(str, command)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["red"]
