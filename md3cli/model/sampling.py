"""Choosing a token from logits (Moondream 3 specification, section 10).

Randomness is a pure function of (seed, number of the draw): no generator state lives anywhere, so a
sampled answer does not depend on batch, order or resume either.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-30  # less is greedy: logits divided by it would leave the range of float32
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _place_of_float64(device: torch.device) -> torch.device:
    """Where float64 is computed for tensors on `device`: Apple's GPU does not know it, the CPU takes its part."""
    return torch.device("cpu") if device.type == "mps" else device


def uniform(seed: Tensor, draw: Tensor) -> Tensor:
    """Uniform float64 in [0, 1) for int64 `seed` and `draw` of one shape (SplitMix64; Steele et al. 2014).

    On the device of `seed`; for Apple's GPU on the CPU.
    """
    z = seed * _MIX_1 + (draw + 1) * _GOLDEN
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 11).to(_place_of_float64(z.device)).double() * 2.0**-53


def top_p_probabilities(logits: Tensor, temperature: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Nucleus of the softmax: (probabilities, ids), each [N, V], sorted downwards, zero outside the nucleus.

    An entry is dropped when the mass *before* it exceeds `top_p`: the first always stays, and so
    does the one that crosses the threshold. What stays sums to 1.
    """
    p, ids = (logits / temperature[:, None]).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    mass_before = p.cumsum(dim=-1) - p
    p = p.masked_fill(mass_before > top_p[:, None], 0.0)
    return p / p.sum(dim=-1, keepdim=True), ids


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, u: Tensor) -> Tensor:
    """Ids [N] drawn from the nucleus by inverting its cumulative mass at `u` (of `uniform`); temperature 0: argmax.

    A row of NaN gets any id: its caller sees to it.
    """
    is_greedy = temperature < LEAST_TEMPERATURE
    p, ids = top_p_probabilities(logits, temperature.masked_fill(is_greedy, 1.0), top_p)
    cumulative = p.to(_place_of_float64(p.device)).double().cumsum(dim=-1)
    rank = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(dim=-1).to(p.device)
    last_kept = ((p > 0).sum(dim=-1) - 1).clamp(min=0)  # of NaN none is kept, and CUDA does not survive index -1
    drawn = ids.gather(1, torch.minimum(rank, last_kept)[:, None])[:, 0]
    return torch.where(is_greedy, logits.argmax(dim=-1), drawn)
