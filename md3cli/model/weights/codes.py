"""Weights in 8 and 4 bits: codes with their scales, made from full weights and turned back.

Three schemes, the ones checkpoints store and the low-bit products take:

- int8: one scale per output row, symmetric: value = code * scale, codes -127 … 127.
- int4: one scale and zero point per 128 values that follow one another in row order:
  value = (code - zero_point) * scale, codes 0 … 15. The original's 4-bit scheme.
- fp8: float8 e4m3fn codes, one scale per output row: value = code * scale.

Each quantiser takes scales somebody searched for, or spreads the extremes over all codes. Codes stand one to an
element here; `pack_nibbles` puts two of them into a file's byte. Knows no files, and computes nothing with codes.
Source: Moondream 3 specification, sections 19.2 and 19.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import prod

import torch
from torch import Tensor

from md3cli.model.weights.names import INT4_GROUP

INT8_MAX = 127
INT4_MAX = 15
FP8_MAX = 448.0  # largest float8 e4m3fn
_PIECE_ELEMENTS = 1 << 19  # widened to float32 at a time: 2 MiB stay in the cache, 6 times as fast as 32
_TINY = torch.finfo(torch.float32).tiny  # no scale below it: denormals may be switched off


class LowBit(StrEnum):
    """A scheme, by the name the user sees."""

    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A matrix [out, in], or one per expert [experts, out, in], as codes.

    `codes` is int8 or float8 of `shape`, `scale` float32 [..., out]. For int4 `codes` is uint8
    [groups, 128], `scale` and `zero_point` float32 [groups, 1]; a group may reach over the end of a row.
    """

    kind: LowBit
    shape: tuple[int, ...]
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind is LowBit.INT4:
            groups = prod(self.shape) // INT4_GROUP
            assert self.zero_point is not None
            assert self.codes.shape == (groups, INT4_GROUP), (self.codes.shape, self.shape)
            assert self.scale.shape == self.zero_point.shape == (groups, 1), (self.scale.shape, self.shape)
        else:
            assert self.codes.shape == self.shape, (self.codes.shape, self.shape)
            assert self.scale.shape == self.shape[:-1], (self.scale.shape, self.shape)

    @property
    def num_matrices(self) -> int:
        """The number of experts, or 1."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def num_bytes(self) -> int:
        """Memory of codes and scales."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scale, self.zero_point) if tensor is not None)

    @property
    def is_by_row(self) -> bool:
        """True when no scale is shared by two rows, so that a row or an expert can stand alone."""
        return self.kind is not LowBit.INT4 or self.shape[-1] % INT4_GROUP == 0

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return the values [..., out, in] in `dtype`, computed in float32 piece by piece."""
        result = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        codes, target = self.codes, result.view(self.codes.shape)
        scale, zero_point = self.scale, self.zero_point
        if self.kind is not LowBit.INT4:
            codes, target, scale = codes.flatten(0, -2), target.flatten(0, -2), scale.flatten()[:, None]
        for piece in _pieces(codes):
            values = codes[piece].float()
            if zero_point is not None:
                values -= zero_point[piece]
            target[piece] = values.mul_(scale[piece])
        return result

    def matrices(self) -> Iterator[QuantisedWeight]:
        """Yield a weight [out, in] for each expert, or the matrix itself; views. Needs `is_by_row`."""
        assert self.is_by_row, f"{self.shape}: groups reach over rows"
        count, shape = self.num_matrices, self.shape[-2:]
        codes, scale = self.codes, self.scale
        if len(self.shape) == 2 or self.kind is LowBit.INT4:
            codes, scale = (t.unflatten(0, (count, -1)) for t in (codes, scale))
        zero_points: tuple[Tensor | None, ...] = (None,) * count
        if self.zero_point is not None:
            zero_points = self.zero_point.unflatten(0, (count, -1)).unbind()
        for code, row_scale, zero_point in zip(codes.unbind(), scale.unbind(), zero_points, strict=True):
            yield QuantisedWeight(self.kind, shape, code, row_scale, zero_point)


def quantise(weight: Tensor, kind: LowBit) -> QuantisedWeight:
    """Quantise `weight` [..., out, in] in one of the schemes, extremes spread over all codes."""
    quantisers = {LowBit.INT8: quantise_int8, LowBit.INT4: quantise_int4, LowBit.FP8: quantise_fp8}
    return quantisers[kind](weight)


def quantise_int8(weight: Tensor, scale: Tensor | None = None) -> QuantisedWeight:
    """Quantise to symmetric int8; `scale` float32 [..., out], by default the row's largest magnitude / 127."""
    return _quantise_rows(weight, scale, LowBit.INT8, INT8_MAX, torch.int8)


def quantise_fp8(weight: Tensor, scale: Tensor | None = None) -> QuantisedWeight:
    """Quantise to float8 e4m3fn; `scale` float32 [..., out], by default the row's largest magnitude / 448."""
    return _quantise_rows(weight, scale, LowBit.FP8, FP8_MAX, torch.float8_e4m3fn)


def _quantise_rows(
    weight: Tensor, scale: Tensor | None, kind: LowBit, largest: float, dtype: torch.dtype
) -> QuantisedWeight:
    if scale is None:
        scale = weight.abs().amax(dim=-1).float() / largest
    scale = torch.where(scale >= _TINY, scale, 1.0)
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    rows, target, row_scale = weight.flatten(0, -2), codes.flatten(0, -2), scale.flatten()[:, None]
    for piece in _pieces(rows):
        values = rows[piece].float() / row_scale[piece]
        if kind is LowBit.INT8:
            values.round_()
        target[piece] = values.clamp_(-largest, largest).to(dtype)
    return QuantisedWeight(kind, tuple(weight.shape), codes, scale)


def quantise_int4(weight: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None) -> QuantisedWeight:
    """Quantise to 4 bits in groups of 128; scales and zero points [groups, 1], by default each group's range / 15.

    `weight` must fill an even number of groups (`names.slots` says so before anything is read).
    """
    groups = weight.reshape(-1, INT4_GROUP)
    if scale is None or zero_point is None:
        low, high = groups.amin(dim=1, keepdim=True).float(), groups.amax(dim=1, keepdim=True).float()
        scale = ((high - low) / INT4_MAX).clamp_min(_TINY)
        zero_point = -low / scale
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    for piece in _pieces(groups):
        values = groups[piece].float() / scale[piece] + zero_point[piece]
        codes[piece] = values.round_().clamp_(0, INT4_MAX).to(torch.uint8)
    return QuantisedWeight(LowBit.INT4, tuple(weight.shape), codes, scale, zero_point)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes uint8 [n, 128] to [n/2, 128]: row r's high nibbles are group r, its low ones group r + n/2."""
    high, low = codes.chunk(2)
    return (high << 4) | low


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Undo `pack_nibbles`."""
    return torch.cat([packed >> 4, packed & INT4_MAX])


def _pieces(rows: Tensor) -> Iterator[slice]:
    step = max(1, _PIECE_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)
