"""Products with int8 weights by oneDNN: each row brings its own scale, many rows at twice the bf16 rate.

oneDNN takes activations that are quantised already, so rows are brought to 8 bits here, each by its
own largest magnitude, and its product is scaled back by the same: no row can see another. Faster than
`low_bit_int8.py` for the hundreds of rows of a picture (729 x 1152 x 4304, two Zen 5 cores, torch
2.13, 2026-11: 1740 against 1280 GFLOP/s, bf16 at 800) and a fifth slower for single rows, which is why
vision computes with this and the decoder with that.

Shape suffixes: N rows, K inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from md3cli.model.low_bit_int8 import peaks, reduces_range
from md3cli.model.quantised import INT8_MAX, LowBit, QuantisedWeight

_ZERO = 128  # the unsigned code of zero: signed activations run on a reference path four thousand times as slow


def has_onednn_products() -> bool:
    """True where this build of torch carries the operator and this CPU its instructions."""
    return (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise") and not reduces_range()
    )


class OneDnnMatrix:
    """A weight [O, K] in oneDNN's layout; used as `low_bit.Matrix`."""

    def __init__(self, weight: QuantisedWeight) -> None:
        assert weight.kind is LowBit.INT8
        assert len(weight.shape) == 2, weight.shape
        self._packed = torch.ops.onednn.qlinear_prepack(weight.codes, None)
        self._scale = weight.scale
        self._zero_points = torch.zeros(weight.shape[0], dtype=torch.int32)
        self.num_bytes = weight.num_bytes

    def __call__(self, x_NK: Tensor) -> Tensor:
        """Any rows [N, K] -> float32 [N, O]."""
        if len(x_NK) == 1:  # with AMX oneDNN rounds a single row's product otherwise than the same row's in company
            return self(x_NK.expand(2, -1))[:1]
        peak_N1 = peaks(x_NK)
        shifted = (x_NK / peak_N1).mul_(INT8_MAX).add_(_ZERO + 0.5)  # to the nearest: what is cast to uint8 is cut off
        y_NO: Tensor = torch.ops.onednn.qlinear_pointwise(
            shifted.to(torch.uint8),
            1 / INT8_MAX,
            _ZERO,
            self._packed,
            self._scale,
            self._zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return y_NO.mul_(peak_N1)
