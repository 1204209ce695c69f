"""Products with 4-bit weights: packed once in the layout of torch's CPU kernel, unpacked tile by tile elsewhere.

The kernel (`aten._weight_int4pack_mm_for_cpu`) reads codes as fast as memory gives them and computes
at a third of the bf16 rate, so it serves steps of few rows. A picture's whole prefix is computed from
the weight unpacked to the activations' dtype, one matrix at a time: 2.2 times as fast at 738 rows.
Which of the two runs follows from the kind of pass (`TextPass`) and never from the number of rows,
because the two round differently and no answer may depend on its company.

Both compute `(code - 8) * scale + zero`, scale and zero in the activations' dtype: in bfloat16 each is
rounded by up to 2**-9 of itself, a tenth of the 4-bit rounding; in float32 values are exact.
Measured: Zen 5, one core, torch 2.13, 2026-11: 2048 x 2048 in 0.125 ms at one row, unpacked in 2.2 ms.

Shape suffixes: N rows, K inputs, O outputs, G groups of a row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from md3cli.model.moe import usual_size
from md3cli.model.name_tables import INT4_GROUP
from md3cli.model.quantised import INT4_MAX, LowBit, QuantisedWeight

BLOCK = 64  # outputs side by side in the packed layout; what torch's AVX-512 kernel reads
_CODE_OFFSET = 8  # the kernel's zero


@dataclass(slots=True)
class TextPass:
    """What the decoder is doing: a picture's whole prefix (`is_prefix`), or a prompt or step."""

    is_prefix: bool = False


@functools.cache
def has_int4_kernel() -> bool:
    """True where the CPU kernel exists and reads the layout of `pack_blocks`."""
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        return False
    codes = torch.arange(BLOCK * INT4_GROUP, dtype=torch.int32).view(BLOCK, INT4_GROUP) * 7 % (INT4_MAX + 1)
    try:
        theirs: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    except (RuntimeError, NotImplementedError):
        return False
    return torch.equal(theirs.flatten(), pack_blocks(codes.to(torch.uint8)).flatten())


def can_pack(shape: tuple[int, ...]) -> bool:
    """True where a matrix fills the layout: whole blocks of outputs, groups that end with a row."""
    return shape[-2] % BLOCK == 0 and shape[-1] % INT4_GROUP == 0


def pack_blocks(codes_OK: Tensor) -> Tensor:
    """uint8 codes [O, K] -> uint8 [O/64, K, 32]: the low nibbles are a block's first 32 outputs, the high its last."""
    blocks = codes_OK.view(-1, 2, BLOCK // 2, codes_OK.shape[1])
    return (blocks[:, 0] | (blocks[:, 1] << 4)).transpose(1, 2).contiguous()


def unpack_blocks(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `pack_blocks`, transposed: codes as `dtype` [K, O]."""
    num_blocks, num_inputs, half = packed.shape
    out_KO = torch.empty(num_inputs, num_blocks * 2 * half, dtype=dtype, device=packed.device)
    halves = out_KO.view(num_inputs, num_blocks, 2, half).permute(1, 0, 2, 3)
    halves[:, :, 0] = packed & INT4_MAX
    halves[:, :, 1] = packed >> 4
    return out_KO


class Int4Matrix:
    """A weight [O, K] in 4 bits with a scale and a zero per group, in the dtype of the activations."""

    def __init__(self, packed: Tensor, scales_and_zeros_GO2: Tensor, text_pass: TextPass) -> None:
        self.packed, self.scales_and_zeros_GO2, self.text_pass = packed, scales_and_zeros_GO2, text_pass
        is_cpu_bf16 = packed.device.type == "cpu" and scales_and_zeros_GO2.dtype is torch.bfloat16
        self._has_kernel = is_cpu_bf16 and has_int4_kernel()

    @property
    def num_bytes(self) -> int:
        return int(self.packed.nbytes + self.scales_and_zeros_GO2.nbytes)

    def __call__(self, x_NK: Tensor) -> Tensor:
        """Rows [N, K] -> [N, O] in the same dtype."""
        if self._has_kernel and not self.text_pass.is_prefix:
            kernel_shape = self.packed.view(-1, self.packed.shape[1] // 2)  # [O, K / 2]
            return torch.ops.aten._weight_int4pack_mm_for_cpu(  # type: ignore[no-any-return]
                x_NK, kernel_shape, INT4_GROUP, self.scales_and_zeros_GO2
            )
        padded = F.pad(x_NK, (0, 0, 0, usual_size(len(x_NK)) - len(x_NK)))
        return torch.mm(padded, self.unpacked())[: len(x_NK)]

    def unpacked(self) -> Tensor:
        """The weight transposed [K, O], in the dtype of the scales."""
        scale_GO, zero_GO = (part.contiguous() for part in self.scales_and_zeros_GO2.unbind(-1))
        out_KO = unpack_blocks(self.packed, scale_GO.dtype)
        groups = out_KO.view(-1, INT4_GROUP, out_KO.shape[1])
        shift_GO = zero_GO.float() / scale_GO.float() - _CODE_OFFSET
        groups.add_(shift_GO.to(scale_GO.dtype)[:, None]).mul_(scale_GO[:, None])
        return out_KO


def pack_int4(weight: QuantisedWeight, text_pass: TextPass, dtype: torch.dtype) -> list[Int4Matrix]:
    """A weight, or one per expert, packed for activations of `dtype`; a stack lies in one piece of memory."""
    assert weight.kind is LowBit.INT4
    assert can_pack(weight.shape), weight.shape
    (num_outputs, num_inputs), count = weight.shape[-2:], weight.num_matrices
    device = weight.codes.device
    packed = torch.empty(count, num_outputs // BLOCK, num_inputs, BLOCK // 2, dtype=torch.uint8, device=device)
    pairs = torch.empty(count, num_inputs // INT4_GROUP, num_outputs, 2, dtype=dtype, device=device)
    for part, target, pair_GO2 in zip(weight.matrices(), packed, pairs, strict=True):
        assert part.zero_point is not None
        target.copy_(pack_blocks(part.codes.view(num_outputs, num_inputs)))
        zero = (_CODE_OFFSET - part.zero_point) * part.scale
        pair_GO2.copy_(torch.stack([part.scale, zero], dim=-1).view(num_outputs, -1, 2).transpose(0, 1))
    return [Int4Matrix(*tensors, text_pass) for tensors in zip(packed, pairs, strict=True)]
