"""The decoder with the GPU's forms in place, in Triton's interpreter: passes, golden cases, low bits, fake forms."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton", reason="the kernels need triton, which the development extra brings on Linux")

from golden_cases import GOLDEN, assert_answer, load_case
from gpu.triton_cases import OPS, distinct_logits, normal, random_weight, relative_error

from md3cli.model.engine.kv_cache import DecodeStore, KVCache, PrefixStore, PromptStore
from md3cli.model.engine.passes import run_prefixes
from md3cli.model.engine.resize import weight_table
from md3cli.model.engine.state import idle_rows
from md3cli.model.kernels import registry
from md3cli.model.kernels.forms import place_forms
from md3cli.model.kernels.tiles import Product, WeightForm, tile_of
from md3cli.model.kernels.weights import KernelExperts, KernelLinear
from md3cli.model.network.config import HEAD_DIM
from md3cli.model.network.moondream import Moondream3
from md3cli.model.network.text import PassKind, rotary_frequencies, rotary_table
from md3cli.model.quant.layers import has_packed_weights, low_bit_matrices
from md3cli.model.quant.load import load_dequantised, load_low_bit
from md3cli.model.weights.hub import model_path
from md3cli.model.weights.plan import CheckpointPlan, plan_checkpoint

CPU = torch.device("cpu")


def with_kernels(model: Moondream3) -> Moondream3:
    placed = copy.deepcopy(model)
    place_forms(placed)
    return placed


def passes(model: Moondream3) -> dict[str, Tensor]:
    """A prefix, a prompt and a step through slots in mixed order; hidden states of live rows and what slots hold."""
    torch.manual_seed(0)
    config, length = model.config, model.config.prefix_len
    dim = config.text.dim
    prefixes, prompts, steps = torch.randn(3, length, dim), torch.randn(2, 5, dim), torch.randn(4, 1, dim)
    cache = KVCache(config, 4, length + 20, dtype=torch.float32, device=CPU)
    found = {}
    with torch.inference_mode():
        position = torch.arange(length)[None].expand(3, -1)
        found["prefix"] = model.text(prefixes, position, None, PrefixStore(cache, torch.tensor([2, 0, 3])))
        total, position = length + 9, torch.tensor([[length], [length + 2]]) + torch.arange(5)
        store = PromptStore(cache, torch.tensor([3, 2]), position, total)
        found["prompt"] = model.text(prompts, position, None, store)
        live, position = torch.tensor([True, False, True, True]), torch.tensor([length, length, length + 7, length + 5])
        hidden = model.text(steps, position[:, None], None, DecodeStore(cache, position, live), live[:, None])
        found["step"] = hidden[live]
        found["keys"], found["values"] = torch.stack(cache.keys)[:, live], torch.stack(cache.values)[:, live]
        found["no store"] = model.text(prompts, torch.arange(5)[None].expand(2, -1))
    return found


@pytest.mark.process
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_every_pass_equals_the_plain_one(name: str) -> None:
    model = load_case(name).model
    plain, fast = passes(model), passes(with_kernels(model))
    for part, expected in plain.items():
        assert relative_error(fast[part], expected) < 1e-5, part


def assert_golden(name: str, batch_size: int, most: int | None, *, is_planned: bool) -> None:
    """An engine with the kernels gives the certain answers of a case, or the shortest of them."""
    case = load_case(name)
    keys = [key for key in range(len(case.requests)) if case.is_certain(key)]
    keys.sort(key=lambda key: len(case.expected[key]["token_ids"]))
    engine = case.engine(batch_size, with_kernels(case.model), is_planned=is_planned, delay=int(is_planned))
    answers = list(engine.run(case.job(key) for key in keys[:most]))
    assert len(answers) == len(keys[:most])
    for answer in answers:
        assert_answer(answer, case.expected[answer.key])


@pytest.mark.process
@pytest.mark.parametrize(("name", "batch_size", "is_planned"), [("a", 3, True), ("c", 1, False)])
def test_golden_answers_come_out_of_the_kernels(name: str, batch_size: int, is_planned: bool) -> None:
    assert_golden(name, batch_size, most=3, is_planned=is_planned)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize(("batch_size", "is_planned"), [(1, True), (8, False), (8, True), (16, True)])
def test_all_golden_answers_come_out_of_the_kernels(name: str, batch_size: int, is_planned: bool) -> None:
    assert_golden(name, batch_size, most=None, is_planned=is_planned)


@pytest.mark.process
@pytest.mark.parametrize("num_pictures", [1, 2])
def test_prefixes_of_any_number_of_pictures_equal_the_plain_ones(num_pictures: int) -> None:
    """One picture's mask of live rows is a single value under a stride of 0, which a kernel must not walk along."""
    case = load_case("c")
    placed, slots = with_kernels(case.model), torch.arange(num_pictures) + 1
    embeddings = torch.randn(num_pictures, case.model.config.vision.num_patches, case.model.config.text.dim)
    found = []
    for model in (case.model, placed):
        cache = KVCache(model.config, num_pictures + 1, 64, dtype=torch.float32, device=CPU)
        with torch.inference_mode():
            run_prefixes(model, cache, slots, embeddings)
        found.append(torch.stack([*cache.keys, *cache.values]))
    assert (found[0] - found[1]).abs().max() < 1e-4


