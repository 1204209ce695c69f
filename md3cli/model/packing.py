"""Stored tensors to canonical ones and back: splits, stacks, 8-bit and 4-bit weights.

`assemble` and `disassemble` are inverse up to rounding for every `Recipe`.
Source: Moondream 3 specification, sections 19.1 to 19.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from md3cli.model.name_tables import Recipe, Slot
from md3cli.model.quantised import LowBit, QuantisedWeight, pack_nibbles, quantise, unpack_nibbles

SCHEMES = {Recipe.FP8: LowBit.FP8, Recipe.INT4: LowBit.INT4, Recipe.INT8: LowBit.INT8}


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
        case Recipe.FP8 | Recipe.INT4 | Recipe.INT8:
            return read_quantised(slot, read).dequantise(dtype)


def disassemble(slot: Slot, tensor: Tensor | QuantisedWeight) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of `slot`, by plain name, in the order of its parts; views where possible.

    A slot stored in 8 or 4 bits takes codes that were made already, or a tensor to be rounded to them.
    """
    if slot.recipe.is_low_bit:
        if isinstance(tensor, Tensor):
            tensor = quantise(tensor, SCHEMES[slot.recipe])
        return zip([part.name for part in slot.parts], _stored_quantised(tensor), strict=True)
    assert isinstance(tensor, Tensor), slot.name
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
        case _:
            raise AssertionError("fused tensors are read, never written")
    return zip(names, pieces, strict=True)


def _stack_experts(slot: Slot, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    result = torch.empty(slot.shape, dtype=dtype, device=read(slot.parts[0].name).device)
    rows = result.flatten(0, 1).chunk(len(slot.parts))  # a part is rows of one expert
    for part, target in zip(slot.parts, rows, strict=True):
        target.copy_(read(part.name))
    return result


def read_quantised(slot: Slot, read: Callable[[str], Tensor]) -> QuantisedWeight:
    """The codes and scales of a slot stored in 8 or 4 bits (`slot.recipe.is_low_bit`)."""
    codes, *scales = (read(part.name) for part in slot.parts)
    scales = [scale.float() for scale in scales]
    if slot.recipe is Recipe.INT4:
        return QuantisedWeight(LowBit.INT4, slot.shape, unpack_nibbles(codes), *scales)
    return QuantisedWeight(SCHEMES[slot.recipe], slot.shape, codes, scales[0].view(slot.shape[:-1]))


def _stored_quantised(weight: QuantisedWeight) -> tuple[Tensor, ...]:
    """Inverse of `read_quantised`."""
    if weight.zero_point is None:
        scale = weight.scale[..., None] if weight.kind is LowBit.INT8 else weight.scale
        return weight.codes, scale
    return pack_nibbles(weight.codes), weight.scale, weight.zero_point
