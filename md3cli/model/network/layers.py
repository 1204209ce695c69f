"""Building blocks shared by the vision encoder and the text decoder.

Parameters are left uninitialised: weights come from a checkpoint (or a trainer), and an `__init__` that draws random
numbers would cost more than loading a small model.

Shape suffixes: B batch, T new positions, S positions attended to, H heads, K head width, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from md3cli.model.network.config import LAYER_NORM_EPS


class Linear(nn.Linear):
    """`x @ weight.T + bias`; weight [out, in]. torch's own class, so that tools that look for it find it."""

    def reset_parameters(self) -> None:
        """Leave the parameters uninitialised."""


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimension, eps 1e-5 everywhere in this network."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=LAYER_NORM_EPS)

    def reset_parameters(self) -> None:
        """Leave the parameters uninitialised."""


class Mlp(nn.Module):
    """`fc2(gelu_tanh(fc1(x)))`: the dense feed-forward of both towers and the projection."""

    def __init__(self, dim: int, inner_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, inner_dim)
        self.fc2 = Linear(inner_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Tensor | None) -> Tensor:
    """Attend by scaled dot products [B, H, T, K]; `mask` bool, broadcastable to [B, H, T, S], True = may attend."""
    return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask)


def bmm_attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Tensor | None) -> Tensor:
    """Compute what `attention` does, by two matrix products and a softmax."""
    scale = q_BHTK.shape[-1] ** -0.5
    scores_BHTS = torch.matmul(q_BHTK * scale, k_BHSK.transpose(-1, -2))
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask, float("-inf"))
    return torch.matmul(scores_BHTS.softmax(dim=-1), v_BHSK)


def split_heads(x_BTD: Tensor, num_heads: int) -> Tensor:
    """Split [B, T, H * K] into heads [B, H, T, K]."""
    batch, length, dim = x_BTD.shape
    return x_BTD.view(batch, length, num_heads, dim // num_heads).transpose(1, 2)


def merge_heads(x_BHTK: Tensor) -> Tensor:
    """Join heads [B, H, T, K] to [B, T, H * K]."""
    return x_BHTK.transpose(1, 2).flatten(2)
