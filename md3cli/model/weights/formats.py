"""The layouts a Moondream 3 checkpoint comes in: which one a file is, and its config.json as four sections.

A layout is decided by tensor names, never by file names; what it calls a tensor stands in `names.py`.
No torch, no files. Source: Moondream 3 specification, sections 2 and 19.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Any

from md3cli.errors import CheckpointError

JsonObject = dict[str, Any]
SECTIONS = ("text", "vision", "region", "tokenizer")


class Format(StrEnum):
    """A checkpoint layout, by the name the user sees."""

    ORIGINAL = "original"
    ORIGINAL_FP8 = "original-fp8"
    RAW = "raw"
    RAW_FP8 = "raw-fp8"
    HF = "hf"
    INT4 = "int4"
    INT8 = "int8"

    @property
    def has_fp8_experts(self) -> bool:
        """True where experts are in 8 bits with one scale per row."""
        return self in (Format.ORIGINAL_FP8, Format.RAW_FP8)


FORMAT_NAMES = ", ".join(Format)
INT8_SCALE = "_scale"  # behind the name of a matrix stored in int8: `X.weight_scale`, as compressed-tensors has it
_MLX_MARKS = (".mlp.fc1_q", ".mlp.fc2_q")
_FOREIGN_PACKINGS = {  # ends of names that other quantisers leave, and who they are
    ".qweight": "GPTQ or AWQ",
    ".q_weight": "EXL2",
    ".weight_packed": "compressed-tensors, packed",
    ".weight_scale_inv": "FP8 by blocks",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".W_q": "HQQ",
}


def plain_name(stored: str) -> str:
    """Remove what carries no meaning from a stored name: a compiler's `._orig_mod`, the leading `model.`."""
    return stored.replace("._orig_mod.", ".").removeprefix("_orig_mod.").removeprefix("model.")


def detect_format(names: Collection[str], where: str) -> Format:
    """Return the layout of a file with these plain names; `where` is for the message.

    Raises:
        CheckpointError: MLX 4-bit, which is known and not read, or nothing that is known.
    """
    if any(name.endswith(_MLX_MARKS) for name in names):
        raise CheckpointError(
            f"{where} is a 4-bit MLX checkpoint (such as moondream/md3p-int4), which runs on Apple's MLX only; "
            f"use one of these formats instead: {FORMAT_NAMES}"
        )
    _refuse_foreign_packing(names, where)
    has_fp8_scales = any(".moe_quant." in name for name in names)
    if any(name.startswith("text_model.transformer.h.") for name in names):
        return Format.RAW_FP8 if has_fp8_scales else Format.RAW
    if any(name.startswith("text_model.layers.") for name in names):
        return Format.HF
    if any(name.startswith("text.blocks.") for name in names):
        if any(name.endswith(".weight.packed") for name in names):
            return Format.INT4
        if has_fp8_scales:
            return Format.ORIGINAL_FP8
        return Format.INT8 if any(name.endswith(f".weight{INT8_SCALE}") for name in names) else Format.ORIGINAL
    examples = ", ".join(sorted(names)[:3]) or "none"
    raise CheckpointError(
        f"{where} holds no Moondream 3 weights that are understood (formats: {FORMAT_NAMES}); "
        f"its first tensors: {examples}"
    )


def _refuse_foreign_packing(names: Collection[str], where: str) -> None:
    for name in names:
        for end, packing in _FOREIGN_PACKINGS.items():
            if name.endswith(end):
                raise CheckpointError(
                    f"{where}: tensor {name} is packed as by {packing}, which is not read; "
                    f"formats that are understood: {FORMAT_NAMES}"
                )


