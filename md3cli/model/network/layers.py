"""Building blocks of the vision encoder and the text decoder: products, norms, attention, a mixture of experts.

These are the plain forms, as the specification words them (Moondream 3 specification, section 7, for the experts);
`engine/kernels.py` has faster ones. A row's result is the same whatever the rows beside it are: experts are visited in
order of their number and summed in float32.

Parameters are left uninitialised: weights come from a checkpoint (or a trainer), and an `__init__` that draws random
numbers would cost more than loading a small model.

Shape suffixes: B batch, T new positions, S positions attended to, H heads, K head width, D width; of experts N tokens,
I inner width of an expert, X experts, A choices per token, P = N * A pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from md3cli.model.network.config import LAYER_NORM_EPS, MoeConfig


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


# -- a mixture of experts --------------------------------------------------------------------------


class Routing(NamedTuple):
    """Which experts each token uses: `experts_NA` int64, and their float32 `weights_NA` (sum 1 per token)."""

    experts_NA: Tensor
    weights_NA: Tensor


class ExpertMatrices(nn.Module):
    """One matrix per expert, no bias: weight [X, out, in]."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, x_PD: Tensor, counts: list[int]) -> Tensor:
        """Multiply rows sorted by expert, `counts[e]` of them for expert e: [P, in] -> [P, out].

        One call for all experts, so that a tool that puts itself around the weight does so once.
        """
        parts = x_PD.split(counts)
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, self.weight, strict=True) if len(part)])


def gate(up_NI2: Tensor) -> Tensor:
    """Return `gelu(first half) * (second half + 1)`, exact GELU: [N, 2I] -> [N, I]."""
    activated, scale = up_NI2.chunk(2, dim=-1)
    return F.gelu(activated) * (scale + 1)


def usual_size(num_rows: int) -> int:
    """Return the rows to compute for `num_rows`: above 16 a multiple of 8, since oneDNN makes code for each size.

    Every picture's prefix would bring new sizes for every expert: a tenth of its time, and memory that grows by
    tens of megabytes a picture until oneDNN's cache of a thousand codes is full.
    """
    return num_rows if num_rows <= 16 else -(-num_rows // 8) * 8


# Rows, which of them are live, and the two summands of the block -> their sum with the experts' outputs.
Fused = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]


class MoeMlp(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, dim: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Linear(dim, config.num_experts)
        self.fc1 = ExpertMatrices(config.num_experts, dim, 2 * config.expert_inner_dim)
        self.fc2 = ExpertMatrices(config.num_experts, config.expert_inner_dim, dim)
        self.run: Callable[[Tensor, Routing], Tensor] = self.run_experts  # `kernels.optimise` puts a faster one
        self.fused: Fused | None = None  # or one that does the routing and the block's sums as well
        self.here = slice(0, config.num_experts)  # the experts whose matrices are here: fewer where processes share

    def route(self, x_ND: Tensor) -> Routing:
        """Choose by the largest router logits of each token; the softmax is over the chosen ones only, in float32."""
        top = self.router(x_ND).float().topk(self.config.experts_per_token, dim=-1)
        return Routing(top.indices, top.values.softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        return self.run(x_ND, self.route(x_ND)).view(x.shape)

    def run_experts(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, one expert at a time."""
        return self.sum_experts(x_ND, routing).to(x_ND.dtype)

    def sum_experts(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """Return the sum of `run_experts` as it is before it is rounded, in float32; of the experts that are here."""
        num_choices = routing.experts_NA.shape[1]
        order = routing.experts_NA.flatten().argsort(stable=True)
        counts = routing.experts_NA.flatten().bincount(minlength=self.config.num_experts).tolist()
        start, counts = sum(counts[: self.here.start]), counts[self.here]
        out_ND = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device)
        if not any(counts):
            return out_ND
        order = order[start : start + sum(counts)]
        tokens_P = order // num_choices
        y_PD = self.fc2(gate(self.fc1(x_ND[tokens_P], counts)), counts)
        weighted_PD = y_PD.float() * routing.weights_NA.flatten()[order, None]
        for tokens, weighted in zip(tokens_P.split(counts), weighted_PD.split(counts), strict=True):
            out_ND = out_ND.index_add(0, tokens, weighted)  # per expert, so that the order of sums is fixed
        return out_ND
