"""Triton kernels of the mixture of experts, and of products with weights in 8 and 4 bits.

A (token, expert) pair is a row of the products. `plan_*` sorts the pairs by expert and cuts them into
blocks of at most BM pairs that share an expert; a program of `up_gate` and `down` computes one block
against BN columns of that expert's matrix; `combine` adds a token's pairs, in order of the expert's
number and in float32. Nothing asks the host, so nothing waits. Idle rows get no pair: no block serves
them and no weight is read for them.

A row's bits do not depend on its companions: every sum runs over the row's own values, in an order that
the tile sizes fix, and tile sizes follow from the kind of pass (`tiles.py`), never from its contents.

All sizes and strides are compile-time constants (`tl.constexpr`): with run-time strides the loads are
scalar and the kernel spills (255 registers, compiled for sm_90).

Knows nothing of torch. Only `operators.py` imports and launches these kernels: Triton is imported where a GPU is, and
nowhere else. Their plain twin is `layers.MoeMlp.run_experts`.
Ideas: blocks that share an expert and blocks marked unused are vLLM's (`moe_align_block_size`).
Source: Moondream 3 specification, sections 7, 19.2 and 19.3.

Shape suffixes: N tokens, X experts, A experts of a token, P = N * A pairs, B blocks, D width, I inner width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from md3cli.model.kernels.packed_codes import CODE_OFFSET_BF16, CODE_OFFSET_FP16, packed_fp8, packed_int4

# Forms of a weight; `tiles.WeightForm` has the same numbers, but for those behind INT4.
PLAIN = tl.constexpr(0)  # the dtype of the rows
FP8 = tl.constexpr(1)  # float8 e4m3fn codes as uint8, float32 scale of each output
INT8 = tl.constexpr(2)  # int8 codes, float32 scale of each output
INT4 = tl.constexpr(3)  # two codes in a byte, float32 scale and zero point of each output and group of 128
FP8_BY_HARDWARE = tl.constexpr(4)  # FP8 where the card has an instruction that converts it to the rows' dtype
FP8_PACKED = tl.constexpr(5)  # FP8 and INT4 decoded two numbers at a time (`packed_codes.py`)
INT4_PACKED = tl.constexpr(6)

INT4_GROUP = tl.constexpr(128)
INT4_HALF = tl.constexpr(64)  # byte j of a group holds codes j (low bits) and j + 64: no shuffle when unpacked
FEW_ROWS = tl.constexpr(16)  # of a tile of a step
FP8_SHIFT = tl.constexpr(2.0**120)  # what an e4m3 code read as float32 bits is too small by

# -- the plan --------------------------------------------------------------------------------------


@triton.jit
def _choose(logits, row, num_rows, X: tl.constexpr, XP: tl.constexpr, A: tl.constexpr):
    """Each row's A largest logits: (chosen [R, XP] bool, exp of the distance to the largest [R, XP], their sum [R]).

    The sum is taken in the order of the logits, whatever the tile's size, so that a row's weights have
    the same bits in a tile of any height.
    """
    column = tl.arange(0, XP)
    is_there = (row < num_rows)[:, None] & (column < X)[None, :]
    left = tl.load(logits + row[:, None] * X + column[None, :], mask=is_there, other=float("-inf")).to(tl.float32)
    # A damaged row, of NaN or minus infinity, must still choose A different experts: -inf marks what may not be chosen.
    left = tl.where(is_there & (left > -1e38), left, tl.where(is_there, -1e38, float("-inf")))
    largest = tl.where(row < num_rows, tl.max(left, axis=1), 0.0)
    chosen = left > float("inf")
    share = tl.zeros_like(left)
    total = tl.zeros_like(largest)
    for _ in tl.static_range(A):
        best = tl.max(left, axis=1)
        hit = column[None, :] == tl.argmax(left, axis=1)[:, None]
        value = tl.exp(best - largest)
        chosen = chosen | hit
        share = tl.where(hit, value[:, None], share)
        total += value
        left = tl.where(hit, float("-inf"), left)
    return chosen & (row < num_rows)[:, None], share, tl.where(row < num_rows, total, 1.0)


@triton.jit
def _live_rows(live, row, num_rows, HAS_LIVE: tl.constexpr):
    is_live = row < num_rows
    if HAS_LIVE:
        is_live = is_live & (tl.load(live + row, mask=is_live, other=0) != 0)
    return is_live


@triton.jit
def _store_blocks(count, block_expert, block_first, ends, num_blocks, X: tl.constexpr, XP: tl.constexpr,
                  BM: tl.constexpr, BP: tl.constexpr):  # fmt: skip
    """From the pairs of each expert: where they end, and the blocks that cut them; returns where they start [XP]."""
    column = tl.arange(0, XP)
    end = tl.cumsum(count, axis=0)
    start = end - count
    tl.store(ends + column, end, mask=column < X)
    blocks = (count + BM - 1) // BM
    blocks_end = tl.cumsum(blocks, axis=0)
    for first in range(0, num_blocks, BP):
        block = first + tl.arange(0, BP)
        expert = tl.sum((blocks_end[None, :] <= block[:, None]).to(tl.int32), axis=1)
        nth = block[:, None] - (blocks_end - blocks)[None, :]  # of its expert's blocks
        begin = tl.sum(tl.where(column[None, :] == expert[:, None], start[None, :] + nth * BM, 0), axis=1)
        is_used = expert < XP
        tl.store(block_expert + block, tl.where(is_used, expert, -1), mask=block < num_blocks)
        tl.store(block_first + block, tl.where(is_used, begin, 0), mask=block < num_blocks)
    return start


@triton.jit
def _store_pairs(chosen, is_live, share, total, row, before, pair_token, place, weight, A: tl.constexpr):
    """Number the pairs of a tile of rows behind `before` [XP] pairs of each expert, and write both directions down."""
    counted = (chosen & is_live[:, None]).to(tl.int32)
    pair = before[None, :] + tl.cumsum(counted, axis=0) - counted
    choice = tl.cumsum(chosen.to(tl.int32), axis=1) - 1  # a token's experts in order of their number
    slot = row[:, None] * A + choice
    is_pair = counted != 0
    tl.store(pair_token + pair, tl.broadcast_to(row[:, None], pair.shape), mask=is_pair)
    tl.store(place + slot, tl.where(is_pair, pair, -1), mask=chosen)
    tl.store(weight + slot, share / total[:, None], mask=chosen)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def plan_rows(
    logits, live, pair_token, place, weight, block_expert, block_first, ends, num_rows, num_blocks,
    X: tl.constexpr, XP: tl.constexpr, A: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, BP: tl.constexpr,
    HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """The whole plan of up to R rows in one program, from the router's logits [N, X]."""
    row = tl.arange(0, R)
    chosen, share, total = _choose(logits, row, num_rows, X, XP, A)
    is_live = _live_rows(live, row, num_rows, HAS_LIVE)
    count = tl.sum((chosen & is_live[:, None]).to(tl.int32), axis=0)
    start = _store_blocks(count, block_expert, block_first, ends, num_blocks, X, XP, BM, BP)
    _store_pairs(chosen, is_live, share, total, row, start, pair_token, place, weight, A)


