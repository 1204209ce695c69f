"""Models with random weights, for benchmarks and tests where the real ones cannot be had.

Values are small enough that activations stay finite through every layer and are drawn from one
repeated block, because drawing nine billion numbers would take longer than the benchmark.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from md3cli.model.config import ModelConfig, MoeConfig, TextConfig
from md3cli.model.moondream import Moondream3

BLOCK = 1 << 20
STD = 0.02

CONFIGS = {
    # the real vision tower on a short decoder: every kernel at its real shape, minutes instead of hours
    "mid": replace(
        ModelConfig(),
        text=TextConfig(n_layers=6, moe=MoeConfig(num_experts=16, start_layer=1, experts_per_token=8)),
    ),
    "full": ModelConfig(),
}


def random_model(config: ModelConfig, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Moondream3:
    """A network of this size with seeded random weights, built tensor by tensor, ready for inference."""
    generator = torch.Generator().manual_seed(seed)
    block = (torch.randn(BLOCK, generator=generator) * STD).to(dtype).to(device)
    with torch.device("meta"):
        model = Moondream3(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = _filled(parameter.shape, block, int(torch.randint(BLOCK, (1,), generator=generator)))
            if name == "weight" and parameter.dim() == 1:
                value += 1  # LayerNorm scales
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    return model.eval()


def forbid_end(model: Moondream3) -> None:
    """Make the end of text impossible, so that every generation runs to its budget."""
    model.text.lm_head.bias[model.config.tokenizer.eos_id] = float("-inf")


def _filled(shape: torch.Size, block: torch.Tensor, offset: int) -> torch.Tensor:
    """A tensor of this shape whose values run through `block` from `offset`, again and again."""
    value = torch.empty(shape, dtype=block.dtype, device=block.device)
    flat = value.view(-1)
    rolled = block.roll(-offset)
    for first in range(0, flat.numel(), BLOCK):
        part = flat[first : first + BLOCK]
        part.copy_(rolled[: part.numel()])
    return value
