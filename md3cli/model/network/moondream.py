"""Moondream 3: vision encoder, text decoder and the region heads between words and places, in one module.

The region heads turn coordinates and sizes into embeddings and back (Moondream 3 specification, section 8). Values are
0-1 of the upright picture: coordinates are centres, `bin / bins`; sizes are logarithmic, `2 ** (bin / (bins - 1) * 10 -
10)`, width before height. Hidden states are the decoder's output *before* its last LayerNorm; `ln` exists only in newer
weights and is left out, not faked, when the checkpoint has none.

Parameter names are those of the original checkpoint without its `model.` prefix. This file holds the network only: no
tokenizer, no batching of requests, no decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from md3cli.model.network.config import ModelConfig, RegionConfig
from md3cli.model.network.layers import LayerNorm, Linear
from md3cli.model.network.text import TextBlock, TextDecoder
from md3cli.model.network.vision import VisionEncoder

SIZE_OCTAVES = 10.0  # sizes reach from 2**-10 to 1


def fourier_features(values: Tensor, frequencies: Tensor) -> Tensor:
    """Return `[cos(2π v·F), sin(2π v·F)]`: values [..., n], frequencies [n, F] -> [..., 2F].

    The value is rounded to the model's dtype, as the original feeds it back; the angle is float32.
    """
    values = values.to(frequencies.dtype).float()
    # Sums of one or two products: as a matrix product they could round differently in another batch.
    angle = 2 * math.pi * (values[..., None] * frequencies.float()).sum(-2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(frequencies.dtype)


NEAR_FRACTION = 64  # bins / 64 to each side: 1.6 % of the picture for a coordinate


class BinReading(NamedTuple):
    """What is read from logits over bins [..., n]; each [...].

    Attributes:
        bins: the most probable one, int64.
        masses: the softmax mass within `n / NEAR_FRACTION` of it, float32.
        are_finite: whether all logits are.
    """

    bins: Tensor
    masses: Tensor
    are_finite: Tensor


def reach_of(num_bins: int) -> int:
    """Return how many bins to each side of one are near it."""
    return max(1, num_bins // NEAR_FRACTION)


def read_bins(logits: Tensor) -> BinReading:
    """Read the most probable bin of logits [..., n], in float32."""
    wide = logits.float()
    bins = wide.argmax(dim=-1)
    return BinReading(bins, near_mass(wide, bins), wide.isfinite().all(dim=-1))


def near_mass(logits: Tensor, bins: Tensor) -> Tensor:
    """Return the softmax mass near the chosen bin: logits float32 [..., n], bins [...] -> [...]."""
    num_bins = logits.shape[-1]
    reach = reach_of(num_bins)
    near = bins[..., None] + torch.arange(-reach, reach + 1, device=logits.device)
    mass = logits.softmax(dim=-1).gather(-1, near.clamp(0, num_bins - 1))
    return mass.masked_fill((near < 0) | (near >= num_bins), 0.0).sum(dim=-1)


def coord_value(bins: Tensor, num_bins: int) -> Tensor:
    """Turn bin numbers into coordinates 0 … (n-1)/n, float32."""
    return bins.float() / num_bins


def size_value(bins: Tensor, num_bins: int) -> Tensor:
    """Turn bin numbers into sizes 2**-10 … 1, float32."""
    return torch.exp2(bins.float() / (num_bins - 1) * SIZE_OCTAVES - SIZE_OCTAVES)


def size_bin(sizes: Tensor, num_bins: int) -> Tensor:
    """Turn sizes into bin numbers, not rounded: the inverse of `size_value`."""
    return (sizes.clamp_min(2.0**-SIZE_OCTAVES).log2() + SIZE_OCTAVES) / SIZE_OCTAVES * (num_bins - 1)


class BinTables(NamedTuple):
    """What every bin stands for: embeddings of coordinates [C, D], and sizes float32 [Z] as the size encoder sees them.

    A value is rounded to the model's dtype before it is encoded. C coordinate bins, Z size bins, D width.
    """

    coords_CD: Tensor
    sizes_Z: Tensor


class RegionHeads(nn.Module):
    """Encoders value -> embedding and decoders hidden state -> bin logits."""

    def __init__(self, config: RegionConfig, *, has_ln: bool) -> None:
        super().__init__()
        self.config = config
        self.coord_features = nn.Parameter(torch.empty(1, config.coord_feat_dim // 2))
        self.coord_encoder = Linear(config.coord_feat_dim, config.dim)
        self.coord_decoder = Linear(config.dim, config.coord_out_dim)
        self.size_features = nn.Parameter(torch.empty(2, config.size_feat_dim // 2))
        self.size_encoder = Linear(config.size_feat_dim, config.dim)
        self.size_decoder = Linear(config.dim, config.size_out_dim)
        self.ln = LayerNorm(config.dim) if has_ln else None
        self.features: Callable[[Tensor, Tensor], Tensor] = fourier_features  # `kernels.optimise` may choose another
        self.tables: BinTables | None = None  # where decisions are taken by kernels: `kernels.forms` makes them

    @property
    def num_coord_bins(self) -> int:
        return self.config.coord_out_dim

    @property
    def num_size_bins(self) -> int:
        return self.config.size_out_dim // 2

    def encode_coord(self, coords: Tensor) -> Tensor:
        """Encode coordinates [...] as embeddings [..., D]."""
        embedding: Tensor = self.coord_encoder(self.features(coords[..., None], self.coord_features))
        return embedding

    def encode_size(self, size_wh: Tensor) -> Tensor:
        """Encode sizes [..., 2] (width, height) as embeddings [..., D]."""
        return self.size_encoder(self.features(size_wh, self.size_features))  # type: ignore[no-any-return]

    def bin_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Read logits over the coordinate bins [..., bins] and over the size bins [..., 2, bins], width first."""
        normed = self._norm(hidden)
        return self.coord_decoder(normed), self.size_decoder(normed).unflatten(-1, (2, self.num_size_bins))

    def coord_logits(self, hidden: Tensor) -> Tensor:
        """Read logits over the coordinate bins [..., bins] from hidden states [..., D]."""
        return self.coord_decoder(self._norm(hidden))  # type: ignore[no-any-return]

    def size_logits(self, hidden: Tensor) -> Tensor:
        """Read logits over the size bins [..., 2, bins], width first, from hidden states [..., D]."""
        logits = self.size_decoder(self._norm(hidden))
        return logits.unflatten(-1, (2, self.num_size_bins))  # type: ignore[no-any-return]

    def _norm(self, hidden: Tensor) -> Tensor:
        return hidden if self.ln is None else self.ln(hidden)


