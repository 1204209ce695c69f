"""Triton kernels of attention over slots of the cache: every query reads positions 0 to its own of one slot.

A step has one query of each sequence: `attend_split` reads at most SPLIT positions of a slot, and `join_splits` adds
what the splits found, in order. Prompts come in blocks of queries of one sequence: `attend_block` walks the positions
in tiles. Their new keys and values are stored before (`attention_kernels.tau_rope_store`).

What a row reads, and the order of its sums, follow from its own position: tiles behind it, and masked positions in its
last tile, add exact zeros. So a row's bits depend neither on its companions nor on the capacity of the slots. Slot -1
is an idle row: nothing is read and its output is zero. Sums are float32; keys and values are never copied.

Knows nothing of torch. Only `operators.py` imports and launches these kernels: Triton is imported where a GPU is, and
nowhere else. Their plain twin is `layers.attention` under the mask of a `text.SlotStore`.
Ideas: splits of a fixed size instead of a fixed number are Thinking Machines' ("Defeating Nondeterminism in LLM
Inference"); parts with their maximum and sum are FlashDecoding's.
Source: Moondream 3 specification, section 7.

Shape suffixes: N rows of a step, B sequences of T queries, H heads, S splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEAD = tl.constexpr(64)
SCALE = tl.constexpr(0.125)  # 64 ** -0.5
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _num_read(slots, position, row, position_stride, CAPACITY):
    """How many positions the query of a step reads: none where it is idle, at most what a slot holds."""
    last = tl.load(position + row * position_stride).to(tl.int32)
    is_live = (tl.load(slots + row) >= 0).to(tl.int32)
    return tl.minimum(last + 1, CAPACITY) * is_live


@triton.jit(do_not_specialize=["num_rows", "position_stride", "CAPACITY"])
def attend_split(
    q, keys, values, slots, position, parts, stats, num_rows, position_stride, CAPACITY,
    H: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One row, one head, SPLIT positions: their weighted values, not yet divided, their largest score and their mass.

    Grid (rows N, heads, splits S). q [N, H, 64]; keys, values [slots, H, CAPACITY, 64]; parts float32 [S, N, H, 64];
    stats float32 [2, S, N, H]. A split that the row does not reach writes nothing: `join_splits` does not read it.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = _num_read(slots, position, row, position_stride, CAPACITY)
    first = split * SPLIT
    if first < length:
        depth = tl.arange(0, HEAD)
        at = first + tl.arange(0, SPLIT)
        is_read = (at < length)[:, None]
        slot = tl.load(slots + row).to(tl.int64)
        offset = (slot * H + head) * CAPACITY * HEAD + at[:, None] * HEAD + depth[None, :]
        # No loop over tiles: all keys are under way at once, 32 kB of a program, and so are all values behind them.
        key = tl.load(keys + offset, mask=is_read, other=0.0)
        value = tl.load(values + offset, mask=is_read, other=0.0)
        query = tl.load(q + (row * H + head) * HEAD + depth).to(tl.float32) * SCALE
        score = tl.sum(key.to(tl.float32) * query[None, :], axis=1)
        score = tl.where(at < length, score, NOTHING)
        best = tl.max(score, axis=0)
        weight = tl.exp(score - best)
        index = (split * num_rows + row) * H + head
        tl.store(parts + index * HEAD + depth, tl.sum(weight[:, None] * value.to(tl.float32), axis=0))
        tl.store(stats + index, best)
        tl.store(stats + tl.num_programs(2) * num_rows * H + index, tl.sum(weight, axis=0))


@triton.jit(do_not_specialize=["num_rows", "position_stride", "CAPACITY"])
def join_splits(
    parts, stats, slots, position, out, num_rows, position_stride, CAPACITY,
    H: tl.constexpr, BH: tl.constexpr, SPLIT: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Add the splits of BH heads of a row, from the first to the last that it reaches: out [N, H, 64].

    Grid (rows, blocks of heads).
    """
    row = tl.program_id(0)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    is_head = head < H
    depth = tl.arange(0, HEAD)
    length = _num_read(slots, position, row, position_stride, CAPACITY)
    at = row * H + head
    best = tl.full([BH], NOTHING, tl.float32)
    for split in tl.static_range(S):  # masked loads, not a branch: those of all splits are under way at once
        is_there = is_head & (split * SPLIT + tl.zeros_like(head) < length)
        best = tl.maximum(best, tl.load(stats + split * num_rows * H + at, mask=is_there, other=NOTHING))
    best = tl.where(best == NOTHING, 0.0, best)  # an idle row has no largest score
    total = tl.zeros([BH, HEAD], tl.float32)
    mass = tl.zeros([BH], tl.float32)
    for split in tl.static_range(S):
        is_there = is_head & (split * SPLIT + tl.zeros_like(head) < length)
        index = split * num_rows * H + at
        share = tl.exp(tl.load(stats + index, mask=is_there, other=NOTHING) - best)
        mass += share * tl.load(stats + S * num_rows * H + index, mask=is_there, other=0.0)
        part = tl.load(parts + index[:, None] * HEAD + depth[None, :], mask=is_there[:, None], other=0.0)
        total += share[:, None] * part
    mass = tl.where(mass == 0.0, 1.0, mass)  # of an idle row; NaN stays
    target = out + at[:, None] * HEAD + depth[None, :]
    tl.store(target, (total / mass[:, None]).to(out.dtype.element_ty), mask=is_head[:, None])


