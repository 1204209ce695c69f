"""Triton kernels between the projection of q, k, v and the attention of a text layer.

`tau_products` computes what a token says about the scales of its queries and values; `tau_rope_store`
applies these scales and the rotation, and writes keys and values straight into the cache. Two kernels
where the plain path (`text.Tau`, `text.rotate`, a store's `update`) runs 45.

Each row is computed alone; sums over the width are cut into parts and added in order. The kind of pass decides how
large a part is, never the rows at hand.
Knows nothing of torch. Only `operators.py` imports and launches these kernels: Triton is imported where a GPU is, and
nowhere else.
Source: Moondream 3 specification, section 7.

Shape suffixes: R rows (tokens of all sequences), H heads, D width, J = 2 H products of tau, S parts of a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEAD = tl.constexpr(64)
PAIRS = tl.constexpr(16)  # of values that are rotated: i and i + 16
ROTATED = tl.constexpr(32)  # the first values of a head
KEPT = tl.constexpr(32)  # the values behind them


@triton.jit(do_not_specialize=["num_rows"])
def tau_products(
    qkv, w, parts, num_rows,
    K: tl.constexpr, J: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """`parts[s] = gelu(qkv)[:, s * PART : (s + 1) * PART] . w[:, the same]`: float32 [S, R, J]; w [J, K].

    Grid (blocks of BM rows, parts S). The activation is computed on the way and never stored.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    column = tl.arange(0, BJ)
    depth = tl.arange(0, BK)
    is_row = row < num_rows
    total = tl.zeros((BM, BJ), tl.float32)
    for k0 in range(0, PART, BK):
        k = part * PART + k0 + depth
        values = qkv + row[:, None].to(tl.int64) * K + k[None, :]
        tile = w + column[None, :] * K + k[:, None]
        if EVEN:
            x = tl.load(values, mask=is_row[:, None], other=0.0)
            weight = tl.load(tile)
        else:
            x = tl.load(values, mask=is_row[:, None] & (k < K)[None, :], other=0.0)
            weight = tl.load(tile, mask=(k < K)[:, None] & (column < J)[None, :], other=0.0)
        wide = x.to(tl.float32)
        feature = (0.5 * wide * (1.0 + tl.math.erf(wide * 0.7071067811865476))).to(x.dtype)
        total = tl.dot(feature, weight, total, input_precision="ieee")
    at = (part * num_rows + row[:, None]) * J + column[None, :]
    tl.store(parts + at, total, mask=is_row[:, None] & (column < J)[None, :])


@triton.jit
def _scale(parts, row, num_rows, column, is_head, alpha, log_position, J: tl.constexpr, S: tl.constexpr, dtype):
    """`tanh(product) + 0.5 + sigmoid(alpha * ln(position + 1))` of some heads, rounded where the plain path rounds."""
    product = tl.zeros(column.shape, tl.float32)
    for part in tl.static_range(S):
        product += tl.load(parts + (part * num_rows + row) * J + column, mask=is_head, other=0.0)
    product = product.to(dtype).to(tl.float32)
    by_token = (2.0 * tl.sigmoid(2.0 * product) - 1.0).to(dtype).to(tl.float32)
    return (by_token + (0.5 + tl.sigmoid(alpha * log_position))).to(dtype).to(tl.float32)


@triton.jit
def _scaled(base, head, is_head, scale, first, WIDTH: tl.constexpr, dtype):
    """WIDTH values of each head from `first` on, times the head's scale, rounded: float32 [heads, WIDTH]."""
    at = base + head[:, None] * HEAD + first + tl.arange(0, WIDTH)[None, :]
    values = tl.load(at, mask=is_head[:, None], other=0.0).to(tl.float32)
    return (values * scale[:, None]).to(dtype).to(tl.float32)


@triton.jit
def _rotated(base, head, is_head, scale, cos, sin, dtype):
    """The first 32 values of each head, scaled and rotated: pairs split-half on input, interleaved on output."""
    a = _scaled(base, head, is_head, scale, 0, PAIRS, dtype)
    b = _scaled(base, head, is_head, scale, PAIRS, PAIRS, dtype)
    return tl.interleave(a * cos[None, :] - b * sin[None, :], a * sin[None, :] + b * cos[None, :])