def test_copies_of_a_model_stay_apart() -> None:
    """Forms hold the module they were made of; a copy must not compute with the original's weights."""
    model = load_case("c").model
    copied = with_kernels(model)
    x, position = torch.randn(1, 3, model.config.text.dim), torch.arange(3)[None]
    before = model.text(x, position)
    for parameter in copied.text.blocks[0].attn.parameters():
        parameter.data.zero_()
    assert torch.equal(model.text(x, position), before)


# -- low bits --------------------------------------------------------------------------------------


def empty(plan: CheckpointPlan) -> Moondream3:
    with torch.device("meta"):
        return Moondream3(plan.config, has_region_ln=plan.has_region_ln)


@pytest.mark.process
def test_float8_experts_stay_float8_and_answer_as_their_values() -> None:
    plan = plan_checkpoint(GOLDEN / "case-c-formats/raw-fp8")
    model, plain = empty(plan), empty(plan)
    load_low_bit(model, plan, quant="stored", dtype=torch.float32, device=CPU, for_kernels=True)
    load_dequantised(plain, plan, quant="stored", device=CPU)
    assert has_packed_weights(model)
    assert {matrix.form for matrix in low_bit_matrices(model)} == {WeightForm.FP8}
    expected = passes(plain)
    for part, found in passes(model).items():
        assert relative_error(found, expected[part]) < 1e-5, part


@pytest.mark.process
@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_dense_layers_and_experts_stay_in_few_bits(quant: str) -> None:
    plan = plan_checkpoint(model_path("tiny"))
    loaded, plain = empty(plan), empty(plan)
    load_low_bit(loaded, plan, quant=quant, dtype=torch.float16, device=CPU, for_kernels=True)
    load_dequantised(plain, plan, quant=quant, device=CPU)
    block = loaded.text.blocks[-1]
    assert isinstance(block.attn.qkv, KernelLinear)
    assert isinstance(block.mlp.fc1, KernelExperts)
    x, position = torch.randn(2, 4, plain.config.text.dim) * 0.5, torch.arange(4)[None].expand(2, -1)
    with torch.inference_mode():
        assert relative_error(loaded.text(x.half(), position), plain.text(x, position)) < 5e-3


# -- fake forms ------------------------------------------------------------------------------------


