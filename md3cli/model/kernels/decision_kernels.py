"""Triton kernels of a decision: from the logits of all heads to a row's new state, its event and its next input.

`scan_vocabulary` finds the greatest logit of each part of a row's vocabulary. `decide` joins the parts, reads the bins
of a coordinate and of a size, takes the decision and writes the row's state in place; it also writes the Fourier
features of the size, which the size encoder multiplies next. `feed` writes the row's next input: the embedding of a
token, of a coordinate or of a size. Three kernels where the plain path (`engine/state.py`) runs 160.

Each row is computed alone, and its sums are added in an order that only the sizes of the heads decide. A row is a
place in the buffers of the state: that of its number, or `index` says which.

Knows nothing of torch. Only `decision_operators.py` imports and launches these kernels: Triton is imported where a GPU
is, and nowhere else.
Source: Moondream 3 specification, sections 8, 10 and 11; sine and cosine by the polynomials of Cephes (S. Moshier).

Shape suffixes: N rows, V vocabulary, P parts of it, C coordinate bins, Z size bins, F frequencies, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The numbers of `engine.state.Mode` and `engine.state.Finish`; a test compares them.
IDLE, TEXT, REASON, X, Y, SIZE, SEGMENT = (tl.constexpr(number) for number in range(7))
NO, STOP, LENGTH = (tl.constexpr(number) for number in range(3))

OF_TOKEN, OF_COORD, OF_SIZE = (tl.constexpr(number) for number in range(3))  # what a row is fed
NEAR_FRACTION = tl.constexpr(64)  # `moondream.NEAR_FRACTION`
NOTHING, INFINITY = tl.constexpr(float("-inf")), tl.constexpr(float("inf"))  # not NaN: Triton compares constants
BEHIND_ALL = tl.constexpr(0x7FFFFFFF)  # greater than any index

FULL_TURN = tl.constexpr(6.283185307179586)
QUARTERS = tl.constexpr(0.6366197723675814)  # 2 / pi
# A quarter turn in three summands: the products of the first two with the number of quarters are exact.
QUARTER_1, QUARTER_2 = tl.constexpr(1.5703125), tl.constexpr(4.837512969970703125e-4)
QUARTER_3 = tl.constexpr(7.54978995489188216e-8)


@triton.jit
def _place(index, row, HAS_INDEX: tl.constexpr):
    """Where the state of a row lies."""
    return tl.load(index + row) if HAS_INDEX else row


@triton.jit
def _first_best(value, at):
    """The greatest value, and the least index that has it; NaN counts as the greatest of all, as in torch's argmax."""
    is_nan = value != value
    has_nan = tl.max(is_nan.to(tl.int32), axis=0) > 0
    best = tl.max(tl.where(is_nan, NOTHING, value), axis=0)
    is_best = is_nan | ((value == best) & (has_nan == 0))
    return tl.where(has_nan, float("nan"), best), tl.min(tl.where(is_best, at, BEHIND_ALL), axis=0)


@triton.jit
def _all_finite(value, is_there):
    """1 where all values that are there are finite, else 0."""
    is_fine = (tl.abs(value) < INFINITY) | (is_there == 0)  # NaN is less than nothing
    return tl.min(is_fine.to(tl.int32), axis=0)


@triton.jit
def _bin(logits, NUM: tl.constexpr, BLOCK: tl.constexpr):
    """The likeliest of NUM bins, the softmax mass near it, and 1 where all logits are finite."""
    at = tl.arange(0, BLOCK)
    is_bin = at < NUM
    value = tl.load(logits + at, mask=is_bin, other=NOTHING).to(tl.float32)
    best, chosen = _first_best(value, tl.where(is_bin, at, BEHIND_ALL))
    REACH: tl.constexpr = NUM // NEAR_FRACTION if NUM >= NEAR_FRACTION else 1
    share = tl.where(is_bin, tl.exp(value - best), 0.0)
    is_near = (at >= chosen - REACH) & (at <= chosen + REACH)
    mass = tl.sum(tl.where(is_near, share, 0.0), axis=0) / tl.sum(share, axis=0)
    return chosen, mass, _all_finite(value, is_bin)


@triton.jit
def _cos_sin(angle):
    """Cosine and sine of float32 angles, to 1e-7 up to some 10,000 and no worse than the angle's own bits beyond.

    Not `tl.cos`: for huge angles it keeps an array in local memory.
    """
    quarter = tl.floor(angle * QUARTERS + 0.5)
    x = angle - quarter * QUARTER_1
    x = x - quarter * QUARTER_2
    x = x - quarter * QUARTER_3
    z = x * x
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    turn = quarter.to(tl.int32) & 3
    is_odd = (turn & 1) == 1
    cos_out, sin_out = tl.where(is_odd, sine, cosine), tl.where(is_odd, cosine, sine)
    return tl.where((turn == 1) | (turn == 2), -cos_out, cos_out), tl.where(turn >= 2, -sin_out, sin_out)


