"""Layers of the network over packed matrices: a layer's experts, and the vision encoder's products in 8 bits.

A row's result does not depend on the rows beside it, and a token's is the same alone and in company: sums over its
experts are float32, added in order of the expert's number. Knows no files and no schemes.

Shape suffixes: N tokens, D width, I inner width of an expert, A choices per token, P = N * A pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from md3cli.model.kernels.float8_products import Float8Linear, Float8Mlp
from md3cli.model.kernels.weights import KernelExperts, KernelLinear, KernelWeight
from md3cli.model.network.layers import Linear, Mlp, MoeMlp, Routing, gate
from md3cli.model.network.vision import VisionBlock, VisionEncoder
from md3cli.model.quant.matrices import Int8Matrix, LowBitLinear, Matrix, OneDnnMatrix, has_onednn_products, peaks
from md3cli.model.quant.search import search
from md3cli.model.weights.codes import LowBit

ROWS = 1024  # of the MLP at a time: a crop of the real encoder, or many of a small one's
_TANH_SCALE = 2 * math.sqrt(2 / math.pi)


class Int8Mlp(nn.Module):
    """`layers.Mlp` on the int8 engine; rows stay in float32 between its two products."""

    def __init__(self, plain: Mlp) -> None:
        super().__init__()
        self.fc1, self.fc2 = _int8_matrix(plain.fc1), _int8_matrix(plain.fc2)
        self.bias1, self.bias2 = plain.fc1.bias.float(), plain.fc2.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        parts = [self._rows(part) for part in x.reshape(-1, x.shape[-1]).split(ROWS)]
        return torch.cat(parts).view(*x.shape[:-1], -1)

    def _rows(self, x_NK: Tensor) -> Tensor:
        inner = gelu_tanh_(self.fc1(x_NK).add_(self.bias1))
        return self.fc2(inner).add_(self.bias2).to(x_NK.dtype)


def gelu_tanh_(x: Tensor) -> Tensor:
    """Compute GELU by tanh in place: `x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3))`, twice as fast as torch."""
    inner = x.square().mul_(0.044715 * _TANH_SCALE).add_(_TANH_SCALE).mul_(x)
    return x.mul_(inner.sigmoid_())


def quantise_vision(encoder: VisionEncoder, kind: LowBit = LowBit.INT8) -> None:
    """Exchange the products of every block for int8 or fp8 ones, in place; patch embedding and projection stay.

    Block by block: full weights go as their codes come. int8 needs `matrices.has_int8_products`; a crop of the real
    encoder takes 0.84 s where bf16 takes 1.04 (two Zen 5 cores, torch 2.13, 2026-11), since attention stays as it is.
    fp8 is for GPUs (`float8_products.float8_fault`); elsewhere it computes the same, slowly.
    """
    assert kind in (LowBit.INT8, LowBit.FP8), kind
    for block in encoder.blocks:
        assert isinstance(block, VisionBlock)
        for name in ("qkv", "proj"):
            plain = getattr(block.attn, name)
            is_int8 = kind is LowBit.INT8
            setattr(
                block.attn, name, LowBitLinear(_int8_matrix(plain), plain.bias) if is_int8 else _float8_linear(plain)
            )
        mlp = block.mlp
        low_bit = Int8Mlp(mlp) if kind is LowBit.INT8 else Float8Mlp(_float8_linear(mlp.fc1), _float8_linear(mlp.fc2))
        block.register_module("mlp", low_bit)


def _float8_linear(plain: Linear) -> Float8Linear:
    return Float8Linear(KernelWeight.of_quantised(search(plain.weight, LowBit.FP8)), plain.bias)


def _int8_matrix(plain: Linear) -> Matrix:
    weight = search(plain.weight, LowBit.INT8)
    return OneDnnMatrix(weight) if has_onednn_products() else Int8Matrix(weight)


class LowBitExperts:
    """`MoeMlp.run` over packed experts of any kind; each chosen expert's matrices are read once for all its tokens."""

    def __init__(self, fc1: Sequence[Matrix], fc2: Sequence[Matrix]) -> None:
        assert len(fc1) == len(fc2)
        self.fc1, self.fc2 = fc1, fc2

    def __call__(self, x_ND: Tensor, routing: Routing) -> Tensor:
        experts_NA, order_NA = routing.experts_NA.sort(dim=1)
        weights_NA = routing.weights_NA.gather(1, order_NA)
        run = self._one_token if len(x_ND) == 1 else self._sorted_tokens
        return run(x_ND, experts_NA, weights_NA).to(x_ND.dtype)

    def _sorted_tokens(self, x_ND: Tensor, experts_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """Return weighted sums over each token's experts, float32 [N, D]."""
        # Expert by expert: all pairs' outputs would be tens of megabytes, which the C library maps anew, page by page,
        # in each layer: a fifth of a prefix's time.
        order_P = experts_NA.flatten().argsort(stable=True)
        counts = experts_NA.flatten().bincount(minlength=len(self.fc1)).tolist()
        tokens_P = order_P // experts_NA.shape[1]
        weights_P1 = weights_NA.flatten()[order_P, None]
        sums_ND = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device)
        start = 0
        for tokens, outputs in self._outputs(x_ND, tokens_P.split(counts)):
            weights = weights_P1[start : start + len(tokens)]
            sums_ND.index_add_(0, tokens, outputs.mul_(weights))
            start += len(tokens)
        return sums_ND

    def _outputs(self, x_ND: Tensor, chosen: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each chosen expert's tokens [T], and what it makes of them, float32 [T, D]."""
        for expert, tokens in enumerate(chosen):
            if len(tokens):
                yield tokens, self._expert(expert, x_ND.index_select(0, tokens)).float()

    def _one_token(self, x_1D: Tensor, experts_1A: Tensor, weights_1A: Tensor) -> Tensor:
        outputs_AD = self._outputs_of_one(x_1D, experts_1A[0].tolist())
        sum_1D: Tensor
        sum_1D, *others = outputs_AD.mul_(weights_1A.T).split(1)
        for other in others:
            sum_1D.add_(other)
        return sum_1D

    def _outputs_of_one(self, x_1D: Tensor, experts: list[int]) -> Tensor:
        """Return what the chosen experts make of a token, float32 [A, D]."""
        return torch.cat([self._expert(expert, x_1D) for expert in experts]).float()

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        return self.fc2[expert](gate(self.fc1[expert](x)))


class Int8Experts(LowBitExperts):
    """`LowBitExperts` on the int8 engine: a token is brought to magnitude 1 once for all its experts.

    A step of one token is a chain of small operations, of which this takes a third away; in a picture's
    prefix it saves passes over every token's eight copies.
    """

    fc1: Sequence[Int8Matrix]
    fc2: Sequence[Int8Matrix]

    def _outputs(self, x_ND: Tensor, chosen: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        peak_N1 = peaks(x_ND)
        rows_ND = x_ND / peak_N1
        for fc1, fc2, tokens in zip(self.fc1, self.fc2, chosen, strict=True):
            if len(tokens):
                up = fc1.product(rows_ND.index_select(0, tokens)).mul_(peak_N1.index_select(0, tokens))
                yield tokens, fc2(gate_(up))

    def _outputs_of_one(self, x_1D: Tensor, experts: list[int]) -> Tensor:
        peak_11 = peaks(x_1D)
        row_1D = x_1D / peak_11
        inner_AI = gate_(torch.cat([self.fc1[expert].product(row_1D) for expert in experts]).mul_(peak_11))
        peak_A1 = peaks(inner_AI)
        rows = inner_AI.div_(peak_A1).split(1)
        out_AD = torch.cat([self.fc2[expert].product(row) for expert, row in zip(experts, rows, strict=True)])
        return out_AD.mul_(peak_A1)


def gate_(up_NI2: Tensor) -> Tensor:
    """Compute `layers.gate` over its input: [N, 2I] -> [N, I]."""
    activated, scale = up_NI2.chunk(2, dim=-1)
    return F.gelu(activated).mul_(scale.add_(1))


def place_experts(layer: MoeMlp, leaf: str, matrices: Sequence[Matrix]) -> None:
    """Exchange one plain weight of `layer` (`fc1` or `fc2`) for packed matrices; with both the layer can run."""
    setattr(layer, leaf, PackedMatrices(matrices))
    fc1, fc2 = layer.fc1, layer.fc2
    if isinstance(fc1, PackedMatrices) and isinstance(fc2, PackedMatrices):
        has_engine = all(isinstance(matrix, Int8Matrix) for matrix in (*fc1.matrices, *fc2.matrices))
        layer.run = (Int8Experts if has_engine else LowBitExperts)(fc1.matrices, fc2.matrices)


class PackedMatrices(nn.Module):
    """Stands in a layer where the plain stack of experts was: no parameters."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        super().__init__()
        self.matrices = matrices


def low_bit_matrices(model: nn.Module) -> Iterator[Matrix | KernelWeight]:
    """Yield every packed weight of a model, those of its experts included."""
    for module in model.modules():
        if isinstance(module, (LowBitLinear, KernelLinear, KernelExperts, Float8Linear)):
            yield module.matrix
        elif isinstance(module, PackedMatrices):
            yield from module.matrices


def has_packed_weights(model: nn.Module) -> bool:
    """Return True when any weight of the model is packed in few bits."""
    return next(low_bit_matrices(model), None) is not None
