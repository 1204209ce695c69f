"""md3cli against the independent reference, on models, pictures and prompts drawn at random.

The same greedy decisions are asked for wherever the reference's margins are wide enough for the
arithmetic: one request at a time through the class, and in mixed batches of every size.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling
from reference import comparing, preprocess
from reference.cases import draw_image, draw_requests, draw_text_only
from reference.comparing import BFLOAT16, FLOAT32, Margins
from reference.network import Config
from reference.random_models import draw_config, draw_network
from reference.reading import read_network
from reference.sequence import Model
from reference.skills import Answer, answer
from reference.writing import FORMATS, formats_of, write_checkpoint
from tokenizers import Tokenizer

from md3cli import Moondream
from md3cli.config import ModelOptions
from md3cli.images.crops import CropConfig
from md3cli.model.api_requests import prepare_pil
from md3cli.model.engine import load as load_module
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.load import load_engine
from md3cli.model.quant.quantise import QuantiseSettings, quantise_checkpoint
from md3cli.model.weights.codes import LowBit
from md3cli.records import Job, Request, Task

pytestmark = pytest.mark.process

LOOPS = [(delay, is_planned) for delay in (0, 1, 2) for is_planned in (False, True)]

IMAGES_PER_MODEL = 2
TEXT_ONLY_PER_MODEL = 2
SETTINGS = ("max_tokens", "max_objects")
THREADS = ((2, 200), (2, 201), (2, 410), (3, 300), (3, 301), (5, 900), (410, 2))  # width and height


@dataclass(frozen=True)
class Asked:
    """One request with its picture (None: text only) and the reference's answer to it."""

    request: dict
    image: Image.Image | None
    answer: Answer


@dataclass(frozen=True)
class Drawn:
    """A checkpoint on disk, the reference's model of it and everything asked of it."""

    folder: Path
    model: Model
    asked: list[Asked]


def draw(folder: Path, seed: int, form: str, dense: bool = False) -> Drawn:
    """The model of `seed` written as `form`; the reference reads what was written."""
    write_checkpoint(draw_network(seed, dense), folder, form, shape_seed=seed)
    return ask_reference(folder, random.Random(seed))


def draw_quantised(folder: Path, seed: int, form: str, settings: QuantiseSettings) -> Drawn:
    """The same, written as `form` and then quantised by md3."""
    source = write_checkpoint(draw_network(seed), folder / "source", form)
    quantise_checkpoint(source, folder / "quantised", settings)
    return ask_reference(folder / "quantised", random.Random(seed))


def ask_reference(folder: Path, rng: random.Random) -> Drawn:
    """What the reference makes of pictures and requests drawn from `rng`."""
    model = Model(read_network(folder), Tokenizer.from_file(str(folder / "tokenizer.json")))
    asked = []
    for _ in range(IMAGES_PER_MODEL):
        image = draw_image(rng, model.network.config)
        assert_cut_alike(image, model.network.config)
        with torch.no_grad():
            encoded = model.encode_image(image)
        asked += [Asked(request, image, answer(model, request, encoded)) for request in draw_requests(rng)]
    for _ in range(TEXT_ONLY_PER_MODEL):
        request = draw_text_only(rng)
        asked.append(Asked(request, None, answer(model, request, None)))
    return Drawn(folder, model, asked)


def noise(size: tuple[int, int]) -> Image.Image:
    """A picture whose every pixel says when it is resized otherwise."""
    width, height = size
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8))


def assert_cut_alike(image: Image.Image, config: Config) -> None:
    """Both cut the same crops of a picture, byte for byte: few answers tell when a handful of pixels differ."""
    sizes = {name: config["vision"][name] for name in ("crop_size", "overlap_margin", "max_crops")}
    ours = prepare_pil(image, CropConfig(patch_size=config["vision"]["enc_patch_size"], **sizes))
    crops, tiling = preprocess.crops_of(image, config)
    assert ours.tiling == tiling
    np.testing.assert_array_equal(ours.crops, crops, err_msg=f"{image.mode} {image.size}")


def load(drawn: Drawn, dtype: str = "fp32", batch_size: int | None = None, loop: int | None = None) -> Moondream:
    """The class over the model; `loop` counts among `LOOPS`, None is how this machine runs."""
    delay, is_planned = (None, None) if loop is None else LOOPS[loop % len(LOOPS)]
    with patch.object(load_module, "Engine", partial(Engine, delay=delay, is_planned=is_planned)):
        if batch_size is None:
            return Moondream.load(str(drawn.folder), device="cpu", dtype=dtype)
        options = ModelOptions(model=str(drawn.folder), device="cpu", dtype=dtype, batch_size=batch_size, cache=False)
        return Moondream(load_engine(options))


