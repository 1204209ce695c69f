"""The Triton kernel that resizes a picture along one axis in Pillow's whole numbers.

Every output is a sum of 32 bits of pixels times weights with 22 bits behind the point, rounded once: no order of the
sum, card or compiler can change a bit. A picture is seen as [A, L, B]: A lines that are resized alone, the length L,
and B values side by side: [H, W, 3] for its width, [1, H, 3 W] for its height.

Knows nothing of torch, nor of how weights come about (`engine/resize.py`). Only `operators.py` imports and launches it.
Source: the resampling in whole numbers of Pillow's Resample.c.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHANNELS = tl.constexpr(3)
FRACTION_BITS = tl.constexpr(22)
HALF = tl.constexpr(1 << 21)


@triton.jit(do_not_specialize=["num_lines", "old", "new", "row_values", "num_taps"])
def resize_axis(
    pixels, table, out, num_lines, old, new, row_values, num_taps,
    IS_WIDTH: tl.constexpr, STEP: tl.constexpr, BL: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """`out[a, o, b] = sum over t of table[1 + t, o] * pixels[a, table[0, o] + t, b]`, in 2^-22, rounded, 0 to 255.

    pixels uint8 [A, old, B], out uint8 [A, new, B]; table int32 [1 + num_taps, new] reads inputs that exist. B is
    `row_values`, or 3 where IS_WIDTH. STEP divides `num_taps`. Grid (blocks of BV of the new * B values, of BL lines).
    """
    inner = CHANNELS if IS_WIDTH else row_values
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    line = tl.program_id(1) * BL + tl.arange(0, BL)
    # What stands beyond the end is computed again from the last value, and not stored: no load needs a mask.
    last_column = tl.minimum(column, new * inner - 1)
    last_line = tl.minimum(line, num_lines - 1).to(tl.int64)
    output = last_column // inner
    first = tl.load(table + output).to(tl.int64)
    # Values come first in a tile: lanes of a warp lie along its first axis, so that a weight serves all lines of a
    # thread and the lanes read one line. With lines first, a warp read eight lines at a time.
    source = pixels + (first * inner + (last_column - output * inner))[:, None] + last_line[None, :] * old * inner
    weights = table + new + output
    total = tl.full((BV, BL), HALF, tl.int32)
    for _ in range(0, num_taps, STEP):
        for i in tl.static_range(STEP):
            weight = tl.load(weights + i * new)
            total += tl.load(source + i * inner).to(tl.int32) * weight[:, None]
        weights += STEP * new
        source += STEP * inner
    value = tl.minimum(tl.maximum(total >> FRACTION_BITS, 0), 255).to(tl.uint8)
    target = out + column[:, None] + line[None, :].to(tl.int64) * new * inner
    tl.store(target, value, mask=(column < new * inner)[:, None] & (line < num_lines)[None, :])
