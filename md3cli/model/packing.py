"""Stored tensors to canonical ones and back: splits, stacks, 8-bit and 4-bit experts.

`assemble` and `disassemble` are inverse up to rounding for every `Recipe`. Work is done in pieces,
so that the largest matrix never stands in memory twice in float32.
Source: Moondream 3 specification, sections 19.1 to 19.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from md3cli.model.name_tables import INT4_GROUP, Recipe, Slot

FP8_MAX = 448.0  # largest float8 e4m3fn
INT4_MAX = 15
_PIECE_GROUPS = 1 << 16  # 4-bit groups unpacked at a time: 32 MiB of float32 in each half


def assemble(slot: Slot, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    """The canonical tensor of `slot` in `dtype`; `read` gives a stored tensor by its plain name.

    No copy is made where the stored tensor is already right.
    """
    parts = [part.name for part in slot.parts]
    match slot.recipe:
        case Recipe.COPY:
            return read(parts[0]).to(dtype)
        case Recipe.TRANSPOSE:
            return read(parts[0]).to(dtype).T.contiguous()
        case Recipe.FIRST_HALF:
            return read(parts[0])[: slot.shape[0]].to(dtype)
        case Recipe.SECOND_HALF:
            return read(parts[0])[slot.shape[0] :].to(dtype)
        case Recipe.CONCAT:
            return torch.cat([read(name).to(dtype) for name in parts])
        case Recipe.STACK_EXPERTS:
            return _stack_experts(slot, read, dtype)
        case Recipe.FP8:
            return dequantise_fp8(read(parts[0]), read(parts[1]), dtype)
        case Recipe.INT4:
            return dequantise_int4(read(parts[0]), read(parts[1]), read(parts[2]), dtype).view(slot.shape)


def disassemble(slot: Slot, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of `slot`, by plain name, in the order of its parts; views where possible."""
    names = [part.name for part in slot.parts]
    match slot.recipe:
        case Recipe.COPY:
            pieces: tuple[Tensor, ...] = (tensor,)
        case Recipe.TRANSPOSE:
            pieces = (tensor.T.contiguous(),)
        case Recipe.CONCAT:
            pieces = tensor.chunk(len(names))
        case Recipe.STACK_EXPERTS:
            pieces = tensor.flatten(0, 1).chunk(len(names))
        case Recipe.FP8:
            pieces = quantise_fp8(tensor)
        case Recipe.INT4:
            pieces = quantise_int4(tensor)
        case Recipe.FIRST_HALF | Recipe.SECOND_HALF:
            raise AssertionError("fused tensors are read, never written")
    return zip(names, pieces, strict=True)


def _stack_experts(slot: Slot, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    result = torch.empty(slot.shape, dtype=dtype, device=read(slot.parts[0].name).device)
    rows = result.flatten(0, 1).chunk(len(slot.parts))  # a part is rows of one expert
    for part, target in zip(slot.parts, rows, strict=True):
        target.copy_(read(part.name))
    return result


def dequantise_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """value = weight · scale of its row: weight float8 [experts, rows, cols], scale [experts, rows]."""
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for target, expert, row_scale in zip(result, weight, scale, strict=True):
        target.copy_(expert.float() * row_scale.float()[:, None])
    return result


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `dequantise_fp8` with scale = row maximum / 448."""
    scale = weight.abs().amax(dim=-1).float() / FP8_MAX
    scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)  # denormals may be switched off
    packed = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for target, expert, row_scale in zip(packed, weight, scale, strict=True):
        target.copy_((expert.float() / row_scale[:, None]).clamp(-FP8_MAX, FP8_MAX))
    return packed, scale


def dequantise_int4(packed: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """value = (q - zero_point) · scale, flat: packed uint8 [n/2, 128], scale and zero_point [n, 1].

    The high nibble of row r belongs to group r, the low nibble to group r + n/2.
    """
    half = packed.shape[0]
    result = torch.empty((2 * half, packed.shape[1]), dtype=dtype, device=packed.device)
    for start in range(0, half, _PIECE_GROUPS):
        rows = slice(start, min(start + _PIECE_GROUPS, half))
        low_rows = slice(rows.start + half, rows.stop + half)
        for nibbles, target in ((packed[rows] >> 4, rows), (packed[rows] & INT4_MAX, low_rows)):
            result[target] = ((nibbles.float() - zero_point[target].float()) * scale[target].float()).to(dtype)
    return result.flatten()


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `dequantise_int4` with the range of each group spread over 0 … 15."""
    groups = weight.reshape(-1, INT4_GROUP)
    low, high = (edge.float() for edge in groups.aminmax(dim=1, keepdim=True))
    scale = ((high - low) / INT4_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    zero_point = -low / scale
    half = len(groups) // 2
    packed = torch.empty((half, INT4_GROUP), dtype=torch.uint8, device=weight.device)
    for start in range(0, half, _PIECE_GROUPS):
        rows = slice(start, min(start + _PIECE_GROUPS, half))
        low_rows = slice(rows.start + half, rows.stop + half)
        high_q, low_q = (
            (groups[part].float() / scale[part] + zero_point[part]).round().clamp(0, INT4_MAX).to(torch.uint8)
            for part in (rows, low_rows)
        )
        packed[rows] = (high_q << 4) | low_q
    return packed, scale, zero_point
