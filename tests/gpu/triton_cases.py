"""Every kernel of our own at given sizes: fresh inputs, how it is launched, and its twin in float64.

The interpreter's tests and `gpu_check.py` walk the same list; the first at sizes of a few hundred on the
CPU, the second at the real ones on a card. A case makes its inputs when it is asked to, not before.

Shape suffixes: N rows, X experts, A choices, P pairs, D width, I inner width, O outputs, K inputs, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from md3cli.model.kernels import operators
from md3cli.model.kernels.float8_products import plain_scale_rows
from md3cli.model.kernels.forms import OPS
from md3cli.model.kernels.tiles import Product, WeightForm, tile_of
from md3cli.model.kernels.weights import KernelWeight
from md3cli.model.network.config import HEAD_DIM, LAYER_NORM_EPS, ModelConfig, MoeConfig, VisionConfig
from md3cli.model.network.layers import attention
from md3cli.model.network.text import PassKind, rotary_table
from md3cli.model.network.vision import normalise_crops
from md3cli.model.weights.codes import LowBit, quantise

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
KINDS = {WeightForm.FP8: LowBit.FP8, WeightForm.INT8: LowBit.INT8, WeightForm.INT4: LowBit.INT4}
STEP_ROWS, PROMPT_ROWS, PREFIX_ROWS = (1, 3, 8, 64), 64 * 20, 22 * 730  # 64 questions, a full pass of prefixes
THETA = 1_500_000.0


@dataclass(frozen=True)
class Prepared:
    """Inputs on their device. `run` launches once; `expected` is the twin, float64; their results are compared.

    `flops` and `bytes` are what one launch must do and move at the least. `launch` is the kernel alone, for
    timing, where `run` brings what it wrote into another form.
    """

    run: Callable[[], tuple[Tensor, ...]]
    expected: Callable[[], tuple[Tensor, ...]]
    flops: float
    bytes: float
    launch: Callable[[], object] | None = None


@dataclass(frozen=True)
class KernelCase:
    """One kernel in one dtype (and form of weight) at one number of rows; `tolerance` is a relative error."""

    name: str
    kernel: str
    dtype: str
    rows: int
    tolerance: float
    make: Callable[[], Prepared]


def cases(config: ModelConfig, device: torch.device) -> list[KernelCase]:
    """Cases of a model's sizes on a device: bf16 at real rows on CUDA; float32 and fp16 at few in the interpreter."""
    on_card = device.type == "cuda"
    dtypes = (torch.bfloat16,) if on_card else (torch.float32, torch.float16)
    rows = (*STEP_ROWS, PROMPT_ROWS, PREFIX_ROWS) if on_card else (1, 3, 50)
    return [case for dtype in dtypes for case in _cases_of(config, device, dtype, rows)]


def _cases_of(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, rows: tuple[int, ...]
) -> Iterator[KernelCase]:
    moe, text = config.text.moe, config.text
    assert moe is not None
    name = str(dtype).removeprefix("torch.")
    tolerance = TOLERANCE[dtype]

    def case(kernel: str, count: int, make: Callable[[], Prepared], form: str = "") -> KernelCase:
        words = " ".join(filter(None, (kernel, form, name)))
        return KernelCase(f"{words}, {count} rows", kernel, name, count, tolerance, make)

    on_card = device.type == "cuda"
    kinds = dict.fromkeys(STEP_ROWS, PassKind.STEP) | {PROMPT_ROWS: PassKind.PROMPT}
    for count in rows:
        kind = kinds.get(count, PassKind.PREFIX)
        yield case("plan", count, partial(plan_case, moe, count, kind, dtype, device))
        for form in WeightForm if dtype is not torch.float32 else (WeightForm.PLAIN,):
            of_form = partial(_weight_case, text.dim, moe, form, count, kind, dtype, device)
            yield case("up_gate", count, partial(of_form, up_gate_case), form.name.lower())
            yield case("down", count, partial(of_form, down_case), form.name.lower())
            if form in (WeightForm.INT4, WeightForm.INT8):
                make = partial(dense_case, text.dim, 3 * text.dim, form, count, kind, dtype, device)
                yield case("dense", count, make, form.name.lower())
        yield case("combine", count, partial(combine_case, text.dim, moe, count, dtype, device))
        yield case("tau_products", count, partial(tau_products_case, text.n_heads, count, kind, dtype, device))
        yield case("tau_rope_store", count, partial(tau_rope_store_case, text.n_heads, count, dtype, device))
        if kind is PassKind.STEP:
            yield case("slot_attention_step", count, partial(step_case, text.n_heads, count, dtype, device))
        elif kind is PassKind.PROMPT or not on_card:
            yield case("slot_attention_block", count, partial(block_case, text.n_heads, count, dtype, device))
    crops = (1, 9, 36) if device.type == "cuda" else (1, 2)
    for count in (number * config.vision.num_patches for number in crops):
        yield case("add_layer_norm", count, partial(add_layer_norm_case, config.vision.enc_dim, count, dtype, device))
        yield case("patch_rows", count, partial(patch_rows_case, config.vision, count, dtype, device))
        make = partial(scale_rows_case, config.vision.enc_ff_dim, count, dtype, device)
        # A value between two codes may be rounded to either of them: a sixteenth of it, now and then.
        yield replace(case("scale_rows", count, make), tolerance=max(tolerance, 1e-3))


