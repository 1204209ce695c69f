"""Products with int8 weights on the CPU: activations are quantised on the way, row by row.

torch's fastest int8 product here (fbgemm) takes one scale for all the rows it is given. Left to find
that scale itself (`quantized.linear_dynamic`), a row's result would depend on its companions, by a lot
where one of them is loud. So each row is brought to magnitude 1 and the scale is the same always: a
row's result is then the same bit for bit in any company, and no pass over the rows looks for a range.

The operators it needs are marked for removal by torch (pytorch issue 184982), which is why torch is
pinned and why nothing outside this file knows them.
Measured: Zen 5, two cores, torch 2.13, 2026-11: 2048 x 2048 in 0.10 ms at one row (40 GB/s), 1.3 TFLOP/s
at 91 rows and more, scaling included.

Shape suffixes: N rows, K inputs, O outputs.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from md3cli.model.quantised import LowBit, QuantisedWeight

ENGINES = ("x86", "fbgemm")
ROWS = 192  # computed at a time: what stands between two steps stays in the cache
_TINY = torch.finfo(torch.float32).tiny


def has_int8_products() -> bool:
    """True where this build of torch and this CPU have the int8 engine."""
    return any(engine in torch.backends.quantized.supported_engines for engine in ENGINES)


@functools.cache
def reduces_range() -> bool:
    """CPUs without VNNI add pairs of products in 16 bits, which 8-bit activations would overflow: 7 bits there."""
    capabilities = torch.cpu.get_capabilities()
    return not any(capabilities.get(flag, False) for flag in ("avx512_vnni", "avx_vnni", "amx_int8"))


def peaks(x_NK: Tensor) -> Tensor:
    """The largest magnitude of each row, float32 [N, 1], never zero."""
    return x_NK.abs().amax(1, keepdim=True).float().clamp_min_(_TINY)


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
        """Rows of magnitude 1 at the most, float32 [N, K] -> float32 [N, O]."""
        levels = 63 if reduces_range() else 127
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(  # type: ignore[no-any-return]
            rows, 1 / levels, levels + 1, self._packed
        )

    def __call__(self, x_NK: Tensor) -> Tensor:
        """Any rows [N, K] -> float32 [N, O]."""
        if len(x_NK) <= ROWS:
            peak_N1 = peaks(x_NK)
            return self.product(x_NK / peak_N1).mul_(peak_N1)
        y_NO = torch.empty(len(x_NK), self.num_outputs)
        for x, y in zip(x_NK.split(ROWS), y_NO.split(ROWS), strict=True):
            peak_N1 = peaks(x)
            torch.mul(self.product(x / peak_N1), peak_N1, out=y)
        return y_NO
