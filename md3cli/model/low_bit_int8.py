"""Products with int8 weights on the CPU: activations are quantised on the way, row by row.

torch's fastest int8 product here (`quantized.linear_dynamic`, fbgemm) finds one scale for all rows it
is given, so that a row's result would depend on its companions, by a lot where one of them is loud.
`normalise_rows` takes that away: each row is brought to magnitude 1, and a sentinel row holding +1 and
-1 fixes the range. A row's result is then the same bit for bit in any company.

The operators it needs are marked for removal by torch (pytorch issue 184982), which is why torch is
pinned and why nothing outside this file knows them.
Many rows are taken some at a time: a product of a vision layer's 729 rows takes half the time so.
Measured: Zen 5, one core, torch 2.13, 2026-11: 2048 x 2048 in 0.15 ms at one row (28 GB/s), 640 GFLOP/s at 738.

Shape suffixes: N rows, K inputs, O outputs.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from md3cli.model.quantised import LowBit, QuantisedWeight

ENGINES = ("x86", "fbgemm")
ROWS = 96  # computed at a time: with the float32 between two products, 1.6 MB at the most, in the cache
_TINY = torch.finfo(torch.float32).tiny


class NormalRows(NamedTuple):
    """Rows of magnitude 1 and behind them the sentinel: `rows` float32 [N + 1, K]; `peak_N1` is what they were."""

    rows: Tensor
    peak_N1: Tensor


def has_int8_products() -> bool:
    """True where this build of torch and this CPU have the int8 engine."""
    return any(engine in torch.backends.quantized.supported_engines for engine in ENGINES)


@functools.cache
def reduces_range() -> bool:
    """CPUs without VNNI add pairs of products in 16 bits, which 8-bit activations would overflow: 7 bits there."""
    capabilities = torch.cpu.get_capabilities()
    return not any(capabilities.get(flag, False) for flag in ("avx512_vnni", "avx_vnni", "amx_int8"))


@functools.cache
def sentinel_row(num_inputs: int) -> Tensor:
    """The row that fixes the range of a batch at -1 … 1, [1, K]; shared, not to be written to."""
    row = torch.zeros(1, num_inputs)
    row[0, 0] = 1
    row[0, -1] = -1
    return row


def peaks(x_NK: Tensor) -> Tensor:
    """The largest magnitude of each row, float32 [N, 1], never zero."""
    return x_NK.abs().amax(1, keepdim=True).float().clamp_min_(_TINY)


def normalise_rows(x_NK: Tensor) -> NormalRows:
    """Rows over their largest magnitude, the sentinel appended."""
    num_rows, num_inputs = x_NK.shape
    peak_N1 = peaks(x_NK)
    rows = torch.empty(num_rows + 1, num_inputs)
    torch.div(x_NK, peak_N1, out=rows[:num_rows])
    rows[num_rows:].copy_(sentinel_row(num_inputs))
    return NormalRows(rows, peak_N1)


class Int8Matrix:
    """A weight [O, K] packed for the engine."""

    def __init__(self, weight: QuantisedWeight) -> None:
        assert weight.kind is LowBit.INT8
        assert len(weight.shape) == 2, weight.shape
        self.num_outputs, num_inputs = weight.shape
        zero_points = torch.zeros(self.num_outputs, dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deprecated and will be removed", category=UserWarning)
            codes = torch._make_per_channel_quantized_tensor(weight.codes, weight.scale, zero_points, 0)
            self._packed = torch.ops.quantized.linear_prepack(codes, None)
        self.num_bytes = self.num_outputs * (num_inputs + 8)  # codes; a row's scale and sum

    def product(self, rows: Tensor) -> Tensor:
        """Normalised rows with a sentinel last [N + 1, K] -> float32 [N + 1, O], the last row meaningless."""
        return torch.ops.quantized.linear_dynamic(rows, self._packed, reduces_range())  # type: ignore[no-any-return]

    def __call__(self, x_NK: Tensor) -> Tensor:
        """Any rows [N, K] -> float32 [N, O]."""
        if len(x_NK) <= ROWS:
            rows, peak_N1 = normalise_rows(x_NK)
            return self.product(rows)[:-1].mul_(peak_N1)
        y_NO = torch.empty(len(x_NK), self.num_outputs)
        for x, y in zip(x_NK.split(ROWS), y_NO.split(ROWS), strict=True):
            rows, peak_N1 = normalise_rows(x)
            torch.mul(self.product(rows)[:-1], peak_N1, out=y)
        return y_NO
