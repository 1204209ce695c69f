"""Layouts: told apart by names, config.json in every style, one name table each way."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import CheckpointError
from md3cli.model.network.config import ModelConfig
from md3cli.model.weights.names import (
    Format,
    Part,
    Recipe,
    expected_tensors,
    has_region_ln,
    part_of,
    plain_name,
    slots,
    stored_name,
)
from md3cli.model.weights.plan import detect_format, hf_config, normalise_config

GOLDEN = Path(__file__).parents[2] / "golden"

# Moondream 3 specification, section 1.
PARAMETERS = {
    Part.VISION: 412_987_248,
    Part.PROJECTION: 35_661_824,
    Part.EMBEDDING: 104_857_600,
    Part.ATTENTION: 402_849_792,
    Part.TAU: 9_437_952,
    Part.DENSE: 134_258_688,
    Part.ROUTERS: 2_622_720,
    Part.EXPERTS: 8_053_063_680,
    Part.NORMS_HEAD: 105_011_200,
    Part.REGION: 7_876_224,
}


def golden_config(*folder: str) -> Any:
    return json.loads(GOLDEN.joinpath(*folder, "config.json").read_text())


def test_real_model_has_the_published_parameters() -> None:
    counts = dict.fromkeys(Part, 0)
    for name, shape in expected_tensors(ModelConfig(), has_region_ln=True).items():
        counts[part_of(name, shape)] += prod(shape)
    assert counts == PARAMETERS
    assert sum(counts.values()) == 9_268_626_928


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["text.blocks.0.ln.weight"], Format.ORIGINAL),
        (["text.blocks.4.moe_quant.up_scale", "text.blocks.0.ln.weight"], Format.ORIGINAL_FP8),
        (["text_model.transformer.h.0.ln.weight"], Format.RAW),
        (["text_model.transformer.h.4.moe_quant.up_scale"], Format.RAW_FP8),
        (["text_model.layers.0.input_layernorm.weight", "lm_head.weight"], Format.HF),
        (["text.blocks.0.attn.qkv.weight.packed"], Format.INT4),
        (["text.blocks.0.attn.qkv.weight", "text.blocks.0.attn.qkv.weight_scale"], Format.INT8),
        (["text.blocks.0.attn.qkv.weight.packed", "vision.blocks.0.attn.qkv.weight_scale"], Format.INT4),
    ],
)
def test_layout_is_told_by_names(names: list[str], layout: Format) -> None:
    assert detect_format(names, "x") is layout


def test_mlx_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"MLX.*original, original-fp8, raw, raw-fp8, hf, int4, int8"):
        detect_format(["text.blocks.4.mlp.fc1_q", "text.wte.weight"], "x")


def test_unknown_names_are_refused_with_examples() -> None:
    with pytest.raises(CheckpointError, match=r"first tensors: lm_head\.weight, transformer\.wte"):
        detect_format(["transformer.wte", "lm_head.weight"], "x")


@pytest.mark.parametrize(
    ("stored", "plain"),
    [
        ("model.text.wte", "text.wte"),
        ("text.wte", "text.wte"),
        ("model.text.blocks.0._orig_mod.ln.weight", "text.blocks.0.ln.weight"),
        ("_orig_mod.model.text.wte", "text.wte"),
        ("model._orig_mod.text.wte", "text.wte"),
    ],
)
def test_what_carries_no_meaning_is_stripped(stored: str, plain: str) -> None:
    assert plain_name(stored) == plain


def test_sections_are_found_under_config_and_at_top_level() -> None:
    under = golden_config("case-a", "checkpoint")
    assert normalise_config(under) == under["config"]
    assert normalise_config({"model_type": "moondream3", **under["config"]}) == under["config"]


def test_hf_style_means_the_same_model() -> None:
    theirs = ModelConfig.from_sections(normalise_config(golden_config("case-c-formats", "hf-port")))
    ours = ModelConfig.from_sections(normalise_config(golden_config("case-c", "checkpoint")))
    assert theirs == ours


@pytest.mark.parametrize(
    "document", [{}, {"config": {}}, {"config": None}, {"text_config": {}}, {"config": {"text": {}}}]
)
def test_what_is_missing_takes_the_defaults(document: dict[str, Any]) -> None:
    assert ModelConfig.from_sections(normalise_config(document)) == ModelConfig()


def test_null_moe_means_dense_layers() -> None:
    assert ModelConfig.from_sections(normalise_config({"text": {"moe": None}})).text.moe is None
    assert ModelConfig.from_sections(normalise_config({"text_config": {"num_experts": None}})).text.moe is None


def test_vllm_spellings_of_moe_are_read() -> None:
    config = ModelConfig.from_sections(normalise_config({"text": {"moe": {"n_experts": 8, "n_experts_per_tok": 2}}}))
    assert config.text.moe is not None
    assert (config.text.moe.num_experts, config.text.moe.experts_per_token) == (8, 2)


@pytest.mark.parametrize(
    "document", [[], None, "x", {"config": 3}, {"text": []}, {"text_config": 1}, {"text": {"moe": 1}}]
)
def test_damaged_documents_are_checkpoint_errors(document: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        normalise_config(document)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_KEYS = ("config", "text", "vision", "region", "tokenizer", "text_config", "vision_config", "moe", "dim", "n_layers")


@pytest.mark.process
@given(st.dictionaries(st.sampled_from(_KEYS), _JSON | st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=3)))
def test_any_json_is_a_config_or_a_checkpoint_error(document: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_sections(normalise_config(document))
    except CheckpointError:
        return
    assert expected_tensors(config, has_region_ln=True)


@pytest.mark.parametrize("layout", list(Format))
def test_every_tensor_has_exactly_one_place(layout: Format) -> None:
    """No two parts share a name, and parts hold as many values as what they make."""
    config = ModelConfig.from_sections(normalise_config(golden_config("case-c", "checkpoint")))
    expected = expected_tensors(config, has_region_ln=layout is not Format.HF)
    table = list(slots(expected, layout))
    assert {slot.name: slot.shape for slot in table} == expected
    names = [part.name for slot in table for part in slot.parts]
    assert len(set(names)) == len(names)
    assert detect_format(names, "x") is layout
    assert has_region_ln(names) is (layout is not Format.HF)


def test_fused_tau_is_read_where_a_file_has_it() -> None:
    expected = {"text.blocks.0.attn.tau.wq": (2, 384), "text.blocks.0.attn.tau.wv": (2, 384)}
    fused = list(slots(expected, Format.RAW, ["text_model.transformer.h.0.tau_wqwv"]))
    assert [(slot.recipe, slot.parts[0].shape) for slot in fused] == [
        (Recipe.FIRST_HALF, (4, 384)),
        (Recipe.SECOND_HALF, (4, 384)),
    ]
    assert [slot.recipe for slot in slots(expected, Format.RAW)] == [Recipe.COPY, Recipe.COPY]


def test_hf_port_has_no_place_for_region_ln() -> None:
    with pytest.raises(
        CheckpointError, match=r"region\.ln\.weight every coordinate would change; write original or raw"
    ):
        list(slots(expected_tensors(ModelConfig(), has_region_ln=True), Format.HF))


def test_odd_groups_cannot_be_packed() -> None:
    with pytest.raises(CheckpointError, match=r"qkv\.weight: 384 values cannot be packed in 4 bits"):
        list(slots({"text.blocks.0.attn.qkv.weight": (3, 128)}, Format.INT4))


def test_full_names_start_with_model_where_the_layout_says_so() -> None:
    assert stored_name("text.wte", Format.ORIGINAL) == "model.text.wte"
    assert stored_name("lm_head.weight", Format.HF) == "lm_head.weight"
    assert stored_name("text_model.norm.weight", Format.HF) == "model.text_model.norm.weight"
    assert stored_name("region_model.ln.bias", Format.RAW) == "region_model.ln.bias"


def test_hf_config_is_what_normalising_reads_back() -> None:
    sections = normalise_config(golden_config("case-b", "checkpoint"))
    again = ModelConfig.from_sections(normalise_config(hf_config(sections)))
    assert again == ModelConfig.from_sections(sections)
    assert hf_config(sections)["vision_config"]["prefix_len"] == 37


def test_dense_models_are_said_in_the_ports_words() -> None:
    sections = normalise_config(golden_config("case-b", "checkpoint"))
    sections["text"] = {**sections["text"], "moe": None}
    again = ModelConfig.from_sections(normalise_config(hf_config(sections)))
    assert not any(again.text.is_moe_layer(layer) for layer in range(again.text.n_layers))


@pytest.mark.parametrize(
    ("name", "packing"),
    [
        ("text.blocks.0.attn.qkv.qweight", "GPTQ or AWQ"),
        ("text.blocks.0.attn.qkv.weight_packed", "compressed-tensors, packed"),
        ("text.blocks.0.attn.qkv.weight.absmax", "bitsandbytes"),
        ("text.blocks.0.attn.qkv.W_q", "HQQ"),
        ("text_model.layers.0.mlp.down_proj.weight_scale_inv", "FP8 by blocks"),
    ],
)
def test_other_packings_are_refused_by_name(name: str, packing: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        detect_format(["text.blocks.0.ln.weight", name], "x")
    assert f"tensor {name} is packed as by {packing}" in str(caught.value)
    advice = "understood: original, original-fp8, raw, raw-fp8, hf, int4, int8"
    if packing == "bitsandbytes":
        advice = "take the checkpoint it was packed from, with --quant int8 or int4"
    assert advice in str(caught.value)