# -- inputs ----------------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    """Fresh normal numbers, drawn on the device."""
    return (torch.randn(shape, device=device) * scale).to(dtype)


def distinct_logits(num_rows: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Logits of which no two of a row are equal after rounding: nobody promises which of two equal ones is chosen."""
    order = torch.rand(num_rows, num_experts, device=device).argsort(dim=1)
    return (order.float() / num_experts * 4 - 2).to(dtype)


def random_weight(form: WeightForm, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> KernelWeight:
    """A weight of any form from random values."""
    values = normal(*shape, dtype=dtype, device=device, scale=shape[-1] ** -0.5)
    if form is WeightForm.PLAIN:
        return KernelWeight.of_plain(values)
    return KernelWeight.of_quantised(quantise(values, KINDS[form]))


# -- the plan --------------------------------------------------------------------------------------


def plan_twin(logits_NX: Tensor, live_N: Tensor | None, num_choices: int, block_rows: int) -> tuple[Tensor, ...]:
    """The plan by torch's own operations: pair_token, place, weight, block_expert, block_first, ends.

    `pair_token` is -1 behind the last pair, where the kernels leave what was there.
    """
    num_rows, num_experts = logits_NX.shape
    top = logits_NX.double().topk(num_choices, dim=-1)
    experts_NA, order = top.indices.sort(dim=1)
    weight_NA = top.values.softmax(dim=-1).gather(1, order)
    live = live_N if live_N is not None else torch.ones(num_rows, dtype=torch.bool, device=logits_NX.device)
    flat = torch.where(live[:, None], experts_NA, num_experts).flatten()
    by_expert = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts + 1)
    num_pairs = int(counts[:-1].sum())
    pair_token = torch.where(torch.arange(len(flat), device=flat.device) < num_pairs, by_expert // num_choices, -1)
    place = torch.empty_like(flat).scatter(0, by_expert, torch.arange(len(flat), device=flat.device))
    place = torch.where(flat < num_experts, place, -1).view(num_rows, num_choices)
    ends = counts[:-1].cumsum(0)
    blocks = [
        (expert, int(ends[expert] - counts[expert]) + first)
        for expert in range(num_experts)
        for first in range(0, int(counts[expert]), block_rows)
    ]
    blocks += [(-1, 0)] * (operators.max_blocks(len(flat), num_experts, block_rows) - len(blocks))
    block_expert, block_first = torch.tensor(blocks, device=flat.device).T
    return pair_token, place, weight_NA, block_expert, block_first, ends


def run_plan(logits_NX: Tensor, live_N: Tensor | None, num_choices: int, block_rows: int) -> tuple[Tensor, ...]:
    """The plan by the kernels that this number of rows takes."""
    few = len(logits_NX) <= operators.PLAN_ROWS
    plan: tuple[Tensor, ...] = (OPS.plan_rows if few else OPS.plan_tiles)(logits_NX, live_N, num_choices, block_rows)
    return plan


def plan_case(moe: MoeConfig, num_rows: int, kind: PassKind, dtype: torch.dtype, device: torch.device) -> Prepared:
    """The plan of random logits, some rows idle."""
    logits = distinct_logits(num_rows, moe.num_experts, dtype, device)
    live = torch.rand(num_rows, device=device) < 0.8
    live[-1] = True
    block_rows = tile_of(Product.UP_GATE, kind, WeightForm.PLAIN, dtype, device).rows
    num_pairs = int(live.sum()) * moe.experts_per_token

    def comparable(plan: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pair_token, *rest = plan
        return (pair_token[:num_pairs], *rest)

    twin = partial(plan_twin, logits, live, moe.experts_per_token, block_rows)
    run = partial(run_plan, logits, live, moe.experts_per_token, block_rows)
    moved = logits.nbytes + 3 * 4 * num_rows * moe.experts_per_token
    return Prepared(lambda: comparable(run()), lambda: comparable(twin()), 0.0, float(moved))


# -- products --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertInputs:
    """What both products of the experts take: rows, their plan, and the twin's view of it."""

    x_ND: Tensor
    logits_NX: Tensor
    plan: tuple[Tensor, ...]
    num_choices: int
    block_rows: int

    @classmethod
    def random(
        cls, dim: int, moe: MoeConfig, num_rows: int, block_rows: int, dtype: torch.dtype, device: torch.device
    ) -> ExpertInputs:
        """Random rows and routings."""
        x, logits = (
            normal(num_rows, dim, dtype=dtype, device=device),
            distinct_logits(num_rows, moe.num_experts, dtype, device),
        )
        plan = run_plan(logits, None, moe.experts_per_token, block_rows)
        return cls(x, logits, plan, moe.experts_per_token, block_rows)

    @property
    def num_touched(self) -> int:
        """Experts that have a pair."""
        return int((self.plan[5].diff(prepend=self.plan[5].new_zeros(1)) > 0).sum())

    def by_expert(self, rows_PK: Tensor, weight_XOK: Tensor) -> Tensor:
        """The twin's product: rows sorted by expert, each with its expert's matrix, float64."""
        ends = self.plan[5].tolist()
        parts = []
        for start, end, matrix in zip([0, *ends], ends, weight_XOK, strict=False):
            parts.append(rows_PK[start:end] @ matrix.double().T)
        return torch.cat(parts)


Make = Callable[[ExpertInputs, KernelWeight, torch.dtype, PassKind], Prepared]


def _weight_case(
    dim: int, moe: MoeConfig, form: WeightForm, num_rows: int, kind: PassKind, dtype: torch.dtype,
    device: torch.device, make: Make,
) -> Prepared:  # fmt: skip
    """A product of the experts with a random weight; `make` says which of the two."""
    block_rows = tile_of(Product.UP_GATE, kind, form, dtype, device).rows
    inputs = ExpertInputs.random(dim, moe, num_rows, block_rows, dtype, device)
    inner = moe.expert_inner_dim
    outputs, width = (2 * inner, dim) if make is up_gate_case else (dim, inner)
    return make(inputs, random_weight(form, (moe.num_experts, outputs, width), dtype, device), dtype, kind)


def up_gate_case(inputs: ExpertInputs, weight: KernelWeight, dtype: torch.dtype, kind: PassKind) -> Prepared:
    """The first product with its gate."""
    tile = tile_of(Product.UP_GATE, kind, weight.form, dtype, inputs.x_ND.device)
    pair_token, _, _, *blocks = inputs.plan

    def expected() -> tuple[Tensor, ...]:
        up = inputs.by_expert(inputs.x_ND.double()[pair_token.long()], weight.dequantise(torch.float32))
        activated, gate = up.chunk(2, dim=-1)
        return (torch.nn.functional.gelu(activated) * (gate + 1),)

    run = partial(OPS.up_gate, inputs.x_ND, *weight.arguments, pair_token, *blocks, tile.as_list())
    return _product(lambda: (run(),), expected, len(pair_token), inputs.num_touched, weight)


def down_case(inputs: ExpertInputs, weight: KernelWeight, dtype: torch.dtype, kind: PassKind) -> Prepared:
    """The second product."""
    device = inputs.x_ND.device
    tile = tile_of(Product.DOWN, kind, weight.form, dtype, device)
    _, _, _, *blocks = inputs.plan
    y = normal(inputs.plan[0].shape[0], weight.num_inputs, dtype=dtype, device=device)

    def expected() -> tuple[Tensor, ...]:
        return (inputs.by_expert(y.double(), weight.dequantise(torch.float32)),)

    run = partial(OPS.down, y, *weight.arguments, *blocks, tile.as_list())
    return _product(lambda: (run(),), expected, len(y), inputs.num_touched, weight)


def dense_case(
    num_inputs: int, num_outputs: int, form: WeightForm, num_rows: int, kind: PassKind, dtype: torch.dtype,
    device: torch.device,
) -> Prepared:  # fmt: skip
    """A dense layer over codes, with its bias."""
    weight = random_weight(form, (num_outputs, num_inputs), dtype, device)
    tile = tile_of(Product.DENSE, kind, form, dtype, device)
    x, bias = normal(num_rows, num_inputs, dtype=dtype, device=device), normal(num_outputs, dtype=dtype, device=device)

    def expected() -> tuple[Tensor, ...]:
        return (x.double() @ weight.dequantise(torch.float32)[0].double().T + bias.double(),)

    run = partial(OPS.dense, x, *weight.arguments, bias, tile.as_list())
    return _product(lambda: (run(),), expected, num_rows, 1, weight)


def _product(
    run: Callable[[], tuple[Tensor, ...]],
    expected: Callable[[], tuple[Tensor, ...]],
    num_rows: int,
    num_matrices: int,
    weight: KernelWeight,
) -> Prepared:
    elements = weight.num_outputs * weight.num_inputs
    moved = weight.num_bytes * num_matrices / weight.num_matrices
    return Prepared(run, expected, 2.0 * num_rows * elements, float(moved))


def combine_case(dim: int, moe: MoeConfig, num_rows: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    """The weighted sum with the block's summands, some rows idle."""
    logits = distinct_logits(num_rows, moe.num_experts, dtype, device)
    live = torch.rand(num_rows, device=device) < 0.8
    _, place, weight, *_ = run_plan(logits, live, moe.experts_per_token, 16)
    z = normal(place.numel(), dim, dtype=dtype, device=device)
    residual, branch = (normal(num_rows, dim, dtype=dtype, device=device) for _ in range(2))

    def expected() -> tuple[Tensor, ...]:
        chosen = z.double()[place.clamp_min(0).long()] * torch.where(place >= 0, weight.double(), 0.0)[..., None]
        return (residual.double() + branch.double() + chosen.sum(1),)

    run = partial(OPS.combine, z, place, weight, residual, branch)
    return Prepared(lambda: (run(),), expected, 0.0, float(z.nbytes + 3 * residual.nbytes))


# -- attention -------------------------------------------------------------------------------------


def tau_products_case(
    num_heads: int, num_rows: int, kind: PassKind, dtype: torch.dtype, device: torch.device
) -> Prepared:
    """Tau's products; the parts of the sum are added up before they are compared."""
    width = 3 * num_heads * HEAD_DIM
    tile = tile_of(Product.TAU, kind, WeightForm.PLAIN, dtype, device)
    qkv = normal(num_rows, width, dtype=dtype, device=device)
    weight = normal(2 * num_heads, width, dtype=dtype, device=device, scale=width**-0.5)

    def expected() -> tuple[Tensor, ...]:
        return (torch.nn.functional.gelu(qkv.double()) @ weight.double().T,)

    run = partial(OPS.tau_products, qkv, weight, tile.as_list())
    flops = 2.0 * num_rows * weight.numel()
    return Prepared(lambda: (run().sum(0),), expected, flops, float(qkv.nbytes + weight.nbytes), run)


def tau_rope_store_case(num_heads: int, num_rows: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Rows of as many sequences as divide them by seven (or one), at mixed positions, into shuffled slots."""
    length = next(t for t in (730, 50, 1) if num_rows % t == 0)
    batch, capacity = num_rows // length, length + 64
    qkv = normal(num_rows, 3 * num_heads * HEAD_DIM, dtype=dtype, device=device)
    parts = normal(2, num_rows, 2 * num_heads, dtype=torch.float32, device=device)
    alpha = normal(num_heads, dtype=dtype, device=device)
    first = torch.randint(0, 64, (batch, 1), device=device)
    position = first + torch.arange(length, device=device)
    table, slots = rotary_table(position, THETA), torch.randperm(batch, device=device)
    cache = [torch.zeros(batch, num_heads, capacity, HEAD_DIM, dtype=dtype, device=device) for _ in range(2)]

    launch = partial(OPS.tau_rope_store, qkv, parts, alpha, position, table, slots, *cache, True)

    def run() -> tuple[Tensor, ...]:
        return *launch(), *(_stored(tensor, slots, position) for tensor in cache)

    def expected() -> tuple[Tensor, ...]:
        q, k, v = tau_rope_twin(qkv, parts, alpha, position, table)
        return q, k, v, k, v

    moved = qkv.nbytes * 2 + parts.nbytes + table.nbytes
    return Prepared(run, expected, 0.0, float(moved), launch)


def _stored(cache_SHCK: Tensor, slots: Tensor, position: Tensor) -> Tensor:
    """What the cache holds for each row, [B, T, H, 64]."""
    return cache_SHCK[slots[:, None], :, position]


def tau_rope_twin(
    qkv_R3D: Tensor, parts_SRJ: Tensor, alpha_H: Tensor, position_BT: Tensor, table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, T, H, 64] in float64, as `text.TextAttention.plain_projection` computes them."""
    batch, length = position_BT.shape
    products = parts_SRJ.double().sum(0).view(batch, length, 2, -1)
    log_position = (position_BT.double() + 1).log()[..., None]
    scale_q, scale_v = (
        (torch.tanh(product) + 0.5 + torch.sigmoid(alpha_H.double() * log_position))[..., None]
        for product in products.unbind(2)
    )
    q, k, v = qkv_R3D.double().view(batch, length, 3, -1, HEAD_DIM).unbind(2)
    wide = table.double()
    q, k = (rotated(part.transpose(1, 2), wide).transpose(1, 2) for part in (q * scale_q, k))
    return q, k, v * scale_v


CAPACITY = 1536  # of a slot, in positions
BLOCK = 16  # queries of one sequence in a pass of prompts


def step_case(num_heads: int, num_rows: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    """One query of each row, some 750 positions on; every third row of several is idle."""
    is_live = torch.arange(num_rows, device=device) % 3 != 1
    position = 730 + torch.randint(0, 40, (num_rows, 1), device=device)
    return slots_case(OPS.slot_attention_step, num_heads, is_live, position, dtype)


def block_case(num_heads: int, num_rows: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Prompts behind a picture, in blocks; the last block of several is idle."""
    batch = max(1, num_rows // BLOCK)
    is_live = torch.arange(batch, device=device) + 1 < max(batch, 2)
    position = 730 + torch.randint(0, 20, (batch, 1), device=device) + torch.arange(BLOCK, device=device)
    return slots_case(OPS.slot_attention_block, num_heads, is_live, position, dtype)


def slots_case(
    attend: Callable[..., Tensor], num_heads: int, live_B: Tensor, position_BT: Tensor, dtype: torch.dtype
) -> Prepared:
    """Attention over shuffled slots that hold NaN behind what is stored."""
    device, (batch, length) = position_BT.device, position_BT.shape
    q = normal(batch, length, num_heads, HEAD_DIM, dtype=dtype, device=device)
    keys, values = (normal(batch, num_heads, CAPACITY, HEAD_DIM, dtype=dtype, device=device) for _ in range(2))
    slots = torch.randperm(batch, device=device)
    behind = torch.arange(CAPACITY, device=device) > position_BT[slots.argsort()].amax(1, keepdim=True)  # [slot, C]
    for tensor in (keys, values):
        tensor.masked_fill_(behind[:, None, :, None], float("nan"))
    slots = slots.masked_fill(~live_B, -1)
    read = float((position_BT.amax(1)[live_B] + 1).sum()) * num_heads * HEAD_DIM
    moved = 2 * read * q.element_size() + 2 * q.nbytes
    run = partial(attend, q, keys, values, slots, position_BT)
    twin = partial(slot_attention_twin, q, keys, values, slots, position_BT)
    return Prepared(lambda: (run(),), lambda: (twin(),), 4 * read * length, moved)


def slot_attention_twin(q_BTHK: Tensor, keys: Tensor, values: Tensor, slots_B: Tensor, position_BT: Tensor) -> Tensor:
    """Plain attention of each sequence over its slot, float64 [B, T, H, 64]; zeros for idle ones."""
    out = torch.zeros(q_BTHK.shape, dtype=torch.float64, device=q_BTHK.device)
    for row, slot in enumerate(slots_B.tolist()):
        if slot >= 0:
            end = int(position_BT[row].max()) + 1
            mask = torch.arange(end, device=q_BTHK.device) <= position_BT[row][:, None]
            k, v = (tensor[slot, :, :end].double() for tensor in (keys, values))
            out[row] = attention(q_BTHK[row].double().transpose(0, 1), k, v, mask).transpose(0, 1)
    return out


def rotated(x_BHTK: Tensor, table: Tensor) -> Tensor:
    """`text.rotate` in float64; it computes in float32 itself."""
    a, b = x_BHTK[..., :32].chunk(2, dim=-1)
    pairs = torch.stack([a * table[0] - b * table[1], a * table[1] + b * table[0]], dim=-1).flatten(-2)
    return torch.cat([pairs, x_BHTK[..., 32:]], dim=-1)


# -- vision ----------------------------------------------------------------------------------------


def add_layer_norm_case(dim: int, num_rows: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    """A sum far from zero with its norm; the norm is of the rounded sum."""
    x, branch = (normal(num_rows, dim, dtype=dtype, device=device) + 2 for _ in range(2))
    weight, bias = (normal(dim, dtype=dtype, device=device) for _ in range(2))

    def expected() -> tuple[Tensor, ...]:
        total = (x + branch).double()
        norm = torch.nn.functional.layer_norm(total, (dim,), weight.double(), bias.double(), LAYER_NORM_EPS)
        return total, norm

    run = partial(OPS.add_layer_norm, x, branch, weight, bias, LAYER_NORM_EPS)
    return Prepared(run, expected, 0.0, float(4 * x.nbytes))


def scale_rows_case(width: int, num_rows: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    """The GELU of rows in float8; what a code and its scale stand for is compared, and the scale."""
    x = normal(num_rows, width, dtype=dtype, device=device)

    def values(codes: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return codes.view(torch.float8_e4m3fn).float() * scale, scale

    run = partial(OPS.scale_rows, x, True)
    moved = float(x.nbytes + x.numel())
    return Prepared(lambda: values(*run()), lambda: values(*plain_scale_rows(x, gelu=True)), 0.0, moved, run)


def patch_rows_case(config: VisionConfig, num_rows: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Crops of random bytes; the twin cuts them on the host and puts zeros behind each patch."""
    num_crops, side, width = num_rows // config.num_patches, config.crop_size, -(-config.patch_dim // 8) * 8
    crops = torch.randint(256, (num_crops, side, side, 3), dtype=torch.uint8, device=device)
    every_byte = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    values = normalise_crops(every_byte, dtype).flatten().to(device)

    def expected() -> tuple[Tensor, ...]:
        patch, grid = config.enc_patch_size, config.grid_size
        cells = normalise_crops(crops.cpu(), dtype).view(num_crops, 3, grid, patch, grid, patch)
        rows = cells.permute(0, 2, 4, 1, 3, 5).reshape(num_crops, grid * grid, -1)
        return (torch.nn.functional.pad(rows, (0, width - rows.shape[2])).to(device),)

    run = partial(OPS.patch_rows, crops, values, config.enc_patch_size, width)
    moved = crops.numel() + num_rows * width * dtype.itemsize
    return Prepared(lambda: (run(),), expected, 0.0, float(moved), run)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """`|found - expected| / |expected|` in float64; NaN and infinity stay."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))
