"""The decoder's kernels as operators of torch: what is launched for given tensors, and the shapes that come of it.

Each operator has a fake form, so that the whole engine runs on fake tensors of a device that is not
there (shapes, devices and launches are checked that way) and compilers can follow it. The same code runs
on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1), where the kernels are tested.

Importing this file imports triton: only `forms.py` does so, when an engine on CUDA is built.

Shape suffixes: N tokens, X experts, A experts of a token, P = N * A pairs, B blocks, D width, I inner width,
O outputs, R rows, H heads, K head width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from md3cli.model.kernels import attention_kernels, expert_kernels, resize_kernels, row_kernels, slot_kernels
from md3cli.model.kernels.registry import launch as _launch
from md3cli.model.kernels.registry import operator as _operator
from md3cli.model.kernels.tiles import RESIZED_VALUES, TAPS_STEP, Tile, WeightForm, capability_of
from md3cli.model.network.config import HEAD_DIM

PLAN_HEIGHTS = (8, 64)  # rows of the one program that plans few; each is compiled when it is first met
PLAN_ROWS = PLAN_HEIGHTS[-1]  # more rows take three kernels
_BLOCK_CHUNK = 128  # blocks, and tiles of rows, that the planning program looks at together
_TILE_ROWS = 32  # of the kernels that plan more rows: 21 us for 1,280 rows and 47 for 11,680, with 64: 42 and 58 (H200)
_TILE_WARPS = 8
_FEW_ROWS = 16  # of a tile of tau's products in a step or a prompt
_TAU_PART = 128  # values of a sum of which a program takes one part: one row waits 7 us, 24 us with parts of 512 (H200)
_LONG_TAU_PART = 2048  # where rows are many, and so are programs: fewer parts to write and read again
_COMBINED_COLUMNS = 512
SPLIT = 256  # positions of a slot that one program of a step reads; a fixed size, so that a row's sums know no other
SPLIT_WARPS = 16  # 40 registers a thread, three programs on a multiprocessor; with 8 warps some cards spill
_JOINED_HEADS = 8
_ANGLE_ROWS = 16
_FEATURE_ROWS = 4
BLOCK_QUERIES = 16  # of a prompt that one program computes: the least that matrix units take


# -- the plan --------------------------------------------------------------------------------------


def max_blocks(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """Return the most blocks that pairs can be cut into: an expert's last block may be short, but not empty."""
    return min(num_pairs, num_experts + num_pairs // block_rows)


def _empty_plan(logits_NX: Tensor, live_N: Tensor | None, num_choices: int, block_rows: int) -> tuple[Tensor, ...]:
    """Return room for pair_token [P], place [N, A], weight [N, A], block_expert [B], block_first [B], ends [X]."""
    num_rows, num_experts = logits_NX.shape
    num_pairs = num_rows * num_choices
    num_blocks = max_blocks(num_pairs, num_experts, block_rows)

    def whole(*shape: int) -> Tensor:
        return logits_NX.new_empty(shape, dtype=torch.int32)

    return (
        whole(num_pairs),
        whole(num_rows, num_choices),
        logits_NX.new_empty((num_rows, num_choices), dtype=torch.float32),
        whole(num_blocks),
        whole(num_blocks),
        whole(num_experts),
    )


_PLAN = (
    "(Tensor logits, Tensor? live, int num_choices, int block_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@_operator(f"plan_rows{_PLAN}", 1, _empty_plan)
def _plan_rows(logits_NX: Tensor, live_N: Tensor | None, num_choices: int, block_rows: int) -> tuple[Tensor, ...]:
    """Plan up to PLAN_ROWS rows."""
    assert live_N is None or live_N.is_contiguous(), live_N.stride()
    plan = pair_token, place, weight, block_expert, block_first, ends = _empty_plan(
        logits_NX, live_N, num_choices, block_rows
    )
    num_rows, num_experts = logits_NX.shape
    assert num_rows <= PLAN_ROWS, num_rows
    height = next(rows for rows in PLAN_HEIGHTS if num_rows <= rows)
    _launch(
        expert_kernels.plan_rows, (1,),
        logits_NX, live_N, pair_token, place, weight, block_expert, block_first, ends, num_rows, len(block_expert),
        X=num_experts, XP=triton.next_power_of_2(num_experts), A=num_choices, BM=block_rows, R=height,
        BP=_BLOCK_CHUNK, HAS_LIVE=live_N is not None, warps=16 if height > 8 else 4,
    )  # fmt: skip
    return plan


@_operator(f"plan_tiles{_PLAN}", 3, _empty_plan)
def _plan_tiles(logits_NX: Tensor, live_N: Tensor | None, num_choices: int, block_rows: int) -> tuple[Tensor, ...]:
    """Plan any number of rows."""
    assert live_N is None or live_N.is_contiguous(), live_N.stride()
    plan = pair_token, place, weight, block_expert, block_first, ends = _empty_plan(
        logits_NX, live_N, num_choices, block_rows
    )
    num_rows, num_experts = logits_NX.shape
    num_tiles, padded = triton.cdiv(num_rows, _TILE_ROWS), triton.next_power_of_2(num_experts)
    counts = logits_NX.new_empty((num_tiles, padded), dtype=torch.int32)
    tiled = {"X": num_experts, "XP": padded, "A": num_choices, "R": _TILE_ROWS, "HAS_LIVE": live_N is not None}
    _launch(expert_kernels.count_tiles, (num_tiles,), logits_NX, live_N, counts, num_rows, **tiled, warps=_TILE_WARPS)
    _launch(
        expert_kernels.plan_tiles, (1,),
        counts, block_expert, block_first, ends, num_tiles, len(block_expert),
        X=num_experts, XP=padded, BM=block_rows, TP=_BLOCK_CHUNK, BP=_BLOCK_CHUNK, warps=8,
    )  # fmt: skip
    _launch(
        expert_kernels.place_tiles, (num_tiles,),
        logits_NX, live_N, counts, pair_token, place, weight, num_rows, **tiled, warps=_TILE_WARPS,
    )  # fmt: skip
    return plan


# -- products --------------------------------------------------------------------------------------


def kernel_form(form: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> int:
    """Return the form as a kernel is told it on a card of this compute capability; None is the interpreter.

    No card converts float8 to bfloat16, or 4 bits to anything, at the rate of plain arithmetic: these are decoded two
    at a time. To float16 there is an instruction, on newer cards.
    """
    if capability is None or dtype is torch.float32:
        return form
    if form == WeightForm.INT4:
        return int(expert_kernels.INT4_PACKED.value)
    if form == WeightForm.FP8 and dtype is torch.bfloat16:
        return int(expert_kernels.FP8_PACKED.value)
    if form == WeightForm.FP8 and capability >= (8, 9):
        return int(expert_kernels.FP8_BY_HARDWARE.value)
    return form


def _groups(zero: Tensor | None) -> int:
    return zero.shape[1] if zero is not None else 1


def _fake_up_gate(x: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, form: int,
                  pair_token: Tensor, block_expert: Tensor, block_first: Tensor, ends: Tensor, tile: list[int],
                  ) -> Tensor:  # fmt: skip
    return x.new_empty(pair_token.shape[0], codes.shape[1] // 2)


@_operator(
    "up_gate(Tensor x, Tensor codes, Tensor? scale, Tensor? zero, int form, Tensor pair_token, Tensor block_expert, "
    "Tensor block_first, Tensor ends, int[] tile) -> Tensor",
    1,
    _fake_up_gate,
)
def _up_gate(x: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, form: int,
             pair_token: Tensor, block_expert: Tensor, block_first: Tensor, ends: Tensor, tile: list[int],
             ) -> Tensor:  # fmt: skip
    """Compute the gated inner values of every pair [P, I]; x [N, D] contiguous."""
    assert x.is_contiguous(), x.stride()
    cut, inner = Tile.of_list(tile), codes.shape[1] // 2
    y_PI = x.new_empty(pair_token.shape[0], inner)
    _launch(
        expert_kernels.up_gate, (triton.cdiv(inner, cut.columns), len(block_expert)),
        x, codes, _pointer(scale, codes), _pointer(zero, codes), y_PI, pair_token, block_expert, block_first, ends,
        D=x.shape[1], INNER=inner, GROUPS=_groups(zero), FORM=kernel_form(form, x.dtype, capability_of(x.device)),
        EVEN=form == WeightForm.INT4 or _is_even(inner, x.shape[1], cut),
        BM=cut.rows, BN=cut.columns, BK=cut.depth, warps=cut.warps, stages=cut.stages,
    )  # fmt: skip
    return y_PI


def _fake_down(y: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, form: int,
               block_expert: Tensor, block_first: Tensor, ends: Tensor, tile: list[int]) -> Tensor:  # fmt: skip
    return y.new_empty(y.shape[0], codes.shape[1])


@_operator(
    "down(Tensor y, Tensor codes, Tensor? scale, Tensor? zero, int form, Tensor block_expert, Tensor block_first, "
    "Tensor ends, int[] tile) -> Tensor",
    1,
    _fake_down,
)
def _down(y: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, form: int,
          block_expert: Tensor, block_first: Tensor, ends: Tensor, tile: list[int]) -> Tensor:  # fmt: skip
    """Compute the outputs of every pair [P, D], not yet weighted."""
    z_PD = y.new_empty(y.shape[0], codes.shape[1])
    _launch_down(y, codes, scale, zero, form, None, z_PD, (block_expert, block_first, ends), Tile.of_list(tile))
    return z_PD


def _fake_dense(x: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, form: int,
                bias: Tensor | None, tile: list[int]) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], codes.shape[1])


@_operator(
    "dense(Tensor x, Tensor codes, Tensor? scale, Tensor? zero, int form, Tensor? bias, int[] tile) -> Tensor",
    1,
    _fake_dense,
)
def _dense(x: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, form: int,
           bias: Tensor | None, tile: list[int]) -> Tensor:  # fmt: skip
    """Multiply rows [N, K] by one matrix, codes [1, O, ...]: [N, O]."""
    out_NO = x.new_empty(x.shape[0], codes.shape[1])
    _launch_down(x, codes, scale, zero, form, bias, out_NO, None, Tile.of_list(tile))
    return out_NO


def _launch_down(x: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, form: int, bias: Tensor | None,
                 out: Tensor, blocks: tuple[Tensor, Tensor, Tensor] | None, cut: Tile) -> None:  # fmt: skip
    assert x.is_contiguous(), x.stride()
    (num_rows, num_inputs), num_outputs = x.shape, out.shape[1]
    num_blocks = triton.cdiv(num_rows, cut.rows) if blocks is None else len(blocks[0])
    # 4-bit tiles mask no columns: `weights.can_hold` lets in only sizes that whole tiles cover.
    _launch(
        expert_kernels.down, (triton.cdiv(num_outputs, cut.columns), num_blocks),
        x, codes, _pointer(scale, codes), _pointer(zero, codes), _pointer(bias, x), out,
        *(blocks or (None, None, None)), num_rows,
        K=num_inputs, OUT=num_outputs, GROUPS=_groups(zero), FORM=kernel_form(form, x.dtype, capability_of(x.device)),
        EVEN=form == WeightForm.INT4 or _is_even(num_outputs, num_inputs, cut),
        IS_DENSE=blocks is None, HAS_BIAS=bias is not None,
        BM=cut.rows, BN=cut.columns, BK=cut.depth, warps=cut.warps, stages=cut.stages,
    )  # fmt: skip


def _is_even(num_outputs: int, num_inputs: int, cut: Tile) -> bool:
    """Return True where whole tiles cover a matrix, so that no load needs a mask."""
    return num_outputs % cut.columns == 0 and num_inputs % cut.depth == 0


def _pointer(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return `stand_in` where there is no tensor; the kernel does not read it then."""
    return tensor if tensor is not None else stand_in


def _fake_combine(z: Tensor, place: Tensor, weight: Tensor, residual: Tensor | None, branch: Tensor | None) -> Tensor:
    return z.new_empty(place.shape[0], z.shape[1])


@_operator(
    "combine(Tensor z, Tensor place, Tensor weight, Tensor? residual, Tensor? branch) -> Tensor", 1, _fake_combine
)
def _combine(z: Tensor, place: Tensor, weight: Tensor, residual: Tensor | None, branch: Tensor | None) -> Tensor:
    """Add up each token's weighted sum [N, D], and the two summands of the block where they are given."""
    num_rows, width = place.shape[0], z.shape[1]
    assert (residual is None) == (branch is None)
    assert all(part is None or part.is_contiguous() for part in (z, residual, branch))
    out_ND = z.new_empty(num_rows, width)
    columns = min(_COMBINED_COLUMNS, triton.next_power_of_2(width))
    _launch(
        expert_kernels.combine, (num_rows, triton.cdiv(width, columns)),
        z, place, weight, residual, branch, out_ND,
        D=width, A=place.shape[1], HAS_RESIDUAL=residual is not None, BN=columns, warps=2,
    )  # fmt: skip
    return out_ND


# -- attention -------------------------------------------------------------------------------------


def _fake_tau_products(qkv: Tensor, weight: Tensor, tile: list[int]) -> Tensor:
    parts = triton.cdiv(qkv.shape[1], _tau_part(qkv.shape[1], tile))
    return qkv.new_empty((parts, qkv.shape[0], weight.shape[0]), dtype=torch.float32)


def _tau_part(width: int, tile: list[int]) -> int:
    """Return how many of a row's `width` values a program adds up: the kind of pass decides, as it does the tile."""
    part = _TAU_PART if Tile.of_list(tile).rows == _FEW_ROWS else _LONG_TAU_PART
    whole: int = triton.cdiv(width, _TAU_PART) * _TAU_PART
    return min(part, whole)


@_operator("tau_products(Tensor qkv, Tensor weight, int[] tile) -> Tensor", 1, _fake_tau_products)
def _tau_products(qkv: Tensor, weight: Tensor, tile: list[int]) -> Tensor:
    """`gelu(qkv) . weight` in parts that are still to be added, float32 [S, R, 2H]; qkv [R, 3D], weight [2H, 3D]."""
    (num_rows, width), num_products = qkv.shape, weight.shape[0]
    cut, part = Tile.of_list(tile), _tau_part(width, tile)
    out = _fake_tau_products(qkv, weight, tile)
    columns = max(16, triton.next_power_of_2(num_products))
    _launch(
        attention_kernels.tau_products, (triton.cdiv(num_rows, cut.rows), out.shape[0]),
        qkv, weight, out, num_rows,
        K=width, J=num_products, EVEN=width % part == 0 and num_products == columns,
        BM=cut.rows, BJ=columns, BK=cut.depth, PART=part, warps=cut.warps, stages=cut.stages,
    )  # fmt: skip
    return out


def _fake_tau_rope_store(
    qkv: Tensor, parts: Tensor, alpha: Tensor, position: Tensor, table: Tensor, slots: Tensor | None,
    keys: Tensor | None, values: Tensor | None, returns_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q = qkv.new_empty(*position.shape, alpha.shape[0], HEAD_DIM)
    return q, *((torch.empty_like(q), torch.empty_like(q)) if returns_kv else (q.new_empty(0), q.new_empty(0)))


@_operator(
    "tau_rope_store(Tensor qkv, Tensor parts, Tensor alpha, Tensor position, Tensor table, Tensor? slots, "
    "Tensor(a!)? keys, Tensor(b!)? values, bool returns_kv) -> (Tensor, Tensor, Tensor)",
    1,
    _fake_tau_rope_store,
)
def _tau_rope_store(
    qkv: Tensor, parts: Tensor, alpha: Tensor, position: Tensor, table: Tensor, slots: Tensor | None,
    keys: Tensor | None, values: Tensor | None, returns_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scaled and rotated q, k, v [B, T, H, 64], k and v also (or only) in the cache [slots, H, capacity, 64].

    `position` [B, T] may be an expanded view; `table` is `text.rotary_table`'s. `slots` [B], of which -1 stores
    nothing, is there where the cache is. Without `returns_kv` the last two are empty.
    """
    assert (slots is None) == (keys is None) == (values is None)
    assert all(part is None or part.is_contiguous() for part in (qkv, keys, values, slots))
    q, k, v = _fake_tau_rope_store(qkv, parts, alpha, position, table, slots, keys, values, returns_kv)
    num_heads, num_rows = alpha.shape[0], qkv.shape[0]
    block = min(32, triton.next_power_of_2(num_heads))
    _launch(
        attention_kernels.tau_rope_store, (num_rows, triton.cdiv(num_heads, block)),
        qkv, parts, alpha, position, table, slots, q, k, v, keys, values, num_rows,
        position.shape[1], *position.stride(), keys.shape[2] if keys is not None else 0,
        H=num_heads, J=2 * num_heads, S=parts.shape[0], BH=block,
        RETURNS_KV=returns_kv, STORES=keys is not None, warps=2,
    )  # fmt: skip
    return q, k, v


# -- attention over slots --------------------------------------------------------------------------


def _fake_slot_attention(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, position: Tensor) -> Tensor:
    return q.new_empty(q.shape)


_SLOT_ATTENTION = "(Tensor q, Tensor keys, Tensor values, Tensor slots, Tensor position) -> Tensor"


@_operator(f"slot_attention_step{_SLOT_ATTENTION}", 2, _fake_slot_attention)
def _slot_attention_step(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, position: Tensor) -> Tensor:
    """Attend with one query of each sequence, q [N, 1, H, 64]; the rest is as in `slot_attention_block`."""
    _check_slots(q, keys, values, slots)
    (num_rows, length, num_heads, _), capacity = q.shape, keys.shape[2]
    assert length == 1, q.shape
    num_splits = triton.cdiv(capacity, SPLIT)
    parts = q.new_empty((num_splits, num_rows, num_heads, HEAD_DIM), dtype=torch.float32)
    stats = q.new_empty((2, num_splits, num_rows, num_heads), dtype=torch.float32)
    where = slots, position
    sizes = num_rows, position.stride(0), capacity
    _launch(
        slot_kernels.attend_split, (num_rows, num_heads, num_splits),
        q, keys, values, *where, parts, stats, *sizes, H=num_heads, SPLIT=SPLIT, warps=SPLIT_WARPS,
    )  # fmt: skip
    out = torch.empty_like(q)
    heads = min(_JOINED_HEADS, triton.next_power_of_2(num_heads))
    _launch(
        slot_kernels.join_splits, (num_rows, triton.cdiv(num_heads, heads)),
        parts, stats, *where, out, *sizes, H=num_heads, BH=heads, SPLIT=SPLIT, S=num_splits, warps=4,
    )  # fmt: skip
    return out


@_operator(f"slot_attention_block{_SLOT_ATTENTION}", 1, _fake_slot_attention)
def _slot_attention_block(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, position: Tensor) -> Tensor:
    """Attend with T queries of each sequence, q [B, T, H, 64]: each reads positions 0 to its own of its slot.

    keys, values [slots, H, capacity, 64], the new ones stored; `slots` int64 [B], several sequences may have one, and
    -1 reads nothing and gives zeros; `position` int64 [B, T] may be an expanded view.
    """
    _check_slots(q, keys, values, slots)
    batch, length, num_heads, _ = q.shape
    out = torch.empty_like(q)
    _launch(
        slot_kernels.attend_block, (triton.cdiv(length, BLOCK_QUERIES), num_heads, batch),
        q, keys, values, slots, position, out, length, *position.stride(), keys.shape[2],
        H=num_heads, BM=BLOCK_QUERIES, BC=block_positions(q.dtype), warps=4,
    )  # fmt: skip
    return out


def block_positions(dtype: torch.dtype) -> int:
    """Return how many positions a block of queries reads at a time."""
    return 32 if dtype is torch.float32 else 64


def _check_slots(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    assert all(part.is_contiguous() for part in (q, keys, values, slots))
    assert keys.shape == values.shape
    assert q.dtype is keys.dtype is values.dtype
    assert slots.dtype is torch.int64


# -- pictures --------------------------------------------------------------------------------------


def _fake_resize_axis(pixels: Tensor, table: Tensor, axis: int) -> Tensor:
    shape = list(pixels.shape)
    shape[axis] = table.shape[1]
    return pixels.new_empty(shape)


@_operator("resize_axis(Tensor pixels, Tensor table, int axis) -> Tensor", 1, _fake_resize_axis)
def _resize_axis(pixels: Tensor, table: Tensor, axis: int) -> Tensor:
    """Resize uint8 [H, W, 3] along axis 0 or 1 as `engine/resize.py` does; `table` is its `weight_table`."""
    assert axis in (0, 1)
    assert pixels.dtype is torch.uint8
    assert pixels.shape[2] == resize_kernels.CHANNELS.value
    assert pixels.is_contiguous(), pixels.stride()
    assert table.is_contiguous(), table.stride()
    out = _fake_resize_axis(pixels, table, axis)
    (height, width, channels), (num_rows, new) = pixels.shape, table.shape
    num_taps = num_rows - 1
    constants = {"STEP": TAPS_STEP if num_taps % TAPS_STEP == 0 else 1, "BV": RESIZED_VALUES}
    warps = RESIZED_VALUES // 32
    if axis == 1:
        grid = triton.cdiv(new * channels, RESIZED_VALUES), triton.cdiv(height, resize_kernels.ROWS.value)
        _launch(
            resize_kernels.resize_width, grid, pixels, table, out, height, width, new, num_taps,
            **constants, warps=warps, stages=1,
        )  # fmt: skip
    else:
        row_values = width * channels
        _launch(
            resize_kernels.resize_height, (new, triton.cdiv(row_values, RESIZED_VALUES)),
            pixels, table, out, row_values, new, num_taps, **constants, warps=warps, stages=1,
        )  # fmt: skip
    return out


# -- what a step computes beside its layers --------------------------------------------------------


def _fake_rotary_angles(position: Tensor, frequency: Tensor) -> Tensor:
    return frequency.new_empty(2, position.shape[0], 1, position.shape[1], len(frequency))


@_operator("rotary_angles(Tensor position, Tensor frequency) -> Tensor", 1, _fake_rotary_angles)
def _rotary_angles(position: Tensor, frequency: Tensor) -> Tensor:
    """Cosines and sines [2, B, 1, T, F] of positions [B, T], which may be an expanded view; frequency float32 [F]."""
    table = _fake_rotary_angles(position, frequency)
    num_rows, count = position.numel(), len(frequency)
    assert count == triton.next_power_of_2(count), count
    _launch(
        row_kernels.rotary_angles, (triton.cdiv(num_rows, _ANGLE_ROWS),),
        position, frequency, table, num_rows, position.shape[1], *position.stride(),
        F=count, BR=_ANGLE_ROWS, warps=4,
    )  # fmt: skip
    return table


def _fake_fourier_features(values: Tensor, frequencies: Tensor) -> Tensor:
    return frequencies.new_empty(*values.shape[:-1], 2 * frequencies.shape[1])


@_operator("fourier_features(Tensor values, Tensor frequencies) -> Tensor", 1, _fake_fourier_features)
def _fourier_features(values: Tensor, frequencies: Tensor) -> Tensor:
    """Return `[cos(2 pi v . f), sin(2 pi v . f)]` [..., 2F] of values float32 [..., n]; frequencies [n, F]."""
    values = values.contiguous()
    count, width = frequencies.shape
    assert values.shape[-1] == count, values.shape
    assert frequencies.is_contiguous(), frequencies.stride()
    out, num_rows = _fake_fourier_features(values, frequencies), values.numel() // count
    _launch(
        row_kernels.fourier_features, (triton.cdiv(num_rows, _FEATURE_ROWS),), values, frequencies, out, num_rows,
        N=count, F=width, BF=triton.next_power_of_2(width), BR=_FEATURE_ROWS, warps=4,
    )  # fmt: skip
    return out