@triton.jit(do_not_specialize=["T", "position_stride_b", "position_stride_t", "CAPACITY"])
def attend_block(
    q, keys, values, slots, position, out, T, position_stride_b, position_stride_t, CAPACITY,
    H: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BM queries of one sequence and head, each at its own position: out [B, T, H, 64], as q is.

    Grid (blocks of queries, heads, sequences B). Positions are walked BC at a time, up to the last of any query: what
    is behind a query's own position has weight zero, and must be finite: it is of the same sequence, or its padding.
    """
    sequence, head = tl.program_id(2), tl.program_id(1)
    index = tl.program_id(0) * BM + tl.arange(0, BM)
    is_query = index < T
    slot = tl.load(slots + sequence).to(tl.int64)
    own = position + sequence * position_stride_b + index * position_stride_t
    last = tl.load(own, mask=is_query & (tl.zeros_like(index) <= slot), other=-1).to(tl.int32)
    last = tl.minimum(last, CAPACITY - 1)
    end = tl.max(last, axis=0) + 1
    depth = tl.arange(0, HEAD)
    row = (sequence * T + index).to(tl.int64)
    at_query = (row * H + head)[:, None] * HEAD + depth[None, :]
    query = tl.load(q + at_query, mask=is_query[:, None], other=0.0)
    base = (slot * H + head) * CAPACITY * HEAD
    total = tl.zeros([BM, HEAD], tl.float32)
    best = tl.full([BM], NOTHING, tl.float32)
    mass = tl.zeros([BM], tl.float32)
    for first in range(0, end, BC):
        at = first + tl.arange(0, BC)
        is_read = at < end
        key = tl.load(keys + base + at[None, :] * HEAD + depth[:, None], mask=is_read[None, :], other=0.0)
        value = tl.load(values + base + at[:, None] * HEAD + depth[None, :], mask=is_read[:, None], other=0.0)
        score = tl.dot(query, key, input_precision="ieee") * SCALE
        score = tl.where(at[None, :] <= last[:, None], score, NOTHING)
        best_yet = tl.maximum(best, tl.max(score, axis=1))
        shift = tl.where(best_yet == NOTHING, 0.0, best_yet)  # a query that reads nothing yet
        weight = tl.exp(score - shift[:, None])
        kept = tl.exp(best - shift)
        mass = mass * kept + tl.sum(weight, axis=1)
        total = tl.dot(weight.to(value.dtype), value, total * kept[:, None], input_precision="ieee")
        best = best_yet
    mass = tl.where(mass == 0.0, 1.0, mass)  # of an idle sequence; NaN stays
    tl.store(out + at_query, (total / mass[:, None]).to(out.dtype.element_ty), mask=is_query[:, None])
