"""The reference cases of tests/golden: models, pictures, requests and what must come of them."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from md3cli.images import crops as images
from md3cli.images.crops import CropConfig, ImageLimits, PreparedImage, prepare_image
from md3cli.model.engine.encoder import ImageEncoder
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.prompts import Prompts, Tokenizer
from md3cli.model.network.moondream import Moondream3
from md3cli.model.weights.read import load_model
from md3cli.records import Answer, ImageItem, Job, Request, RunIdentity, Task

GOLDEN = Path(__file__).parents[1] / "golden"
# name -> (checkpoint folder, pictures' folder, expected file)
CASES = {
    "a": (GOLDEN / "case-a/checkpoint", GOLDEN / "case-a/images", GOLDEN / "case-a/expected.json"),
    "b": (GOLDEN / "case-b/checkpoint", GOLDEN / "case-b/images", GOLDEN / "case-b/expected.json"),
    "c": (GOLDEN / "case-c/checkpoint", GOLDEN / "case-c/images", GOLDEN / "case-c/expected.json"),
    **{
        name: (
            GOLDEN / f"case-c-formats/{name}",
            GOLDEN / "case-c-formats/images",
            GOLDEN / f"case-c-formats/expected-{name}.json",
        )
        for name in ("raw-fp8", "hf-port", "int4")
    },
}
LEAST_MARGIN, LEAST_MOE_MARGIN = 1e-3, 1e-5  # closer decisions may fall either way in float32


@dataclass(frozen=True)
class GoldenCase:
    """One case: the model in float32, its pictures, and (request, expected) pairs."""

    model: Moondream3
    tokenizer: Tokenizer
    prompts: Prompts
    image_facts: list[dict[str, Any]]
    images: list[PreparedImage]
    requests: list[Request]
    image_indices: list[int | None]
    expected: list[dict[str, Any]]

    def engine(self, batch_size: int, model: Moondream3 | None = None, **options: int) -> Engine:
        """An engine over the case's model; `options` are the Engine's."""
        model = model or self.model
        settings = {"max_context": model.config.text.max_context, **options}
        return Engine(
            model,
            self.tokenizer,
            self.prompts,
            ImageEncoder(model),
            identity=RunIdentity("golden"),
            batch_size=batch_size,
            **settings,  # type: ignore[arg-type]  # delay, is_planned
        )

    def job(self, key: int) -> Job:
        index = self.image_indices[key]
        return Job(key, None if index is None else self.images[index], self.requests[key])

    def is_certain(self, key: int) -> bool:
        """False where a decision is too close to call, or the first choice is one that may be skipped."""
        result = self.expected[key]
        trace = result["trace"]
        clear = all(t["margin"] >= LEAST_MARGIN and t["moe_margin"] >= LEAST_MOE_MARGIN for t in trace)
        first = result.get("first_choice")
        return clear and (first is None or len(set(first.values())) == 1)


def read_request(raw: dict[str, Any]) -> Request:
    """A request of expected.json."""
    return Request(
        Task(raw["skill"]),
        raw.get("question") or raw.get("object"),
        length=raw.get("length", "normal"),
        reasoning=raw.get("reasoning", True),
        spatial_refs=tuple(tuple(ref) for ref in raw.get("spatial_refs") or ()),
        max_tokens=raw.get("max_tokens", 768),
        max_objects=raw.get("max_objects", 150),
    )


def resized_as_recorded() -> AbstractContextManager[object]:
    """Within it, pictures are resized as the cases were made, with Pillow 13: some of them height first.

    The original resizes width first, and so does the package; a case's answers belong to its own crops.
    """
    return patch.object(images, "_resize", _smaller_between_first)


def _smaller_between_first(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Resize to the bytes that one call of Pillow 13 gives for the cases' pictures, on every version of Pillow."""
    is_height_first = image.height > max(image.width, height) and image.width * height < width * image.height
    between = (image.width, height) if is_height_first else (width, image.height)
    for size in (between, (width, height)):
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image)


def prepare_as_recorded(path: Path, crop_config: CropConfig) -> PreparedImage:
    """Prepare a case's picture."""
    with resized_as_recorded():
        return prepare_image(ImageItem(path.name, str(path)), crop_config, ImageLimits(), None)


@cache
def load_case(name: str, dtype: torch.dtype = torch.float32) -> GoldenCase:
    """Read a case; kept for the session."""
    folder, image_folder, expected_file = CASES[name]
    model = load_model(folder, dtype=dtype)
    tokenizer = Tokenizer.load(folder / "tokenizer.json", model.config)
    expected = json.loads(expected_file.read_text())
    crop_config = model.config.vision.crop_config
    prepared = [prepare_as_recorded(image_folder / facts["file"], crop_config) for facts in expected["images"]]
    return GoldenCase(
        model=model,
        tokenizer=tokenizer,
        prompts=Prompts(model.config, tokenizer),
        image_facts=expected["images"],
        images=prepared,
        requests=[read_request(entry["request"]) for entry in expected["requests"]],
        image_indices=[entry["request"]["image"] for entry in expected["requests"]],
        expected=[entry["result"] | {"prompt": entry["prompt"]} for entry in expected["requests"]],
    )


def assert_answer(answer: Answer, expected: dict[str, Any]) -> None:
    """An engine's answer says what the case expects, coordinates to 1e-6."""
    assert answer.failure is None, answer.failure
    assert answer.result is not None
    result = answer.result
    assert answer.finish_reason == expected["finish"]
    reasoning = expected.get("reasoning") or None
    num_reasoned = len(reasoning["token_ids"]) if reasoning else 0
    assert answer.output_tokens == len(expected["token_ids"]) + num_reasoned
    for key in ("caption", "answer"):
        if key in expected:
            assert result[key] == expected[key]
    if reasoning:
        assert result["reasoning"]["text"] == reasoning["text"]
        assert result["reasoning"]["grounding"] == reasoning["grounding"]
        assert result["reasoning"]["finish_reason"] == reasoning["finish"]
    for key in ("objects", "points"):
        if key in expected:
            assert_values(result[key], expected[key])
    if "segments" in result:
        assert bool(result["segments"]) == ("bbox" in expected)
        for segment in result["segments"]:
            assert segment["svg_path"] == (expected.get("svg_path") or "")
            assert segment.get("parse_error") == expected.get("parse_error")
            assert_values([segment["bbox"]], [expected["bbox"]])


def assert_values(found: list[dict[str, Any]], expected: list[dict[str, float]]) -> None:
    """The same number of items, every expected number within 1e-6."""
    assert len(found) == len(expected)
    for item, wanted in zip(found, expected, strict=True):
        assert all(abs(item[name] - value) <= 1e-6 for name, value in wanted.items()), (item, wanted)
