"""What each checkpoint layout calls the model's tensors, and how its tensors make ours: one table, both ways.

Canonical names are the original checkpoint's without the leading `model.`, and the keys of
`Moondream3.state_dict()`. They and their shapes follow from the configuration alone, so a file's header can be
judged before a byte of its data is mapped. A `Slot` is one canonical tensor with its recipe: the stored tensors it is
made of and the way they are put together. Reading follows the recipe forwards, writing backwards (`read.py`).
All names here are plain: without `model.` (`plain_name`); `stored_name` puts it back. No torch, no files.
Source: Moondream 3 specification, sections 1 and 19.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from math import prod
from typing import TYPE_CHECKING

from md3cli.errors import CheckpointError

if TYPE_CHECKING:
    from md3cli.model.network.config import ModelConfig, RegionConfig, TextConfig, VisionConfig


Shape = tuple[int, ...]
_Entries = Iterator[tuple[str, Shape]]


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
    """Return the shape of every tensor of a model by canonical name, in the order they are read.

    `region.ln` exists in newer revisions of the weights only, so the caller says whether it does.
    """
    return {
        **dict(_vision_tensors(config.vision)),
        **dict(_text_tensors(config.text)),
        **dict(_region_tensors(config.region, has_region_ln)),
    }


def is_experts(name: str, shape: Shape) -> bool:
    """Return True for a stack of expert matrices; a dense `fc1.weight` has the same name but two dimensions."""
    return len(shape) == 3 and ".mlp." in name


def part_of(name: str, shape: Shape) -> Part:
    """Return the part of the model that a canonical tensor belongs to."""
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


INT8_SCALE = "_scale"  # behind the name of a matrix stored in int8: `X.weight_scale`, as compressed-tensors has it
INT4_GROUP = 128  # the original scheme knows no other
FLOATS = frozenset({"BF16", "F16", "F32"})
FP8 = frozenset({"F8_E4M3"})
BYTES = frozenset({"U8"})
INT8 = frozenset({"I8"})
REGION_LN = ("region.ln.weight", "region.ln.bias")

# Canonical, raw, HF port: first the group's prefixes, then the names under them. {} is the layer; a
# trailing * stands for .weight and .bias.
_GROUPS = (
    (
        ("text.blocks.{}.", "text_model.transformer.h.{}.", "text_model.layers.{}."),
        """
        ln*             ln*             input_layernorm*
        attn.qkv*       mixer.Wqkv*     self_attn.qkv*
        attn.proj*      mixer.out_proj* self_attn.o_proj*
        attn.tau.wq     tau_wq          self_attn.tau_wq.weight
        attn.tau.wv     tau_wv          self_attn.tau_wv.weight
        attn.tau.alpha  tau_alpha       self_attn.tau_alpha
        mlp.fc1*        mlp.fc1*        mlp.up_proj*
        mlp.fc2*        mlp.fc2*        mlp.down_proj*
        mlp.router*     gate*           mlp.gate*
        """,
    ),
    (
        ("text.", "text_model.", ""),
        """
        wte       transformer.embd.wte.weight  text_model.embed_tokens.weight
        post_ln*  lm_head.ln*                  text_model.norm*
        lm_head*  lm_head.linear*              lm_head*
        """,
    ),
    (
        ("vision.blocks.{}.", "vision_encoder.encoder.model.visual.blocks.{}.", "vision_model.layers.{}."),
        """
        ln1*        norm1*      input_layernorm*
        ln2*        norm2*      post_attention_layernorm*
        attn.qkv*   attn.qkv*   self_attn.qkv*
        attn.proj*  attn.proj*  self_attn.o_proj*
        mlp.fc1*    mlp.fc1*    mlp.up_proj*
        mlp.fc2*    mlp.fc2*    mlp.down_proj*
        """,
    ),
    (
        ("vision.", "vision_encoder.", "vision_model."),
        """
        patch_emb*     encoder.model.visual.patch_embed.linear*  embeddings.projection*
        pos_emb        encoder.model.visual.pos_embed            embeddings.position_embeddings
        post_ln*       encoder.model.visual.norm*                post_layernorm*
        proj_mlp.fc1*  projection.mlp.fc1*                       vision_projection.up_proj*
        proj_mlp.fc2*  projection.mlp.fc2*                       vision_projection.down_proj*
        """,
    ),
    (
        ("region.", "region_model.", "region_"),
        """
        coord_features  coordinate_features.weight  encoder.coord_freq
        size_features   size_features.weight        encoder.size_freq
        coord_encoder*  coordinate_encoder*         encoder.coord_encoder*
        coord_decoder*  coordinate_head*            decoder.coord_decoder*
        size_encoder*   size_encoder*               encoder.size_encoder*
        size_decoder*   size_head*                  decoder.size_decoder*
        ln*             ln*                         -
        """,
    ),
)
_RAW_EXPERTS = {"fc1": "mlp.experts.weight", "fc2": "mlp.output_experts.weight"}
_FP8_SCALES = {"fc1": "up_scale", "fc2": "down_scale"}
# "up" is the half that is activated, "gate" the half that gets + 1: the reverse of common usage.
_HF_EXPERTS = {"fc1": ("up_proj", "gate_proj"), "fc2": ("down_proj",)}
_HF_TOP_LEVEL = ("lm_head.",)  # all other names of the HF port start with model.


class Recipe(Enum):
    """How the stored tensors make the canonical one."""

    COPY = auto()
    TRANSPOSE = auto()  # of two dimensions
    CONCAT = auto()  # along the first dimension, all parts
    FIRST_HALF = auto()  # rows of one stored tensor that two slots share
    SECOND_HALF = auto()
    STACK_EXPERTS = auto()  # per expert: its parts one above the other; then stacked
    FP8 = auto()  # weight, scale per row
    INT4 = auto()  # packed, scale, zero point
    INT8 = auto()  # weight, scale per row

    @property
    def is_low_bit(self) -> bool:
        """True where the tensor is stored as codes of 8 or 4 bits."""
        return self in (Recipe.FP8, Recipe.INT4, Recipe.INT8)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a layout stores it; `dtypes` in the safetensors spelling."""

    name: str
    shape: Shape
    dtypes: frozenset[str] = FLOATS


