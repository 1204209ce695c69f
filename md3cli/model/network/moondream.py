"""Moondream 3: vision encoder, text decoder and region heads in one module.

Parameter names are those of the original checkpoint without its `model.` prefix. This file holds
the network only: no tokenizer, no batching of requests, no decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from md3cli.model.network.config import ModelConfig
from md3cli.model.network.region import RegionHeads
from md3cli.model.network.text import TextDecoder
from md3cli.model.network.vision import VisionEncoder


class Moondream3(nn.Module):
    """The network. Build it under `torch.device("meta")` and assign weights (see `weights/read.py`)."""

    def __init__(self, config: ModelConfig, *, has_region_ln: bool = True) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.text = TextDecoder(config.text)
        self.region = RegionHeads(config.region, has_ln=has_region_ln)

    @property
    def dtype(self) -> torch.dtype:
        return self.text.wte.dtype

    @property
    def device(self) -> torch.device:
        return self.text.wte.device

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
