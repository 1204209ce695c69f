"""Weights in the layout that the kernels read, and the modules that hold them: plain, or codes that stay codes.

One object holds a stack of matrices, one for each expert; a dense matrix is a stack of one. Codes of 4 bits lie two in
a byte, the k-th and the (k + 64)-th of a group of 128, so that a tile is unpacked into two products without moving a
value; their scales and zero points are turned to [groups, outputs], the order in which a tile of columns reads them.

The modules are put in place while a checkpoint is loaded (`quant/load.py`). Nothing here imports triton: what they
run is an operator that `forms.place_forms` brings.
Source: Moondream 3 specification, sections 19.2 and 19.3.

Shape suffixes: X matrices, B sequences, T new positions, N = B * T rows, O outputs, K inputs, G groups of an output's
inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from md3cli.errors import CheckpointError
from md3cli.model.kernels.tiles import Product, WeightForm, tile_of
from md3cli.model.network.text import PassKind
from md3cli.model.weights.codes import INT4_MAX, LowBit, QuantisedWeight
from md3cli.model.weights.names import INT4_GROUP

_HALF = INT4_GROUP // 2
_FP8_NAN = 0x7F  # both NaN codes, sign aside; e4m3fn has no infinity


_FORMS = {LowBit.FP8: WeightForm.FP8, LowBit.INT8: WeightForm.INT8, LowBit.INT4: WeightForm.INT4}


@dataclass(frozen=True, slots=True)
class KernelWeight:
    """Matrices [X, O, K]; what `codes`, `scale` and `zero` hold depends on `form`.

    - PLAIN: values [X, O, K] of the activations' dtype; no scale.
    - FP8, INT8: uint8 or int8 [X, O, K], float32 scale [X, O].
    - INT4: uint8 [X, O, K / 2], float32 scale and zero [X, G, O]: value = scale * (code - zero).
    """

    form: WeightForm
    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None

    @property
    def num_matrices(self) -> int:
        return self.codes.shape[0]

    @property
    def num_outputs(self) -> int:
        return self.codes.shape[1]

    @property
    def num_inputs(self) -> int:
        return self.codes.shape[2] * (2 if self.form is WeightForm.INT4 else 1)

    @property
    def num_bytes(self) -> int:
        """The memory of codes, scales and zero points."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scale, self.zero) if tensor is not None)

    @property
    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        """The weight as the operators take it: codes, scale, zero, form."""
        return self.codes, self.scale, self.zero, int(self.form)

    @classmethod
    def of_plain(cls, weight: Tensor) -> KernelWeight:
        """Wrap values [X, O, K] or [O, K] in their own memory."""
        return cls(WeightForm.PLAIN, weight.detach().reshape(-1, *weight.shape[-2:]))

    @classmethod
    def of_quantised(cls, weight: QuantisedWeight) -> KernelWeight:
        """Repack codes of any scheme, on their device.

        Raises:
            CheckpointError: float8 codes that are no number.
        """
        form = _FORMS[weight.kind]
        count, num_outputs, num_inputs = weight.num_matrices, *weight.shape[-2:]
        if form is WeightForm.INT4:
            return cls(form, *_repacked(weight, count, num_outputs, num_inputs))
        codes = weight.codes.view(torch.uint8) if form is WeightForm.FP8 else weight.codes
        if form is WeightForm.FP8 and bool(((codes & _FP8_NAN) == _FP8_NAN).any()):
            raise CheckpointError("the float8 weights hold codes that are no number; the file is damaged")
        codes = codes.reshape(count, num_outputs, num_inputs)
        return cls(form, codes, weight.scale.reshape(count, num_outputs).float())

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return the values [X, O, K], computed in float32: the plain twin of the kernels' decoding."""
        if self.form is WeightForm.PLAIN:
            return self.codes.to(dtype)
        assert self.scale is not None
        if self.form is WeightForm.INT4:
            assert self.zero is not None
            codes_XOGH = self.codes.unflatten(-1, (-1, _HALF))
            values = torch.cat([codes_XOGH & INT4_MAX, codes_XOGH >> 4], dim=-1).float()
            scale, zero = (part.transpose(1, 2)[..., None] for part in (self.scale, self.zero))
            return ((values - zero) * scale).flatten(-2).to(dtype)
        # By a table: the kernel's own trick passes through denormal numbers, which a CPU may be told to flush to zero.
        values = fp8_values(self.codes.device)[self.codes.int()] if self.form is WeightForm.FP8 else self.codes.float()
        return (values * self.scale[..., None]).to(dtype)


def fp8_values(device: torch.device | None = None) -> Tensor:
    """Return the value of every float8 e4m3fn code, float32 [256], from its definition; both NaN codes are NaN."""
    values = []
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
        value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(float("nan") if code & _FP8_NAN == _FP8_NAN else sign * value)
    return torch.tensor(values, device=device)


def can_hold(kind: LowBit, shape: tuple[int, ...]) -> bool:
    """Return False for the few sizes the kernels' 4-bit tiles do not cover whole; such weights are widened."""
    return kind is not LowBit.INT4 or (shape[-1] % INT4_GROUP == 0 and shape[-2] % INT4_GROUP == 0)


def _repacked(weight: QuantisedWeight, count: int, num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    assert weight.zero_point is not None
    assert can_hold(weight.kind, weight.shape), weight.shape
    codes = weight.codes.view(count, num_outputs, -1, 2, _HALF)
    packed = codes[..., 0, :] | (codes[..., 1, :] << 4)
    scale, zero = (
        part.float().view(count, num_outputs, -1).transpose(1, 2).contiguous()
        for part in (weight.scale, weight.zero_point)
    )
    return packed.reshape(count, num_outputs, num_inputs // 2), scale, zero


class KernelLinear(nn.Module):
    """`layers.Linear` over a weight in 8 or 4 bits; the kernel adds the bias before it rounds.

    `prefix_len`, the positions of the model's prefix, tells the kinds of pass apart.
    """

    def __init__(self, weight: KernelWeight, bias: nn.Parameter | None, prefix_len: int) -> None:
        super().__init__()
        assert weight.num_matrices == 1, weight.codes.shape
        self.matrix, self.bias, self.prefix_len = weight, bias, prefix_len

    def forward(self, x_BTK: Tensor) -> Tensor:
        """Multiply rows [B, T, K] -> [B, T, O] in the same dtype."""
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
