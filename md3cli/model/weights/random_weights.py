"""Models with random weights, for benchmarks and tests where the real ones cannot be had.

Values are small enough that activations stay finite through every layer. They are drawn once, on the
CPU, as one block that every tensor repeats from a place of its own: drawing nine billion numbers
would take longer than the benchmark, and every device fills the same model from the same block.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch

from md3cli.model.network.config import ModelConfig, MoeConfig, RegionConfig, TextConfig, VisionConfig
from md3cli.model.network.moondream import Moondream3

# A prime: no expert's size is a multiple of it, so each expert starts elsewhere in the block. With 2**20 all experts of
# a layer, of 2**22 and 2**21 values each, were the same, and a kernel that took the wrong one went unseen.
BLOCK = (1 << 20) + 7
STD = 0.02

CONFIGS = {
    # every part of the real model, at sizes for tests: 15 MB in bf16. Dense layers, then experts that are too many to
    # be computed for every token; widths are multiples of 128, the tile of the kernels and the group of low bits
    "mini": ModelConfig(
        text=TextConfig(
            dim=256,
            ff_dim=512,
            n_layers=4,
            vocab_size=2048,
            n_heads=4,
            n_kv_heads=4,
            moe=MoeConfig(num_experts=8, start_layer=2, experts_per_token=4, expert_inner_dim=256),
        ),
        vision=VisionConfig(
            enc_dim=128,
            enc_n_layers=3,
            enc_ff_dim=256,
            enc_n_heads=2,
            proj_out_dim=256,
            crop_size=126,
            overlap_margin=2,
            proj_inner_dim=512,
        ),
        region=RegionConfig(dim=256),
    ),
    # the real vision tower on a short decoder: every kernel at its real shape, minutes instead of hours
    "mid": replace(
        ModelConfig(),
        text=TextConfig(n_layers=6, moe=MoeConfig(num_experts=16, start_layer=1, experts_per_token=8)),
    ),
    "full": ModelConfig(),
}


def random_model(config: ModelConfig, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Moondream3:
    """Build a network of this size with seeded random weights, tensor by tensor, ready for inference.

    The same seed gives the same weights on every device; no two tensors, and no two experts of a layer, are alike.
    """
    generator = torch.Generator().manual_seed(seed)
    block = (torch.randn(BLOCK, generator=generator) * STD).to(dtype).to(device)
    with torch.device("meta"):
        model = Moondream3(config)
    places = [(module, name) for module in model.modules() for name, _ in module.named_parameters(recurse=False)]
    offsets = Random(seed).sample(range(BLOCK), len(places))
    for (module, name), offset in zip(places, offsets, strict=True):
        value = _filled(getattr(module, name).shape, block, offset)
        if name == "weight" and value.dim() == 1:
            value += 1  # LayerNorm scales
        setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    return model.eval()


# A logit that no other comes near. Not minus infinity: logits that are not finite are a failure; float16 holds it.
UNTHINKABLE = -3e4


def forbid_end(model: Moondream3) -> None:
    """Make the ends of text and of reasoning impossible, so that every generation runs to its budget."""
    ids = model.config.tokenizer
    for token in (ids.eos_id, ids.answer_id):
        model.text.lm_head.bias[token] = UNTHINKABLE


def _filled(shape: torch.Size, block: torch.Tensor, offset: int) -> torch.Tensor:
    """Return a tensor of this shape whose values run through `block` from `offset`, again and again."""
    value = torch.empty(shape, dtype=block.dtype, device=block.device)
    flat = value.view(-1)
    rolled = block.roll(-offset)
    for first in range(0, flat.numel(), BLOCK):
        part = flat[first : first + BLOCK]
        part.copy_(rolled[: part.numel()])
    return value
