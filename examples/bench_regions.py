"""Measure what `md3 run --then` answers about regions, and what it saves.

    python examples/bench_regions.py --scenes 300 --out bench

Asks a model about each shape that it finds in held-out scenes of the little world (the colour of a kind, with 10 % of
room around it; the shape of a colour, with 50 %), compares with the truth, and with the same questions about the same
crops cut by hand. Then it times one picture of eight shapes against a loop of two commands. Greedy, without reasoning,
on the CPU. Writes `regions.json` into `--out`.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench_tiny import HELD_OUT_SEED
from PIL import Image
from tiny_scores import iou
from world import COLOURS, KINDS
from world_draw import Instance, Picture, make_picture

from md3cli.images.rects import padded_rect

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
    """Time detect and a question per object in one command, and as a loop of two commands, in turn."""
    folder = out / "time"
    folder.mkdir(parents=True)
    picture, question = scene_of_eight(folder), "What colour is the shape?"
    together, loop, num_regions = list[float](), list[float](), 0
    for turn in range(repeats):
        start = time.perf_counter()
        records = ask(
            picture, folder / f"together_{turn}.jsonl", model, Question(("shape",), f"query:{question}", 0.1, "")
        )
        together.append(time.perf_counter() - start)
        regions = [record for record in records if "region" in record]
        num_regions = len(regions)
        start = time.perf_counter()
        boxes = folder / f"boxes_{turn}.jsonl"
        md3("detect", str(picture), "shape", "--model", model, "--no-cache", "-o", str(boxes))
        by_hand(regions, folder, folder / f"turn_{turn}", model, 0.1)
        loop.append(time.perf_counter() - start)
    ratios = sorted(one / two for one, two in zip(together, loop, strict=True))
    return {
        "objects": num_regions,
        "together_s": [round(value, 2) for value in together],
        "loop_s": [round(value, 2) for value in loop],
        "ratio (median)": round(ratios[len(ratios) // 2], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--scenes", type=int, default=300, help="0 times only")
    parser.add_argument("--repeats", type=int, default=3, help="of the timing; 0 leaves it out")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    out, folder = arguments.out, arguments.out / "scenes"
    folder.mkdir(parents=True)
    results: dict[str, Any] = {}
    if arguments.scenes:
        pictures = {f"{index:04d}.png": make_picture(HELD_OUT_SEED, index) for index in range(arguments.scenes)}
        for name, picture in pictures.items():
            picture.image.save(folder / name)
        results |= accuracy(pictures, folder, out, arguments.model)
    if arguments.repeats:
        results["one picture"] = seconds(out, arguments.model, arguments.repeats)
        print(results["one picture"])
    (out / "regions.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
