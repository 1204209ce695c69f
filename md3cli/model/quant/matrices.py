"""Weights in 8 and 4 bits as matrices, all behind one call: rows in, rows out.

A `Matrix` is a quantised weight in the form its device computes with fastest. A row's result never depends on the rows
beside it, so nothing here may choose by the number of rows, or look for one scale over several of them.

- `Int8Matrix`, on a CPU with torch's int8 engine. float8 weights become int8 there, which adds a tenth to their
  rounding and nothing to their size. The operators are marked for removal by torch (pytorch issue 184982), which
  is why torch is pinned and why nothing outside this file knows them.
- `OneDnnMatrix`: int8 for the hundreds of rows of a picture. Of 729 x 1152 x 4304 it computes 1740 GFLOP/s against 1280
  of `Int8Matrix` and 800 in bf16, and a single row a fifth slower: vision has this, the decoder the other.
- `Int4Matrix`, everywhere: the CPU's kernel for steps of few rows, else unpacked tile by tile.
- `TileMatrix`, for the rest (int8 and float8 on other devices): dequantised as a whole for each product. It is also the
  plain twin that the others are tested against.

Measured on two Zen 5 cores, torch 2.13, 2026-11. Knows no files and no layers of the network.

Shape suffixes: N rows, K inputs, O outputs, G groups of a row.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from md3cli.model.network.layers import usual_size
from md3cli.model.weights.codes import INT4_MAX, INT8_MAX, LowBit, QuantisedWeight, quantise_int8
from md3cli.model.weights.names import INT4_GROUP

ENGINES = ("x86", "fbgemm")
ROWS = 192  # computed at a time: what stands between two steps stays in the cache
_ZERO = 128  # oneDNN's code of zero: signed activations run on a reference path four thousand times as slow
BLOCK = 64  # outputs side by side in the 4-bit layout; what torch's AVX-512 kernel reads
_CODE_OFFSET = 8  # the 4-bit kernel's zero
_TINY = torch.finfo(torch.float32).tiny


def has_int8_products() -> bool:
    """Return True where this build of torch and this CPU have the int8 engine."""
    return any(engine in torch.backends.quantized.supported_engines for engine in ENGINES)


@functools.cache
def reduces_range() -> bool:
    """Return True for a CPU without VNNI, which adds pairs of products in 16 bits: activations have 7 bits there."""
    capabilities = torch.cpu.get_capabilities()
    return not any(capabilities.get(flag, False) for flag in ("avx512_vnni", "avx_vnni", "amx_int8"))


def peaks(x_NK: Tensor) -> Tensor:
    """Return the largest magnitude of each row, float32 [N, 1], never zero."""
    return x_NK.abs().amax(1, keepdim=True).float().clamp_min_(_TINY)


class Int8Matrix:
    """A weight [O, K] packed for torch's int8 engine (fbgemm).

    The engine takes one scale for all the rows it is given. So each row is brought to magnitude 1 and the scale is
    always the same. 2048 x 2048 takes 0.10 ms at one row (40 GB/s); 1.3 TFLOP/s at 91 rows and more.
    """

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
        """Multiply rows of magnitude 1 at the most: float32 [N, K] -> float32 [N, O]."""
        levels = 63 if reduces_range() else 127
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(  # type: ignore[no-any-return]
            rows, 1 / levels, levels + 1, self._packed
        )

    def __call__(self, x_NK: Tensor) -> Tensor:
        """Multiply any rows: [N, K] -> float32 [N, O]."""
        if len(x_NK) <= ROWS:
            peak_N1 = peaks(x_NK)
            return self.product(x_NK / peak_N1).mul_(peak_N1)
        y_NO = torch.empty(len(x_NK), self.num_outputs)
        for x, y in zip(x_NK.split(ROWS), y_NO.split(ROWS), strict=True):
            peak_N1 = peaks(x)
            torch.mul(self.product(x / peak_N1), peak_N1, out=y)
        return y_NO


def has_onednn_products() -> bool:
    """Return True where this build of torch carries the operator and this CPU its instructions."""
    has_operator = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    return has_operator and not reduces_range()


class OneDnnMatrix:
    """A weight [O, K] in oneDNN's layout, which takes rows that were brought to 8 bits, each by its own magnitude."""

    def __init__(self, weight: QuantisedWeight) -> None:
        assert weight.kind is LowBit.INT8
        assert len(weight.shape) == 2, weight.shape
        self._packed = torch.ops.onednn.qlinear_prepack(weight.codes, None)
        self._scale = weight.scale
        self._zero_points = torch.zeros(weight.shape[0], dtype=torch.int32)
        self.num_bytes = weight.num_bytes

    def __call__(self, x_NK: Tensor) -> Tensor:
        """Multiply any rows: [N, K] -> float32 [N, O]."""
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


@dataclass(slots=True)
class TextPass:
    """What the decoder is doing: a picture's whole prefix (`is_prefix`), or a prompt or step."""

    is_prefix: bool = False


@functools.cache
def has_int4_kernel() -> bool:
    """Return True where the CPU's kernel exists and reads the layout of `pack_blocks`."""
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        return False
    codes = torch.arange(BLOCK * INT4_GROUP, dtype=torch.int32).view(BLOCK, INT4_GROUP) * 7 % (INT4_MAX + 1)
    try:
        theirs: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    except (RuntimeError, NotImplementedError):
        return False
    return torch.equal(theirs.flatten(), pack_blocks(codes.to(torch.uint8)).flatten())


