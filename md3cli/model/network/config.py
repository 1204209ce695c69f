"""The sizes of a Moondream 3 network, read from config.json (Moondream 3 specification, section 2).

Frozen dataclasses whose field names are the file's own. `ModelConfig.from_sections` takes the four sections `text
vision region tokenizer`; `plan.normalise_config` brings other layouts of the file to that form. Every number is
checked against a closed range before anything is allocated from it: a config.json is input like any other. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from md3cli.errors import CheckpointError
from md3cli.images.crops import CropConfig

LAYER_NORM_EPS = 1e-5
HEAD_DIM = 64  # of the text decoder; the rotary code turns 32 of them, fixed
ROTARY_DIM = 32
MAX_CONTEXT_LIMIT = 32768

DEFAULT_TEMPLATES: Mapping[str, Any] = {
    "caption": {"short": [1, 32708, 2, 12492, 3], "normal": [1, 32708, 2, 6382, 3], "long": [1, 32708, 2, 4059, 3]},
    "query": {"prefix": [1, 15381, 2], "suffix": [3]},
    "detect": {"prefix": [1, 7235, 476, 2], "suffix": [3]},
    "point": {"prefix": [1, 2581, 2], "suffix": [3]},
}
# Only newer weights were trained to segment: used when config.json gives a template or the model is 3.1.
SEGMENT_TEMPLATE: Mapping[str, Any] = {"prefix": [1, 17374, 2], "suffix": [3]}


def _sized(default: float | None, least: float, most: float) -> Any:
    """Declare a number with its range; a file with a number outside the range is damaged or hostile, not a model."""
    return field(default=default, metadata={"range": (least, most)})


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """The sparse layers of the decoder: from `start_layer` on, each token uses `experts_per_token` of `num_experts`."""

    num_experts: int = _sized(64, 1, 1024)
    start_layer: int = _sized(4, 0, 256)
    experts_per_token: int = _sized(8, 1, 1024)
    expert_inner_dim: int = _sized(1024, 1, 65536)


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The text decoder; `moe` None makes all layers dense."""

    dim: int = _sized(2048, 64, 16384)
    ff_dim: int = _sized(8192, 1, 131072)
    n_layers: int = _sized(24, 1, 256)
    vocab_size: int = _sized(51200, 32, 1_048_576)
    max_context: int = _sized(4096, 2, 1_048_576)
    n_heads: int = _sized(32, 1, 256)
    n_kv_heads: int = _sized(32, 1, 256)
    group_size: int | None = _sized(None, 1, 65536)
    rope_theta: float = _sized(1_500_000.0, 1.0, 1e12)
    moe: MoeConfig | None = field(default_factory=MoeConfig)

    def is_moe_layer(self, layer: int) -> bool:
        """Return True for a layer whose feed-forward is a mixture of experts."""
        return self.moe is not None and layer >= self.moe.start_layer


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision encoder, its tiling and its projection into the text width."""

    enc_dim: int = _sized(1152, 1, 16384)
    enc_patch_size: int = _sized(14, 1, 256)
    enc_n_layers: int = _sized(27, 1, 256)
    enc_ff_dim: int = _sized(4304, 1, 131072)
    enc_n_heads: int = _sized(16, 1, 256)
    proj_out_dim: int = _sized(2048, 64, 16384)
    crop_size: int = _sized(378, 1, 4096)
    in_channels: int = _sized(3, 3, 3)
    max_crops: int = _sized(12, 1, 256)
    overlap_margin: int = _sized(4, 0, 1024)
    proj_inner_dim: int = _sized(8192, 1, 131072)

    @property
    def grid_size(self) -> int:
        """Patches along one side of a crop, and cells along one side of the pooled grid."""
        return self.crop_size // self.enc_patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one crop = embeddings of one image."""
        return (self.crop_size // self.enc_patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch."""
        return self.in_channels * self.enc_patch_size**2

    @property
    def crop_config(self) -> CropConfig:
        """How pictures must be cut for this network."""
        return CropConfig(self.crop_size, self.enc_patch_size, self.overlap_margin, self.max_crops)


@dataclass(frozen=True, slots=True)
class RegionConfig:
    """The heads that read and write coordinates and sizes; `size_out_dim` holds width and height bins."""

    dim: int = _sized(2048, 64, 16384)
    coord_feat_dim: int = _sized(256, 2, 65536)
    coord_out_dim: int = _sized(1024, 2, 65536)
    size_feat_dim: int = _sized(512, 2, 65536)
    size_out_dim: int = _sized(2048, 4, 131072)
    group_size: int | None = _sized(None, 1, 65536)


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """Ids with a meaning, and the prompt templates; a template of None means the skill is not supported."""

    bos_id: int = 0
    eos_id: int = 0
    answer_id: int = 3
    thinking_id: int = 4
    coord_id: int = 5
    size_id: int = 6
    start_ground_points_id: int = 7
    end_ground_id: int = 9
    templates: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_TEMPLATES))


