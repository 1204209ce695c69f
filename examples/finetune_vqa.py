"""Teach a model to answer questions of your own about pictures with transformers' Trainer, and let `md3 eval` judge.

    python examples/finetune_vqa.py --out vqa                                            # scenes that it draws itself
    python examples/finetune_vqa.py --out vqa --train train.jsonl --held-out held-out.jsonl

A row of your own has a picture's path, from the file's folder: {"image": "a.jpg", "question": "…", "answer": "…"}. The
held-out questions are asked before and after. All weights learn, and OUT/model is a folder for `md3 query … -m
OUT/model`; with `--rank 16` adapters on the text decoder do, for `--adapter OUT/adapter`. Needs md3cli[hf,eval]; two
minutes of a CPU core.

The real model: `--model moondream3 --dtype bfloat16 --rank 16 --rate 1e-4 --batch-size 1 --accumulate 16
--checkpointing`, on a GPU with room for its 18.5 GB and the work. Keep answers as short, and as alike in form, as you
want them back.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training import data_of, data_options, model_options, options, run_md3, train
from world_draw import make_picture

PARTS = ("attention", "dense", "experts")  # of the text decoder: what is seen stays as it is
SIDES = {"left": 0, "right": -1}  # a scene's shapes stand in order from left to right
SEEDS = (61, 62)  # of scenes to learn and held-out ones


def draw(folder: Path, seed: int, count: int) -> Path:
    """Draw scenes and ask which shape is outermost, which the embedded model cannot tell; return the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    file, rows = folder / "questions.jsonl", []
    for index in range(count):
        picture, name = make_picture(seed, index), f"scene_{index:05d}.png"
        picture.image.save(folder / name)
        for side, place in SIDES.items():
            answer = picture.instances[place].name
            rows.append({"image": name, "question": f"What is furthest {side}?", "answer": answer})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read_records(manifest: Path) -> list[dict[str, Any]]:
    """Return the rows of a manifest as records to learn from; pictures are opened when their batch is made."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        {"image": manifest.parent / row["image"], "task": "query", "prompt": row["question"], "answer": row["answer"]}
        for row in rows
    ]


def evaluate(out: Path, name: str, held_out: Path, model: Sequence[str]) -> None:
    """Ask the held-out questions, and score the answers."""
    answers = str(out / f"{name}.jsonl")
    asked = ["--map", "prompt=question", "--const", "task=query", "--const", "reasoning=false"]
    run_md3("run", str(held_out), *asked, *model, "-o", answers, "--overwrite", "--quiet")
    run_md3("eval", answers, "--answer", "answer", "--metric", "exact", "-o", str(out / name))


def main(args: argparse.Namespace) -> None:
    """Ask, train, ask again."""
    rows, held_out = data_of(args, draw, SEEDS)
    evaluate(args.out, "before", held_out, model_options(args, None))
    trained = train(args, read_records(rows), PARTS)
    evaluate(args.out, "after", held_out, model_options(args, trained))


if __name__ == "__main__":
    parser = options(__doc__, steps=80, rate=5e-4, rank=0)
    data_options(parser, "rows (.jsonl)", scenes=400)
    main(parser.parse_args())
