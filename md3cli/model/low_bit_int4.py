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
    blocks = codes_OK.unflatten(0, (-1, 2, BLOCK // 2))
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

    def __init__(self, weight: QuantisedWeight, text_pass: TextPass, dtype: torch.dtype) -> None:
        assert weight.kind is LowBit.INT4
        assert can_pack(weight.shape), weight.shape
        assert weight.zero_point is not None
        num_outputs, num_inputs = weight.shape
        zero = (_CODE_OFFSET - weight.zero_point) * weight.scale
        pairs = torch.stack([weight.scale, zero], dim=-1).view(num_outputs, -1, 2)
        self.scales_and_zeros_GO2 = pairs.transpose(0, 1).contiguous().to(dtype)
        self.packed = pack_blocks(weight.codes.view(num_outputs, num_inputs))
        self.text_pass = text_pass
        is_on_cpu = self.packed.device.type == "cpu"
        self._has_kernel = is_on_cpu and dtype is torch.bfloat16 and has_int4_kernel()

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
        return torch.mm(x_NK, self.unpacked())

    def unpacked(self) -> Tensor:
        """The weight transposed [K, O], in the dtype of the scales."""
        scale_GO, zero_GO = (part.contiguous() for part in self.scales_and_zeros_GO2.unbind(-1))
        out_KO = unpack_blocks(self.packed, scale_GO.dtype)
        groups = out_KO.view(-1, INT4_GROUP, out_KO.shape[1])
        shift_GO = zero_GO.float() / scale_GO.float() - _CODE_OFFSET
        groups.add_(shift_GO.to(scale_GO.dtype)[:, None]).mul_(scale_GO[:, None])
        return out_KO
