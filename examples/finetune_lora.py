"""Teach the embedded model a shape it has never seen, with a LoRA, and let `md3 eval` judge.

    python examples/finetune_lora.py --out arrows

draws scenes with arrows among the eight old shapes, asks the model for all nine kinds in held-out ones,
trains adapters on detection with transformers' Trainer and peft, and asks again with
`--adapter arrows/adapter`. Needs the extra md3cli[hf,eval]; some minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from shapes import write_collection
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from world import KINDS, NEW_KIND
from world_draw import make_picture
from world_text import matching

from md3cli import model_path
from md3cli.model.hf import Moondream3ForConditionalGeneration, Moondream3Processor
from md3cli.model.hf.lora import PARTS, lora_targets

ALL_KINDS = (*KINDS, NEW_KIND)
TRAIN_SEED, HELD_OUT_SEED = 41, 42  # the embedded model's own scenes have others
OFTEN = (*KINDS, *[NEW_KIND] * 4)  # what training scenes draw their kinds from


class Scenes(Dataset[dict[str, Any]]):
    """Records to learn from, drawn as they are asked for: every other one looks for the new shape."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = make_picture(TRAIN_SEED, index, OFTEN)
        rng = np.random.default_rng([TRAIN_SEED, index, 1])
        wanted = NEW_KIND if rng.random() < 0.5 else str(rng.choice(KINDS))
        sides = ("x_min", "y_min", "x_max", "y_max")
        boxes = [dict(zip(sides, one.box_xyxy, strict=True)) for one in matching(wanted, picture.instances)]
        return {"image": picture.image, "task": "detect", "prompt": wanted, "objects": boxes}


def train(out: Path, steps: int, batch_size: int, rate: float, rank: int) -> None:
    """Train adapters on every part of the network and save them as peft does, in `out`/adapter."""
    folder = model_path("tiny")
    base = Moondream3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = Moondream3Processor.from_pretrained(folder)
    targets = lora_targets(base.config.network, PARTS)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, **targets))
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        max_grad_norm=1.0,
        logging_steps=25,
        save_steps=max(1, steps // 2),
        remove_unused_columns=False,  # the collator takes records as they are
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        seed=1,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Scenes(steps * batch_size), data_collator=processor.collate
    )
    trainer.train()
    model.save_pretrained(out / "adapter")


def evaluate(out: Path, name: str, *options: str) -> dict[str, Any]:
    """`md3 detect` over the held-out scenes and `md3 eval`; prints its tables, returns its numbers."""
    records, scenes = out / f"{name}.jsonl", out / "held-out"
    detect = ["detect", str(scenes), *ALL_KINDS, "-m", "tiny", "-o", str(records), "--overwrite", "--quiet", *options]
    score = ["eval", str(records), "--gt", str(scenes / "instances.json"), "--root", str(scenes)]
    _md3(*detect)
    _md3(*score[:4])
    scores: dict[str, Any] = json.loads(_md3(*score[:4], "--json", is_quiet=True))
    return scores


def _md3(*arguments: str, is_quiet: bool = False) -> str:
    done = subprocess.run([sys.executable, "-m", "md3cli", *arguments], check=True, capture_output=True, text=True)
    if not is_quiet:
        print(f"$ md3 {' '.join(arguments)}\n{done.stdout}", flush=True)
    return done.stdout


def main() -> None:
    """Draw, ask, train, ask again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scenes", type=int, default=80, help="held-out scenes")
    args = parser.parse_args()
    write_collection(HELD_OUT_SEED, args.scenes, args.out / "held-out", ALL_KINDS)
    before = evaluate(args.out, "before")
    train(args.out, args.steps, args.batch_size, args.rate, args.rank)
    after = evaluate(args.out, "after", "--adapter", str(args.out / "adapter"))
    print(json.dumps({"before": before, "after": after})[:0], end="")


if __name__ == "__main__":
    main()
