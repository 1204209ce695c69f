"""The network's slow spots in training on a CPU, computed another way with the same result.

Only a trainer wants these: engines skip experts, a trainer on CPU is faster without skipping, because
tokens gathered by expert make new matrix shapes at every step, and bfloat16 products compile anew for
each shape (torch 2.13, Zen 5: a step 3x shorter).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import md3cli.model.text
import md3cli.model.vision
from md3cli.model.layers import bmm_attention
from md3cli.model.moe import MoeMlp, Routing, gate
from md3cli.model.moondream import Moondream3


class _AllExperts:
    """Stands in for `MoeMlp.run_experts`: every expert sees every token, unchosen ones with weight zero."""

    def __init__(self, layer: MoeMlp) -> None:
        self._layer = layer

    def __call__(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """[N, D] -> [N, D]; two matrix products whatever the routing."""
        fc1_XID, fc2_XDI = self._layer.fc1.weight, self._layer.fc2.weight
        num_experts, two_inner, dim = fc1_XID.shape
        weights_NX = torch.zeros(len(x_ND), num_experts, device=x_ND.device)
        weights_NX = weights_NX.scatter(1, routing.experts_NA, routing.weights_NA)
        up_NXI2 = F.linear(x_ND, fc1_XID.reshape(-1, dim)).view(-1, num_experts, two_inner)
        inner_NXI = gate(up_NXI2) * weights_NX[..., None].to(up_NXI2.dtype)
        return F.linear(inner_NXI.flatten(1), fc2_XDI.transpose(0, 1).reshape(dim, -1))


def use_fast_paths(model: Moondream3) -> None:
    """Replace attention and experts of `model` for training on this CPU."""
    for module in (md3cli.model.text, md3cli.model.vision):
        module.attention = bmm_attention  # type: ignore[attr-defined]
    for layer in model.modules():
        if isinstance(layer, MoeMlp):
            object.__setattr__(layer, "run_experts", _AllExperts(layer))
