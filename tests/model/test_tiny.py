"""The embedded model: its files, its architecture, and that it sees; every fast path gives its plain answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from md3cli import Moondream, model_path
from md3cli.config import ModelOptions
from md3cli.model.engine.load import load_engine
from md3cli.model.weights.names import Format
from md3cli.model.weights.write import convert_checkpoint

SCENES = Path(__file__).parents[2] / "examples" / "scenes"
PHOTO = Path(__file__).parents[2] / "examples" / "images" / "china.jpg"
KINDS = ("circle", "square", "triangle", "star", "cross", "heart", "moon", "diamond")
SIZE_LIMIT_BYTES = 16 * 10**6
SAME_WITHIN = 0.004  # a size bin is 0.7 % of the size, a coordinate bin 0.001


def load(model: str = "tiny", batch_size: int | None = None) -> Moondream:
    options = ModelOptions(model=model, device="cpu", dtype="fp32", batch_size=batch_size, cache=False)
    return Moondream(load_engine(options))


@pytest.fixture(scope="module")
def tiny() -> Moondream:
    return load()


@pytest.fixture(scope="module")
def truth() -> dict[str, list[dict[str, Any]]]:
    """Annotations of each scene by file name; `name` added, `box` 0-1."""
    coco = json.loads((SCENES / "instances.json").read_text())
    kinds = {category["id"]: category["name"] for category in coco["categories"]}
    images = {image["id"]: image for image in coco["images"]}
    by_file: dict[str, list[dict[str, Any]]] = {image["file_name"]: [] for image in images.values()}
    for annotation in coco["annotations"]:
        image = images[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        scale = (image["width"], image["height"]) * 2
        box = [v / side for v, side in zip((x, y, x + width, y + height), scale, strict=True)]
        kind = kinds[annotation["category_id"]]
        by_file[image["file_name"]].append({**annotation, "kind": kind, "box": box})
    return by_file


def every_request(files: list[str]) -> Iterator[dict[str, Any]]:
    """A request of every task for each scene, and one without an image."""
    for file in files:
        with Image.open(SCENES / file) as image:
            picture = image.convert("RGB")
        asked: tuple[Mapping[str, Any], ...] = (
            {"task": "detect", "prompt": "shape"},
            {"task": "point", "prompt": "circle"},
            {"task": "caption", "length": "short"},
            {"task": "query", "prompt": "How many shapes are there?", "reasoning": True},
            {"task": "query", "prompt": "What is at this point?", "reasoning": False, "spatial_refs": [(0.5, 0.5)]},
            {"task": "segment", "prompt": "star"},
        )
        for request in asked:
            yield {"image": picture, **request}
    yield {"image": None, "task": "query", "prompt": "How many sides does a triangle have?", "reasoning": False}


def answer_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says about its picture."""
    return {key: value for key, value in record.items() if key not in {"id", "meta", "model"}}


def assert_same(first: Any, second: Any) -> None:
    """Equal but for numbers a bin apart: two neighbouring bins can be level to the last bit of a float32 sum."""
    if isinstance(first, Mapping):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    elif isinstance(first, float):
        assert first == pytest.approx(second, abs=SAME_WITHIN)
    else:
        assert first == second


def overlap(box: Mapping[str, float], other: list[float]) -> float:
    width = min(box["x_max"], other[2]) - max(box["x_min"], other[0])
    height = min(box["y_max"], other[3]) - max(box["y_min"], other[1])
    shared = max(0.0, width) * max(0.0, height)
    area = (box["x_max"] - box["x_min"]) * (box["y_max"] - box["y_min"])
    return shared / (area + (other[2] - other[0]) * (other[3] - other[1]) - shared)


def test_the_files_are_small_and_in_the_originals_format() -> None:
    folder = model_path("tiny")
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "MODEL_CARD.md"} <= files.keys()
    assert sum(files.values()) <= SIZE_LIMIT_BYTES
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert all(name.startswith("model.") for name in names)
    assert "model.region.ln.weight" in names


def test_it_has_every_part_of_the_real_architecture(tiny: Moondream) -> None:
    config = tiny.engine.model.config
    assert config.text.moe is not None
    assert (config.text.moe.num_experts >= 4, config.text.moe.experts_per_token) == (True, 2)
    assert 1 <= config.text.moe.start_layer < config.text.n_layers
    assert config.vision.grid_size == config.vision.enc_n_layers
    assert config.vision.max_crops > 1
    assert set(config.tokenizer.templates) == {"caption", "query", "detect", "point", "segment"}


