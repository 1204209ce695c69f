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


MARK = 100.0  # of each component of an input's mark: more than 24 layers of random weights add to it
KNOWN = 1000.0  # a head's logit for the mark that it knows; other marks give it 60 at most
UNPROMPTED = -200.0  # of places' ids, which random words are not to be


def show_places(model: Moondream3) -> None:
    """Make random weights ground what they think and begin a segment with a box, whatever the picture.

    Four inputs bear marks that outweigh what layers add, and heads know them: behind the thinking id comes the start
    of points, behind that a coordinate, and another; then a size or, in reasoning, where no size may come, the end of
    grounding. What follows are random words. A prompt for a segment ends with the start of points.
    """
    ids, text, region = model.config.tokenizer, model.text, model.region
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (4, model.config.text.dim), generator=generator) * 2.0 - 1
    thinks, starts, first, second = signs.to(model.dtype).to(model.device)
    text.wte[ids.thinking_id].add_(MARK * thinks)
    text.wte[ids.start_ground_points_id].add_(MARK * starts)
    region.coord_features[0, 0] = 1  # a whole turn: its cosine is 1 at coordinate 0, and -1 at one half
    region.coord_encoder.weight[:, 0].add_(MARK / 2 * (first - second))
    region.coord_encoder.bias.add_(MARK / 2 * (first + second))

    known = KNOWN / model.config.text.dim
    places = [ids.start_ground_points_id, ids.coord_id, ids.size_id, ids.end_ground_id]
    text.lm_head.bias[places] = UNPROMPTED
    for token, mark in zip(places, (thinks, starts + first, second, second / 2), strict=True):
        text.lm_head.weight[token].add_(known * mark)
    region.coord_decoder.weight[0].add_(known * starts)
    region.coord_decoder.weight[region.num_coord_bins // 2].add_(known * first)


def _filled(shape: torch.Size, block: torch.Tensor, offset: int) -> torch.Tensor:
    """Return a tensor of this shape whose values run through `block` from `offset`, again and again."""
    value = torch.empty(shape, dtype=block.dtype, device=block.device)
    flat = value.view(-1)
    rolled = block.roll(-offset)
    for first in range(0, flat.numel(), BLOCK):
        part = flat[first : first + BLOCK]
        part.copy_(rolled[: part.numel()])
    return value