# Wherever an index begins in the block that an admission sends up: nothing is compiled anew for it.
@triton.jit(do_not_specialize_on_alignment=["index"])
def scan_vocabulary(
    logits, mode, is_first, index, best_out, best_at_out, is_finite_out,
    V: tl.constexpr, PART: tl.constexpr,
    ANSWER: tl.constexpr, EOS: tl.constexpr, SIZE_ID: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """The greatest logit of PART ids that a row may emit, the least id that has it, and whether all are finite.

    Grid (rows N, parts P). logits [N, V]; float32 best, int32 best_at and is_finite [N, P]. Banned ids count as minus
    infinity, but their logits must be finite, too.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = _place(index, row, HAS_INDEX)
    of_row = tl.load(mode + place).to(tl.int32)
    is_later = tl.load(is_first + place).to(tl.int32) == 0
    at = part * PART + tl.arange(0, PART)
    is_id = at < V
    value = tl.load(logits + row * V + at, mask=is_id, other=NOTHING).to(tl.float32)
    is_fine = _all_finite(value, is_id)
    is_banned = ((at == ANSWER) & (of_row == TEXT)) | (((at == EOS) | (at == SIZE_ID)) & (of_row == REASON))
    best, best_at = _first_best(tl.where(is_banned & is_later, NOTHING, value), at)
    out = row * tl.num_programs(1) + part
    tl.store(best_out + out, best)
    tl.store(best_at_out + out, best_at)
    tl.store(is_finite_out + out, is_fine)


@triton.jit(do_not_specialize=["prefix_len", "max_context"], do_not_specialize_on_alignment=["index"])
def decide(
    logits, best, best_at, is_finite, coord_logits, size_logits, drawn, sizes, frequencies, index,
    mode, is_first, is_point, chooses, emitted, limit, position, draws, events, features, source,
    prefix_len, max_context,
    V: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    Z: tl.constexpr, BZ: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    ANSWER: tl.constexpr, EOS: tl.constexpr, COORD: tl.constexpr, SIZE_ID: tl.constexpr,
    HAS_DRAWN: tl.constexpr, HAS_INDEX: tl.constexpr, WAS_FED: tl.constexpr,
):  # fmt: skip
    """One row's decision: its state is written in place, beside its event and what it is fed (`engine.state.advance`).

    Grid (rows N). best, best_at, is_finite [N, P] of `scan_vocabulary`; coord_logits [N, C], size_logits [N, 2, Z];
    drawn int64 [N], the tokens of a sampled step; sizes float32 [Z]; frequencies [2, F]. State as in `engine.state
    .Rows`: `mode`, `is_first`, `emitted`, `position`, `draws` are written. WAS_FED: live rows have taken an input since
    their last decision, and move on by it first. events float32 [N, 10]; features [N, 2 F]; source int32 [N, 2].
    """
    row = tl.program_id(0).to(tl.int64)
    place = _place(index, row, HAS_INDEX)
    now = tl.load(mode + place).to(tl.int32)
    was_first = tl.load(is_first + place).to(tl.int32) != 0
    of_points = tl.load(is_point + place).to(tl.int32) != 0
    has_choices = tl.load(chooses + place).to(tl.int32) != 0
    count, most = tl.load(emitted + place), tl.load(limit + place)
    is_idle = now == IDLE
    where = tl.load(position + place)
    if WAS_FED:
        where += (now != IDLE).to(tl.int64)

    # The heads: what each would say, and whether its numbers are numbers.
    part = tl.arange(0, BP)
    at_part = row * P + part
    part_best = tl.load(best + at_part, mask=part < P, other=NOTHING)
    part_at = tl.load(best_at + at_part, mask=part < P, other=BEHIND_ALL)
    text_is_fine = tl.min(tl.load(is_finite + at_part, mask=part < P, other=1), axis=0) != 0
    coord_bin, coord_mass, coord_is_fine = _bin(coord_logits + row * C, C, BC)
    width_bin, width_mass, width_is_fine = _bin(size_logits + row * 2 * Z, Z, BZ)
    height_bin, height_mass, height_is_fine = _bin(size_logits + (row * 2 + 1) * Z, Z, BZ)
    regions_are_fine = (coord_is_fine & width_is_fine & height_is_fine) != 0

    # The token.
    if HAS_DRAWN:
        token = tl.load(drawn + row).to(tl.int32)
    else:
        _, token = _first_best(part_best, part_at)
    coord_logit = tl.load(logits + row * V + COORD).to(tl.float32)
    eos_logit = tl.load(logits + row * V + EOS).to(tl.float32)
    either = tl.where(coord_logit >= eos_logit, COORD, EOS)
    token = tl.where((now == X) & (was_first == 0), either, token)
    token = tl.where((now == REASON) & (count == most), ANSWER, token)
    is_text = (now == TEXT) | ((now == REASON) & (token != COORD))
    is_fine = text_is_fine & (is_text | regions_are_fine)
    mass = tl.where(is_fine, 1.0 / (1.0 + tl.exp(eos_logit - coord_logit)), float("nan"))

    # What it means.
    writes, reasons, segments = now == TEXT, now == REASON, now == SEGMENT
    starts, is_y, is_size = now == X, now == Y, now == SIZE
    ends = (writes | segments | starts) & (token == EOS)
    goes_on = ends == 0
    feeds_coord = is_y | (starts & goes_on) | ((reasons | segments) & (token == COORD))
    feeds_size = is_size | (segments & (token == SIZE_ID))
    answers = reasons & (token == ANSWER)
    emits = ((writes | segments) & goes_on) | (reasons & (answers == 0)) | is_size | (is_y & of_points)
    count = tl.where(answers, 0, count + emits.to(tl.int64))
    has_room = where < max_context
    is_full = (emits & (reasons == 0) & (count >= most)) | (has_room == 0)
    finish = tl.where(is_idle, NO, tl.where(ends, STOP, tl.where(is_full, LENGTH, NO)))
    waits = has_choices & (answers | writes) & has_room & is_fine
    is_over = is_idle | (finish != NO) | waits | (is_fine == 0)
    after_y = tl.where(of_points, X, SIZE)
    after = tl.where(starts, Y, tl.where(is_y, after_y, tl.where(is_size, X, tl.where(answers, TEXT, now))))
    falls_idle = is_over & (is_idle == 0) & (waits == 0)

    tl.store(mode + place, tl.where(is_over, IDLE, after).to(tl.int64))
    tl.store(is_first + place, answers)
    tl.store(emitted + place, count)
    tl.store(position + place, tl.where(falls_idle, prefix_len, where))
    tl.store(draws + place, tl.load(draws + place) + 1)

    event = events + row * 10
    tl.store(event, now.to(tl.float32))
    tl.store(event + 1, token.to(tl.float32))
    tl.store(event + 2, coord_bin.to(tl.float32))
    tl.store(event + 3, width_bin.to(tl.float32))
    tl.store(event + 4, height_bin.to(tl.float32))
    tl.store(event + 5, finish.to(tl.float32))
    tl.store(event + 6, mass)
    tl.store(event + 7, coord_mass)
    tl.store(event + 8, width_mass)
    tl.store(event + 9, height_mass)

    kind = tl.where(feeds_size, OF_SIZE, tl.where(feeds_coord, OF_COORD, OF_TOKEN))
    tl.store(source + row * 2, kind)
    tl.store(source + row * 2 + 1, tl.where(feeds_coord, coord_bin, token))

    frequency = tl.arange(0, BF)
    is_frequency = frequency < F
    of_width = tl.load(frequencies + frequency, mask=is_frequency, other=0.0).to(tl.float32)
    of_height = tl.load(frequencies + F + frequency, mask=is_frequency, other=0.0).to(tl.float32)
    cycles = tl.load(sizes + width_bin) * of_width + tl.load(sizes + height_bin) * of_height
    cosine, sine = _cos_sin(cycles * FULL_TURN)
    out = features + row * 2 * F + frequency
    tl.store(out, cosine.to(features.dtype.element_ty), mask=is_frequency)
    tl.store(out + F, sine.to(features.dtype.element_ty), mask=is_frequency)


@triton.jit(do_not_specialize_on_alignment=["index"])
def feed(
    source, tokens, coords, size_embeddings, index, next_inputs,
    D: tl.constexpr, BD: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """`next_inputs[row]` = the row of `tokens` [V, D] or `coords` [C, D] that `source` names, or the row's own size.

    Grid (rows N, blocks of BD columns). source int32 [N, 2] of `decide`, size_embeddings [N, D].
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    is_column = column < D
    kind = tl.load(source + row * 2) + tl.zeros_like(column)
    number = tl.load(source + row * 2 + 1).to(tl.int64)
    # Loads under masks, not branches: what a row is not fed is not read.
    of_token = tl.load(tokens + number * D + column, mask=is_column & (kind == OF_TOKEN), other=0.0)
    of_coord = tl.load(coords + number * D + column, mask=is_column & (kind == OF_COORD), other=0.0)
    of_size = tl.load(size_embeddings + row * D + column, mask=is_column & (kind == OF_SIZE), other=0.0)
    value = tl.where(kind == OF_TOKEN, of_token, tl.where(kind == OF_COORD, of_coord, of_size))
    tl.store(next_inputs + _place(index, row, HAS_INDEX) * D + column, value, mask=is_column)
