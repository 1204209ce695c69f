"""What a model answers in every way transformers and the original ask it, to compare placements by.

As a script it compares the embedded model's layers on disk, on the CPU and on two pretended devices with one process,
and prints a line of JSON for each of `PLACEMENTS` and `PRETENDED`, or for those that are named:

    python tests/support/placed_answers.py [NAME …]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import safetensors
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from md3cli.model.hf import Moondream3ForConditionalGeneration, Moondream3Processor

TINY = Path(__file__).parents[2] / "md3cli" / "model" / "tiny"
WORDS = ("caption: short", "query: What is this?", "detect: circle", "point: square")
SPREAD = {"model.vision": "a", "model.text.wte": "b", "model.text.post_ln": "a", "model.text.lm_head": "b"} | {
    "model.region": "a",
    **{f"model.text.blocks.{number}": "a" if number % 2 else "b" for number in range(5)},
}


def spread(first: str, second: str) -> dict[str, str]:
    """A device map of the embedded model that crosses from one device to the other at every second block."""
    return {name: first if place == "a" else second for name, place in SPREAD.items()}


PLACEMENTS: dict[str, dict[str, Any]] = {
    "all on disk": {"device_map": {"": "disk"}},
    "text on disk": {"device_map": {"model.vision": "cpu", "model.text": "disk", "model.region": "cpu"}},
    "every second block on disk": {"device_map": spread("cpu", "disk")},
    "auto, 6 MB in memory": {"device_map": "auto", "max_memory": {"cpu": "6MB"}},
    "sequential, 6 MB in memory": {"device_map": "sequential", "max_memory": {"cpu": "6MB"}},
}
_TWO = spread("pretended:0", "pretended:1")
_OFFLOADED = {"model.text.blocks.0": "disk", "model.text.blocks.3": "cpu", "model.vision": "disk"}
PRETENDED: dict[str, dict[str, Any]] = {
    "two devices": {"device_map": _TWO},
    "two devices, cpu and disk": {"device_map": _TWO | _OFFLOADED},
}


def drawn() -> Image.Image:
    """A picture of the kind that the embedded model knows: a red circle and a blue square."""
    picture = Image.new("RGB", (168, 120), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((12, 30, 62, 80), fill="red")
    draw.rectangle((100, 50, 150, 100), fill="blue")
    return picture


def load(folder: Path = TINY, **arguments: Any) -> Moondream3ForConditionalGeneration:
    """Load a model in float32 as transformers does."""
    model = Moondream3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **arguments)
    assert isinstance(model, Moondream3ForConditionalGeneration)
    return model.eval()


@torch.no_grad()
def ask(model: Moondream3ForConditionalGeneration, folder: Path = TINY) -> dict[str, Any]:
    """Logits of a batch, the tokens of `generate`, greedy and sampled, and what methods and `annotate` answer."""
    processor, picture = Moondream3Processor.from_pretrained(folder), drawn()
    batch = processor(text=list(WORDS), images=[picture] * len(WORDS))
    logits = model(**batch).logits
    bounds = {"max_new_tokens": 8, "max_objects": 2}
    tokens = [model.generate(**processor(text=[word], images=[picture]), **bounds) for word in WORDS]
    torch.manual_seed(3)
    inputs = processor(text=[WORDS[0]], images=[picture])
    sampled = model.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=1.5)
    hot = {"max_tokens": 8, "temperature": 1.0}
    skills = [
        model.caption(picture, length="short", settings={"max_tokens": 8}),
        model.query(picture, "what is this?", reasoning=False, settings=hot),
        model.query(question="what is red?", reasoning=True, settings={"max_tokens": 4}),
        model.detect(picture, "circle", settings={"max_objects": 2}),
        model.point(picture, "square", settings={"max_objects": 2}),
    ]
    find = {"image": picture, "task": "detect", "prompt": "circle", "max_objects": 2, "then": "query:What is this?"}
    tell = {"image": picture, "task": "caption", "length": "short"}
    skills += model.moondream().annotate([{**asked, "max_tokens": 8} for asked in (tell, find, {"task": "odd"}, tell)])
    tokens = [*tokens, sampled]
    # Scores are rounded, and on an edge a difference of 1e-5 shows.
    answers = json.loads(json.dumps(skills), object_hook=lambda of: {key: of[key] for key in of if key != "score"})
    return {"logits": logits.to("cpu"), "tokens": [found.to("cpu") for found in tokens], "answers": answers}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Say how far logits are apart, and whether every decision, every token and every answer is the same."""
    logits: tuple[Tensor, Tensor] = (found["logits"], expected["logits"])
    same = [torch.equal(*pair) for pair in zip(found["tokens"], expected["tokens"], strict=True)]
    return {
        "largest_difference": float((logits[0] - logits[1]).abs().max()),
        "decisions_equal": torch.equal(logits[0].argmax(-1), logits[1].argmax(-1)),
        "tokens_equal": all(same),
        "answers_equal": found["answers"] == expected["answers"],
    }


def ask_pretended(placement: dict[str, Any]) -> dict[str, Any]:
    """Return what `ask` does of the embedded model on devices that are not there; `register` comes first."""
    from pretended_devices import Pretended

    def read_to_cpu(file: str, framework: str, device: object) -> Any:
        return safetensors.safe_open(file, framework=framework)

    with (
        TemporaryDirectory() as folder,
        Pretended(),
        torch.no_grad(),
        patch("accelerate.utils.offload.safe_open", read_to_cpu),
    ):
        return ask(load(**placement, offload_folder=folder))


def main() -> None:
    """Print how placements compare."""
    from pretended_devices import register

    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=[*PLACEMENTS, *PRETENDED], metavar="NAME")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    expected = ask(load())
    for name in (name for name in PLACEMENTS if name in names):
        with TemporaryDirectory() as folder:
            found = ask(load(**PLACEMENTS[name], offload_folder=folder))
        print(json.dumps({"placement": name, **compare(found, expected)}), flush=True)
    register()  # there is no way back
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a mode of torch's is one thread's
    for name in (name for name in PRETENDED if name in names):
        print(json.dumps({"placement": name, **compare(ask_pretended(PRETENDED[name]), expected)}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