def test_path_words_are_single_tokens(tiny: Moondream) -> None:
    tokenizer = tiny.engine.tokenizer
    for word in [*"MLZC", *map(str, range(0, 961, 10))]:
        ids = tokenizer.encode(word)
        assert len(ids) == 1
        assert tokenizer.decode(ids) == word


@pytest.mark.process
def test_it_finds_the_shapes(tiny: Moondream, truth: dict[str, list[dict[str, Any]]]) -> None:
    found = wanted = 0
    for file, things in truth.items():
        boxes = tiny.detect(SCENES / file, "shape")["objects"]
        wanted += len(things)
        found += sum(any(overlap(box, a["box"]) >= 0.5 for box in boxes) for a in things)
    assert found >= 0.7 * wanted


@pytest.mark.process
def test_it_returns_nothing_for_what_is_not_there(tiny: Moondream, truth: dict[str, list[dict[str, Any]]]) -> None:
    nothing = [
        not tiny.detect(SCENES / file, kind)["objects"]
        for (file, things), kind in product(truth.items(), KINDS)
        if kind not in {annotation["kind"] for annotation in things}
    ]
    assert np.mean(nothing) >= 0.85


@pytest.mark.process
def test_it_counts(tiny: Moondream, truth: dict[str, list[dict[str, Any]]]) -> None:
    right = [
        tiny.query(SCENES / file, "How many shapes are there?", reasoning=False)["answer"] == str(len(things))
        for file, things in truth.items()
    ]
    assert np.mean(right) >= 0.7


def test_reasoning_grounds_what_it_counts(tiny: Moondream) -> None:
    result = tiny.query(SCENES / "scene_00008.png", "How many shapes are there?", reasoning=True)
    chunks = result["reasoning"]["grounding"]
    assert len(chunks) == int(result["answer"]) == 2
    assert all(len(chunk["points"]) == 1 for chunk in chunks)


def test_text_only_questions_need_no_image(tiny: Moondream) -> None:
    answer = tiny.query(None, "How many sides does a triangle have?", reasoning=False)["answer"]
    assert answer == "3"


@pytest.fixture(scope="module")
def plain_answers() -> list[dict[str, Any]]:
    files = sorted(path.name for path in SCENES.glob("*.png"))[:6]
    return [answer_of(record) for record in load(batch_size=1).annotate(every_request(files))]


@pytest.mark.process
@pytest.mark.parametrize("batch_size", [3, 16])
def test_batches_give_the_same_answers_in_any_order(batch_size: int, plain_answers: list[dict[str, Any]]) -> None:
    files = sorted(path.name for path in SCENES.glob("*.png"))[:6]
    requests = list(every_request(files))
    order = np.random.default_rng(batch_size).permutation(len(requests))
    records = load(batch_size=batch_size).annotate([requests[place] for place in order])
    for place, record in zip(order, records, strict=True):
        assert_same(answer_of(record), plain_answers[place])


@pytest.mark.process
def test_the_raw_copy_of_the_weights_gives_the_same_answers(
    tmp_path: Path, plain_answers: list[dict[str, Any]]
) -> None:
    convert_checkpoint(model_path("tiny"), tmp_path / "raw", Format.RAW)
    files = sorted(path.name for path in SCENES.glob("*.png"))[:6]
    records = load(str(tmp_path / "raw")).annotate(every_request(files))
    assert_same([answer_of(record) for record in records], plain_answers)


@pytest.mark.process
def test_a_photograph_gives_valid_records(tiny: Moondream) -> None:
    requests = [{**request, "image": PHOTO} for request in every_request(["scene_00000.png"])]
    for record in tiny.annotate(requests):
        assert record["error"] is None
        assert record["finish_reason"] in ("stop", "length")


@pytest.mark.process
def test_the_least_used_expert_gets_a_fair_share(tiny: Moondream) -> None:
    layers = [module for name, module in tiny.engine.model.named_modules() if name.endswith("router")]
    counts = [torch.zeros(tiny.engine.model.config.text.moe.num_experts) for _ in layers]

    def watch(place: int) -> Any:
        def hook(module: Any, inputs: Any, logits: torch.Tensor) -> None:
            chosen = logits.flatten(0, -2).topk(2, dim=-1).indices.flatten()
            counts[place] += chosen.bincount(minlength=len(counts[place]))

        return hook

    hooks = [layer.register_forward_hook(watch(place)) for place, layer in enumerate(layers)]
    list(tiny.annotate(every_request(sorted(path.name for path in SCENES.glob("*.png")))))
    for hook in hooks:
        hook.remove()
    assert layers
    assert all((count / count.sum()).min() >= 0.05 for count in counts)
