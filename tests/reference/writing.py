"""Writes a network's tensors as a checkpoint folder in any published format (specification, section 19).

Weights are stored as bfloat16, scales and zero points as float32. What a quantised format loses is
lost here; `reading` says what the folder stands for.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from reference.network import Config, Network, Tensors
from reference.reading import HF_MOE, HF_TEXT, HF_VISION

TOKENIZER = Path(__file__).parents[1] / "golden" / "case-a" / "checkpoint" / "tokenizer.json"
FORMATS = ("original", "original-single", "original-fp8", "raw", "raw-fused", "raw-fp8", "hf-port", "int4")
FP8_MAX = 448.0
INT4_GROUP = 128


def formats_of(config: Config) -> tuple[str, ...]:
    """The formats that can hold this model: 8-bit ones store experts only."""
    return FORMATS if config["text"]["moe"] else tuple(name for name in FORMATS if not name.endswith("fp8"))


def write_checkpoint(network: Network, folder: Path, form: str, shape_seed: int = 0) -> Path:
    """Write `folder` (made here) in `form`; `shape_seed` draws how tensors fall to shards."""
    folder.mkdir(parents=True)
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps(config_document(network.config, form), indent=1))
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in network.tensors.items()}
    if form.endswith("fp8"):
        stored = with_fp8_experts(stored, network.tensors)
    if form == "int4":
        stored = with_int4_matrices(stored, network.tensors)
    if form.startswith("raw"):
        stored = raw_names(stored, fused_tau=form != "raw")
    elif form == "hf-port":
        stored = hf_names(stored)
    elif form != "original-single":
        stored = {f"model.{name}": tensor for name, tensor in stored.items()}
    if form == "raw-fp8":  # as a compiler and an 8-bit K/V cache leave them
        stored = {name.replace(".mixer.", ".mixer._orig_mod."): tensor for name, tensor in stored.items()}
        for kind in ("k_scale", "v_scale"):
            stored[f"text_model.transformer.h.0.kv_quantizer.{kind}"] = torch.tensor(0.5)
    if form in ("original", "original-fp8"):
        write_shards(stored, folder, random.Random(shape_seed))
    else:
        write_file(stored, folder / "model.safetensors")
    return folder


def write_file(tensors: Tensors, path: Path) -> None:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def write_shards(tensors: Tensors, folder: Path, rng: random.Random) -> None:
    count = rng.randint(2, 4)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    homes = {name: names[i] if i < count else rng.choice(names) for i, name in enumerate(sorted(tensors))}
    for shard in names:
        write_file({name: tensors[name] for name in tensors if homes[name] == shard}, folder / shard)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# -- config ----------------------------------------------------------------------------------------


def config_document(config: Config, form: str) -> dict:
    """The sections under `config`, at top level (single file), or as the HF port has them."""
    if form == "hf-port":
        return hf_document(config)
    if form == "int4":
        grouped = {part: config[part] | {"group_size": INT4_GROUP} for part in ("text", "region")}
        return {"model_type": "moondream3", "config": config | grouped}
    if form == "original-single":
        return {"model_type": "moondream3", "unknown": {"key": 1}, **config}
    return {"architectures": ["HfMoondream"], "model_type": "moondream3", "config": config}


def hf_document(config: Config) -> dict:
    text, region = config["text"], config["region"]
    moe = text["moe"] or {
        "num_experts": 1,
        "start_layer": text["n_layers"],
        "experts_per_token": 1,
        "expert_inner_dim": 8,
    }
    theirs = {name: text[ours] for ours, name in HF_TEXT.items()} | {name: moe[ours] for ours, name in HF_MOE.items()}
    theirs |= {"head_dim": 64, "attention_bias": True, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 0}
    theirs["rope_parameters"] = {"rope_type": "default", "rope_theta": text["rope_theta"]}
    vision = {name: config["vision"][ours] for ours, name in HF_VISION.items()}
    side = config["vision"]["crop_size"] // config["vision"]["enc_patch_size"]
    return {
        "architectures": ["Moondream3ForConditionalGeneration"],
        "model_type": "moondream3",
        "text_config": theirs,
        "vision_config": vision | {"prefix_len": 1 + side**2},
        "region_config": {"hidden_size": region["dim"]} | {name: region[name] for name in region if name != "dim"},
        "tokenizer": config["tokenizer"],
    }


# -- quantised storage -----------------------------------------------------------------------------


def with_fp8_experts(stored: Tensors, exact: Tensors) -> Tensors:
    out = dict(stored)
    for name, weight in exact.items():
        found = re.match(r"^(text\.blocks\.\d+)\.mlp\.fc([12])\.weight$", name)
        if found and weight.ndim == 3:
            scale = weight.abs().amax(dim=-1) / FP8_MAX
            out[name] = (weight / scale[:, :, None]).to(torch.float8_e4m3fn)
            out[f"{found[1]}.moe_quant.{'up' if found[2] == '1' else 'down'}_scale"] = scale
    return out


def packed_int4(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.reshape(-1, INT4_GROUP)
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    scale = (high - low) / 15
    zero_point = -low / scale
    quants = (groups / scale + zero_point).round().clamp(0, 15).to(torch.uint8)
    first, second = quants.chunk(2)
    return {"packed": (first << 4) | second, "scale": scale, "zero_point": zero_point}


def with_int4_matrices(stored: Tensors, exact: Tensors) -> Tensors:
    out = dict(stored)
    matrices = r"^(text\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])|region\.(coord|size)_(en|de)coder)\.weight$"
    for name, weight in exact.items():
        if re.match(matrices, name):
            del out[name]
            out |= {f"{name}.{part}": tensor for part, tensor in packed_int4(weight).items()}
    return out


# -- names -----------------------------------------------------------------------------------------

VISUAL = "vision_encoder.encoder.model.visual"
TO_RAW = [
    (r"^text\.wte$", "text_model.transformer.embd.wte.weight"),
    (r"^text\.blocks\.(\d+)\.attn\.qkv\.", r"text_model.transformer.h.\1.mixer.Wqkv."),
    (r"^text\.blocks\.(\d+)\.attn\.proj\.", r"text_model.transformer.h.\1.mixer.out_proj."),
    (r"^text\.blocks\.(\d+)\.attn\.tau\.", r"text_model.transformer.h.\1.tau_"),
    (r"^text\.blocks\.(\d+)\.mlp\.router\.", r"text_model.transformer.h.\1.gate."),
    (r"^text\.blocks\.", "text_model.transformer.h."),
    (r"^text\.post_ln\.", "text_model.lm_head.ln."),
    (r"^text\.lm_head\.", "text_model.lm_head.linear."),
    (r"^vision\.patch_emb\.", f"{VISUAL}.patch_embed.linear."),
    (r"^vision\.pos_emb$", f"{VISUAL}.pos_embed"),
    (r"^vision\.blocks\.(\d+)\.ln([12])\.", rf"{VISUAL}.blocks.\1.norm\2."),
    (r"^vision\.blocks\.", f"{VISUAL}.blocks."),
    (r"^vision\.post_ln\.", f"{VISUAL}.norm."),
    (r"^vision\.proj_mlp\.", "vision_encoder.projection.mlp."),
    (r"^region\.coord_features$", "region_model.coordinate_features.weight"),
    (r"^region\.size_features$", "region_model.size_features.weight"),
    (r"^region\.coord_encoder\.", "region_model.coordinate_encoder."),
    (r"^region\.coord_decoder\.", "region_model.coordinate_head."),
    (r"^region\.size_decoder\.", "region_model.size_head."),
    (r"^region\.", "region_model."),
]
TO_HF = [
    (r"^text\.wte$", "model.text_model.embed_tokens.weight"),
    (r"^text\.blocks\.(\d+)\.ln\.", r"model.text_model.layers.\1.input_layernorm."),
    (r"^text\.blocks\.(\d+)\.attn\.proj\.", r"model.text_model.layers.\1.self_attn.o_proj."),
    (r"^text\.blocks\.(\d+)\.attn\.tau\.(w[qv])$", r"model.text_model.layers.\1.self_attn.tau_\2.weight"),
    (r"^text\.blocks\.(\d+)\.attn\.tau\.alpha$", r"model.text_model.layers.\1.self_attn.tau_alpha"),
    (r"^text\.blocks\.(\d+)\.mlp\.router\.", r"model.text_model.layers.\1.mlp.gate."),
    (r"^text\.blocks\.(\d+)\.mlp\.fc1\.", r"model.text_model.layers.\1.mlp.up_proj."),
    (r"^text\.blocks\.(\d+)\.mlp\.fc2\.", r"model.text_model.layers.\1.mlp.down_proj."),
    (r"^text\.post_ln\.", "model.text_model.norm."),
    (r"^text\.lm_head\.", "lm_head."),
    (r"^vision\.patch_emb\.", "model.vision_model.embeddings.projection."),
    (r"^vision\.pos_emb$", "model.vision_model.embeddings.position_embeddings"),
    (r"^vision\.blocks\.(\d+)\.ln1\.", r"model.vision_model.layers.\1.input_layernorm."),
    (r"^vision\.blocks\.(\d+)\.ln2\.", r"model.vision_model.layers.\1.post_attention_layernorm."),
    (r"^vision\.blocks\.(\d+)\.attn\.proj\.", r"model.vision_model.layers.\1.self_attn.o_proj."),
    (r"^vision\.blocks\.(\d+)\.mlp\.fc1\.", r"model.vision_model.layers.\1.mlp.up_proj."),
    (r"^vision\.blocks\.(\d+)\.mlp\.fc2\.", r"model.vision_model.layers.\1.mlp.down_proj."),
    (r"^vision\.post_ln\.", "model.vision_model.post_layernorm."),
    (r"^vision\.proj_mlp\.fc1\.", "model.vision_model.vision_projection.up_proj."),
    (r"^vision\.proj_mlp\.fc2\.", "model.vision_model.vision_projection.down_proj."),
    (r"^region\.(coord|size)_features$", r"model.region_encoder.\1_freq"),
    (r"^region\.(coord|size)_encoder\.", r"model.region_encoder.\1_encoder."),
    (r"^region\.(coord|size)_decoder\.", r"model.region_decoder.\1_decoder."),
]


def name_by(rules: list[tuple[str, str]], name: str) -> str:
    for pattern, replacement in rules:
        new, hits = re.subn(pattern, replacement, name)
        if hits:
            return new
    raise KeyError(name)


def raw_names(tensors: Tensors, fused_tau: bool) -> Tensors:
    tensors = dict(tensors)
    if fused_tau:
        for stem in [name.removesuffix("wq") for name in tensors if name.endswith(".tau.wq")]:
            tensors[f"{stem}wqwv"] = torch.cat([tensors.pop(f"{stem}wq"), tensors.pop(f"{stem}wv")])
    out: Tensors = {}
    for name, tensor in tensors.items():
        raw = name_by(TO_RAW, name)
        if tensor.ndim == 3 and ".mlp.fc" in raw:
            raw = raw.replace(".mlp.fc1.", ".mlp.experts.").replace(".mlp.fc2.", ".mlp.output_experts.")
        out[raw] = tensor.T if name.endswith("_features") else tensor
    return out


def hf_names(tensors: Tensors) -> Tensors:
    out: Tensors = {}
    for name, tensor in tensors.items():
        attention = re.match(r"^(text|vision)\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)$", name)
        if attention:
            part, layer, leaf = attention.groups()
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                out[f"model.{part}_model.layers.{layer}.self_attn.{letter}_proj.{leaf}"] = third
        elif tensor.ndim == 3 and ".mlp." in name:
            out |= hf_experts(name, tensor)
        elif not name.startswith("region.ln."):
            out[name_by(TO_HF, name)] = tensor
    return out


def hf_experts(name: str, matrices: Tensor) -> Tensors:
    layer = name.split(".")[2]
    out: Tensors = {}
    for number, matrix in enumerate(matrices):
        stem = f"model.text_model.layers.{layer}.mlp.experts.{number}"
        if ".fc2." in name:
            out[f"{stem}.down_proj.weight"] = matrix
        else:
            out[f"{stem}.up_proj.weight"], out[f"{stem}.gate_proj.weight"] = matrix.chunk(2)
    return out
