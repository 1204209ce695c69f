"""The mixture of experts of the text decoder (Moondream 3 specification, section 7).

`MoeMlp.run_experts` is the plain path: sort the (token, choice) pairs by expert, then one pair of matrix products per
expert that was chosen; `engine/kernels.py` has faster ones. A token's result is the same whatever the other tokens
are: experts are visited in order of their number and summed in float32.

Shape suffixes: N tokens, D width, I inner width of an expert, X experts, A choices per token, P = N * A pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from md3cli.model.network.config import MoeConfig
from md3cli.model.network.layers import Linear


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

    def route(self, x_ND: Tensor) -> Routing:
        """Choose by the largest router logits of each token; the softmax is over the chosen ones only, in float32."""
        top = self.router(x_ND).float().topk(self.config.experts_per_token, dim=-1)
        return Routing(top.indices, top.values.softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        return self.run(x_ND, self.route(x_ND)).view(x.shape)

    def run_experts(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, one expert at a time."""
        num_choices = routing.experts_NA.shape[1]
        order = routing.experts_NA.flatten().argsort(stable=True)
        counts = routing.experts_NA.flatten().bincount(minlength=self.config.num_experts).tolist()
        tokens_P = order // num_choices
        y_PD = self.fc2(gate(self.fc1(x_ND[tokens_P], counts)), counts)
        weighted_PD = y_PD.float() * routing.weights_NA.flatten()[order, None]
        out_ND = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device)
        for tokens, weighted in zip(tokens_P.split(counts), weighted_PD.split(counts), strict=True):
            out_ND = out_ND.index_add(0, tokens, weighted)  # per expert, so that the order of sums is fixed
        return out_ND.to(x_ND.dtype)
