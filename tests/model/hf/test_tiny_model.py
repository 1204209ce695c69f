"""The transformers class on the embedded model: the records of the commands, and a new shape learned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_cases import WORDS, request_of, scenes

from md3cli import Moondream, model_path
from md3cli.model.hf import Moondream3ForConditionalGeneration, Moondream3Processor
from md3cli.records import Task

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.process
def test_generate_gives_the_records_of_the_commands() -> None:
    """Every skill and tiling in one batch, to the last id and coordinate."""
    folder = model_path("tiny")
    model = Moondream3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = Moondream3Processor.from_pretrained(folder)
    pairs = [(words, image) for image in scenes() for words in WORDS]
    rows = [request_of(*pair) | {"max_tokens": 48, "max_objects": 12} for pair in pairs]
    records = list(Moondream.load("tiny", device="cpu", dtype="fp32").annotate(rows))
    inputs = processor(text=[words for words, _ in pairs], images=[image for _, image in pairs])
    generation = model.generate(**inputs, max_new_tokens=48, max_objects=12, return_dict_in_generate=True)
    answer_id = model.model.config.tokenizer.answer_id
    for row, record in enumerate(records):
        ids = generation.sequences[row, inputs["input_ids"].shape[1] :].tolist()
        assert generation.finish_reasons[row] == record["finish_reason"]
        if record["task"] in (Task.DETECT, Task.POINT):
            names = ("x_min", "y_min", "x_max", "y_max") if record["task"] == Task.DETECT else ("x", "y")
            wanted = [[item[name] for name in names] for item in record.get("objects", record.get("points"))]
            found = generation.objects[row]
            assert torch.allclose(found, torch.tensor(wanted).reshape(-1, len(names)), atol=1e-6)
            continue
        if "reasoning" in record:
            end = ids.index(answer_id)
            assert processor.decode(ids[:end]) == record["reasoning"]["text"]
            ids = ids[end:]
        assert processor.decode(ids) == record.get("caption", record.get("answer"))
    assert {record["task"] for record in records} == {"caption", "query", "detect", "point"}
    assert any(record.get("objects") for record in records)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_lora_teaches_a_new_shape_and_keeps_the_old_ones(tmp_path: Path) -> None:
    """AP50 of the arrow from under 0.1 to at least 0.5, the old kinds within 2 points on average."""
    script = EXAMPLES / "finetune_lora.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True, cwd=tmp_path)
    before, after = (ap50_by_kind(tmp_path / name / "eval.json") for name in ("before", "after"))
    assert before.pop("arrow") < 0.1
    assert after.pop("arrow") >= 0.5
    assert np.mean(list(after.values())) >= np.mean(list(before.values())) - 0.02
    losses = [entry["loss"] for entry in trainer_log(tmp_path) if "loss" in entry]
    assert np.mean(losses[-3:]) < np.mean(losses[:1])


def ap50_by_kind(report: Path) -> dict[str, float]:
    """AP50 of each kind in the JSON of `md3 eval`."""
    (boxes,) = json.loads(report.read_text())["sections"]
    return {label: scores["AP50"] for label, scores in boxes["by_name"].items()}


def trainer_log(out: Path) -> list[dict[str, Any]]:
    """What Trainer logged up to its last checkpoint."""
    states = sorted((out / "trainer").glob("*/trainer_state.json"), key=lambda file: file.stat().st_mtime)
    log: list[dict[str, Any]] = json.loads(states[-1].read_text())["log_history"]
    return log
