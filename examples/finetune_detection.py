"""Teach a model to find the classes of a COCO file with transformers' Trainer, and let `md3 eval` judge.

    python examples/finetune_detection.py --out boxes                                    # scenes that it draws itself
    python examples/finetune_detection.py --out boxes --train train/instances.json --held-out val/instances.json

Pictures lie beside their COCO file. The held-out ones are asked for every class of it, before and after. All weights
learn, and OUT/model is a folder for `md3 detect … -m OUT/model`; with `--rank 16` adapters on every part of the network
do, for `--adapter OUT/adapter`. Needs md3cli[hf,eval]; two minutes of a CPU core.

The real model: `--model moondream3 --dtype bfloat16 --rank 16 --rate 1e-4 --batch-size 1 --accumulate 16
--checkpointing`, on a GPU with room for its 18.5 GB and the work. Names of classes are words to it: say "forklift", not
"class_7". Keep pictures that have none of a class: from them it learns to find nothing.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shapes import write_collection
from training import data_of, data_options, model_options, options, run_md3, train

from md3cli.model.hf.config import PARTS

CLASSES = {"warm shape": ("red", "yellow"), "cold shape": ("blue", "cyan")}  # no words of the embedded model's
SEEDS = (71, 72)  # of scenes to learn and held-out ones


def draw(folder: Path, seed: int, count: int) -> Path:
    """Draw scenes with boxes of two classes that the embedded model does not know; return the COCO file."""
    write_collection(seed, count, folder)
    file = folder / "instances.json"
    coco = json.loads(file.read_text(encoding="utf-8"))
    numbers = {colour: number for number, colours in enumerate(CLASSES.values(), 1) for colour in colours}
    coco["categories"] = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    known = [one for one in coco["annotations"] if one["colour"] in numbers]
    coco["annotations"] = [{**one, "category_id": numbers[one["colour"]]} for one in known]
    file.write_text(json.dumps(coco), encoding="utf-8")
    return file


def read_records(file: Path) -> list[dict[str, Any]]:
    """Return a record for each picture and class of a COCO file: its boxes, 0-1, or none, from left to right."""
    coco = json.loads(file.read_text(encoding="utf-8"))
    boxes: dict[tuple[int, int], list[list[float]]] = defaultdict(list)
    for one in coco["annotations"]:
        if not one.get("iscrowd"):
            boxes[one["image_id"], one["category_id"]].append(one["bbox"])
    records = []
    for image in coco["images"]:
        width, height = image["width"], image["height"]
        for category in coco["categories"]:
            objects = [
                {"x_min": x / width, "y_min": y / height, "x_max": (x + w) / width, "y_max": (y + h) / height}
                for x, y, w, h in sorted(boxes[image["id"], category["id"]])
            ]
            path = file.parent / image["file_name"]
            records.append({"image": path, "task": "detect", "prompt": category["name"], "objects": objects})
    return records


def evaluate(out: Path, name: str, held_out: Path, model: Sequence[str]) -> None:
    """Ask for every class in the held-out pictures, and score the boxes."""
    records = str(out / f"{name}.jsonl")
    classes = [one["name"] for one in json.loads(held_out.read_text(encoding="utf-8"))["categories"]]
    run_md3("detect", str(held_out), *classes, *model, "-o", records, "--overwrite", "--quiet")
    run_md3("eval", records, "--gt", str(held_out), "-o", str(out / name))


def main(args: argparse.Namespace) -> None:
    """Ask, train, ask again."""
    boxes, held_out = data_of(args, draw, SEEDS)
    evaluate(args.out, "before", held_out, model_options(args, None))
    trained = train(args, read_records(boxes), PARTS)
    evaluate(args.out, "after", held_out, model_options(args, trained))


if __name__ == "__main__":
    parser = options(__doc__, steps=120, rate=5e-4, rank=0)
    data_options(parser, "a COCO file", scenes=400)
    main(parser.parse_args())