@dataclass(frozen=True, slots=True)
class Slot:
    """One canonical tensor and what it is made of."""

    name: str
    shape: Shape
    recipe: Recipe
    parts: tuple[StoredTensor, ...]


def _read_names() -> tuple[dict[str, str], dict[str, str]]:
    """Write the groups out: canonical name -> raw name, and canonical name -> HF name."""
    raw: dict[str, str] = {}
    hf: dict[str, str] = {}
    for prefixes, lines in _GROUPS:
        for line in lines.strip().splitlines():
            names = line.split()
            for suffix in (".weight", ".bias") if names[0].endswith("*") else ("",):
                key, raw_name, hf_name = (p + n.replace("*", suffix) for p, n in zip(prefixes, names, strict=True))
                raw[key] = raw_name
                if names[2] != "-":
                    hf[key] = hf_name
    return raw, hf


_RAW_NAMES, _HF_NAMES = _read_names()
_LAYER = re.compile(r"\.blocks\.(\d+)\.")


def _translated(canonical: str, names: Mapping[str, str]) -> str:
    match = _LAYER.search(canonical)
    key = _LAYER.sub(".blocks.{}.", canonical)
    if canonical in REGION_LN and key not in names:
        raise CheckpointError(
            "the HF port's network has no LayerNorm before its region heads, and without these weights' "
            f"{canonical} every coordinate would change; write {Format.ORIGINAL} or {Format.RAW} instead"
        )
    return names[key].format(match[1] if match else "")


def slots(expected: Mapping[str, Shape], layout: Format, present: Collection[str] = ()) -> Iterator[Slot]:
    """Yield the recipe of every tensor in `expected` (`expected_tensors`) for one layout.

    `present` holds the plain names of the file that is read: raw files fuse tau or not, and 4- and
    8-bit files say by their names which matrices are codes. Without it the recipes are those of what is
    written, with the matrices in few bits that the 4-bit port has.

    Raises:
        CheckpointError: the layout has no place for a tensor (the HF port for `region.ln`).
    """
    for name, shape in expected.items():
        experts = _experts_slot(name, shape, layout) if is_experts(name, shape) else None
        if layout is Format.INT4 and _is_marked(name, ".packed", present):
            yield _int4_slot(name, shape)
        elif f"{name}{INT8_SCALE}" in present or (layout is Format.INT8 and _is_marked(name, INT8_SCALE, present)):
            yield _int8_slot(name, shape)
        elif experts is not None:
            yield experts
        elif layout in (Format.RAW, Format.RAW_FP8):
            yield _raw_slot(name, shape, present)
        elif layout is Format.HF:
            yield _hf_slot(name, shape)
        else:
            yield _copy(name, shape, name)


def _copy(name: str, shape: Shape, stored: str) -> Slot:
    return Slot(name, shape, Recipe.COPY, (StoredTensor(stored, shape),))


