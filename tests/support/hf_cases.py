"""The reference cases as the transformers classes see them, and pictures for the embedded model."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import CASES, load_case
from PIL import Image

from md3cli.records import Request, Task

pytest.importorskip("peft", reason="needs the extra md3cli[hf]")
pytest.importorskip("accelerate", reason="needs the extra md3cli[hf]")

from md3cli.model.hf import Moondream3ForConditionalGeneration, Moondream3Processor

WORDS = ("caption: short", "caption: long", "query: How many shapes are there?", "reason: How many shapes are there?",
         "detect: circle", "detect: shape", "point: shape")  # fmt: skip


@cache
def load_hf(name: str) -> tuple[Moondream3ForConditionalGeneration, Moondream3Processor]:
    """Model in float32 and processor of a case; kept for the session, so leave them as they are."""
    folder = CASES[name][0]
    model = Moondream3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, Moondream3ForConditionalGeneration)
    return model.eval(), Moondream3Processor.from_pretrained(folder)


def words_of(request: Request) -> str:
    """A request in the words of the chat template."""
    if request.task is Task.CAPTION:
        return f"caption: {request.length}"
    mode = "reason" if request.task is Task.QUERY and request.reasoning else str(request.task)
    return f"{mode}: {request.prompt}"


def picture(name: str, index: int | None) -> Image.Image | None:
    """A case's picture as it is on disk."""
    return None if index is None else Image.open(CASES[name][1] / load_case(name).image_facts[index]["file"])


def inputs_for(name: str, keys: list[int], side: str = "left") -> Any:
    """The processor's batch for some requests of a case."""
    case, (_, processor) = load_case(name), load_hf(name)
    return processor(
        text=[words_of(case.requests[key]) for key in keys],
        images=[picture(name, case.image_indices[key]) for key in keys],
        spatial_refs=[case.requests[key].spatial_refs for key in keys],
        padding_side=side,
    )


def scenes() -> list[Image.Image]:
    """Pictures of several tilings: coloured discs and squares on grey."""
    rng = np.random.default_rng(8)
    images = []
    for width, height in ((84, 84), (200, 150), (330, 210), (120, 400)):
        pixels = np.full((height, width, 3), 150, dtype=np.uint8)
        for colour in rng.integers(0, 256, (3, 3)):
            x, y, side = rng.integers(0, width - 30), rng.integers(0, height - 30), rng.integers(20, 30)
            pixels[y : y + side, x : x + side] = colour
        images.append(Image.fromarray(pixels))
    return images


def request_of(words: str, image: Image.Image) -> dict[str, Any]:
    mode, _, rest = words.partition(": ")
    if mode == "caption":
        return {"image": image, "task": "caption", "length": rest}
    task = "query" if mode in ("query", "reason") else mode
    return {"image": image, "task": task, "prompt": rest, "reasoning": mode == "reason"}
