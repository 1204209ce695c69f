"""Measure what `md3 run --then` answers about regions, and what it saves.

    python examples/bench_regions.py --scenes 300 --out bench

Asks a model about each shape that it finds in held-out scenes of the little world (the colour of a kind, with 10 % of
room around it; the shape of a colour, with 50 %), compares with the truth, and with the same questions about the same
crops cut by hand. Then it times one picture of eight shapes against a loop of two commands (detect, then a query for
each crop). Greedy, without reasoning, on the CPU. Writes `regions.json` into `--out`.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_tiny import HELD_OUT_SEED
from PIL import Image
from tiny_scores import iou
from world import COLOURS, KINDS
from world_draw import Instance, Picture, make_picture

import md3cli
from md3cli.images.rects import padded_rect
from md3cli.model.weights.files import find_weight_files
from md3cli.model.weights.names import Format
from md3cli.model.weights.plan import read_config
from md3cli.model.weights.random_weights import CONFIGS, forbid_end, random_model
from md3cli.model.weights.write import write_checkpoint

CORNERS = ("x_min", "y_min", "x_max", "y_max")
Record = dict[str, Any]


class Question(NamedTuple):
    """What is asked about what is found: `names` are looked for, and the answer is the other half of a shape's name."""

    names: tuple[str, ...]
    then: str
    pad: float
    wanted: str


QUESTIONS = {
    "colour of a kind, pad 10 %": Question(tuple(KINDS), "query:What colour is the {label}?", 0.1, "colour"),
    "shape of a colour, pad 50 %": Question(tuple(COLOURS), "query:Which shape is {label}?", 0.5, "kind"),
}


def md3(*words: str) -> None:
    """Run a command of md3, whose failure ends the measurement."""
    subprocess.run([sys.executable, "-m", "md3cli", *words, "--quiet"], check=True)


