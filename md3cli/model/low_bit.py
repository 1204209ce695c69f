"""Low-bit forms of the network's linear layers, all behind one call: rows in, rows out.

A `Matrix` is a quantised weight in the form its device computes with fastest:

- int8 on a CPU with the int8 engine: `low_bit_int8.Int8Matrix`; float8 weights become int8 there,
  which adds a tenth to their rounding and nothing to their size;
- int4 everywhere: `low_bit_int4.Int4Matrix`;
- the rest (int8 and float8 on other devices): `TileMatrix`, dequantised as a whole for each product.
  It is also the plain twin the others are tested against.

Shape suffixes: N rows, K inputs, O outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from md3cli.model.low_bit_int4 import TextPass, can_pack, pack_int4
from md3cli.model.low_bit_int8 import Int8Matrix, has_int8_products
from md3cli.model.quantised import LowBit, QuantisedWeight, quantise_int8


class Matrix(Protocol):
    """A weight [O, K] that multiplies rows; a row's result does not depend on its companions."""

    @property
    def num_bytes(self) -> int: ...

    def __call__(self, x_NK: Tensor) -> Tensor:
        """[N, K] -> [N, O], in the dtype of the rows or wider."""
        ...


class TileMatrix:
    """A weight of any scheme, dequantised to the dtype of the rows whenever it is used."""

    def __init__(self, weight: QuantisedWeight) -> None:
        assert len(weight.shape) == 2, weight.shape
        self.weight = weight

    @property
    def num_bytes(self) -> int:
        return self.weight.num_bytes

    def __call__(self, x_NK: Tensor) -> Tensor:
        return F.linear(x_NK, self.weight.dequantise(x_NK.dtype))


def can_hold(kind: LowBit, shape: tuple[int, ...]) -> bool:
    """False for the few sizes the 4-bit layout does not hold; such weights are widened when they are loaded."""
    return kind is not LowBit.INT4 or can_pack(shape)


def pack(weight: QuantisedWeight, text_pass: TextPass, dtype: torch.dtype) -> list[Matrix]:
    """A weight [O, K], or one per expert, in the form of its device; `dtype` is that of the activations."""
    if weight.kind is LowBit.INT4:
        return list(pack_int4(weight, text_pass, dtype))
    if weight.codes.device.type != "cpu" or not has_int8_products():
        return [TileMatrix(part) for part in weight.matrices()]
    return [_int8_matrix(part) for part in weight.matrices()]


def _int8_matrix(weight: QuantisedWeight) -> Int8Matrix:
    if weight.kind is LowBit.FP8:
        weight = quantise_int8(weight.dequantise(torch.float32))
    return Int8Matrix(weight)


class LowBitLinear(nn.Module):
    """`layers.Linear` over a packed weight."""

    def __init__(self, matrix: Matrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y_NO = self.matrix(x.reshape(-1, x.shape[-1]))
        if self.bias is not None:
            y_NO.add_(self.bias)
        return y_NO.to(x.dtype).view(*x.shape[:-1], -1)
