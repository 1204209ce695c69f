"""The network, the plain path and the engine against the reference cases, number by number."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
import torch
from golden_cases import CASES, GOLDEN, assert_answer, load_case

from md3cli.model.engine import plain
from md3cli.model.engine.state import top_p_probabilities
from md3cli.model.network.moondream import prefix_mask, size_bin, size_value
from md3cli.model.network.vision import normalise_crops

TOLERANCE = 1e-4  # float32; two right implementations differ by 3e-5 at logits of 30
UNITS = json.loads((GOLDEN / "units.json").read_text())


def assert_close(found: torch.Tensor, expected: list[float], tolerance: float = TOLERANCE) -> None:
    difference = (found.double() - torch.tensor(expected, dtype=torch.float64)).abs().max().item()
    assert difference <= tolerance, difference


@pytest.mark.parametrize("name", CASES)
def test_images_from_file_to_prefix(name: str) -> None:
    case = load_case(name)
    model = case.model
    for facts, image in zip(case.image_facts, case.images, strict=True):
        assert list(image.tiling) == facts["tiling"]
        assert hashlib.sha256(image.crops.tobytes()).hexdigest() == facts["crops_sha256"]
        with torch.inference_mode():
            features = model.vision.encode(normalise_crops(torch.from_numpy(image.crops)))
            assert_close(features[0, 0, :8], facts["vision_features"]["sample_crop_0_patch_0"])
            assert_close(features[-1, -1, :8], facts["vision_features"]["sample_last_crop_last_patch"])
            stitched = model.vision.stitch(features[1:], image.tiling)
            assert list(stitched.shape) == facts["stitched_shape"]
            pooled = model.vision.pool(stitched)
            assert_close(pooled[0][: len(facts["pooled_sample_0"])], facts["pooled_sample_0"])
            embeddings = plain.encode_image(model, image)
            assert_close(embeddings[0, :8], facts["image_embedding"]["sample_0"])
            assert_close(embeddings[-1, :8], facts["image_embedding"]["sample_last"])
            prefix = model.prefix_embeddings(embeddings[None])
            position = torch.arange(prefix.shape[1])[None]
            hidden = model.text(prefix, position)[0]
            wanted = facts["prefix_hidden"]
            for index, values in zip(wanted["positions"], wanted["rows"], strict=True):
                assert_close(hidden[index, :8], values)


@pytest.mark.process
@pytest.mark.parametrize("name", CASES)
def test_plain_path_takes_every_decision(name: str) -> None:
    case = load_case(name)
    num_checked = 0
    for key, (request, expected) in enumerate(zip(case.requests, case.expected, strict=True)):
        image = case.job(key).image
        prompt = case.prompts.build(request, has_image=image is not None)
        assert prompt.ids == expected["prompt_ids"]
        if not case.is_certain(key):
            continue
        output = plain.answer(
            case.model, image, request.task, prompt, max_tokens=request.max_tokens, max_objects=request.max_objects
        )
        assert output.token_ids == expected["token_ids"]
        assert output.finish_reason == expected["finish"]
        phases = [phase for phase in (output.reasoning, output) if phase is not None]
        chosen = {kind: [t["choice"] for t in expected["trace"] if t["kind"] == kind] for kind in TRACE_KINDS}
        assert [bin for phase in phases for bin in phase.coord_bins] == chosen["coord"]
        sizes = list(zip(chosen["size_w"], chosen["size_h"], strict=True))
        assert [bins for phase in phases for bins in phase.size_bins] == sizes
        num_checked += 1
    assert num_checked >= 0.9 * len(case.requests)


TRACE_KINDS = ("coord", "size_w", "size_h")


@pytest.mark.process
@pytest.mark.parametrize("name", CASES)
def test_hidden_states_and_logits_after_the_prompt(name: str) -> None:
    case = load_case(name)
    model = case.model
    for key, (request, expected) in enumerate(zip(case.requests, case.expected, strict=True)):
        with torch.inference_mode():
            sequence = plain.PlainGeneration(model, case.job(key).image)
            sequence.feed_prompt(case.prompts.build(request, has_image=case.image_indices[key] is not None))
            logits = sequence.logits()
        assert_close(sequence.hidden[:8], expected["prompt"]["hidden_first_8"])
        assert_close(logits[:16], expected["prompt"]["logits_first_16"])
        assert abs(logits.logsumexp(0).item() - expected["prompt"]["logsumexp"]) <= TOLERANCE


@pytest.mark.process
@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("name", CASES)
def test_engine_in_any_order_at_any_batch_size(name: str, batch_size: int, delay: int) -> None:
    """However many launches behind their results are read, too."""
    case = load_case(name)
    keys = [key for key in range(len(case.requests)) if case.is_certain(key)]
    random.Random(batch_size).shuffle(keys)
    answers = list(case.engine(batch_size, delay=delay).run(case.job(key) for key in keys))
    assert sorted(answer.key for answer in answers) == sorted(keys)
    for answer in answers:
        assert_answer(answer, case.expected[answer.key])


@pytest.mark.process
@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [2, 16])
@pytest.mark.parametrize("name", CASES)
def test_engine_whose_passes_have_one_size(name: str, batch_size: int, delay: int) -> None:
    """As on CUDA: fixed slots, pictures and blocks of prompts padded to a plan, all slots in every step."""
    case = load_case(name)
    keys = [key for key in range(len(case.requests)) if case.is_certain(key)]
    random.Random(delay).shuffle(keys)
    engine = case.engine(batch_size, delay=delay, is_planned=True, prefill_tokens=4 * case.model.config.prefix_len)
    answers = list(engine.run(case.job(key) for key in keys))
    assert sorted(answer.key for answer in answers) == sorted(keys)
    for answer in answers:
        assert_answer(answer, case.expected[answer.key])


@pytest.mark.process
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_bfloat16_stays_close_and_agrees_where_margins_are_wide(name: str) -> None:
    case, wide = load_case(name), load_case(name, torch.bfloat16)
    num_compared = 0
    for key, (request, expected) in enumerate(zip(case.requests, case.expected, strict=True)):
        image = case.job(key).image
        prompt = case.prompts.build(request, has_image=image is not None)
        with torch.inference_mode():
            sequence = plain.PlainGeneration(wide.model, image)
            sequence.feed_prompt(prompt)
            logits = sequence.logits().float()
        first = expected["trace"][0]
        if first["moe_margin"] >= 0.05:
            assert_close(logits[:16], expected["prompt"]["logits_first_16"], tolerance=1.0)
            if first["margin"] >= 1.5:
                assert int(logits.argmax()) == expected["prompt"]["argmax"]
                num_compared += 1
    if any(e["trace"][0]["moe_margin"] >= 0.05 and e["trace"][0]["margin"] >= 1.5 for e in case.expected):
        assert num_compared


def test_prefix_rows_do_not_depend_on_the_prompt() -> None:
    """The whole sequence under one mask gives the same as prefix first, prompt after."""
    case = load_case("a")
    model, image = case.model, case.images[0]
    prompt = case.prompts.build(case.requests[0], has_image=True)
    with torch.inference_mode():
        prefix = model.prefix_embeddings(plain.encode_image(model, image)[None])
        whole = torch.cat([prefix, plain.prompt_embeddings(model, prompt)[None]], dim=1)
        position = torch.arange(whole.shape[1])[None]
        hidden = model.text(whole, position, prefix_mask(whole.shape[1], prefix.shape[1]))
        sequence = plain.PlainGeneration(model, image)
        sequence.feed_prompt(prompt)
    assert_close(hidden[0, -1], sequence.hidden.tolist())


def test_size_bins() -> None:
    for entry in UNITS["size_bins"]:
        value = size_value(torch.tensor(entry["bin"]), 1024).item()
        assert abs(value - entry["size"]) <= 1e-6
        assert round(size_bin(torch.tensor(entry["size"]), 1024).item()) == entry["bin"]


def test_top_p() -> None:
    for entry in UNITS["top_p"]:
        logits = torch.tensor([entry["logits"]], dtype=torch.float32)
        p, ids = top_p_probabilities(logits, torch.tensor([entry["temperature"]]), torch.tensor([entry["top_p"]]))
        by_id = torch.zeros_like(p).scatter(1, ids, p)[0]
        assert_close(by_id, entry["probabilities"], 1e-6)
