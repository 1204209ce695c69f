"""Measure a checkpoint on held-out scenes of the little world and print the table of the model card.

    python examples/bench_tiny.py tiny --scenes 500 --out bench

MODEL is anything `md3 --model` takes. Greedy, float32, on the CPU unless `--device` says otherwise.
Writes `results.json` and `reliability.png` into `--out`. Needs pycocotools and matplotlib.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tiny_scores import (
    Detection,
    average_precision,
    boxes_of,
    caption_right,
    draw_reliability,
    grounded_points,
    is_true_positive,
    mean_iou,
    points_right,
    record_points,
    segment_iou,
)
from torch import Tensor, nn
from world import COLOURS, KINDS
from world_draw import Picture, make_picture
from world_text import all_questions, count_question, matching, names_of, random_name

from md3cli import Moondream
from md3cli.model.engine import load
from md3cli.model.network.layers import MoeMlp

HELD_OUT_SEED = 1000
FIRST_HELD_OUT_SEED = 2  # seed 1 is the training collection
ROWS = (  # name, what it is, asked, aim
    ("AP50", "detect, AP@0.5, every kind asked of every scene", 0.85, 0.95),
    ("AP", "detect, mean AP", 0.60, 0.80),
    ("point", "point, right number, each inside a different right object", 0.85, 0.95),
    ("count", "count questions", 0.90, 0.98),
    ("question", "all questions", 0.90, 0.97),
    ("reasoning", "reasoning, answer right and every grounded point inside its object", 0.80, 0.95),
    ("caption", "caption short, exact object set", 0.80, 0.95),
    ("segment", "segment, single referents, mean IoU with the visible pixels", 0.70, 0.85),
    ("absent", "absent object, nothing returned", 0.90, 0.98),
)


class ExpertLoad:
    """Counts which experts the routers choose."""

    def __init__(self, model: nn.Module) -> None:
        self._counts: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, MoeMlp):
                counts = torch.zeros(module.config.num_experts)
                self._counts.append(counts)
                module.router.register_forward_hook(self._watch(counts, module.config.experts_per_token))

    def _watch(self, counts: Tensor, choices: int) -> Any:
        def hook(module: nn.Module, inputs: object, logits: Tensor) -> None:
            chosen = logits.flatten(0, -2).topk(choices, dim=-1).indices.flatten()
            counts.add_(chosen.bincount(minlength=len(counts)).cpu())

        return hook

    def shares(self) -> list[list[float]]:
        """Share of the choices that went to each expert, by layer."""
        return [[round(v, 4) for v in (counts / counts.sum().clamp_min(1)).tolist()] for counts in self._counts]


def requests_of(scene: int, picture: Picture, image: Any) -> Iterator[dict[str, Any]]:
    """Everything asked of one scene; `meta` says what the answer is scored as."""
    rng = np.random.default_rng([HELD_OUT_SEED, scene, 2])

    def ask(skill: str, task: str, prompt: str | None = None, **more: Any) -> dict[str, Any]:
        meta = {"skill": skill, "scene": scene, **more.pop("meta", {})}
        return {"image": image, "task": task, "prompt": prompt, "meta": meta, **more}

    for kind in KINDS:
        yield ask("detect", "detect", kind)
    absent = f"{rng.choice(tuple(COLOURS))} {rng.choice(KINDS)}"
    if not matching(absent, picture.instances):
        yield ask("absent", "detect", absent)
    for _ in range(3):
        yield ask("point", "point", random_name(rng, picture, present=0.8))
    yield ask("caption", "caption", length="short")
    questions = [count_question(rng, picture), *all_questions(rng, picture)]
    for question in questions:
        refs = [reference for reference in (question.point, question.box_xyxy) if reference]
        yield ask(
            "question", "query", question.text, reasoning=False, spatial_refs=refs,
            meta={"kind": question.kind, "answer": question.answer},
        )  # fmt: skip
    counted = count_question(rng, picture)
    numbers = [instance.number for instance in counted.counted or ()]
    yield ask(
        "reasoning", "query", counted.text, reasoning=True,
        meta={"answer": counted.answer, "counted": numbers},
    )  # fmt: skip
    single = [
        (name, instance.number)
        for instance in picture.instances
        for name in names_of(instance)
        if len(matching(name, picture.instances)) == 1
    ]
    if single:
        name, number = single[int(rng.integers(len(single)))]
        yield ask("segment", "segment", name, meta={"number": number})


class Scores:
    """Takes records one by one; a failed record counts as wrong."""

    def __init__(self, pictures: Mapping[int, Picture]) -> None:
        self._pictures = pictures
        self._values: dict[str, list[float]] = defaultdict(list)
        self.detections: list[Detection] = []
        self.right: list[bool] = []

    def add(self, record: Mapping[str, Any]) -> None:
        """Judge one record by its `meta`."""
        meta = record["meta"]
        picture = self._pictures[meta["scene"]]
        if record["error"] is not None:
            raise SystemExit(f"a request failed: {record['error']}")
        judge = getattr(self, f"_add_{meta['skill']}")
        judge(record, meta, picture)

    def means(self) -> dict[str, float]:
        """Every score that was measured, by name."""
        return {name: float(np.mean(values)) for name, values in sorted(self._values.items())}

    def _add_detect(self, record: Mapping[str, Any], meta: Mapping[str, Any], picture: Picture) -> None:
        kind, found = record["prompt"], boxes_of(record)
        width, height = picture.scene.width, picture.scene.height
        for (left, top, right, bottom), score in found:
            pixels = (left * width, top * height, right * width, bottom * height)
            self.detections.append(Detection(meta["scene"], KINDS.index(kind) + 1, pixels, score))
        self.right += is_true_positive(found, kind, picture)
        if matching(kind, picture.instances):
            self._values["detect mean IoU"] += mean_iou(found, kind, picture)
        else:
            self._values["absent"].append(not found)

    def _add_absent(self, record: Mapping[str, Any], meta: Mapping[str, Any], picture: Picture) -> None:
        self._values["absent"].append(not record["objects"])

    def _add_point(self, record: Mapping[str, Any], meta: Mapping[str, Any], picture: Picture) -> None:
        wanted = matching(record["prompt"], picture.instances)
        self._values["point"].append(points_right(record_points(record), wanted, picture))

    def _add_caption(self, record: Mapping[str, Any], meta: Mapping[str, Any], picture: Picture) -> None:
        self._values["caption"].append(caption_right(record["caption"], picture))

    def _add_question(self, record: Mapping[str, Any], meta: Mapping[str, Any], picture: Picture) -> None:
        is_right = record["answer"].strip() == meta["answer"]
        self._values["question"].append(is_right)
        self._values["count" if meta["kind"] == "count" else f"question: {meta['kind']}"].append(is_right)

    def _add_reasoning(self, record: Mapping[str, Any], meta: Mapping[str, Any], picture: Picture) -> None:
        wanted = [instance for instance in picture.instances if instance.number in meta["counted"]]
        is_grounded = points_right(grounded_points(record), wanted, picture)
        self._values["reasoning"].append(record["answer"].strip() == meta["answer"] and is_grounded)
        self._values["reasoning answer"].append(record["answer"].strip() == meta["answer"])

    def _add_segment(self, record: Mapping[str, Any], meta: Mapping[str, Any], picture: Picture) -> None:
        instance = next(i for i in picture.instances if i.number == meta["number"])
        self._values["segment"].append(segment_iou(record, picture.visible_mask(instance)))


def measure(model: Moondream, seed: int, num_scenes: int, out: Path) -> dict[str, Any]:
    """Ask everything of every scene; returns what goes to results.json."""
    load = ExpertLoad(model.engine.model)
    pictures: dict[int, Picture] = {}

    def requests() -> Iterator[dict[str, Any]]:
        for scene in range(num_scenes):
            pictures[scene] = make_picture(seed, scene)
            yield from requests_of(scene, pictures[scene], model.encode_image(pictures[scene].image))

    scores, num_requests, start = Scores(pictures), 0, time.perf_counter()
    for record in model.annotate(requests()):
        scores.add(record)
        num_requests += 1
    elapsed_s = time.perf_counter() - start
    constant = [Detection(d.image_id, d.category_id, d.box_xyxy, 0.5) for d in scores.detections]
    flat = average_precision(pictures, constant)
    error = draw_reliability([d.score for d in scores.detections], scores.right, str(out / "reliability.png"))
    return {
        **scores.means(),
        **average_precision(pictures, scores.detections),
        **{f"{name} with constant scores": value for name, value in flat.items()},
        "calibration error": error,
        "expert shares": load.shares(),
        "scenes": num_scenes,
        "seed": seed,
        "requests": num_requests,
        "seconds": round(elapsed_s, 1),
    }


def table(results: Mapping[str, Any]) -> str:
    """The card's table, in Markdown."""
    lines = ["| skill | at least | aim | measured |", "|---|---|---|---|"]
    lines += [f"| {text} | {asked:.2f} | {aim:.2f} | {results[name]:.3f} |" for name, text, asked, aim in ROWS]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", help="auto runs low bits on their own kernels, fp32 on plain ones")
    parser.add_argument("--quant", default="stored")
    parser.add_argument("--quant-vision", default="none", help="needs --dtype auto; a CPU computes fp8 as a GPU does")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.seed < FIRST_HELD_OUT_SEED:
        raise SystemExit("seed 1 is the training collection; choose another")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu" and args.quant_vision == "fp8":
        # The option refuses a CPU, which computes the same values slowly.
        patch.object(load, "float8_fault", return_value=None).start()
    model = Moondream.load(
        args.model, device=args.device, dtype=args.dtype, quant=args.quant, quant_vision=args.quant_vision
    )
    results = measure(model, args.seed, args.scenes, args.out)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    extra = {name: value for name, value in results.items() if name not in {row[0] for row in ROWS}}
    print(json.dumps(extra, indent=1))


if __name__ == "__main__":
    main()