def records_of(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ask(folder: Path, out: Path, model: str, question: Question) -> list[Record]:
    """Return the records about regions of all pictures of a folder, and what found them."""
    task = f"detect:{','.join(question.names)}"
    md3("run", str(folder), "--task", task, "--then", question.then, "--pad", str(question.pad), "--no-reasoning",
        "--model", model, "--no-cache", "-o", str(out))  # fmt: skip
    return records_of(out)


def with_truth(records: list[Record], pictures: dict[str, Picture], wanted: str) -> Iterator[tuple[Record, Instance]]:
    """Yield each record about a region that lies on a shape of its name (IoU of at least 0.5), with that shape."""
    named_by = "kind" if wanted == "colour" else "colour"
    for record in records:
        if "region" not in record:
            continue
        region, instances = record["region"], pictures[record["image"]].instances
        box = tuple(region[name] for name in CORNERS)
        named = [instance for instance in instances if getattr(instance, named_by) == region["label"]]
        best = max(named, key=lambda instance: iou(box, instance.box_xyxy), default=None)
        if best is not None and iou(box, best.box_xyxy) >= 0.5:
            yield record, best


def by_hand(records: list[Record], folder: Path, out: Path, model: str, pad: float) -> list[str]:
    """Return the answers to the same questions about the same crops, cut by Pillow into files of their own."""
    crops = out / f"crops_{pad}"
    crops.mkdir(parents=True)
    with open(crops / "asked.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "prompt", "reasoning"])
        for number, record in enumerate(records):
            rect = padded_rect(record["region"], record["width"], record["height"], pad)
            with Image.open(folder / record["image"]) as picture:
                picture.convert("RGB").crop(rect).save(crops / f"{number:06d}.png")
            table.writerow([f"{number:06d}.png", record["prompt"], "false"])
    answers = crops / "answers.jsonl"
    md3("query", str(crops / "asked.csv"), "--model", model, "--no-cache", "-o", str(answers))
    return [record["answer"] for record in records_of(answers)]


def accuracy(pictures: dict[str, Picture], folder: Path, out: Path, model: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, question in QUESTIONS.items():
        records = ask(folder, out / f"{question.wanted}.jsonl", model, question)
        regions = [record for record in records if "region" in record]
        pairs = list(with_truth(records, pictures, question.wanted))
        right = sum(record["answer"].strip() == getattr(truth, question.wanted) for record, truth in pairs)
        crops = by_hand(regions, folder, out, model, question.pad)
        equal = sum(record["answer"] == answer for record, answer in zip(regions, crops, strict=True))
        found[name] = {
            "regions": len(regions),
            "on a shape of that name": len(pairs),
            "right of those": round(right / len(pairs), 4),
            "equal to the crop by hand": f"{equal} of {len(regions)}",
        }
        print(name, found[name], flush=True)
    return found


def scene_of_eight(folder: Path) -> Path:
    """Write the first held-out scene with eight shapes, and return its path."""
    index = next(i for i in range(10_000) if len(make_picture(HELD_OUT_SEED, i).instances) == 8)
    path = folder / "eight.png"
    make_picture(HELD_OUT_SEED, index).image.save(path)
    return path


def seconds(out: Path, model: str, repeats: int) -> dict[str, Any]:
    """Time detect and a question per object in one command, as a loop (detect, then a query a crop), and as two."""
    folder = out / "time"
    folder.mkdir(parents=True)
    picture, (few, short) = scene_of_eight(folder), (("--max-objects", "8"), ("--max-tokens", "8"))
    labels, question = folder / "labels.toml", "What colour is the shape?"
    labels.write_text('[[label]]\nname = "shape"\nmax_objects = 8\n')
    shared = ("--no-reasoning", "--model", model, "--no-cache", *short)
    times: dict[str, list[float]] = {"together": [], "loop": [], "two commands": []}
    regions = list[Record]()
    for turn in range(repeats):
        path = folder / f"together_{turn}.jsonl"
        asked = ("--task", "detect:shape", "--labels", str(labels), "--then", f"query:{question}")
        with timed(times["together"]):
            md3("run", str(picture), *asked, *shared, "-o", str(path))
        regions = [record for record in records_of(path) if "region" in record]
        with timed(found := list[float]()):
            boxes = folder / f"boxes_{turn}.jsonl"
            md3("detect", str(picture), "shape", "--model", model, "--no-cache", *short, *few, "-o", str(boxes))
        crops = folder / f"crops_{turn}"
        crops.mkdir()
        for number, record in enumerate(regions):
            rect = padded_rect(record["region"], record["width"], record["height"], 0.1)
            with Image.open(picture) as opened:
                opened.convert("RGB").crop(rect).save(crops / f"{number}.png")
        with timed(each := list[float]()):
            for crop in sorted(crops.glob("*.png")):
                md3("query", str(crop), "-q", question, *shared, "-o", str(crop.with_suffix(".jsonl")))
        with timed(all_at_once := list[float]()):
            md3("query", str(crops), "-q", question, *shared, "-o", str(folder / f"answers_{turn}.jsonl"))
        times["loop"].append(found[0] + each[0])
        times["two commands"].append(found[0] + all_at_once[0])
    medians = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    ratios = {f"of {name}": round(medians["together"] / medians[name], 3) for name in ("loop", "two commands")}
    return {"objects": len(regions), "seconds": {n: [round(v, 2) for v in t] for n, t in times.items()}, **ratios}


@contextmanager
def timed(times: list[float]) -> Iterator[None]:
    """Append how many seconds the block took."""
    start = time.perf_counter()
    yield
    times.append(time.perf_counter() - start)


def random_mid(folder: Path) -> Path:
    """Write a checkpoint of random weights: the real vision tower, 6 text layers, `tiny`'s tokenizer; no text ends."""
    tiny = md3cli.model_path("tiny")
    config = replace(CONFIGS["mid"], tokenizer=read_config(find_weight_files(tiny)).tokenizer)
    model = random_model(config, dtype=torch.bfloat16, device=torch.device("cpu"))
    forbid_end(model)
    write_checkpoint(model.state_dict(), config, folder, Format.ORIGINAL)
    shutil.copy(tiny / "tokenizer.json", folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a model, or mid: random weights of its size")
    parser.add_argument("--scenes", type=int, default=300, help="0 times only")
    parser.add_argument("--repeats", type=int, default=3, help="of the timing; 0 leaves it out")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    out, folder = arguments.out, arguments.out / "scenes"
    folder.mkdir(parents=True)
    model = str(random_mid(out / "mid")) if arguments.model == "mid" else arguments.model
    results: dict[str, Any] = {}
    if arguments.scenes:
        pictures = {f"{index:04d}.png": make_picture(HELD_OUT_SEED, index) for index in range(arguments.scenes)}
        for name, picture in pictures.items():
            picture.image.save(folder / name)
        results |= accuracy(pictures, folder, out, model)
    if arguments.repeats:
        results["one picture"] = seconds(out, model, arguments.repeats)
        print(results["one picture"])
    (out / "regions.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
