"""Opens a checkpoint folder of any published format as a `Network` (specification, sections 2 and 19).

Every tensor is widened to float32 under the original's name without `model.`; 8-bit and 4-bit
matrices become what they stand for.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from reference.network import Config, Network, Tensors

TEXT = {
    "dim": 2048,
    "ff_dim": 8192,
    "n_layers": 24,
    "vocab_size": 51200,
    "max_context": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "rope_theta": 1.5e6,
}
MOE = {"num_experts": 64, "start_layer": 4, "experts_per_token": 8, "expert_inner_dim": 1024}
VISION = {
    "enc_dim": 1152,
    "enc_patch_size": 14,
    "enc_n_layers": 27,
    "enc_ff_dim": 4304,
    "enc_n_heads": 16,
    "proj_out_dim": 2048,
    "crop_size": 378,
    "in_channels": 3,
    "max_crops": 12,
    "overlap_margin": 4,
    "proj_inner_dim": 8192,
}
REGION = {"dim": 2048, "coord_feat_dim": 256, "coord_out_dim": 1024, "size_feat_dim": 512, "size_out_dim": 2048}
TOKENIZER = {
    "bos_id": 0,
    "eos_id": 0,
    "answer_id": 3,
    "thinking_id": 4,
    "coord_id": 5,
    "size_id": 6,
    "start_ground_points_id": 7,
    "end_ground_id": 9,
}

HF_TEXT = {
    "dim": "hidden_size",
    "ff_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "max_context": "max_position_embeddings",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
}
HF_MOE = {
    "num_experts": "num_experts",
    "start_layer": "moe_start_layer",
    "experts_per_token": "num_experts_per_tok",
    "expert_inner_dim": "moe_intermediate_size",
}
HF_VISION = {
    "enc_dim": "hidden_size",
    "enc_patch_size": "patch_size",
    "enc_n_layers": "num_hidden_layers",
    "enc_ff_dim": "intermediate_size",
    "enc_n_heads": "num_attention_heads",
    "proj_out_dim": "proj_out_dim",
    "crop_size": "crop_size",
    "in_channels": "in_channels",
    "max_crops": "max_crops",
    "overlap_margin": "overlap_margin",
    "proj_inner_dim": "proj_inner_dim",
}


def complete(config: Config) -> Config:
    """The four sections with every field, defaults where the file is silent."""
    text = TEXT | config.get("text", {})
    text["moe"] = None if text.get("moe", {}) is None else MOE | text.get("moe", {})
    return {
        "text": text,
        "vision": VISION | config.get("vision", {}),
        "region": REGION | config.get("region", {}),
        "tokenizer": TOKENIZER | config.get("tokenizer", {}),
    }


def config_of_hf_port(document: dict) -> Config:
    theirs = document["text_config"]
    text = {ours: theirs[name] for ours, name in HF_TEXT.items()}
    text["rope_theta"] = theirs["rope_parameters"]["rope_theta"]
    text["moe"] = {ours: theirs[name] for ours, name in HF_MOE.items()}
    vision = {ours: document["vision_config"][name] for ours, name in HF_VISION.items()}
    region = {name: document["region_config"][name] for name in REGION if name != "dim"}
    return {
        "text": text,
        "vision": vision,
        "region": region | {"dim": document["region_config"]["hidden_size"]},
        "tokenizer": document.get("tokenizer", {}),
    }


def read_config(folder: Path) -> Config:
    document = json.loads((folder / "config.json").read_text())
    if "text_config" in document:
        return complete(config_of_hf_port(document))
    return complete(document.get("config", document))


# -- names -----------------------------------------------------------------------------------------

RAW_NAMES = [
    (r"^text_model\.transformer\.embd\.wte\.weight$", "text.wte"),
    (r"^text_model\.transformer\.h\.(\d+)\.mixer\.Wqkv", r"text.blocks.\1.attn.qkv"),
    (r"^text_model\.transformer\.h\.(\d+)\.mixer\.out_proj", r"text.blocks.\1.attn.proj"),
    (r"^text_model\.transformer\.h\.(\d+)\.tau_", r"text.blocks.\1.attn.tau."),
    (r"^text_model\.transformer\.h\.(\d+)\.gate\.", r"text.blocks.\1.mlp.router."),
    (r"^text_model\.transformer\.h\.(\d+)\.mlp\.experts\.", r"text.blocks.\1.mlp.fc1."),
    (r"^text_model\.transformer\.h\.(\d+)\.mlp\.output_experts\.", r"text.blocks.\1.mlp.fc2."),
    (r"^text_model\.transformer\.h\.(\d+)\.", r"text.blocks.\1."),
    (r"^text_model\.lm_head\.ln\.", "text.post_ln."),
    (r"^text_model\.lm_head\.linear\.", "text.lm_head."),
    (r"^vision_encoder\.encoder\.model\.visual\.patch_embed\.linear\.", "vision.patch_emb."),
    (r"^vision_encoder\.encoder\.model\.visual\.pos_embed$", "vision.pos_emb"),
    (r"^vision_encoder\.encoder\.model\.visual\.blocks\.(\d+)\.norm([12])\.", r"vision.blocks.\1.ln\2."),
    (r"^vision_encoder\.encoder\.model\.visual\.norm\.", "vision.post_ln."),
    (r"^vision_encoder\.encoder\.model\.visual\.", "vision."),
    (r"^vision_encoder\.projection\.mlp\.", "vision.proj_mlp."),
    (r"^region_model\.coordinate_features\.weight$", "region.coord_features"),
    (r"^region_model\.size_features\.weight$", "region.size_features"),
    (r"^region_model\.coordinate_encoder\.", "region.coord_encoder."),
    (r"^region_model\.coordinate_head\.", "region.coord_decoder."),
    (r"^region_model\.size_head\.", "region.size_decoder."),
    (r"^region_model\.", "region."),
]

HF_NAMES = [
    (r"^lm_head\.", "text.lm_head."),
    (r"^model\.text_model\.embed_tokens\.weight$", "text.wte"),
    (r"^model\.text_model\.norm\.", "text.post_ln."),
    (r"^model\.text_model\.layers\.(\d+)\.input_layernorm\.", r"text.blocks.\1.ln."),
    (r"^model\.text_model\.layers\.(\d+)\.self_attn\.o_proj\.", r"text.blocks.\1.attn.proj."),
    (r"^model\.text_model\.layers\.(\d+)\.self_attn\.tau_(w[qv])\.weight$", r"text.blocks.\1.attn.tau.\2"),
    (r"^model\.text_model\.layers\.(\d+)\.self_attn\.tau_alpha$", r"text.blocks.\1.attn.tau.alpha"),
    (r"^model\.text_model\.layers\.(\d+)\.mlp\.gate\.", r"text.blocks.\1.mlp.router."),
    (r"^model\.text_model\.layers\.(\d+)\.mlp\.up_proj\.", r"text.blocks.\1.mlp.fc1."),
    (r"^model\.text_model\.layers\.(\d+)\.mlp\.down_proj\.", r"text.blocks.\1.mlp.fc2."),
    (r"^model\.vision_model\.embeddings\.projection\.", "vision.patch_emb."),
    (r"^model\.vision_model\.embeddings\.position_embeddings$", "vision.pos_emb"),
    (r"^model\.vision_model\.layers\.(\d+)\.input_layernorm\.", r"vision.blocks.\1.ln1."),
    (r"^model\.vision_model\.layers\.(\d+)\.post_attention_layernorm\.", r"vision.blocks.\1.ln2."),
    (r"^model\.vision_model\.layers\.(\d+)\.self_attn\.o_proj\.", r"vision.blocks.\1.attn.proj."),
    (r"^model\.vision_model\.layers\.(\d+)\.mlp\.up_proj\.", r"vision.blocks.\1.mlp.fc1."),
    (r"^model\.vision_model\.layers\.(\d+)\.mlp\.down_proj\.", r"vision.blocks.\1.mlp.fc2."),
    (r"^model\.vision_model\.post_layernorm\.", "vision.post_ln."),
    (r"^model\.vision_model\.vision_projection\.up_proj\.", "vision.proj_mlp.fc1."),
    (r"^model\.vision_model\.vision_projection\.down_proj\.", "vision.proj_mlp.fc2."),
    (r"^model\.region_encoder\.(coord|size)_freq$", r"region.\1_features"),
    (r"^model\.region_(?:en|de)coder\.", "region."),
]


def renamed(tensors: Tensors, rules: list[tuple[str, str]]) -> Tensors:
    """Each name by the first rule that matches it; a name that no rule matches is an error."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            new, hits = re.subn(pattern, replacement, name)
            if hits:
                out[new] = tensor
                break
        else:
            raise KeyError(name)
    return out