def _experts_slot(name: str, shape: Shape, layout: Format) -> Slot | None:
    """Return the recipe of experts; None where a layout treats them like other tensors."""
    leaf = name.split(".")[-2]  # fc1 or fc2
    stored = name
    if layout in (Format.RAW, Format.RAW_FP8):
        stored = _translated(name, _RAW_NAMES).replace(f"mlp.{leaf}.weight", _RAW_EXPERTS[leaf])
    if layout.has_fp8_experts:
        scale = f"{stored.split('.mlp.')[0]}.moe_quant.{_FP8_SCALES[leaf]}"
        return Slot(name, shape, Recipe.FP8, (StoredTensor(stored, shape, FP8), StoredTensor(scale, shape[:2])))
    if layout is Format.HF:
        prefix = _translated(name, _HF_NAMES).split(".mlp.")[0]
        halves = _HF_EXPERTS[leaf]
        part_shape = (shape[1] // len(halves), shape[2])
        parts = [
            StoredTensor(f"{prefix}.mlp.experts.{expert}.{half}.weight", part_shape)
            for expert in range(shape[0])
            for half in halves
        ]
        return Slot(name, shape, Recipe.STACK_EXPERTS, tuple(parts))
    return _copy(name, shape, stored) if layout is Format.RAW else None


def _raw_slot(name: str, shape: Shape, present: Collection[str]) -> Slot:
    stored = _translated(name, _RAW_NAMES)
    if name.endswith("_features"):
        return Slot(name, shape, Recipe.TRANSPOSE, (StoredTensor(stored, shape[::-1]),))
    if stored.endswith((".tau_wq", ".tau_wv")):
        fused = stored[:-1] + "qwv"  # [wq; wv]
        if fused in present:
            half = Recipe.FIRST_HALF if stored.endswith("q") else Recipe.SECOND_HALF
            return Slot(name, shape, half, (StoredTensor(fused, (2 * shape[0], shape[1])),))
    return _copy(name, shape, stored)


def _hf_slot(name: str, shape: Shape) -> Slot:
    stored = _translated(name, _HF_NAMES)
    if ".self_attn.qkv." not in stored:
        return _copy(name, shape, stored)
    third = (shape[0] // 3, *shape[1:])
    parts = tuple(StoredTensor(stored.replace("qkv.", f"{letter}_proj."), third) for letter in "qkv")
    return Slot(name, shape, Recipe.CONCAT, parts)


def _is_marked(name: str, mark: str, present: Collection[str]) -> bool:
    """Return True where the file that is read, or else the 4-bit port, holds this matrix as codes."""
    return f"{name}{mark}" in present if present else is_portable(name)


def is_portable(name: str) -> bool:
    """Return True for matrices the 4-bit port packs; not vision, routers, tau, norms, embedding, head."""
    if not name.endswith(".weight"):
        return False
    in_text = ".attn.qkv." in name or ".attn.proj." in name or ".mlp.fc" in name
    return in_text if name.startswith("text.") else name.startswith("region.") and "coder." in name


def _int4_slot(name: str, shape: Shape) -> Slot:
    groups, rest = divmod(prod(shape), INT4_GROUP)
    if rest or groups % 2:
        raise CheckpointError(
            f"{name}: {prod(shape)} values cannot be packed in 4 bits; "
            f"they must fill an even number of groups of {INT4_GROUP}"
        )
    parts = (
        StoredTensor(f"{name}.packed", (groups // 2, INT4_GROUP), BYTES),
        StoredTensor(f"{name}.scale", (groups, 1)),
        StoredTensor(f"{name}.zero_point", (groups, 1)),
    )
    return Slot(name, shape, Recipe.INT4, parts)


def is_int8_vision(name: str) -> bool:
    """Return True for matrices of the vision tower that may be stored in int8: its blocks, the projection."""
    in_tower = name.startswith(("vision.blocks.", "vision.proj_mlp."))
    return in_tower and name.endswith((".qkv.weight", ".proj.weight", ".fc1.weight", ".fc2.weight"))


def _int8_slot(name: str, shape: Shape) -> Slot:
    scale = StoredTensor(f"{name}{INT8_SCALE}", (*shape[:-1], 1))
    return Slot(name, shape, Recipe.INT8, (StoredTensor(name, shape, INT8), scale))


def is_ignorable(plain: str) -> bool:
    """Return True for tensors that may stand in a file and are not used: scales of an 8-bit K/V cache."""
    return ".kv_quantizer." in plain and plain.endswith((".k_scale", ".v_scale"))


def has_region_ln(present: Collection[str]) -> bool:
    """Return True where a file with these plain names brings the region heads' LayerNorm, in either naming."""
    return any(name in present or _RAW_NAMES[name] in present for name in REGION_LN)


def plain_name(stored: str) -> str:
    """Remove what carries no meaning from a stored name: a compiler's `._orig_mod`, the leading `model.`."""
    return stored.replace("._orig_mod.", ".").removeprefix("_orig_mod.").removeprefix("model.")


def stored_name(plain: str, layout: Format) -> str:
    """Return the full name a layout writes: original and HF port start with `model.`."""
    if layout in (Format.RAW, Format.RAW_FP8) or plain.startswith(_HF_TOP_LEVEL):
        return plain
    return f"model.{plain}"
