"""Modules that hold a weight in codes where the plain network has parameters; the kernels read them as they are.

They are put in place while a checkpoint is loaded (`low_bit_loading.py`) and import no triton: what they
run is an operator that `forms.place_forms` brings.

Shape suffixes: B sequences, T new positions, N = B * T rows, K inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from md3cli.model.kernels.tiles import PassKind, Product, tile_of
from md3cli.model.kernels.weights import KernelWeight


class KernelLinear(nn.Module):
    """`layers.Linear` over a weight in 8 or 4 bits; the kernel adds the bias before it rounds."""

    def __init__(self, weight: KernelWeight, bias: nn.Parameter | None, prefix_len: int) -> None:
        """`prefix_len` positions of the model's prefix tell the kinds of pass apart."""
        super().__init__()
        assert weight.num_matrices == 1, weight.codes.shape
        self.matrix, self.bias, self.prefix_len = weight, bias, prefix_len

    def forward(self, x_BTK: Tensor) -> Tensor:
        """[B, T, K] -> [B, T, O] in the same dtype."""
        kind = PassKind.of(x_BTK.shape[-2], self.prefix_len)
        tile = tile_of(Product.DENSE, kind, self.matrix.form, x_BTK.dtype, x_BTK.device)
        x_NK = x_BTK.reshape(-1, x_BTK.shape[-1])
        out_NO: Tensor = torch.ops.md3.dense(x_NK, *self.matrix.arguments, self.bias, tile.as_list())
        return out_NO.view(*x_BTK.shape[:-1], -1)


class KernelExperts(nn.Module):
    """Stands in a layer where the plain stack of experts was; `forms.FusedExperts` computes with its weight."""

    def __init__(self, weight: KernelWeight) -> None:
        super().__init__()
        self.matrix = weight
