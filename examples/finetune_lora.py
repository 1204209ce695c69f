"""Teach the embedded model a shape it has never seen, with a LoRA, and let `md3 eval` judge.

    python examples/finetune_lora.py --out arrows

draws scenes with arrows among the eight old shapes, asks the model for all nine kinds in held-out ones,
trains adapters on detection with transformers' Trainer and peft, and asks again with
`--adapter arrows/adapter`. Needs the extra md3cli[hf,eval]; some minutes on two CPU cores. With `--bits 4` the model is
packed by bitsandbytes (md3cli[bnb]) while it is trained: QLoRA.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from shapes import write_collection
from torch.utils.data import Dataset
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments
from world import KINDS, NEW_KIND
from world_draw import make_picture
from world_text import matching

from md3cli import model_path
from md3cli.model.hf import Moondream3ForConditionalGeneration, Moondream3Processor
from md3cli.model.hf.config import PARTS, lora_targets

ALL_KINDS = (*KINDS, NEW_KIND)
TRAIN_SEED, HELD_OUT_SEED = 41, 42  # the embedded model's own scenes have others
OFTEN = (*KINDS, *[NEW_KIND] * 3)  # what training scenes draw their kinds from
BITS: dict[int, dict[str, Any]] = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    8: {"load_in_8bit": True},
    16: {},
}
NEW_SHARE = 0.35  # of the records look for the new shape; the others keep the old ones in mind


class Scenes(Dataset[dict[str, Any]]):
    """Records to learn from, drawn as they are asked for: one picture and one kind to look for in it."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = make_picture(TRAIN_SEED, index, OFTEN)
        rng = np.random.default_rng([TRAIN_SEED, index, 1])
        wanted = NEW_KIND if rng.random() < NEW_SHARE else str(rng.choice(KINDS))
        sides = ("x_min", "y_min", "x_max", "y_max")
        boxes = [dict(zip(sides, one.box_xyxy, strict=True)) for one in matching(wanted, picture.instances)]
        return {"image": picture.image, "task": "detect", "prompt": wanted, "objects": boxes}


def train(out: Path, args: argparse.Namespace) -> None:
    """Train adapters on every part of the network and save them as peft does, in `out`/adapter."""
    packing = BitsAndBytesConfig(**BITS[args.bits]) if BITS[args.bits] else None  # type: ignore[no-untyped-call]
    base: Any = Moondream3ForConditionalGeneration.from_pretrained(
        args.model, dtype=torch.float32, quantization_config=packing
    )
    if packing is not None:
        base = prepare_model_for_kbit_training(base)  # type: ignore[no-untyped-call]
    processor = Moondream3Processor.from_pretrained(args.model)
    targets = lora_targets(base.config, PARTS)
    model = get_peft_model(base, LoraConfig(r=args.rank, lora_alpha=args.rank, **targets))
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=args.batch_size,
        max_steps=args.steps,
        learning_rate=args.rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        logging_steps=25,
        save_steps=max(1, args.steps // 2),
        remove_unused_columns=False,  # the collator takes records as they are
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        seed=1,
    )
    scenes = Scenes(args.steps * args.batch_size)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=scenes,
        data_collator=processor.collate,  # type: ignore[arg-type]
    )
    trainer.train(resume_from_checkpoint=args.resume)
    model.save_pretrained(str(out / "adapter"))


def evaluate(out: Path, name: str, model: str, *options: str) -> None:
    """Ask for every kind in the held-out scenes, and score the answers: `md3 detect`, then `md3 eval`."""
    records, scenes = str(out / f"{name}.jsonl"), out / "held-out"
    _md3("detect", str(scenes), *ALL_KINDS, "-m", model, "-o", records, "--overwrite", "--quiet", *options)
    _md3("eval", records, "--gt", str(scenes / "instances.json"), "-o", str(out / name))


def _md3(*arguments: str) -> None:
    print("$ md3", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "md3cli", *arguments], check=True)


def main() -> None:
    """Draw, ask, train, ask again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=model_path, default="tiny", help="default tiny")
    parser.add_argument("--steps", type=int, default=550)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--bits", type=int, default=16, choices=sorted(BITS), help="of the frozen weights")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scenes", type=int, default=80, help="held-out scenes")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT/trainer")
    args = parser.parse_args()
    write_collection(HELD_OUT_SEED, args.scenes, args.out / "held-out", ALL_KINDS)
    evaluate(args.out, "before", str(args.model))
    train(args.out, args)
    evaluate(args.out, "after", str(args.model), "--adapter", str(args.out / "adapter"))


if __name__ == "__main__":
    main()
