"""Triton kernels of what a pass computes beside its layers: angles, and features of places that a prompt names.

Each is one launch where torch has ten to twenty, of a few hundred numbers each: in a replayed step every launch takes a
microsecond, whatever it computes. Rows are computed alone, sums in an order that the width alone fixes.

Knows nothing of torch. Only `operators.py` imports and launches these kernels: Triton is imported where a GPU is, and
nowhere else. Their plain twins are `text.rotary_table` and `moondream.fourier_features`.
Source: Moondream 3 specification, sections 7 and 8.

Shape suffixes: R rows, B sequences, T positions, F frequencies, n values of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit(do_not_specialize=["num_rows", "T", "position_stride_b", "position_stride_t"])
def rotary_angles(
    position, frequency, table, num_rows, T, position_stride_b, position_stride_t,
    F: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of position times frequency: table float32 [2, R, F]. Grid (blocks of BR rows)."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    is_row = row < num_rows
    column = tl.arange(0, F)
    at = position + (row // T) * position_stride_b + (row % T) * position_stride_t
    angle = tl.load(at, mask=is_row, other=0).to(tl.float32)[:, None] * tl.load(frequency + column)[None, :]
    target = table + row[:, None] * F + column[None, :]
    tl.store(target, tl.cos(angle), mask=is_row[:, None])
    tl.store(target + num_rows * F, tl.sin(angle), mask=is_row[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def fourier_features(
    values, frequencies, out, num_rows, N: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """`[cos(2 pi v . f), sin(2 pi v . f)]` of rows of N values (1 or 2): out [R, 2F], frequencies [N, F].

    Values are rounded to the dtype of the frequencies, and the angle is float32. Grid (blocks of BR rows).
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.arange(0, BF)
    is_row, is_column = row < num_rows, column < F
    dtype: tl.constexpr = frequencies.dtype.element_ty
    angle = tl.zeros([BR, BF], tl.float32)
    for index in tl.static_range(N):
        value = tl.load(values + row * N + index, mask=is_row, other=0.0).to(dtype).to(tl.float32)
        frequency = tl.load(frequencies + index * F + column, mask=is_column, other=0.0).to(tl.float32)
        angle += value[:, None] * frequency[None, :]
    angle *= TWO_PI
    target = out + row[:, None] * (2 * F) + column[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(target, tl.cos(angle).to(dtype), mask=mask)
    tl.store(target + F, tl.sin(angle).to(dtype), mask=mask)
