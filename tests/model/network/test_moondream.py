"""NaN and infinity out of the network: `model` failures of the records concerned, no answers, no end of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import CASES, load_case
from PIL import Image
from safetensors.torch import load_file, save_file

from md3cli import Moondream
from md3cli.errors import CheckpointError, RequestError
from md3cli.model.engine import plain
from md3cli.model.engine.encoder import EncodingCache
from md3cli.model.engine.generation import EncodedImage
from md3cli.model.quant.quantise import QuantiseSettings, quantise_checkpoint
from md3cli.model.weights.codes import LowBit
from md3cli.records import RecordDict, Task

CASE, INDEX = CASES["a"][0], "model.safetensors.index.json"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
MESSAGE = "the model computed NaN or infinity in float32: are its weights damaged?"
TEXTS: list[dict[str, Any]] = [
    {"task": "caption", "length": "short"},
    {"task": "caption", "temperature": 0.8},
    {"task": "query", "prompt": "why?", "reasoning": False},
    {"task": "query", "prompt": "why?", "reasoning": True},
    {"task": "query", "prompt": "why?", "reasoning": False, "choices": ["yes", "no"]},
]
REGIONS: list[dict[str, Any]] = [
    {"task": "detect", "prompt": "cat"},
    {"task": "detect", "prompt": "cat", "max_objects": 1},
    {"task": "point", "prompt": "cat"},
    {"task": "segment", "prompt": "cat"},
]
EVERYWHERE = ("model.text.lm_head.bias", "model.text.blocks.1.attn.proj.bias", "model.vision.proj_mlp.fc2.bias")
OF_REGIONS = ("model.region.coord_decoder.bias", "model.region.size_decoder.bias")


def damaged(folder: Path, name: str, value: float) -> Moondream:
    """The model of the case with one number of one tensor replaced."""
    for file in CASE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    weights = load_file(shard)
    weights[name].view(-1)[7] = value
    save_file(weights, shard)
    return Moondream.load(str(folder), device="cpu", dtype="fp32")


def records(model: Moondream, requests: list[dict[str, Any]]) -> list[RecordDict]:
    given = ({"image": PICTURE, "max_tokens": 6, "max_objects": 3, **request} for request in requests)
    return list(model.annotate(given))


def assert_failed(found: list[RecordDict]) -> None:
    for record in found:
        assert record["error"] == {"type": "model", "message": MESSAGE, "retry": True}
        assert not {"caption", "answer", "objects", "points", "segments"} & record.keys()


@pytest.mark.process
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", EVERYWHERE)
def test_no_answer_is_taken_from_what_is_no_number(tmp_path: Path, name: str, value: float) -> None:
    model = damaged(tmp_path, name, value)
    assert_failed(records(model, TEXTS + REGIONS))


@pytest.mark.process
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", OF_REGIONS)
def test_heads_of_regions_concern_those_who_ask_them(tmp_path: Path, name: str, value: float) -> None:
    model = damaged(tmp_path, name, value)
    asked = records(model, TEXTS[:3] + REGIONS + TEXTS[:3])
    assert_failed(asked[3:-3])
    assert [record["error"] for record in (*asked[:3], *asked[-3:])] == [None] * 6
    sound = Moondream.load(str(CASE), device="cpu", dtype="fp32")
    assert [r["caption"] for r in asked[:2]] == [r["caption"] for r in records(sound, TEXTS[:2])]


@pytest.mark.process
def test_every_method_raises_and_the_next_call_is_answered(tmp_path: Path) -> None:
    model = damaged(tmp_path, "model.region.coord_decoder.bias", float("nan"))
    for ask in (model.detect, model.point, model.segment):
        with pytest.raises(RequestError, match="NaN or infinity") as failure:
            ask(PICTURE, "cat")
        assert failure.value.type == "model"
    assert "caption" in model.caption(PICTURE, settings={"max_tokens": 3})
    silent = damaged(tmp_path, "model.text.lm_head.bias", float("nan"))
    for stream in (False, True):
        with pytest.raises(RequestError, match="NaN or infinity"):
            silent.caption(PICTURE, stream=stream)
        with pytest.raises(RequestError, match="NaN or infinity"):
            silent.query(question="why?", stream=stream)


def test_grounded_points_of_a_thought_are_checked_too() -> None:
    from md3cli.model.engine.state import Mode, _is_finite, idle_rows

    rows = idle_rows(4, torch.device("cpu"))
    coord_id, other = 5, 8
    rows = rows._replace(mode=torch.tensor([Mode.REASON, Mode.REASON, Mode.TEXT, Mode.Y]).long())
    yes, no = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    tokens = torch.tensor([coord_id, other, coord_id, other])
    assert _is_finite(rows, tokens, coord_id, [yes, no, yes]).tolist() == [False, True, True, False]
    assert not _is_finite(rows, tokens, coord_id, [no, yes, yes]).any()


@pytest.mark.process
@pytest.mark.parametrize("batch_size", [2, 9])
def test_the_other_rows_of_a_batch_are_answered_as_ever(batch_size: int) -> None:
    model = Moondream.load(str(CASE), device="cpu", dtype="fp32")
    model.engine._allocate(batch_size)
    sound = model.encode_image(PICTURE)
    bad = EncodedImage(torch.full_like(sound.embeddings, torch.inf), 60, 40, "bad")
    alone = records(model, TEXTS + REGIONS)
    requests = [{**request, "image": image} for request in TEXTS + REGIONS for image in (bad, sound)]
    mixed = records(model, requests)
    assert_failed(mixed[::2])
    for record, expected in zip(mixed[1::2], alone, strict=True):
        keys = ("caption", "answer", "objects", "points", "segments")
        assert [record.get(key) for key in keys] == [expected.get(key) for key in keys]


def test_the_plain_path_says_so_as_well(tmp_path: Path) -> None:
    model = damaged(tmp_path, "model.region.size_decoder.bias", float("inf"))
    case = load_case("a")
    prompt = model.engine.prompts.build(next(r for r in case.requests if r.task is Task.DETECT), has_image=True)
    with pytest.raises(RequestError, match="NaN or infinity"):
        plain.answer(model.engine.model, case.images[0], Task.DETECT, prompt, max_tokens=3, max_objects=3)


def test_encodings_without_a_number_are_not_kept(tmp_path: Path) -> None:
    from md3cli.file_cache import FileCache

    network = load_case("a").model
    cache = EncodingCache(FileCache(tmp_path, 10**8), network, background="none")
    fine = torch.zeros(cache.shape, dtype=cache.dtype)
    cache.save("fine", fine)
    cache.save("bad", fine + torch.nan)
    assert cache.load("fine") is not None
    assert cache.load("bad") is None


def test_an_answer_without_words_is_one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Moondream.load(str(CASE), device="cpu", dtype="fp32")

    def fail(ids: Any) -> str:
        raise RequestError("no words", "model")

    monkeypatch.setattr(model.engine.tokenizer, "decode", fail)
    caption, boxes = records(model, [TEXTS[0], REGIONS[0]])
    assert caption["error"] == {"type": "model", "message": "no words", "retry": True}
    assert boxes["error"] is None


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["auto", "fp32"])
def test_codes_do_not_hide_what_is_no_number(tmp_path: Path, quant: str, dtype: str) -> None:
    damaged(tmp_path, "model.text.blocks.1.attn.qkv.weight", float("nan"))
    with pytest.raises(CheckpointError, match=r"text\.blocks\.1\.attn\.qkv\.weight holds values that are not finite"):
        Moondream.load(str(tmp_path), device="cpu", dtype=dtype, quant=quant)
    with pytest.raises(CheckpointError, match="holds values that are not finite"):
        quantise_checkpoint(tmp_path, tmp_path / "out", QuantiseSettings(LowBit(quant)))


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}])
def test_generate_of_transformers_says_so_as_well(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    pytest.importorskip("transformers", reason="needs the extra md3cli[hf]")
    from hf_cases import load_hf

    model, processor = load_hf("a")
    inputs = processor(text=["query: cat", "query: dog"], images=[None, None])
    logits = model.model.text.logits
    monkeypatch.setattr(model.model.text, "logits", lambda hidden: logits(hidden) * torch.nan)
    with pytest.raises(RequestError, match="row 0 of the batch: the model computed NaN or infinity"):
        model.generate(**inputs, max_new_tokens=2, **settings)
