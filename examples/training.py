"""What the fine-tuning examples share: their options, transformers' Trainer with settings that fit, and what is saved.

A record is what `md3` writes, or the same keys by hand: `image`, `task`, `prompt`, and the result to learn (`answer`,
`objects`, `caption`, `points`). `Moondream3Processor.collate` makes batches of them.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# First, so that bitsandbytes, which peft imports, fetches no code.
from md3cli import model_path
from md3cli.model.hf import Moondream3ForConditionalGeneration, Moondream3Processor
from md3cli.model.hf.config import lora_targets

# isort: split
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import Dataset
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

BITS: dict[int, dict[str, Any]] = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    8: {"load_in_8bit": True},
    16: {},
}
Records = Dataset[dict[str, Any]] | Sequence[dict[str, Any]]


def options(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Make a parser with the options of every fine-tuning example; `defaults` are those of `steps`, `rate`, `rank`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for everything")
    parser.add_argument("--model", default="tiny", help="alias, repository or folder (default tiny)")
    parser.add_argument("--dtype", default="float32", help="float32, or bfloat16 for the real model with --rank")
    parser.add_argument(
        "--bits", type=int, default=16, choices=sorted(BITS), help="of the frozen weights (md3cli[bnb])"
    )
    parser.add_argument("--rank", type=int, help="of LoRA adapters; 0 trains all weights")
    parser.add_argument("--rate", type=float, help="the learning rate")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1, help="batches to a step")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT/trainer")
    parser.set_defaults(**defaults)
    return parser


def data_options(parser: argparse.ArgumentParser, what: str, scenes: int) -> None:
    """Add the options of examples that take a user's files, of the form `what`, or draw scenes where none are given."""
    parser.add_argument("--train", type=Path, help=f"{what} to learn; without it scenes are drawn")
    parser.add_argument("--held-out", type=Path, help=f"{what} to ask before and after")
    parser.add_argument("--scenes", type=int, default=scenes, help="to draw for training; a tenth more are held out")


def data_of(args: argparse.Namespace, draw: Callable[[Path, int, int], Path], seeds: tuple[int, int]) -> list[Path]:
    """Return the file to learn and the one to ask: the user's, or what `draw(folder, seed, count)` made."""
    if (args.train is None) != (args.held_out is None):
        raise SystemExit("give both --train and --held-out, or neither of them")
    if args.train is not None:
        return [args.train, args.held_out]
    counts = (args.scenes, max(4, args.scenes // 10))
    folders = (args.out / "train", args.out / "held-out")
    return [draw(*one) for one in zip(folders, seeds, counts, strict=True)]


def train(args: argparse.Namespace, records: Records, parts: Sequence[str]) -> Path:
    """Train on records; return OUT/adapter, or with rank 0 OUT/model, which `md3` takes.

    Adapters go on `parts` of the network (`md3cli.model.hf.config.PARTS`). With rank 0 all weights learn.
    """
    if args.bits != 16 and not args.rank:
        raise SystemExit("weights in 8 or 4 bits are frozen; give --rank, of the adapters that learn")
    path = model_path(args.model)
    processor = Moondream3Processor.from_pretrained(path)
    packing = BitsAndBytesConfig(**BITS[args.bits]) if BITS[args.bits] else None  # type: ignore[no-untyped-call]
    model: Any = Moondream3ForConditionalGeneration.from_pretrained(
        path, dtype=args.dtype, quant="none", quantization_config=packing
    )
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    if packing is not None:
        model = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            model, use_gradient_checkpointing=args.checkpointing
        )
    if args.rank:
        targets = lora_targets(model.config, parts)
        model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=args.rank, **targets))
        model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(args.out / "trainer"),
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        max_steps=args.steps,
        learning_rate=args.rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        logging_steps=max(1, min(25, args.steps // 4)),
        save_steps=max(1, args.steps // 2),
        save_total_limit=1,
        remove_unused_columns=False,  # the collator takes records as they are
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        seed=1,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=records,
        data_collator=processor.collate,  # type: ignore[arg-type]
    )
    trainer.train(resume_from_checkpoint=args.resume)
    saved: Path = args.out / ("adapter" if args.rank else "model")
    model.save_pretrained(str(saved))
    return saved


def model_options(args: argparse.Namespace, trained: Path | None) -> list[str]:
    """Return the options by which `md3` takes the model: as it was, or as it was trained."""
    if trained is None:
        return ["-m", args.model]
    return ["-m", args.model, "--adapter", str(trained)] if args.rank else ["-m", str(trained)]


def run_md3(*arguments: str) -> None:
    """Run a command of md3, and show it."""
    print("$ md3", shlex.join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "md3cli", *arguments], check=True)