# -- config.json ----------------------------------------------------------------------------------


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_HF_TEXT_FIELDS = {
    "hidden_size": "dim",
    "intermediate_size": "ff_dim",
    "num_hidden_layers": "n_layers",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_context",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
}
_HF_MOE_FIELDS = {
    "num_experts": "num_experts",
    "moe_start_layer": "start_layer",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_inner_dim",
}
_HF_VISION_FIELDS = {
    "hidden_size": "enc_dim",
    "patch_size": "enc_patch_size",
    "num_hidden_layers": "enc_n_layers",
    "intermediate_size": "enc_ff_dim",
    "num_attention_heads": "enc_n_heads",
    **_same("proj_out_dim", "crop_size", "in_channels", "max_crops", "overlap_margin", "proj_inner_dim"),
}
_HF_REGION_FIELDS = {
    "hidden_size": "dim",
    **_same("coord_feat_dim", "coord_out_dim", "size_feat_dim", "size_out_dim"),
}
_HF_SECTIONS = {"text_config": _HF_TEXT_FIELDS, "vision_config": _HF_VISION_FIELDS, "region_config": _HF_REGION_FIELDS}
_MOE_ALIASES = {"n_experts": "num_experts", "n_experts_per_tok": "experts_per_token"}  # vLLM's words


def normalise_config(raw: object) -> JsonObject:
    """Return the sections `text vision region tokenizer` of a config.json in any of its layouts.

    Sections stand under `config`, at top level, or in the HF port's style; what is missing stays
    missing, so that `ModelConfig` takes its defaults. Values are not judged here.

    Raises:
        CheckpointError: the document, or a section of it, is no JSON object.
    """
    document = _object(raw, "the document")
    if any(key in document for key in _HF_SECTIONS):
        return _from_hf(document)
    inner = document.get("config")
    sections = document if inner is None else _object(inner, "config")
    result = {key: _object(sections[key], key) for key in SECTIONS if sections.get(key) is not None}
    text = result.get("text")
    if text is not None and text.get("moe") is not None:
        moe = _object(text["moe"], "text.moe")
        result["text"] = {**text, "moe": {_MOE_ALIASES.get(key, key): value for key, value in moe.items()}}
    return result


def _object(value: object, name: str) -> JsonObject:
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json: {name} is no JSON object; the file is damaged or not a Moondream 3 config")
    return value


def _renamed(section: Mapping[str, Any], fields: Mapping[str, str]) -> JsonObject:
    return {ours: section[theirs] for theirs, ours in fields.items() if section.get(theirs) is not None}


def _from_hf(document: JsonObject) -> JsonObject:
    raw = {key: _object(document.get(key) or {}, key) for key in _HF_SECTIONS}
    result: JsonObject = {
        key.removesuffix("_config"): _renamed(raw[key], fields) for key, fields in _HF_SECTIONS.items()
    }
    raw_text = raw["text_config"]
    moe = _renamed(raw_text, _HF_MOE_FIELDS)
    if moe:
        result["text"]["moe"] = moe
    elif "num_experts" in raw_text:  # null: all layers dense
        result["text"]["moe"] = None
    rope = raw_text.get("rope_parameters") or {}
    theta = _object(rope, "rope_parameters").get("rope_theta", raw_text.get("rope_theta"))
    if theta is not None:
        result["text"]["rope_theta"] = theta
    if document.get("tokenizer") is not None:  # the port has none; ours is kept there, so that templates survive
        result["tokenizer"] = _object(document["tokenizer"], "tokenizer")
    return result


def hf_config(sections: Mapping[str, Mapping[str, Any]]) -> JsonObject:
    """Return the HF port's config.json of complete sections: the inverse of `normalise_config`."""
    result: JsonObject = {"architectures": ["Moondream3ForConditionalGeneration"], "model_type": "moondream3"}
    for key, fields in _HF_SECTIONS.items():
        section = sections[key.removesuffix("_config")]
        result[key] = {theirs: section[ours] for theirs, ours in fields.items()}
    text, vision = sections["text"], sections["vision"]
    # Null would be read as the defaults: a dense model's sparse layers start behind its last one.
    dense = {"num_experts": 1, "start_layer": text["n_layers"], "experts_per_token": 1, "expert_inner_dim": 1}
    moe = text["moe"] or dense
    result["text_config"] |= {
        **{theirs: moe[ours] for theirs, ours in _HF_MOE_FIELDS.items()},
        "head_dim": text["dim"] // text["n_heads"],
        "attention_bias": True,
        "rms_norm_eps": 1e-5,  # of LayerNorms, despite the name
        "rope_parameters": {"rope_type": "default", "rope_theta": text["rope_theta"]},
    }
    result["vision_config"]["prefix_len"] = 1 + (vision["crop_size"] // vision["enc_patch_size"]) ** 2
    result["tokenizer"] = dict(sections["tokenizer"])
    return result
