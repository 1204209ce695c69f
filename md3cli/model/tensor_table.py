"""The tensors a Moondream 3 is made of: canonical names, shapes, and the part each belongs to.

Canonical names are the original checkpoint's without the leading `model.`; they are also the
keys of `Moondream3.state_dict()`. Everything here follows from the configuration alone, so a
file's header can be judged before a byte of its data is mapped. No torch.
Source: Moondream 3 specification, sections 1 and 19.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from md3cli.model.config import ModelConfig, RegionConfig, TextConfig, VisionConfig

Shape = tuple[int, ...]
_Entries = Iterator[tuple[str, Shape]]


class Part(StrEnum):
    """The rows of the specification's parameter table, in its order."""

    VISION = "vision"
    PROJECTION = "projection"
    EMBEDDING = "embedding"
    ATTENTION = "attention"
    TAU = "tau"
    DENSE = "dense"
    ROUTERS = "routers"
    EXPERTS = "experts"
    NORMS_HEAD = "norms and head"
    REGION = "region"


def _linear(name: str, rows: int, cols: int) -> _Entries:
    yield f"{name}.weight", (rows, cols)
    yield f"{name}.bias", (rows,)


def _layer_norm(name: str, width: int) -> _Entries:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _vision_tensors(v: VisionConfig) -> _Entries:
    grid = v.crop_size // v.enc_patch_size
    yield from _linear("vision.patch_emb", v.enc_dim, v.in_channels * v.enc_patch_size**2)
    yield "vision.pos_emb", (1, grid * grid, v.enc_dim)
    for n in range(v.enc_n_layers):
        block = f"vision.blocks.{n}"
        yield from _layer_norm(f"{block}.ln1", v.enc_dim)
        yield from _linear(f"{block}.attn.qkv", 3 * v.enc_dim, v.enc_dim)
        yield from _linear(f"{block}.attn.proj", v.enc_dim, v.enc_dim)
        yield from _layer_norm(f"{block}.ln2", v.enc_dim)
        yield from _linear(f"{block}.mlp.fc1", v.enc_ff_dim, v.enc_dim)
        yield from _linear(f"{block}.mlp.fc2", v.enc_dim, v.enc_ff_dim)
    yield from _layer_norm("vision.post_ln", v.enc_dim)
    yield from _linear("vision.proj_mlp.fc1", v.proj_inner_dim, 2 * v.enc_dim)  # global and pooled side by side
    yield from _linear("vision.proj_mlp.fc2", v.proj_out_dim, v.proj_inner_dim)


def _text_tensors(t: TextConfig) -> _Entries:
    qkv_dim = 3 * t.dim
    yield "text.wte", (t.vocab_size, t.dim)
    for n in range(t.n_layers):
        block = f"text.blocks.{n}"
        yield from _layer_norm(f"{block}.ln", t.dim)
        yield from _linear(f"{block}.attn.qkv", qkv_dim, t.dim)
        yield from _linear(f"{block}.attn.proj", t.dim, t.dim)
        yield f"{block}.attn.tau.wq", (t.n_heads, qkv_dim)
        yield f"{block}.attn.tau.wv", (t.n_heads, qkv_dim)
        yield f"{block}.attn.tau.alpha", (t.n_heads,)
        if t.moe is not None and n >= t.moe.start_layer:
            experts, inner = t.moe.num_experts, t.moe.expert_inner_dim
            yield from _linear(f"{block}.mlp.router", experts, t.dim)
            yield f"{block}.mlp.fc1.weight", (experts, 2 * inner, t.dim)
            yield f"{block}.mlp.fc2.weight", (experts, t.dim, inner)
        else:
            yield from _linear(f"{block}.mlp.fc1", t.ff_dim, t.dim)
            yield from _linear(f"{block}.mlp.fc2", t.dim, t.ff_dim)
    yield from _layer_norm("text.post_ln", t.dim)
    yield from _linear("text.lm_head", t.vocab_size, t.dim)


def _region_tensors(r: RegionConfig, has_region_ln: bool) -> _Entries:
    yield "region.coord_features", (1, r.coord_feat_dim // 2)  # half of the features: cos and sin share a frequency
    yield "region.size_features", (2, r.size_feat_dim // 2)
    yield from _linear("region.coord_encoder", r.dim, r.coord_feat_dim)
    yield from _linear("region.coord_decoder", r.coord_out_dim, r.dim)
    yield from _linear("region.size_encoder", r.dim, r.size_feat_dim)
    yield from _linear("region.size_decoder", r.size_out_dim, r.dim)
    if has_region_ln:
        yield from _layer_norm("region.ln", r.dim)


def expected_tensors(config: ModelConfig, *, has_region_ln: bool) -> dict[str, Shape]:
    """Canonical name to shape of every tensor a model of this configuration has, in reading order.

    `region.ln` exists in newer revisions of the weights only, so the caller says whether it does.
    """
    return {
        **dict(_vision_tensors(config.vision)),
        **dict(_text_tensors(config.text)),
        **dict(_region_tensors(config.region, has_region_ln)),
    }


def is_experts(name: str, shape: Shape) -> bool:
    """True for the stacked expert matrices; a dense `fc1.weight` has the same name but two dimensions."""
    return len(shape) == 3 and ".mlp." in name


def part_of(name: str, shape: Shape) -> Part:
    """The part of the model a canonical tensor belongs to."""
    if name.startswith("vision.proj_mlp."):
        return Part.PROJECTION
    if name.startswith("vision."):
        return Part.VISION
    if name.startswith("region."):
        return Part.REGION
    if name == "text.wte":
        return Part.EMBEDDING
    if ".attn.tau." in name:
        return Part.TAU
    if ".attn." in name:
        return Part.ATTENTION
    if ".mlp.router." in name:
        return Part.ROUTERS
    if ".mlp." in name:
        return Part.EXPERTS if is_experts(name, shape) else Part.DENSE
    return Part.NORMS_HEAD


def count_parameters(tensors: Mapping[str, Shape]) -> dict[Part, int]:
    """Parameters by part of a table such as `expected_tensors` gives."""
    counts = dict.fromkeys(Part, 0)
    for name, shape in tensors.items():
        counts[part_of(name, shape)] += prod(shape)
    return counts
