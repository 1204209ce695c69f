"""Triton kernels of the vision encoder: bytes to rows of patches, a sum with its LayerNorm, rows in float8.

`patch_rows` writes the input of the first product from uint8 crops, in one pass over them. `add_layer_norm` reads a
residual and a branch once and writes both their sum and its norm, where torch's two kernels read and write five times.
`scale_rows` brings rows to float8 codes with a scale each, where they wish after an activation.

Each row is computed alone, and its sums are added in an order that only the width decides.
Knows nothing of torch. Only `vision_operators.py` imports and launches these kernels: Triton is imported where a GPU
is, and nowhere else.
Source: Moondream 3 specification, section 5.

Shape suffixes: N crops, S crop side in pixels, P patches of a crop, R rows, D width, K values of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHANNELS = tl.constexpr(3)
BYTES = tl.constexpr(256)
FP8_MAX = tl.constexpr(448.0)
FP8_NAN = tl.constexpr(0x7F)
FP8_NORMAL = tl.constexpr(2.0**-6)  # the least of full precision; below it codes stand 2**-9 apart
LEAST_PEAK = tl.constexpr(1e-30)  # a row of zeros counts as having it: 448 / 0 times 0 is no number
WHOLE = tl.constexpr(8388608.0)  # 2**23, from which on float32 has whole numbers alone


# Crops are read byte by byte, and one crop's first byte is no multiple of 16: not worth a second compilation.
@triton.jit(do_not_specialize_on_alignment=["crops"])
def patch_rows(
    crops, values, out,
    S: tl.constexpr, PATCH: tl.constexpr, GRID: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out[n, p, k] = values[byte k of patch p of crop n]`: out [N, P, WIDTH], zeros behind a patch's bytes.

    Grid (blocks of BLOCK values of a crop, crops). A patch's bytes are in order of channel, row, column; crops are
    [N, S, S, 3]. `values` has what each of the 256 bytes is normalised to: a division on the device would round
    otherwise than the host's.
    """
    crop = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    patch, k = at // WIDTH, at % WIDTH
    channel, place = k // (PATCH * PATCH), k % (PATCH * PATCH)
    y = (patch // GRID) * PATCH + place // PATCH
    x = (patch % GRID) * PATCH + place % PATCH
    is_inside = at < GRID * GRID * WIDTH
    is_byte = is_inside & (k < CHANNELS * PATCH * PATCH)
    byte = tl.load(crops + crop * (S * S * CHANNELS) + (y * S + x) * CHANNELS + channel, mask=is_byte, other=0)
    value = tl.load(values + byte.to(tl.int32), mask=is_byte, other=0.0)
    tl.store(out + crop * (GRID * GRID * WIDTH) + at, value, mask=is_inside)


@triton.jit(do_not_specialize=["num_rows", "branch_rows"])
def add_layer_norm(
    x, branch, weight, bias, total_out, norm_out, num_rows, branch_rows,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """`total = x + branch`, rounded; `norm = LayerNorm(total)`, statistics in float32: all [R, D].

    Grid (blocks of BM rows). The branch has `branch_rows` rows, a divisor of R, and is repeated.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.arange(0, BD)
    is_column = column < D
    mask = (row < num_rows)[:, None] & is_column[None, :]
    at = row[:, None].to(tl.int64) * D + column[None, :]
    of_branch = (row % branch_rows)[:, None].to(tl.int64) * D + column[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    left = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(branch + of_branch, mask=mask, other=0.0).to(tl.float32)
    total = (left + right).to(dtype)
    tl.store(total_out + at, total, mask=mask)
    wide = total.to(tl.float32)
    mean = tl.sum(wide, axis=1) / D
    centred = tl.where(is_column[None, :], wide - mean[:, None], 0.0)
    deviation = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + EPS)
    scale = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
    norm = centred * deviation[:, None] * scale[None, :] + shift[None, :]
    tl.store(norm_out + at, norm.to(dtype), mask=mask)


@triton.jit
def _fp8_codes(x):
    """Round float32 values of at most 448 to float8 e4m3fn codes, ties to even, by their bits.

    Cards before compute capability 8.9 have no such conversion, and Triton's interpreter cuts bits off.
    """
    size = tl.abs(x)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size * 512.0 + WHOLE).to(tl.uint32, bitcast=True) - 0x4B000000
    code = tl.where(size < FP8_NORMAL, small, normal)
    code = tl.where(x != x, FP8_NAN, code)
    return (code | ((x.to(tl.uint32, bitcast=True) >> 31) << 7)).to(tl.uint8)


@triton.jit
def scale_rows(x, codes, scales, K: tl.constexpr, BK: tl.constexpr, GELU: tl.constexpr):
    """`codes * scale = x`, or its GELU by tanh, rounded to float8: codes uint8 [R, K], scales float32 [R].

    Grid (rows). A row's largest value gets the largest code.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BK)
    at = row.to(tl.int64) * K + column
    value = tl.load(x + at, mask=column < K, other=0.0).to(tl.float32)
    if GELU:
        # x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), the same as by tanh
        value = value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    peak = tl.maximum(tl.max(tl.abs(value), axis=0), LEAST_PEAK)
    scaled = value * (FP8_MAX / peak)
    scaled = tl.where(scaled > FP8_MAX, FP8_MAX, tl.where(scaled < -FP8_MAX, -FP8_MAX, scaled))  # NaN stays
    tl.store(codes + at, _fp8_codes(scaled), mask=column < K)
    tl.store(scales + row, peak / FP8_MAX)