def from_raw(tensors: Tensors) -> Tensors:
    out = renamed(tensors, RAW_NAMES)
    for name in [name for name in out if name.endswith(".tau.wqwv")]:
        stem = name.removesuffix("wqwv")
        out[f"{stem}wq"], out[f"{stem}wv"] = out.pop(name).chunk(2, dim=0)
    for name in ("region.coord_features", "region.size_features"):
        out[name] = out[name].T
    return out


def joined_thirds(tensors: Tensors) -> Tensors:
    """`….self_attn.{q,k,v}_proj` joined to the canonical `….attn.qkv`; the rest untouched."""
    rest, thirds = {}, {}
    for name, tensor in tensors.items():
        found = re.match(r"^model\.(text|vision)_model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)$", name)
        if found is None:
            rest[name] = tensor
            continue
        part, layer, letter, leaf = found.groups()
        thirds.setdefault(f"{part}.blocks.{layer}.attn.qkv.{leaf}", {})[letter] = tensor
    joined = {name: torch.cat([three["q"], three["k"], three["v"]]) for name, three in thirds.items()}
    return joined | renamed(rest, HF_NAMES)


def from_hf_port(tensors: Tensors) -> Tensors:
    rest, experts = {}, {}
    for name, tensor in tensors.items():
        found = re.match(r"^model\.text_model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(up|gate|down)_proj\.weight$", name)
        if found is None:
            rest[name] = tensor
            continue
        layer, number, matrix = found.groups()
        experts.setdefault(layer, {}).setdefault(int(number), {})[matrix] = tensor
    out = joined_thirds(rest)
    for layer, by_number in experts.items():
        each = [by_number[number] for number in range(len(by_number))]
        out[f"text.blocks.{layer}.mlp.fc1.weight"] = torch.stack([torch.cat([e["up"], e["gate"]]) for e in each])
        out[f"text.blocks.{layer}.mlp.fc2.weight"] = torch.stack([e["down"] for e in each])
    return out


