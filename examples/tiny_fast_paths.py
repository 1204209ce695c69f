"""The network's slow spots in training on a CPU, computed another way with the same result.

Like `md3cli.model.engine.kernels`, but differentiable and reading the weights at every call. Tokens gathered
by expert make new matrix shapes at every step, and bfloat16 products compile anew for each shape; the
fused attention's backward in bfloat16 takes five times two products and a softmax (torch 2.13, Zen 5).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from md3cli.model.network.layers import MoeMlp, Routing, bmm_attention, gate
from md3cli.model.network.moondream import Moondream3
from md3cli.model.network.text import TextAttention
from md3cli.model.network.vision import VisionAttention


class AllExperts:
    """Every expert sees every token, unchosen ones with weight zero."""

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
    """Let `model` train with these forms."""
    for module in model.modules():
        if isinstance(module, MoeMlp):
            module.run = AllExperts(module)
        elif isinstance(module, (TextAttention, VisionAttention)):
            module.attend = bmm_attention
