"""Scales that lose least: codes for a weight whose weighted squared error is smaller than by extremes.

The extremes of a row or group say how far its codes must reach for nothing to be cut off, not where they serve best.
For each row (int8, fp8) or group of 128 (int4) two moves are made here, and the best scale ever met is kept, so that
the result is never worse than the extremes:

- reach less far: ranges shrunk to a few ratios, as AWQ searches its clipping (Lin et al., 2023, arXiv:2306.00978,
  section 3) and OCTAV puts it for one tensor (Sakr et al., 2022, arXiv:2206.06501);
- refit: for codes as they stand the best scale and zero point are a least-squares line, and for that line the nearest
  codes are best; a few rounds of both, Lloyd's alternation, which HQQ (Badri and Shaji, 2023,
  https://mobiusml.github.io/hqq_blog/) uses on the zero point.

With `importance`, the mean square of each input the weight will meet (`model/calibrate.py`), errors are weighted by it:
to first order that is the error of the product, the diagonal of the Hessian that GPTQ uses whole (Frantar et al., 2022,
arXiv:2210.17323). Searching takes most of a start with `--quant`, so `CodeCache` keeps what was found on disk.

Shape suffixes: R rows or groups, C values in each (128 for groups).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from math import gcd

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from md3cli.errors import CheckpointError
from md3cli.file_cache import FileCache
from md3cli.model.weights.codes import (
    FP8_MAX,
    INT4_MAX,
    INT8_MAX,
    LowBit,
    QuantisedWeight,
    pack_nibbles,
    quantise_fp8,
    quantise_int4,
    quantise_int8,
    unpack_nibbles,
)
from md3cli.model.weights.files import WeightFiles
from md3cli.model.weights.names import INT4_GROUP

SEARCH_VERSION = 1  # rises when `search` finds other scales
LEAST_ELEMENTS = 1 << 20  # smaller weights are searched in no time
# Measured on normal, Laplace and t(3) values, 2026-11: finer steps or more rounds gain under 1 %.
GROUP_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
GROUP_ROUNDS = 4
ROW_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
ROW_ROUNDS = 1
_PIECE_ELEMENTS = 1 << 20  # a piece and what is made of it stay in the caches
_TINY = torch.finfo(torch.float32).tiny


def search(
    weight: Tensor, kind: LowBit, importance: Tensor | None = None, *, name: str = "a matrix"
) -> QuantisedWeight:
    """Quantise `weight` [..., out, in] to `kind` with the best scales.

    `importance` float32 [in], or [experts, in] for a matrix per expert: the weight of an error in
    that column; only ratios within a row or group matter. Not negative, not all zero in a row or group.

    Raises:
        CheckpointError: the weight, called `name`, holds NaN or infinity, for which codes would say any number.
    """
    if not weight.abs().amax().isfinite():
        raise CheckpointError(f"{name} holds values that are not finite; no scale fits them, the weights are damaged")
    if kind is LowBit.INT4:
        scale, zero_point = _search_groups(weight, importance)
        return quantise_int4(weight, scale, zero_point)
    if kind is LowBit.INT8:
        return quantise_int8(weight, _search_rows(weight, importance, INT8_MAX, _to_int8))
    return quantise_fp8(weight, _search_rows(weight, importance, FP8_MAX, _to_fp8))


# -- one scale per row -----------------------------------------------------------------------------


def _to_int8(x_RC: Tensor) -> Tensor:
    return x_RC.round_().clamp_(-INT8_MAX, INT8_MAX)


def _to_fp8(x_RC: Tensor) -> Tensor:
    return x_RC.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def _search_rows(
    weight: Tensor, importance: Tensor | None, largest: float, to_codes: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the best scale of each row: float32 [..., out]."""
    rows = weight.flatten(0, -2)
    found = torch.empty(len(rows), 1, device=weight.device)
    for piece, h_RC in _pieces(weight, importance, multiple=1):
        w_RC = rows[piece].float()
        full_R1 = _positive(w_RC.abs().amax(dim=1, keepdim=True) / largest)
        best = _Best(full_R1, torch.zeros_like(full_R1))
        for ratio in ROW_RATIOS:
            best.offer(full_R1 * ratio, best.zero_point, w_RC, h_RC, lambda x, s, z: to_codes(x / s))
        for _ in range(ROW_ROUNDS):
            codes_RC = to_codes(w_RC / best.scale)
            weighted_RC = codes_RC if h_RC is None else codes_RC * h_RC
            power = (weighted_RC * codes_RC).sum(dim=1, keepdim=True)
            scale = (weighted_RC * w_RC).sum(dim=1, keepdim=True) / power.clamp_min(_TINY)
            scale = torch.where(scale >= _TINY, scale, best.scale)
            best.offer(scale, best.zero_point, w_RC, h_RC, lambda x, s, z: to_codes(x / s))
        found[piece] = best.scale
    return found.view(weight.shape[:-1])