@triton.jit
def _store_head(target, head_stride, head, is_head, first, values, WIDTH: tl.constexpr):
    at = target + head[:, None].to(tl.int64) * head_stride + first + tl.arange(0, WIDTH)[None, :]
    tl.store(at, values.to(target.dtype.element_ty), mask=is_head[:, None])


@triton.jit(do_not_specialize=["num_rows", "T", "position_stride_b", "position_stride_t", "CAPACITY"])
def tau_rope_store(
    qkv, parts, alpha, position, table, slots, q_out, k_out, v_out, keys, values, num_rows,
    T, position_stride_b, position_stride_t, CAPACITY,
    H: tl.constexpr, J: tl.constexpr, S: tl.constexpr, BH: tl.constexpr,
    RETURNS_KV: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    """Scale q and v, rotate q and k of one row and BH heads; write q, and k and v where they are wanted.

    Grid (rows, blocks of heads). qkv [R, 3, H, 64]; q_out, k_out, v_out [R, H, 64]; table float32
    [2, R, 16] cosines and sines; position [R / T, T] by its strides. keys and values are the cache's
    [slots, H, CAPACITY, 64]: row r goes to slot `slots[r // T]`, and nowhere where that is -1.
    """
    row = tl.program_id(0)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    is_head = head < H
    sequence = row // T
    at = tl.load(position + sequence * position_stride_b + (row - sequence * T) * position_stride_t)
    dtype: tl.constexpr = qkv.dtype.element_ty
    log_position = tl.log(at.to(tl.float32) + 1.0)
    of_head = tl.load(alpha + head, mask=is_head, other=0.0).to(tl.float32)
    scale_q = _scale(parts, row, num_rows, head, is_head, of_head, log_position, J, S, dtype)
    scale_v = _scale(parts, row, num_rows, H + head, is_head, of_head, log_position, J, S, dtype)
    pair = tl.arange(0, PAIRS)
    cos = tl.load(table + row * PAIRS + pair)
    sin = tl.load(table + (num_rows + row) * PAIRS + pair)

    q = qkv + row.to(tl.int64) * (3 * H * HEAD)
    k, v = q + H * HEAD, q + 2 * H * HEAD
    unscaled = tl.full([BH], 1.0, tl.float32)
    q_rotated = _rotated(q, head, is_head, scale_q, cos, sin, dtype)
    q_kept = _scaled(q, head, is_head, scale_q, ROTATED, KEPT, dtype)
    k_rotated = _rotated(k, head, is_head, unscaled, cos, sin, dtype)
    k_kept = _scaled(k, head, is_head, unscaled, ROTATED, KEPT, dtype)
    v_all = _scaled(v, head, is_head, scale_v, 0, HEAD, dtype)

    offset = row.to(tl.int64) * (H * HEAD)
    _store_head(q_out + offset, HEAD, head, is_head, 0, q_rotated, ROTATED)
    _store_head(q_out + offset, HEAD, head, is_head, ROTATED, q_kept, KEPT)
    if RETURNS_KV:
        _store_head(k_out + offset, HEAD, head, is_head, 0, k_rotated, ROTATED)
        _store_head(k_out + offset, HEAD, head, is_head, ROTATED, k_kept, KEPT)
        _store_head(v_out + offset, HEAD, head, is_head, 0, v_all, HEAD)
    if STORES:
        slot = tl.load(slots + sequence).to(tl.int64)
        # Behind a slot's end lies its neighbour.
        has_room = is_head & (tl.zeros_like(head) < CAPACITY - at) & (tl.zeros_like(head) <= slot)
        offset = (slot * H * CAPACITY + at.to(tl.int64)) * HEAD
        _store_head(keys + offset, CAPACITY * HEAD, head, has_room, 0, k_rotated, ROTATED)
        _store_head(keys + offset, CAPACITY * HEAD, head, has_room, ROTATED, k_kept, KEPT)
        _store_head(values + offset, CAPACITY * HEAD, head, has_room, 0, v_all, HEAD)
