"""A checkpoint judged by its headers: its layout, its configuration, and the recipe of every tensor.

Everything that can be wrong with a checkpoint is found here, before anything is allocated. The layout is decided by
tensor names, never by file names; config.json comes in several styles and becomes four sections; names, dtypes and
shapes of the files are compared with the table that follows from the configuration. No torch.
Source: Moondream 3 specification, sections 2 and 19.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md3cli.errors import CheckpointError
from md3cli.model.network.config import ModelConfig
from md3cli.model.weights.files import JsonObject, TensorEntry, WeightFiles, find_weight_files, listing, read_json
from md3cli.model.weights.names import (
    INT4_GROUP,
    INT8_SCALE,
    Format,
    Slot,
    StoredTensor,
    expected_tensors,
    has_region_ln,
    is_ignorable,
    slots,
)

SECTIONS = ("text", "vision", "region", "tokenizer")
FORMAT_NAMES = ", ".join(Format)
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
_ADVICE = {
    "bitsandbytes": "the transformers classes read it (md3cli.model.hf); elsewhere take the checkpoint it was "
    "packed from, with --quant int8 or int4"
}
_NAME_LIMIT_CHARS = 160  # a file may call its tensors anything
QUANT_METHOD = "md3"  # of `quantization_config`; the other words there are those of compressed-tensors
INT8_WEIGHTS: Mapping[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """How a checkpoint becomes a model: every canonical tensor is in `slots`, every file entry accounted for."""

    files: WeightFiles
    layout: Format
    config: ModelConfig
    has_region_ln: bool
    slots: tuple[Slot, ...]


def read_config(files: WeightFiles) -> ModelConfig:
    """Return the configuration beside the weights; the real model's where there is none, as the original does.

    Raises:
        CheckpointError: damaged, or sizes outside what any model has.
    """
    if files.config_file is None:
        return ModelConfig()
    document = read_json(files.config_file)
    _check_quantization(document, files.config_file)
    return ModelConfig.from_sections(normalise_config(document))


def _check_quantization(document: Mapping[str, Any], file: Path) -> None:
    """Refuse what a config says about codes but int8 by row: int4 and fp8 are told by the tensors' names."""
    inner = document.get("config")
    for place in (document, inner if isinstance(inner, dict) else {}):
        scheme = place.get("quantization_config")
        if scheme is None:
            continue
        method = scheme.get("quant_method") if isinstance(scheme, dict) else scheme
        groups = scheme.get("config_groups") if isinstance(scheme, dict) else None
        if method != QUANT_METHOD or not isinstance(groups, dict):
            raise CheckpointError(
                f"{file}: quantization_config of {str(method)[:40]!r} is not read; "
                f"formats that are understood: {FORMAT_NAMES}"
            )
        for name, group in groups.items():
            weights = group.get("weights") if isinstance(group, dict) else None
            if not isinstance(weights, dict) or any(weights.get(key) != INT8_WEIGHTS[key] for key in INT8_WEIGHTS):
                raise CheckpointError(
                    f"{file}: quantization_config stores {str(name)[:40]} as {str(weights)[:160]}; "
                    f"only {dict(INT8_WEIGHTS)} is understood"
                )


def plan_checkpoint(path: Path) -> CheckpointPlan:
    """Judge the checkpoint at `path` (a folder or a .safetensors file) by its headers.

    Raises:
        CheckpointError: it cannot be loaded; one message that names the tensors at fault.
    """
    files = find_weight_files(path)
    layout = detect_format(files.entries.keys(), str(path))
    config = read_config(files)
    if layout is Format.INT4 and config.text.group_size not in (None, INT4_GROUP):
        raise CheckpointError(
            f"{path}: 4-bit weights in groups of {config.text.group_size}; only groups of {INT4_GROUP} are understood"
        )
    has_ln = has_region_ln(files.entries.keys())
    recipes = tuple(slots(expected_tensors(config, has_region_ln=has_ln), layout, files.entries.keys()))
    plan = CheckpointPlan(files, layout, config, has_ln, recipes)
    _check(plan, path)
    return plan


def _check(plan: CheckpointPlan, path: Path) -> None:
    entries = plan.files.entries
    needed = {part.name: part for slot in plan.slots for part in slot.parts}
    missing = [name for name in needed if name not in entries]
    extra = [name for name in entries if name not in needed and not is_ignorable(name)]
    found = [(entries[name], part) for name, part in needed.items() if name in entries]
    misshapen = [_shape_fault(entry, part) for entry, part in found if entry.shape != part.shape]
    mistyped = [
        _dtype_fault(entry, part)
        for entry, part in found
        if entry.shape == part.shape and entry.dtype not in part.dtypes
    ]
    faults = [
        _fault("missing", missing),
        _fault("not known", extra),
        _fault("of another shape", misshapen),
        _fault("of another dtype", mistyped),
    ]
    if any(faults):
        assumed = "" if plan.files.config_file else " (no config.json beside it: the real model's sizes were assumed)"
        raise CheckpointError(
            f"{path}: format {plan.layout} (of {FORMAT_NAMES}), but its tensors do not make the model of its "
            f"config.json{assumed}: " + "; ".join(filter(None, faults))
        )


def _shape_fault(entry: TensorEntry, part: StoredTensor) -> str:
    text = f"{part.name} is {list(entry.shape)}, expected {list(part.shape)}"
    if part.name.endswith(".packed") and len(entry.shape) == 2 and entry.shape[1] != INT4_GROUP:
        text += f" (groups of {entry.shape[1]}; only groups of {INT4_GROUP} are understood)"
    return text


def _dtype_fault(entry: TensorEntry, part: StoredTensor) -> str:
    text = f"{part.name} is {entry.dtype}, expected {' or '.join(sorted(part.dtypes))}"
    if entry.dtype == "I8":
        text += f" (its scales, {part.name}{INT8_SCALE}, are missing)"
    return text


def _fault(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind}: {listing([name[:_NAME_LIMIT_CHARS] for name in names])}" if names else ""


# -- the layout ------------------------------------------------------------------------------------


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
                advice = _ADVICE.get(packing, f"formats that are understood: {FORMAT_NAMES}")
                raise CheckpointError(f"{where}: tensor {name} is packed as by {packing}, which is not read; {advice}")


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
