"""Measure what bitsandbytes' 4 and 8 bits take and lose: bytes, and the answers of `tiny` on held-out scenes.

    python examples/bench_bitsandbytes.py --scenes 60            # tiny: bytes, scores, points lost
    python examples/bench_bitsandbytes.py --real                 # a random model of the real widths: bytes alone

Bytes are those of parameters, buffers and scales, over those of the same model in bfloat16. Needs the extras
md3cli[bnb,eval].
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from bench_tiny import HELD_OUT_SEED, Scores, requests_of
from tiny_scores import average_precision
from world_draw import Picture, make_picture

from md3cli import model_path
from md3cli.model.hf import Moondream3Config, Moondream3ForConditionalGeneration
from md3cli.model.hf.bnb import resident_bytes
from md3cli.model.network.config import ModelConfig, MoeConfig, TextConfig
from md3cli.model.weights.random_weights import random_model

VARIANTS: Mapping[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
JUDGED = ("AP50", "AP", "point", "count", "question", "caption", "absent")
# The real widths, vocabulary and vision tower on three of 24 layers: 3 GB in bfloat16.
REAL_WIDTHS = replace(ModelConfig(), text=TextConfig(n_layers=3, moe=MoeConfig(start_layer=1)))


def scores_of(model: Moondream3ForConditionalGeneration, seed: int, num_scenes: int) -> dict[str, float]:
    """Ask everything of every scene through the class's own methods; return the shares that are right."""
    face, pictures = model.moondream(), dict[int, Picture]()

    def requests() -> Iterator[dict[str, Any]]:
        for scene in range(num_scenes):
            pictures[scene] = make_picture(seed, scene)
            yield from requests_of(scene, pictures[scene], face.encode_image(pictures[scene].image))

    scores = Scores(pictures)
    for record in face.annotate(requests()):
        scores.add(record)
    return scores.means() | average_precision(pictures, scores.detections)


def bench_tiny(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each variant of `tiny`."""
    path, dtype = model_path("tiny"), getattr(torch, args.dtype)
    full_bytes = resident_bytes(Moondream3ForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16))
    full: dict[str, float] = {}
    for name, settings in {"plain": None, **VARIANTS}.items():
        if name not in args.only:
            continue
        packing = settings and {"quant_method": "bitsandbytes", **settings, "llm_int8_skip_modules": args.skip}
        small = Moondream3ForConditionalGeneration.from_pretrained(
            path, dtype=torch.bfloat16, quantization_config=packing
        )
        model = Moondream3ForConditionalGeneration.from_pretrained(path, dtype=dtype, quantization_config=packing)
        found = scores_of(model, args.seed, args.scenes)
        full = full or found
        lost = {f"{key} lost": round(100 * (full[key] - found[key]), 1) for key in JUDGED}
        share = round(resident_bytes(small) / full_bytes, 4)
        yield {"variant": name, "bytes": share, **{key: round(found[key], 4) for key in JUDGED}, **lost}


def bench_real() -> Iterator[dict[str, Any]]:
    """Yield the bytes of each variant of a random model of the real widths."""
    network = random_model(REAL_WIDTHS, dtype=torch.bfloat16, device=torch.device("cpu"))
    full_bytes, config = resident_bytes(network), Moondream3Config.from_network(REAL_WIDTHS)
    for name, settings in VARIANTS.items():
        model = Moondream3ForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict={f"model.{key}": value for key, value in network.state_dict().items()},
            dtype=torch.bfloat16,
            quantization_config={"quant_method": "bitsandbytes", **settings},
        )
        yield {"variant": name, "bytes": round(resident_bytes(model) / full_bytes, 4), "full": full_bytes}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--dtype", default="float32", help="of what stays plain, default float32; bfloat16")
    parser.add_argument("--only", nargs="*", default=["plain", *VARIANTS], help="of the variants")
    parser.add_argument("--skip", nargs="*", help="modules that stay plain")
    args = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for row in bench_real() if args.real else bench_tiny(args):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