class Moondream3(nn.Module):
    """The network. Build it under `torch.device("meta")` and assign weights (see `weights/read.py`)."""

    def __init__(self, config: ModelConfig, *, has_region_ln: bool = True) -> None:
        super().__init__()
        self.config = config
        self.is_shared = False  # with other processes, whose passes must be the same: none is made smaller in one alone
        self.vision = VisionEncoder(config.vision)
        self.text = TextDecoder(config.text)
        self.region = RegionHeads(config.region, has_ln=has_region_ln)

    @property
    def dtype(self) -> torch.dtype:
        return self.text.wte.dtype

    @property
    def device(self) -> torch.device:
        return self.text.wte.device

    @property
    def cache_places(self) -> list[tuple[int, torch.device]]:
        """Where each layer's keys and values belong: the heads that the layer has here, and its device."""
        blocks = cast("Iterable[TextBlock]", self.text.blocks)
        return [(block.attn.num_heads, block.device or self.device) for block in blocks]

    def prefix_embeddings(self, image_BPD: Tensor) -> Tensor:
        """Put BOS before image embeddings [B, P, D]: the image's prefix [B, 1 + P, D]."""
        bos_D = self.text.wte[self.config.tokenizer.bos_id]  # a view: an id in a tensor would be copied to the device
        bos_B1D = bos_D.expand(image_BPD.shape[0], 1, -1)
        return torch.cat([bos_B1D, image_BPD], dim=1)


def not_finite(dtype: torch.dtype) -> str:
    """Say in words that the model computed NaN or infinity in `dtype`, and what to do."""
    advice = "are its weights damaged?"
    if dtype is torch.float16:
        advice = "its numbers are too large for it; use --dtype bf16 or fp32"
    return f"the model computed NaN or infinity in {str(dtype).removeprefix('torch.')}: {advice}"


def prefix_mask(length: int, prefix_len: int, device: torch.device | None = None) -> Tensor:
    """Return who attends to whom [length, length]: causal, the first `prefix_len` positions see each other."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[:prefix_len, :prefix_len] = True
    return mask
