"""A layer's experts in few bits: a loop over those that were chosen, in order of their number.

Each chosen expert's matrices are read once for all its tokens. Activations between the two products
stay in float32 where the product gives it (int8), and the weighted sum over a token's experts is
float32 in order of the expert's number, so that a token's result is the same alone and in company.

Shape suffixes: N tokens, D width, I inner width of an expert, A choices per token, P = N * A pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from md3cli.model.low_bit import LowBitLinear, Matrix
from md3cli.model.low_bit_int8 import Int8Matrix, normalise_rows, peaks, sentinel_row
from md3cli.model.moe import MoeMlp, Routing, gate


class LowBitExperts:
    """`MoeMlp.run` over packed experts of any kind."""

    def __init__(self, fc1: Sequence[Matrix], fc2: Sequence[Matrix]) -> None:
        assert len(fc1) == len(fc2)
        self.fc1, self.fc2 = fc1, fc2

    def __call__(self, x_ND: Tensor, routing: Routing) -> Tensor:
        experts_NA, order_NA = routing.experts_NA.sort(dim=1)
        weights_NA = routing.weights_NA.gather(1, order_NA)
        if len(x_ND) == 1:
            y_PD = self._one_token(x_ND, experts_NA[0].tolist())
        else:
            y_PD = self._sorted_tokens(x_ND, experts_NA)
        y_NAD = y_PD.view(*experts_NA.shape, -1)
        return y_NAD.mul_(weights_NA[..., None]).sum(1).to(x_ND.dtype)

    def _sorted_tokens(self, x_ND: Tensor, experts_NA: Tensor) -> Tensor:
        """Outputs of every (token, choice) pair, float32 [P, D] in order of tokens, then choices."""
        order_P = experts_NA.flatten().argsort(stable=True)
        counts = experts_NA.flatten().bincount(minlength=len(self.fc1)).tolist()
        y_PD = torch.empty(len(order_P), x_ND.shape[1], dtype=torch.float32, device=x_ND.device)
        for expert, pairs in enumerate(order_P.split(counts)):
            if len(pairs):
                x = x_ND.index_select(0, pairs // experts_NA.shape[1])
                y_PD.index_copy_(0, pairs, self._expert(expert, x).float())
        return y_PD

    def _one_token(self, x_1D: Tensor, experts: list[int]) -> Tensor:
        """The same for a single token, without sorting: [A, D]."""
        return torch.cat([self._expert(expert, x_1D) for expert in experts]).float()

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        return self.fc2[expert](gate(self.fc1[expert](x)))


class Int8Experts(LowBitExperts):
    """The same on the int8 engine; a single token is normalised once for all its experts.

    A step of one token is a chain of small operations: this takes 40 of each layer's 130 away.
    """

    fc1: Sequence[Int8Matrix]
    fc2: Sequence[Int8Matrix]

    def _one_token(self, x_1D: Tensor, experts: list[int]) -> Tensor:
        rows, peak_11 = normalise_rows(x_1D)
        up = torch.cat([self.fc1[expert].product(rows) for expert in experts])  # every other row is a sentinel's
        inner_AI = gate(up[::2] * peak_11)
        peak_A1 = peaks(inner_AI)
        pairs_A2I = sentinel_row(inner_AI.shape[1]).repeat(len(experts), 2, 1)
        torch.div(inner_AI, peak_A1, out=pairs_A2I[:, 0])
        outputs = [self.fc2[expert].product(pair) for expert, pair in zip(experts, pairs_A2I.unbind(), strict=True)]
        return torch.cat(outputs)[::2] * peak_A1


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


def low_bit_matrices(model: nn.Module) -> Iterator[Matrix]:
    """Every packed weight of a model, its experts' included."""
    for module in model.modules():
        if isinstance(module, LowBitLinear):
            yield module.matrix
        elif isinstance(module, PackedMatrices):
            yield from module.matrices


def has_low_bits(model: nn.Module) -> bool:
    """True when any weight of the model is packed in few bits."""
    return next(low_bit_matrices(model), None) is not None
