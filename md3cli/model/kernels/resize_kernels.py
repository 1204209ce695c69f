"""Triton kernels that resize a picture along its width or its height in Pillow's whole numbers.

Every value is a sum of 32 bits of pixels times weights with 22 bits behind the point, rounded once: no order of the
sum, card or compiler can change a bit. A table int32 [1 + taps, new] says in row 0 where the inputs of an output begin,
and below what each weighs; all of them exist. `STEP` of them are loaded together, and divides `num_taps`.

Tiles have one axis: where no two values of a tile are neighbours in memory, Triton 3.6 lays a warp along its first axis
and Triton 3.9 along its last. Knows nothing of torch, nor of how weights come about (`engine/resize.py`). Only
`operators.py` imports and launches these kernels.
Source: the resampling in whole numbers of Pillow's Resample.c.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHANNELS = tl.constexpr(3)
FRACTION_BITS = tl.constexpr(22)
HALF = tl.constexpr(1 << 21)
ROWS = tl.constexpr(4)  # of a program that resizes widths: a weight is loaded once for all of them


# Bytes are loaded one by one: a picture may begin anywhere in a block of several, and nothing is compiled anew for it.
@triton.jit(do_not_specialize=["height", "old", "new", "num_taps"], do_not_specialize_on_alignment=["pixels"])
def resize_width(pixels, table, out, height, old, new, num_taps, STEP: tl.constexpr, BV: tl.constexpr):
    """`out[y, x, c] = sum over t of table[1 + t, x] * pixels[y, table[0, x] + t, c]`, uint8 [height, new, 3].

    pixels uint8 [height, old, 3]. Grid (blocks of BV of a row's 3 * new values, blocks of ROWS rows).
    """
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    row = tl.program_id(1) * ROWS
    # What stands beyond the end is computed again from the last value, and not stored: no load needs a mask.
    value = tl.minimum(column, CHANNELS * new - 1)
    x = value // CHANNELS
    at = tl.load(table + x) * CHANNELS + value % CHANNELS
    weights = table + new + x
    row_0 = pixels + row.to(tl.int64) * old * CHANNELS
    row_1 = pixels + tl.minimum(row + 1, height - 1).to(tl.int64) * old * CHANNELS
    row_2 = pixels + tl.minimum(row + 2, height - 1).to(tl.int64) * old * CHANNELS
    row_3 = pixels + tl.minimum(row + 3, height - 1).to(tl.int64) * old * CHANNELS
    total_0 = tl.full((BV,), HALF, tl.int32)
    total_1, total_2, total_3 = total_0, total_0, total_0
    for _ in range(0, num_taps, STEP):
        for i in tl.static_range(STEP):
            weight = tl.load(weights + i * new)
            total_0 += weight * tl.load(row_0 + at + i * CHANNELS).to(tl.int32)
            total_1 += weight * tl.load(row_1 + at + i * CHANNELS).to(tl.int32)
            total_2 += weight * tl.load(row_2 + at + i * CHANNELS).to(tl.int32)
            total_3 += weight * tl.load(row_3 + at + i * CHANNELS).to(tl.int32)
        weights += STEP * new
        at += STEP * CHANNELS
    row_values = new * CHANNELS
    _store(out, total_0, row, column, row_values)
    if row + 1 < height:
        _store(out, total_1, row + 1, column, row_values)
    if row + 2 < height:
        _store(out, total_2, row + 2, column, row_values)
    if row + 3 < height:
        _store(out, total_3, row + 3, column, row_values)


@triton.jit(do_not_specialize=["row_values", "new", "num_taps"], do_not_specialize_on_alignment=["pixels"])
def resize_height(pixels, table, out, row_values, new, num_taps, STEP: tl.constexpr, BV: tl.constexpr):
    """`out[y, v] = sum over t of table[1 + t, y] * pixels[table[0, y] + t, v]`, uint8 [new, row_values].

    pixels uint8 [old height, row_values]: a row's 3 * width values. Grid (outputs `new`, blocks of BV values).
    """
    y = tl.program_id(0)
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    value = tl.minimum(column, row_values - 1)
    source = pixels + tl.load(table + y).to(tl.int64) * row_values
    weights = table + new + y
    total = tl.full((BV,), HALF, tl.int32)
    for _ in range(0, num_taps, STEP):
        for i in tl.static_range(STEP):
            total += tl.load(weights + i * new) * tl.load(source + i * row_values + value).to(tl.int32)
        weights += STEP * new
        source += STEP * row_values
    _store(out, total, y, column, row_values)


@triton.jit
def _store(out, total, row, column, row_values):
    """Bring sums, which began with a half, to 8 bits and write them to a row."""
    value = tl.minimum(tl.maximum(total >> FRACTION_BITS, 0), 255).to(tl.uint8)
    tl.store(out + row.to(tl.int64) * row_values + column, value, mask=column < row_values)