def operator_calls() -> dict[str, tuple]:
    """Arguments of one call of each operator."""
    torch.manual_seed(0)
    dtype, rows, dim, experts, choices, heads = torch.float16, 5, 128, 6, 3, 2
    x, logits = normal(rows, dim, dtype=dtype, device=CPU), distinct_logits(rows, experts, dtype, CPU)
    live = torch.ones(rows, dtype=torch.bool)
    tile = tile_of(Product.UP_GATE, PassKind.STEP, WeightForm.INT4, dtype, CPU)
    pair_token, place, weight, *blocks = OPS.plan_rows(logits, live, choices, tile.rows)
    fc1 = random_weight(WeightForm.INT4, (experts, 256, dim), dtype, CPU)
    fc2 = random_weight(WeightForm.FP8, (experts, dim, 128), dtype, CPU)
    dense = random_weight(WeightForm.INT8, (256, dim), dtype, CPU)
    y, z = normal(rows * choices, 128, dtype=dtype, device=CPU), normal(rows * choices, dim, dtype=dtype, device=CPU)
    qkv = normal(rows, 3 * dim, dtype=dtype, device=CPU)
    tau = normal(2 * heads, 3 * dim, dtype=dtype, device=CPU)
    position = torch.arange(rows)[:, None]
    cache = [torch.zeros(rows, heads, 16, HEAD_DIM, dtype=dtype) for _ in range(2)]
    slots, queries = torch.arange(rows), normal(rows, 1, heads, HEAD_DIM, dtype=dtype, device=CPU)
    parts, alpha = OPS.tau_products(qkv, tau, tile.as_list()), normal(heads, dtype=dtype, device=CPU)
    coord_logits, size_logits = (normal(rows, *shape, dtype=dtype, device=CPU) for shape in ((20,), (2, 12)))
    state, ids = idle_rows(rows, CPU), (3, 0, 5)
    scanned = OPS.scan_vocabulary(logits, state.mode, state.is_first, None, 3, 0, 5)
    counted = state.emitted, state.limit, state.position, state.draws
    sizes, frequencies = torch.ones(12), normal(2, 7, dtype=dtype, device=CPU)
    return {
        "plan_rows": (logits, live, choices, 16),
        "plan_tiles": (logits, None, choices, 16),
        "up_gate": (x, *fc1.arguments, pair_token, *blocks, tile.as_list()),
        "down": (y, *fc2.arguments, *blocks, tile.as_list()),
        "dense": (x, *dense.arguments, None, tile.as_list()),
        "combine": (z, place, weight, x, x),
        "tau_products": (qkv, tau, tile.as_list()),
        "tau_rope_store": (qkv, parts, alpha, position, rotary_table(position, 1e4), slots, *cache, True),
        "rotary_angles": (position.expand(-1, 3), rotary_frequencies(1e4, CPU)),
        "fourier_features": (torch.rand(rows, 2), normal(2, 24, dtype=dtype, device=CPU)),
        "slot_attention_step": (queries, *cache, slots, position),
        "slot_attention_block": (queries.expand(-1, 3, -1, -1).contiguous(), *cache, slots, position.expand(-1, 3)),
        "scan_vocabulary": (logits, state.mode, state.is_first, slots, *ids),
        "decide": (
            logits,
            *scanned,
            coord_logits,
            size_logits,
            None,
            sizes,
            frequencies,
            slots,
            state.mode,
            state.is_first,
            state.is_point,
            state.chooses,
            *counted,
            9,
            90,
            *ids,
            4,
            True,
        ),
        "feed": (torch.zeros(rows, 2, dtype=torch.int32), x, x, x, slots, torch.zeros_like(x)),
        "resize_axis": (torch.zeros(5, 9, 3, dtype=torch.uint8), torch.from_numpy(weight_table(9, 4)), 1),
        "add_layer_norm": (x, x[:1], x[0], x[1], 1e-5),
        "scale_rows": (x, True),
        "patch_rows": (torch.zeros(2, 28, 28, 3, dtype=torch.uint8), torch.arange(256).to(dtype), 14, 592),
    }


@pytest.mark.process
@pytest.mark.parametrize("name", operator_calls())
def test_fake_forms_promise_what_the_operators_give(name: str) -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(OPS, name).default, operator_calls()[name], test_utils=checks)


def test_a_kernel_is_launched_on_the_device_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one, which is that of the engine built last. The devices are not there: one number is."""
    current = [0]

    def exchange(device: int) -> int:
        before, current[0] = current[0], device if device >= 0 else current[0]
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    launched = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **constants: launched.append((grid, current[0]))

    with FakeTensorMode(allow_non_fake_inputs=True):
        registry.launch(Kernel(), (3,), torch.empty(2, device="cuda:1"), None, 7, warps=4, X=2)
    registry.launch(Kernel(), (4,), torch.empty(2), warps=4)
    assert launched == [((3,), 1), ((4,), 0)]
    assert current == [0]


def test_every_operator_is_checked_and_says_its_launches() -> None:
    assert set(registry.LAUNCHES) == {f"md3::{name}" for name in operator_calls()}


def test_a_position_behind_the_slots_end_is_not_written_into_the_next() -> None:
    calls = operator_calls()["tau_rope_store"]
    qkv, parts, alpha, _, _, slots, keys, values, _ = calls
    position = torch.tensor([[0], [15], [16], [17], [3]])  # a slot has 16
    OPS.tau_rope_store(qkv, parts, alpha, position, rotary_table(position, 1e4), slots, keys, values, False)
    written = (keys != 0).any(-1).any(1).nonzero().tolist()
    assert written == [[0, 0], [1, 15], [4, 3]]