# -- quantised storage -----------------------------------------------------------------------------


def dequantised_fp8(tensors: Tensors) -> Tensors:
    """Experts times their row scales; scales and the optional K/V scales disappear."""
    out = {
        name: tensor for name, tensor in tensors.items() if ".moe_quant." not in name and ".kv_quantizer." not in name
    }
    for name, scale in tensors.items():
        found = re.match(r"^(.*)\.moe_quant\.(up|down)_scale$", name)
        if found:
            target = f"{found[1]}.mlp.{'fc1' if found[2] == 'up' else 'fc2'}.weight"
            out[target] = out[target].float() * scale[:, :, None]
    return out


def unpacked_int4(packed: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Groups of the flattened matrix: high nibbles are the first half of the groups, low the second."""
    quants = torch.cat([packed >> 4, packed & 15]).float()
    return ((quants - zero_point) * scale).reshape(-1)


def int4_shape(name: str, config: Config) -> tuple[int, ...]:
    """The shape a packed matrix had; the file does not say."""
    text, region = config["text"], config["region"]
    dim = text["dim"]
    found = re.match(r"^text\.blocks\.(\d+)\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.weight$", name)
    if found is None:
        return {
            "region.coord_encoder.weight": (dim, region["coord_feat_dim"]),
            "region.coord_decoder.weight": (region["coord_out_dim"], dim),
            "region.size_encoder.weight": (dim, region["size_feat_dim"]),
            "region.size_decoder.weight": (region["size_out_dim"], dim),
        }[name]
    if found[2].startswith("attn"):
        return (3 * dim, dim) if found[2] == "attn.qkv" else (dim, dim)
    moe = text["moe"]
    if moe is None or int(found[1]) < moe["start_layer"]:
        return (text["ff_dim"], dim) if found[2] == "mlp.fc1" else (dim, text["ff_dim"])
    inner = moe["expert_inner_dim"]
    return (moe["num_experts"], 2 * inner, dim) if found[2] == "mlp.fc1" else (moe["num_experts"], dim, inner)


def dequantised_int4(tensors: Tensors, config: Config) -> Tensors:
    out = {name: t for name, t in tensors.items() if not re.search(r"\.weight\.(packed|scale|zero_point)$", name)}
    for name in [name for name in tensors if name.endswith(".weight.packed")]:
        weight = name.removesuffix(".packed")
        parts = (tensors[f"{weight}.{part}"] for part in ("packed", "scale", "zero_point"))
        out[weight] = unpacked_int4(*parts).reshape(int4_shape(weight, config))
    return out


def dequantised_int8(tensors: Tensors) -> Tensors:
    """Codes times the scale of their row; not a published format, but md3's own."""
    out = {name: tensor for name, tensor in tensors.items() if not name.endswith(".weight_scale")}
    for name, scale in tensors.items():
        if name.endswith(".weight_scale"):
            weight = name.removesuffix("_scale")
            assert out[weight].dtype is torch.int8, weight
            out[weight] = out[weight].float() * scale
    return out


# -- the door --------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {name.replace("._orig_mod", ""): tensor for name, tensor in tensors.items()}


def read_network(folder: Path) -> Network:
    config = read_config(folder)
    tensors = read_tensors(folder)
    if any(name.startswith("text_model.") for name in tensors):
        tensors = from_raw(tensors)
    elif any(name.startswith("model.text_model.") for name in tensors):
        tensors = from_hf_port(tensors)
    else:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tensors = dequantised_int8(dequantised_int4(dequantised_fp8(tensors), config))
    return Network(config, {name: tensor.float() for name, tensor in tensors.items()})