# -- scale and zero point per group of 128 ---------------------------------------------------------


def _to_int4(x_RC: Tensor, scale_R1: Tensor, zero_R1: Tensor) -> Tensor:
    return (x_RC / scale_R1).add_(zero_R1).round_().clamp_(0, INT4_MAX)


def _search_groups(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the best scale and zero point of each group of values in row order: float32 [groups, 1] each."""
    rows, width = weight.flatten(0, -2), weight.shape[-1]
    num_groups = weight.numel() // INT4_GROUP
    scale, zero_point = (torch.empty(num_groups, 1, device=weight.device) for _ in range(2))
    for piece, h in _pieces(weight, importance, multiple=INT4_GROUP // gcd(width, INT4_GROUP)):
        w_RC = rows[piece].reshape(-1, INT4_GROUP).float()
        best = _best_of_groups(w_RC, None if h is None else h.reshape(-1, INT4_GROUP))
        groups = slice(piece.start * width // INT4_GROUP, piece.start * width // INT4_GROUP + len(w_RC))
        scale[groups], zero_point[groups] = best.scale, best.zero_point
    return scale, zero_point


def _best_of_groups(w_RC: Tensor, h_RC: Tensor | None) -> _Best:
    low_R1, high_R1 = w_RC.amin(dim=1, keepdim=True), w_RC.amax(dim=1, keepdim=True)
    mean_R1 = w_RC.mean(dim=1, keepdim=True)
    best = _Best(_positive(low_R1.abs()), -low_R1.sign())  # holds a group of one value exactly, as code 0
    is_constant = high_R1 - low_R1 < INT4_MAX * _TINY
    for ratio in GROUP_RATIOS:
        low = mean_R1 + (low_R1 - mean_R1) * ratio
        scale = ((high_R1 - low_R1) * (ratio / INT4_MAX)).clamp_min(_TINY)
        zero_point = -low / scale
        best.offer(
            torch.where(is_constant, best.scale, scale),
            torch.where(is_constant, best.zero_point, zero_point),
            w_RC,
            h_RC,
            _to_int4,
        )
    scale, zero_point = best.scale, best.zero_point
    for _ in range(GROUP_ROUNDS):
        scale, zero_point = _line(w_RC, h_RC, _to_int4(w_RC, scale, zero_point), best)
        best.offer(scale, zero_point, w_RC, h_RC, _to_int4)
    return best


def _line(w_RC: Tensor, h_RC: Tensor | None, codes_RC: Tensor, best: _Best) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the least-squares line through (code, value); where there is none, the best."""
    if h_RC is None:
        centre = codes_RC.mean(dim=1, keepdim=True)
        mean = w_RC.mean(dim=1, keepdim=True)
        offset_RC = codes_RC - centre
        weighted_RC = offset_RC
    else:
        total = h_RC.sum(dim=1, keepdim=True)
        centre = (codes_RC * h_RC).sum(dim=1, keepdim=True) / total
        mean = (w_RC * h_RC).sum(dim=1, keepdim=True) / total
        offset_RC = codes_RC - centre
        weighted_RC = offset_RC * h_RC
    spread = (weighted_RC * offset_RC).sum(dim=1, keepdim=True)
    scale = (weighted_RC * w_RC).sum(dim=1, keepdim=True) / spread.clamp_min(_TINY)
    zero_point = centre - mean / scale
    is_line = (scale >= _TINY) & zero_point.isfinite()
    return torch.where(is_line, scale, best.scale), torch.where(is_line, zero_point, best.zero_point)


# -- both ------------------------------------------------------------------------------------------


class _Best:
    """For every row the best scale and zero point offered so far, and their error."""

    def __init__(self, scale_R1: Tensor, zero_R1: Tensor) -> None:
        self.scale, self.zero_point = scale_R1, zero_R1
        self._error = torch.full_like(scale_R1, float("inf"))

    def offer(
        self,
        scale_R1: Tensor,
        zero_R1: Tensor,
        w_RC: Tensor,
        h_RC: Tensor | None,
        to_codes: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        """Keep these where they are better; codes (float32) are what `to_codes` makes of values, scale and zero."""
        error_RC = to_codes(w_RC, scale_R1, zero_R1).sub_(zero_R1).mul_(scale_R1).sub_(w_RC).square_()
        if h_RC is not None:
            error_RC *= h_RC
        error = error_RC.sum(dim=1, keepdim=True)
        is_better = error < self._error
        self.scale = torch.where(is_better, scale_R1, self.scale)
        self.zero_point = torch.where(is_better, zero_R1, self.zero_point)
        self._error = torch.where(is_better, error, self._error)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale >= _TINY, scale, 1.0)


def _pieces(weight: Tensor, importance: Tensor | None, multiple: int) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield slices of the rows of [..., out, in] in multiples of so many, and their values' importance [R, in]."""
    num_rows, width = weight.numel() // weight.shape[-1], weight.shape[-1]
    step = max(multiple, _PIECE_ELEMENTS // width // multiple * multiple)
    h_XC = None
    if importance is not None:
        h_XC = importance.view(-1, width).float()
        # To a mean of 1 in each row: its size cannot make errors overflow or vanish.
        h_XC = h_XC / h_XC.mean(dim=1, keepdim=True).clamp_min(_TINY)
    for start in range(0, num_rows, step):
        piece = slice(start, min(start + step, num_rows))
        if h_XC is None:
            yield piece, None
            continue
        experts = torch.arange(piece.start, piece.stop, device=weight.device) // weight.shape[-2]
        yield piece, h_XC[experts] if len(h_XC) > 1 else h_XC.expand(piece.stop - piece.start, -1)


# -- kept for the next start -----------------------------------------------------------------------


class CodeCache:
    """Codes by weight of one checkpoint that was read in `dtype`, on disk beside encodings (`file_cache.py`).

    One file of safetensors a weight. Its key covers the checkpoint's files (place, size, time of change), the dtype,
    the weight's name, the scheme and the search's version. A folder that cannot be written to is only read after that.
    """

    def __init__(self, files: FileCache, checkpoint: WeightFiles, dtype: torch.dtype, device: torch.device) -> None:
        self.files, self.device = files, device
        self.is_writable = True
        facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
        self._context = json.dumps([SEARCH_VERSION, str(dtype), facts])

    def load(self, name: str, kind: LowBit, shape: tuple[int, ...]) -> QuantisedWeight | None:
        """Return the codes of a weight on the cache's device; None when they are not there or damaged."""
        payload = self.files.get(self._key(name, kind)) if _is_worth_it(shape) else None
        if payload is None:
            return None
        try:
            tensors = {part: tensor.to(self.device) for part, tensor in load(payload).items()}
            return _from_tensors(tensors, kind, shape)
        except (SafetensorError, KeyError, AssertionError):
            return None

    def save(self, name: str, weight: QuantisedWeight) -> None:
        """Keep a weight's codes; a full disk ends keeping, not the start."""
        if not (self.is_writable and _is_worth_it(weight.shape)):
            return
        try:
            self.files.put(self._key(name, weight.kind), save(_to_tensors(weight)))
        except OSError:
            self.is_writable = False

    def _key(self, name: str, kind: LowBit) -> str:
        return hashlib.sha256(f"{self._context}:{name}:{kind}".encode()).hexdigest()


def _is_worth_it(shape: tuple[int, ...]) -> bool:
    return torch.Size(shape).numel() >= LEAST_ELEMENTS


def _to_tensors(weight: QuantisedWeight) -> dict[str, Tensor]:
    codes = pack_nibbles(weight.codes) if weight.kind is LowBit.INT4 else weight.codes
    tensors = {"codes": codes, "scale": weight.scale}
    if weight.zero_point is not None:
        tensors["zero_point"] = weight.zero_point
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _from_tensors(tensors: dict[str, Tensor], kind: LowBit, shape: tuple[int, ...]) -> QuantisedWeight:
    codes = unpack_nibbles(tensors["codes"]) if kind is LowBit.INT4 else tensors["codes"]
    return QuantisedWeight(kind, shape, codes, tensors["scale"], tensors.get("zero_point"))
