"""Triton kernels of the vision encoder: bytes to rows of patches, and a sum with its LayerNorm.

`patch_rows` writes the input of the first product from uint8 crops, in one pass over them. `add_layer_norm` reads a
residual and a branch once and writes both their sum and its norm, where torch's two kernels read and write five times.

Each row is computed alone, and its sums are added in an order that only the width decides.
Knows nothing of torch. Only `operators.py` imports and launches these kernels: Triton is imported where a GPU is, and
nowhere else.
Source: Moondream 3 specification, section 5.

Shape suffixes: N crops, S crop side in pixels, P patches of a crop, R rows, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHANNELS = tl.constexpr(3)
BYTES = tl.constexpr(256)


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