def ask_alone(md: Moondream, asked: Asked) -> dict[str, Any]:
    """The request through the class's own method."""
    request = asked.request
    more: dict[str, Any] = {"settings": {name: request[name] for name in SETTINGS if name in request}}
    if "spatial_refs" in request:
        more["spatial_refs"] = request["spatial_refs"]
    if request["skill"] == "caption":
        return md.caption(asked.image, length=request["length"], **more)
    if request["skill"] == "query":
        return md.query(asked.image, request["question"], reasoning=request["reasoning"], **more)
    return getattr(md, request["skill"])(asked.image, request["object"], **more)


def row_of(asked: Asked, number: int) -> dict[str, Any]:
    """The request as `annotate` takes it."""
    request = asked.request
    row = {name: request[name] for name in (*SETTINGS, "length", "reasoning", "spatial_refs") if name in request}
    row |= {"task": request["skill"], "image": asked.image, "meta": {"number": number}}
    if "question" in request or "object" in request:
        row["prompt"] = request.get("question", request.get("object"))
    return row


def request_of(asked: Asked) -> Request:
    """The request as the engine takes it."""
    row = row_of(asked, 0)
    fields = {name: row[name] for name in ("prompt", "length", "reasoning", *SETTINGS) if name in row}
    refs = tuple(map(tuple, row.get("spatial_refs", ())))
    return Request(Task(row["task"]), spatial_refs=refs, **fields)


def assert_batch_agrees(md: Moondream, drawn: Drawn, margins: Margins, order_seed: int = 0) -> None:
    """All requests in one shuffled run of `annotate`; records come in the order asked."""
    order = list(range(len(drawn.asked)))
    random.Random(order_seed).shuffle(order)
    records = list(md.annotate(row_of(drawn.asked[number], number) for number in order))
    assert [record["meta"]["number"] for record in records] == order
    for number, record in zip(order, records, strict=True):
        assert record["error"] is None
        asked = drawn.asked[number]
        comparing.assert_agrees(drawn.model, asked.request, asked.answer, record, margins)
        assert_counts_agree(drawn, asked, record, margins)


def assert_counts_agree(drawn: Drawn, asked: Asked, record: dict[str, Any], margins: Margins) -> None:
    prefix_len = drawn.model.network.prefix_len if asked.image is not None else 0
    assert record["tokens"]["prompt"] == prefix_len + len(asked.answer["prompt_ids"])
    if not comparing.is_certain(asked.answer, margins):
        return
    thought = asked.answer.get("reasoning")
    assert record["finish_reason"] == asked.answer["finish"]
    assert record["tokens"]["output"] == len(asked.answer["token_ids"]) + len(thought["token_ids"] if thought else ())
    if thought:
        assert record["reasoning"]["finish_reason"] == thought["finish"]


def assert_mostly_certain(drawn: Drawn) -> None:
    """Guards the tests themselves: in float32 nearly every answer must be compared in full."""
    certain = sum(comparing.is_certain(asked.answer, FLOAT32) for asked in drawn.asked)
    assert certain >= 0.8 * len(drawn.asked)


@pytest.mark.parametrize("seed", range(6))
def test_pictures_are_cut_alike(seed: int) -> None:
    """Drawn ones, and threads around the width from which on the height comes first."""
    config, rng = draw_config(seed), random.Random(seed)
    for _ in range(20):
        assert_cut_alike(draw_image(rng, config), config)
    for size in THREADS:
        assert_cut_alike(noise(size), config)


@pytest.mark.parametrize("size", [size for size in THREADS if size[1] > 100 * size[0]], ids=str)
def test_a_picture_cut_in_the_other_order_is_found(size: tuple[int, int]) -> None:
    def width_first(picture: Image.Image, width: int, height: int) -> Image.Image:
        return picture.resize((width, picture.height), Resampling.LANCZOS).resize((width, height), Resampling.LANCZOS)

    with patch.object(preprocess, "resize", width_first), pytest.raises(AssertionError, match=f"RGB .{size[0]}, "):
        assert_cut_alike(noise(size), draw_config(0))


@pytest.mark.parametrize("seed", range(3))
def test_one_request_at_a_time(seed: int, tmp_path: Path) -> None:
    drawn = draw(tmp_path / "model", seed, "original", dense=seed == 2)
    assert_mostly_certain(drawn)
    for loop in (None, 2 * seed + 1):
        md = load(drawn, loop=loop)
        for asked in drawn.asked:
            comparing.assert_agrees(drawn.model, asked.request, asked.answer, ask_alone(md, asked), FLOAT32)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_in_mixed_batches(form: str, tmp_path: Path) -> None:
    drawn = draw(tmp_path / "model", 100 + FORMATS.index(form), form)
    assert_mostly_certain(drawn)
    assert_batch_agrees(load(drawn, loop=FORMATS.index(form)), drawn, FLOAT32)