Section = TypeVar("Section", MoeConfig, TextConfig, VisionConfig, RegionConfig, TokenizerConfig)


def _read_section(kind: type[Section], section: str, raw: Any) -> Section:
    """Read a section: missing keys are defaults, unknown keys are ignored, every number is checked."""
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"config.json: section {section!r} is no object")
    values: dict[str, Any] = {}
    for item in fields(kind):
        if item.name not in raw or item.name in ("moe", "templates"):
            continue
        value = raw[item.name]
        if value is None and item.name == "group_size":
            continue
        low, high = item.metadata.get("range", (0, 1_048_576))
        allowed = (int, float) if item.name == "rope_theta" else (int,)
        if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value <= high:
            raise CheckpointError(
                f"config.json: {section}.{item.name} is {str(value)[:40]!r}, expected a number from {low:g} to "
                f"{high:g}; the file is damaged or not a Moondream 3 config"
            )
        values[item.name] = value
    return kind(**values)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """All sizes of a network."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    region: RegionConfig = field(default_factory=RegionConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    @property
    def prefix_len(self) -> int:
        """Positions of an image in the sequence: BOS and one per pooled cell."""
        return 1 + self.vision.num_patches

    @classmethod
    def from_sections(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read `{"text": …, "vision": …, "region": …, "tokenizer": …}`; anything may be missing.

        Raises:
            CheckpointError: a value of the wrong kind, out of range, or sizes that do not fit together.
        """
        raw_text = raw.get("text") or {}
        text = _read_section(TextConfig, "text", raw_text)
        if isinstance(raw_text, Mapping) and "moe" in raw_text:
            raw_moe = raw_text["moe"]
            text = replace(text, moe=None if raw_moe is None else _read_section(MoeConfig, "text.moe", raw_moe))
        raw_tokenizer = raw.get("tokenizer") or {}
        tokenizer = _read_section(TokenizerConfig, "tokenizer", raw_tokenizer)
        templates = raw_tokenizer.get("templates")
        if templates is not None and not isinstance(templates, Mapping):
            raise CheckpointError("config.json: tokenizer.templates is no object")
        tokenizer = replace(tokenizer, templates={**DEFAULT_TEMPLATES, **(templates or {})})
        config = cls(
            text=text,
            vision=_read_section(VisionConfig, "vision", raw.get("vision")),
            region=_read_section(RegionConfig, "region", raw.get("region")),
            tokenizer=tokenizer,
        )
        config._check()
        return config

    def _check(self) -> None:
        text, vision, region = self.text, self.vision, self.region
        moe = text.moe
        rules = [
            (text.dim == HEAD_DIM * text.n_heads, "text.dim must be 64 * text.n_heads"),
            (text.n_kv_heads == text.n_heads, "text.n_kv_heads must equal text.n_heads"),
            (vision.enc_dim % vision.enc_n_heads == 0, "vision.enc_dim must be a multiple of vision.enc_n_heads"),
            (vision.crop_size % vision.enc_patch_size == 0, "vision.crop_size must be a multiple of enc_patch_size"),
            (vision.grid_size > 2 * vision.overlap_margin, "vision.overlap_margin leaves nothing of a crop"),
            (vision.proj_out_dim == text.dim, "vision.proj_out_dim must equal text.dim"),
            (region.dim == text.dim, "region.dim must equal text.dim"),
            (region.coord_feat_dim % 2 == 0 and region.size_feat_dim % 2 == 0, "region feature sizes must be even"),
            (region.size_out_dim % 2 == 0, "region.size_out_dim must be even"),
            (moe is None or moe.experts_per_token <= moe.num_experts, "more experts per token than experts"),
        ]
        for holds, rule in rules:
            if not holds:
                raise CheckpointError(f"config.json: {rule}")
        tokens = self.tokenizer
        for item in fields(tokens):
            if item.name.endswith("_id") and getattr(tokens, item.name) >= text.vocab_size:
                raise CheckpointError(f"config.json: tokenizer.{item.name} is outside the vocabulary")