def pack_blocks(codes_OK: Tensor) -> Tensor:
    """Pack uint8 codes [O, K] to [O/64, K, 32]: low nibbles are a block's first 32 outputs, high ones its last."""
    blocks = codes_OK.view(-1, 2, BLOCK // 2, codes_OK.shape[1])
    return (blocks[:, 0] | (blocks[:, 1] << 4)).transpose(1, 2).contiguous()


def unpack_blocks(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `pack_blocks`, transposed: codes as `dtype` [K, O]."""
    num_blocks, num_inputs, half = packed.shape
    out_KO = torch.empty(num_inputs, num_blocks * 2 * half, dtype=dtype, device=packed.device)
    halves = out_KO.view(num_inputs, num_blocks, 2, half).permute(1, 0, 2, 3)
    halves[:, :, 0] = packed & INT4_MAX
    halves[:, :, 1] = packed >> 4
    return out_KO


class Int4Matrix:
    """A weight [O, K] in 4 bits with a scale and a zero per group, in the dtype of the activations.

    The CPU's kernel reads codes as fast as memory gives them (2048 x 2048 in 0.125 ms at one row) and computes at a
    third of the bf16 rate; the unpacked weight is 2.2 times as fast at 738 rows. The two round differently, so the
    kind of pass chooses (`TextPass`), never the number of rows. Both compute `(code - 8) * scale + zero`: in bfloat16
    scale and zero are rounded by up to 2**-9 of themselves, a tenth of the 4-bit rounding; in float32 values are exact.
    """

    def __init__(self, packed: Tensor, scales_and_zeros_GO2: Tensor, text_pass: TextPass) -> None:
        self.packed, self.scales_and_zeros_GO2, self.text_pass = packed, scales_and_zeros_GO2, text_pass
        is_cpu_bf16 = packed.device.type == "cpu" and scales_and_zeros_GO2.dtype is torch.bfloat16
        self._has_kernel = is_cpu_bf16 and has_int4_kernel()

    @property
    def num_bytes(self) -> int:
        return int(self.packed.nbytes + self.scales_and_zeros_GO2.nbytes)

    def __call__(self, x_NK: Tensor) -> Tensor:
        """Multiply rows [N, K] -> [N, O] in the same dtype."""
        if self._has_kernel and not self.text_pass.is_prefix:
            kernel_shape = self.packed.view(-1, self.packed.shape[1] // 2)  # [O, K / 2]
            return torch.ops.aten._weight_int4pack_mm_for_cpu(  # type: ignore[no-any-return]
                x_NK, kernel_shape, INT4_GROUP, self.scales_and_zeros_GO2
            )
        padded = F.pad(x_NK, (0, 0, 0, usual_size(len(x_NK)) - len(x_NK)))
        return torch.mm(padded, self.unpacked())[: len(x_NK)]

    def unpacked(self) -> Tensor:
        """Return the weight transposed [K, O], in the dtype of the scales."""
        scale_GO, zero_GO = (part.contiguous() for part in self.scales_and_zeros_GO2.unbind(-1))
        out_KO = unpack_blocks(self.packed, scale_GO.dtype)
        groups = out_KO.view(-1, INT4_GROUP, out_KO.shape[1])
        shift_GO = zero_GO.float() / scale_GO.float() - _CODE_OFFSET
        groups.add_(shift_GO.to(scale_GO.dtype)[:, None]).mul_(scale_GO[:, None])
        return out_KO


def _pack_int4(weight: QuantisedWeight, text_pass: TextPass, dtype: torch.dtype) -> list[Matrix]:
    assert can_hold(weight.kind, weight.shape), weight.shape
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


class TileMatrix:
    """A weight of any scheme, dequantised to the dtype of the rows whenever it is used."""

    def __init__(self, weight: QuantisedWeight) -> None:
        assert len(weight.shape) == 2, weight.shape
        self.weight = weight

    @property
    def num_bytes(self) -> int:
        return self.weight.num_bytes

    def __call__(self, x_NK: Tensor) -> Tensor:
        return F.linear(x_NK, self.weight.dequantise(x_NK.dtype))


Matrix = Int8Matrix | OneDnnMatrix | Int4Matrix | TileMatrix


def can_hold(kind: LowBit, shape: tuple[int, ...]) -> bool:
    """Return False for the few sizes the 4-bit layout does not hold; such weights are widened when they are loaded."""
    return kind is not LowBit.INT4 or (shape[-2] % BLOCK == 0 and shape[-1] % INT4_GROUP == 0)


def pack(weight: QuantisedWeight, text_pass: TextPass, dtype: torch.dtype) -> list[Matrix]:
    """Return a weight [O, K], or one per expert, in the form of its device; `dtype` is that of the activations."""
    if weight.kind is LowBit.INT4:
        return _pack_int4(weight, text_pass, dtype)
    if weight.codes.device.type != "cpu" or not has_int8_products():
        return [TileMatrix(part) for part in weight.matrices()]
    is_fp8 = weight.kind is LowBit.FP8
    return [Int8Matrix(quantise_int8(part.dequantise(torch.float32)) if is_fp8 else part) for part in weight.matrices()]


class LowBitLinear(nn.Module):
    """`layers.Linear` over a packed weight."""

    def __init__(self, matrix: Matrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y_NO = self.matrix(x.reshape(-1, x.shape[-1]))
        if self.bias is not None:
            y_NO.add_(self.bias)
        return y_NO.to(x.dtype).view(*x.shape[:-1], -1)