QUANTISED = {
    "int4": QuantiseSettings(LowBit.INT4),
    "int4, short scales": QuantiseSettings(LowBit.INT4, int4_scale_dtype=torch.bfloat16),
    "int4, vision": QuantiseSettings(LowBit.INT4, has_int8_vision=True),
    "int8": QuantiseSettings(LowBit.INT8),
    "int8, vision": QuantiseSettings(LowBit.INT8, has_int8_vision=True),
    "fp8": QuantiseSettings(LowBit.FP8),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_what_md3_quantised_means_the_same_to_the_reference(name: str, tmp_path: Path) -> None:
    number = list(QUANTISED).index(name)
    form = ("original", "raw-fused", "raw-fp8", "int4", "original", "raw")[number]
    drawn = draw_quantised(tmp_path, 301 + 3 * number, form, QUANTISED[name])
    assert_mostly_certain(drawn)
    assert_batch_agrees(load(drawn, loop=number), drawn, FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(400, 406))
def test_many_quantised_models(seed: int, tmp_path: Path) -> None:
    for name, settings in QUANTISED.items():
        drawn = draw_quantised(tmp_path / name, seed, FORMATS[seed % len(FORMATS)], settings)
        assert_batch_agrees(load(drawn, batch_size=1 + seed % 5, loop=seed), drawn, FLOAT32)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_batch_size_changes_nothing(batch_size: int, tmp_path: Path) -> None:
    drawn = draw(tmp_path / "model", 4, "original-single")
    for order_seed in range(3):  # as this machine runs, and of the other loops half for each batch size
        loop = [None, batch_size, batch_size + 3][order_seed]
        assert_batch_agrees(load(drawn, batch_size=batch_size, loop=loop), drawn, FLOAT32, order_seed)


@pytest.mark.slow
@pytest.mark.parametrize("loop", range(len(LOOPS)), ids=map(str, LOOPS))
@pytest.mark.parametrize("seed", range(500, 504))
def test_every_loop_at_every_batch_size(seed: int, loop: int, tmp_path: Path) -> None:
    """However far behind the launches results are read, and whether passes have one size or not."""
    drawn = draw(tmp_path / "model", seed, FORMATS[seed % len(FORMATS)], dense=seed % 4 == 3)
    for batch_size in (1, 2, 5, 20):
        assert_batch_agrees(load(drawn, batch_size=batch_size, loop=loop), drawn, FLOAT32, batch_size)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_pictures_that_arrive_late_change_nothing(batch_size: int, tmp_path: Path) -> None:
    """Decoding is slower than the model at times: the engine then goes on with what it has."""
    drawn = draw(tmp_path / "model", 4, "hf-port")
    engine = load(drawn, batch_size=batch_size, loop=batch_size).engine
    prepared = [None if asked.image is None else prepare_pil(asked.image, engine.crop_config) for asked in drawn.asked]
    jobs = [Job(key, prepared[key], request_of(asked)) for key, asked in enumerate(drawn.asked)]
    rng = random.Random(batch_size)
    for _ in range(4):
        rng.shuffle(jobs)
        arriving = [item for job in jobs for item in [None] * rng.choice([0, 0, 1, 30]) + [job]]
        answers = {answer.key: answer for answer in engine.run(arriving)}
        for key, asked in enumerate(drawn.asked):
            assert answers[key].failure is None
            comparing.assert_agrees(drawn.model, asked.request, asked.answer, answers[key].result, FLOAT32)


def test_bfloat16_agrees_where_margins_are_wide(tmp_path: Path) -> None:
    drawn = draw(tmp_path / "model", 9, "raw", dense=True)  # experts are nearly always too close to call
    assert sum(comparing.num_sure(asked.answer, BFLOAT16) for asked in drawn.asked) >= len(drawn.asked)
    for loop in (None, 3):
        assert_batch_agrees(load(drawn, dtype="bf16", loop=loop), drawn, BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 212))
def test_many_models_in_every_format(seed: int, tmp_path: Path) -> None:
    dense = seed % 5 == 0
    for form in formats_of(draw_network(seed, dense).config):
        drawn = draw(tmp_path / form, seed, form, dense)
        md = load(drawn, batch_size=1 + seed % 9, loop=seed)
        for order_seed in range(2):
            assert_batch_agrees(md, drawn, FLOAT32, order_seed)
        assert_batch_agrees(load(drawn, dtype="bf16"), drawn, BFLOAT16)