@triton.jit(do_not_specialize=["num_rows"])
def count_tiles(
    logits, live, counts, num_rows,
    X: tl.constexpr, XP: tl.constexpr, A: tl.constexpr, R: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """First of three kernels for more rows: pairs of each expert in each tile of R rows, counts [tiles, XP]."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    chosen, _, _ = _choose(logits, row, num_rows, X, XP, A)
    is_live = _live_rows(live, row, num_rows, HAS_LIVE)
    count = tl.sum((chosen & is_live[:, None]).to(tl.int32), axis=0)
    tl.store(counts + tl.program_id(0) * XP + tl.arange(0, XP), count)


@triton.jit(do_not_specialize=["num_tiles", "num_blocks"])
def plan_tiles(
    counts, block_expert, block_first, ends, num_tiles, num_blocks,
    X: tl.constexpr, XP: tl.constexpr, BM: tl.constexpr, TP: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Second: blocks of all rows, and `counts` turned into the number of pairs that come before each tile's."""
    column = tl.arange(0, XP)
    count = tl.zeros([XP], tl.int32)
    for first in range(0, num_tiles, TP):
        tile = first + tl.arange(0, TP)
        at = counts + tile[:, None] * XP + column[None, :]
        count += tl.sum(tl.load(at, mask=(tile < num_tiles)[:, None], other=0), axis=0)
    before = _store_blocks(count, block_expert, block_first, ends, num_blocks, X, XP, BM, BP)
    for first in range(0, num_tiles, TP):
        tile = first + tl.arange(0, TP)
        at = counts + tile[:, None] * XP + column[None, :]
        of_tile = tl.load(at, mask=(tile < num_tiles)[:, None], other=0)
        tl.store(at, before[None, :] + tl.cumsum(of_tile, axis=0) - of_tile, mask=(tile < num_tiles)[:, None])
        before += tl.sum(of_tile, axis=0)


@triton.jit(do_not_specialize=["num_rows"])
def place_tiles(
    logits, live, counts, pair_token, place, weight, num_rows,
    X: tl.constexpr, XP: tl.constexpr, A: tl.constexpr, R: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """Third: each tile writes its pairs behind those that come before; it chooses again what it chose first."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    chosen, share, total = _choose(logits, row, num_rows, X, XP, A)
    is_live = _live_rows(live, row, num_rows, HAS_LIVE)
    before = tl.load(counts + tl.program_id(0) * XP + tl.arange(0, XP))
    _store_pairs(chosen, is_live, share, total, row, before, pair_token, place, weight, A)


# -- products --------------------------------------------------------------------------------------


@triton.jit
def decoded(codes, FORM: tl.constexpr, dtype: tl.constexpr):
    """Codes of one element each as numbers of `dtype`; exact for every finite code, scales not applied.

    Without an instruction for it, a float8 code's bits are put where float32 has sign, the low bits of its
    exponent, and mantissa; times 2**120 that is the code's value, denormal codes included.
    """
    if FORM == FP8_PACKED:
        return packed_fp8(codes)
    if FORM == FP8_BY_HARDWARE:
        return codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    if FORM == FP8:
        bits = codes.to(tl.int32)
        as_float = (((bits & 128) << 24) | ((bits & 127) << 20)).to(tl.float32, bitcast=True)
        return (as_float * FP8_SHIFT).to(dtype)
    return codes.to(dtype)


@triton.jit
def _tile(pointers, column, k, OUT: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr):
    """A tile [BK, BN] of a weight; columns and depth behind its edges are zero."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(k < K)[:, None] & (column < OUT)[None, :], other=0)


@triton.jit
def _rows(pointers, is_row, k, K: tl.constexpr, EVEN: tl.constexpr):
    """A tile [BM, BK] of the rows; rows that are not there are zero."""
    if EVEN:
        return tl.load(pointers, mask=is_row[:, None], other=0.0)
    return tl.load(pointers, mask=is_row[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _two_products(
    x, w, scale, zero, row, is_row, column, second,
    OUT: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr, EVEN: tl.constexpr, IS_PAIR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows of x [*, K] times columns of one matrix w [OUT, K] and, where IS_PAIR, those `second` outputs further on.

    Both share each tile of the rows. float32 [BM, BN], scaled; without IS_PAIR the second is the first.
    """
    a = tl.zeros((BM, BN), tl.float32)
    b = tl.zeros((BM, BN), tl.float32)
    x_row = x + row[:, None].to(tl.int64) * K
    if (FORM == INT4) | (FORM == INT4_PACKED):
        byte = tl.arange(0, INT4_HALF)
        w_a = w + column[None, :] * (K // 2) + byte[:, None]
        if BM == FEW_ROWS:
            return _few_rows_in_4_bits(
                x_row, is_row, w_a, scale, zero, column, second, OUT, K, FORM, IS_PAIR, BM, BN
            )  # fmt: skip
        w_b = w_a + second * (K // 2)
        for group in range(K // INT4_GROUP):
            low, high = _group_rows(x_row, is_row, group)
            total = tl.sum(low.to(tl.float32), axis=1) + tl.sum(high.to(tl.float32), axis=1)
            low_codes, high_codes, _ = _nibbles(tl.load(w_a + group * INT4_HALF), FORM, low.dtype)
            factors = _factors(scale, zero, group, column, OUT, K)
            a += _group(low, high, total[:, None], low_codes, high_codes, factors, FORM)
            if IS_PAIR:
                low_codes, high_codes, _ = _nibbles(tl.load(w_b + group * INT4_HALF), FORM, low.dtype)
                factors = _factors(scale, zero, group, column + second, OUT, K)
                b += _group(low, high, total[:, None], low_codes, high_codes, factors, FORM)
    else:
        depth = tl.arange(0, BK)
        w_a = w + column[None, :] * K + depth[:, None]
        w_b = w_a + second * K
        for k0 in range(0, K, BK):
            k = k0 + depth
            rows = _rows(x_row + k[None, :], is_row, k, K, EVEN)
            tile = decoded(_tile(w_a + k0, column, k, OUT, K, EVEN), FORM, rows.dtype)
            a = tl.dot(rows, tile, a, input_precision="ieee")
            if IS_PAIR:
                tile = decoded(_tile(w_b + k0, column + second, k, OUT, K, EVEN), FORM, rows.dtype)
                b = tl.dot(rows, tile, b, input_precision="ieee")
        if FORM != PLAIN:
            a *= tl.load(scale + column, mask=column < OUT, other=0.0)[None, :]
            if IS_PAIR:
                b *= tl.load(scale + column + second, mask=column + second < OUT, other=0.0)[None, :]
    if IS_PAIR:
        return a, b
    return a, a


@triton.jit
def _few_rows_in_4_bits(
    x_row, is_row, w_a, scale, zero, column, second,
    OUT: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr, IS_PAIR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`_two_products` of a step in 4 bits: all that is read comes ahead of its use, and threads exchange nothing.

    Codes and rows feed the matrix units, so Triton has their loads run ahead. Scales and zero points do not: those of
    the next PER groups are loaded here before the present ones are multiplied, which takes as long as memory does.
    (By one turn of the loop, not by more: loops that hand a value on over two turns are not pipelined at all.)
    """
    a = tl.zeros((BM, BN), tl.float32)
    b = tl.zeros((BM, BN), tl.float32)
    w_b = w_a + second * (K // 2)
    other = column + second
    PER: tl.constexpr = 2 if (K // INT4_GROUP) % 2 == 0 else 1
    first_a, last_a = _factors(scale, zero, 0, column, OUT, K), _factors(scale, zero, PER - 1, column, OUT, K)
    first_b, last_b = _factors(scale, zero, 0, other, OUT, K), _factors(scale, zero, PER - 1, other, OUT, K)
    for group in range(0, K // INT4_GROUP, PER):
        after = group + PER
        next_first_a = _factors(scale, zero, after, column, OUT, K)
        next_last_a = _factors(scale, zero, after + PER - 1, column, OUT, K)
        if IS_PAIR:
            next_first_b = _factors(scale, zero, after, other, OUT, K)
            next_last_b = _factors(scale, zero, after + PER - 1, other, OUT, K)
        else:
            next_first_b, next_last_b = first_b, last_b
        a, b = _few_rows_of_group(x_row, is_row, w_a, w_b, group, first_a, first_b, a, b, FORM, IS_PAIR)
        if PER == 2:
            a, b = _few_rows_of_group(x_row, is_row, w_a, w_b, group + 1, last_a, last_b, a, b, FORM, IS_PAIR)
        first_a, last_a = next_first_a, next_last_a
        first_b, last_b = next_first_b, next_last_b
    if IS_PAIR:
        return a, b
    return a, a


@triton.jit
def _few_rows_of_group(
    x_row, is_row, w_a, w_b, group, factors_a, factors_b, a, b, FORM: tl.constexpr, IS_PAIR: tl.constexpr
):  # fmt: skip
    """Add one group to both sums; the sum of x comes from the matrix units, too: a product with ones."""
    low, high = _group_rows(x_row, is_row, group)
    low_codes, high_codes, ones = _nibbles(tl.load(w_a + group * INT4_HALF), FORM, low.dtype)
    total = tl.dot(high, ones, tl.dot(low, ones, input_precision="ieee"), input_precision="ieee")
    a += _group(low, high, total, low_codes, high_codes, factors_a, FORM)
    if IS_PAIR:
        low_codes, high_codes, _ = _nibbles(tl.load(w_b + group * INT4_HALF), FORM, low.dtype)
        b += _group(low, high, total, low_codes, high_codes, factors_b, FORM)
    return a, b


@triton.jit
def _group_rows(x_row, is_row, group):
    """Both halves of a group of the rows' values, each [BM, 64]; rows that are not there are zero."""
    k = group * INT4_GROUP + tl.arange(0, INT4_HALF)
    low = tl.load(x_row + k[None, :], mask=is_row[:, None], other=0.0)
    high = tl.load(x_row + (k + INT4_HALF)[None, :], mask=is_row[:, None], other=0.0)
    return low, high


@triton.jit
def _factors(scale, zero, group, column, OUT: tl.constexpr, K: tl.constexpr):
    """Scales and zero points of a group of 4-bit codes; behind the last group the last one's, which nobody uses."""
    at = tl.minimum(group, K // INT4_GROUP - 1) * OUT + column
    return tl.load(scale + at), tl.load(zero + at)


@triton.jit
def _nibbles(codes, FORM: tl.constexpr, dtype: tl.constexpr):
    """Low codes and high codes of bytes as numbers of `dtype`, `_offset` too large, and ones beside them."""
    if FORM == INT4_PACKED:
        return packed_int4(codes, dtype)
    return (codes & 15).to(dtype), (codes >> 4).to(dtype), tl.full(codes.shape, 1.0, dtype)


@triton.jit
def _group(low, high, total, low_codes, high_codes, factors, FORM: tl.constexpr):
    """One group of 128 inputs in 4 bits: `scale * (x . codes - zero * sum of x)`; codes are exact in any dtype."""
    scale, zero = factors
    product = tl.dot(low, low_codes, input_precision="ieee")
    product = tl.dot(high, high_codes, product, input_precision="ieee")
    if FORM == INT4_PACKED:
        zero += CODE_OFFSET_BF16 if low.dtype == tl.bfloat16 else CODE_OFFSET_FP16
    return scale[None, :] * (product - total * zero[None, :])


@triton.jit
def up_gate(
    x, w, scale, zero, y, pair_token, block_expert, block_first, ends,
    D: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr, FORM: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`y[p] = gelu(x[t] . W[e, :I]) * (x[t] . W[e, I:] + 1)` for the pairs p = (t, e) of a block: y [P, I].

    Grid (columns, blocks). Both halves are rounded to the dtype of the rows before the gate, as the plain
    path does. w [X, 2I, D]; scale [X, 2I], or with zero [X, GROUPS, 2I] for int4.
    """
    block = tl.program_id(1)
    expert = tl.load(block_expert + block)
    if expert >= 0:
        pair = tl.load(block_first + block) + tl.arange(0, BM)
        is_pair = pair < tl.load(ends + expert)
        token = tl.load(pair_token + pair, mask=is_pair, other=0)
        column = tl.program_id(0) * BN + tl.arange(0, BN)
        e = expert.to(tl.int64)
        width: tl.constexpr = D // 2 if (FORM == INT4) | (FORM == INT4_PACKED) else D
        up, gate = _two_products(
            x, w + e * (2 * INNER * width), scale + e * (GROUPS * 2 * INNER), zero + e * (GROUPS * 2 * INNER),
            token, is_pair, column, INNER, 2 * INNER, D, FORM, EVEN, True, BM, BN, BK,
        )  # fmt: skip
        dtype = y.dtype.element_ty
        up, gate = up.to(dtype).to(tl.float32), gate.to(dtype).to(tl.float32)
        gelu = 0.5 * up * (1.0 + tl.math.erf(up * 0.7071067811865476))
        inner = gelu.to(dtype).to(tl.float32) * (gate + 1.0).to(dtype).to(tl.float32)
        target = y + pair[:, None].to(tl.int64) * INNER + column[None, :]
        tl.store(target, inner.to(dtype), mask=is_pair[:, None] & (column < INNER)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def down(
    y, w, scale, zero, bias, z, block_expert, block_first, ends, num_rows,
    K: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, FORM: tl.constexpr, EVEN: tl.constexpr,
    IS_DENSE: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`z[p] = y[p] . W[e]` for the pairs of a block: z [P, OUT]. Grid (columns, blocks).

    IS_DENSE: one matrix for all `num_rows` rows, no plan; then `bias` [OUT] is added where HAS_BIAS.
    """
    block = tl.program_id(1)
    if IS_DENSE:
        expert = 0
        pair = block * BM + tl.arange(0, BM)
        end = num_rows
    else:
        expert = tl.load(block_expert + block)
        pair = tl.load(block_first + block) + tl.arange(0, BM)
        end = tl.load(ends + tl.maximum(expert, 0))
    if expert >= 0:
        is_pair = pair < end
        column = tl.program_id(0) * BN + tl.arange(0, BN)
        width: tl.constexpr = K // 2 if (FORM == INT4) | (FORM == INT4_PACKED) else K
        e = tl.cast(expert, tl.int64)
        out, _ = _two_products(
            y, w + e * (OUT * width), scale + e * (GROUPS * OUT), zero + e * (GROUPS * OUT),
            pair, is_pair, column, 0, OUT, K, FORM, EVEN, False, BM, BN, BK,
        )  # fmt: skip
        if HAS_BIAS:
            out += tl.load(bias + column, mask=column < OUT, other=0.0).to(tl.float32)[None, :]
        target = z + pair[:, None].to(tl.int64) * OUT + column[None, :]
        tl.store(target, out.to(z.dtype.element_ty), mask=is_pair[:, None] & (column < OUT)[None, :])


@triton.jit
def combine(
    z, place, weight, residual, branch, out,
    D: tl.constexpr, A: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`out[t] = residual[t] + branch[t] + sum of weight * z` over the token's pairs, in float32, in order of experts.

    Grid (tokens, columns). An idle token has no pair (`place` -1): its sum is zero.
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    is_column = column < D
    total = tl.zeros([BN], tl.float32)
    for choice in tl.static_range(A):
        pair = tl.load(place + token * A + choice)
        # A masked load, not a branch: all A loads are under way at once.
        at = z + pair.to(tl.int64) * D + column
        value = tl.load(at, mask=is_column & (tl.zeros_like(column) <= pair), other=0.0).to(tl.float32)
        total += value * tl.load(weight + token * A + choice)
    at = token.to(tl.int64) * D + column
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask=is_column).to(tl.float32) + tl.load(branch + at, mask=is_column).to(
            tl.float32
        )
    tl.store(out + at, total.to(out.dtype.element_ty), mask=is_column)
