"""Every kernel of the GPU against its twin, in Triton's interpreter; a row alone against the row in company."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which the development extra brings on Linux")

from gpu.triton_cases import (
    OPS,
    KernelCase,
    cases,
    distinct_logits,
    normal,
    plan_twin,
    random_weight,
    relative_error,
    run_plan,
)

from md3cli.errors import CheckpointError
from md3cli.model.kernels import operators
from md3cli.model.kernels.forms import FusedExperts
from md3cli.model.kernels.tiles import WeightForm
from md3cli.model.kernels.weights import KernelExperts, KernelLinear, KernelWeight, can_hold, fp8_values
from md3cli.model.network.config import ModelConfig, MoeConfig, TextConfig, VisionConfig
from md3cli.model.network.layers import MoeMlp
from md3cli.model.network.text import PassKind
from md3cli.model.weights.codes import INT4_MAX, LowBit, QuantisedWeight, quantise

CPU = torch.device("cpu")
SMALL = replace(
    ModelConfig(),
    text=TextConfig(
        dim=128, n_heads=2, moe=MoeConfig(num_experts=6, start_layer=0, experts_per_token=3, expert_inner_dim=128)
    ),
    vision=VisionConfig(enc_dim=36, crop_size=70),
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}

pytestmark = pytest.mark.usefixtures("unwritten_memory_shows")


@pytest.mark.process
@pytest.mark.parametrize("case", cases(SMALL, CPU), ids=lambda case: case.name)
def test_a_kernel_equals_its_twin_in_float64(case: KernelCase) -> None:
    torch.manual_seed(0)
    prepared = case.make()
    found, expected = prepared.run(), prepared.expected()
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        # Several roundings to fp16 stand between inputs and outputs; the plain path, compared below, has them too.
        assert relative_error(one, other) < 3 * case.tolerance, case.name


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.process
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_routing_is_planned_as_by_torch(data: st.DataObject) -> None:
    """1 to 300 rows, idle ones among them, one expert that takes all, experts with nobody."""
    num_experts = data.draw(st.sampled_from([4, 5, 8, 64]))
    num_choices = data.draw(st.integers(1, min(num_experts, 8)))
    num_rows = data.draw(st.one_of(st.integers(1, 8), st.integers(60, 70), st.integers(71, 300)))
    block_rows = data.draw(st.sampled_from([16, 128]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    logits = distinct_logits(num_rows, num_experts, torch.float32, CPU)
    if data.draw(st.booleans()):
        logits[:, data.draw(st.integers(0, num_experts - 1))] += 100  # takes a pair of every row
    live = torch.rand(num_rows) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    found = run_plan(logits, live, num_choices, block_rows)
    expected = plan_twin(logits, live, num_choices, block_rows)
    num_pairs = int(live.sum()) * num_choices
    assert torch.equal(found[0][:num_pairs].long(), expected[0][:num_pairs])
    assert torch.allclose(found[2].double(), expected[2], rtol=1e-6)
    for one, other in zip((found[1], *found[3:]), (expected[1], *expected[3:]), strict=True):
        assert torch.equal(one.long(), other)


def test_few_rows_and_many_are_planned_alike() -> None:
    """The one-program plan and the three kernels give the same bits, so that a row's weights know no company."""
    logits = distinct_logits(60, 64, torch.float16, CPU)
    live = torch.rand(60) < 0.7
    num_pairs = int(live.sum()) * 8
    few, many = (plan(logits, live, 8, 16) for plan in (OPS.plan_rows, OPS.plan_tiles))
    assert torch.equal(few[0][:num_pairs], many[0][:num_pairs])
    for one, other in zip(few[1:], many[1:], strict=True):
        assert torch.equal(one, other)


def test_logits_that_are_no_numbers_choose_experts_that_exist() -> None:
    """Each once: a place that nobody writes would send `combine` to an address that is not there."""
    logits = torch.full((5, 5), float("nan"))
    logits[1] = torch.tensor([1.0, float("nan"), 3.0, float("inf"), -float("inf")])
    logits[2] = -float("inf")
    logits[3] = torch.tensor([-float("inf"), 1.0, -float("inf"), -float("inf"), -float("inf")])
    for plan in (OPS.plan_rows, OPS.plan_tiles):
        pair_token, place, weight, block_expert, _, ends = plan(logits, None, 2, 16)
        assert ends[-1] == 10
        assert sorted(pair_token.tolist()) == sorted([*range(5)] * 2)
        assert sorted(place.flatten().tolist()) == list(range(10))
        assert block_expert.max() < 5
        assert weight[3].tolist() == [0.0, 1.0]  # experts 0 and 1


# -- experts ---------------------------------------------------------------------------------------


def layers(
    dim: int, config: MoeConfig, dtype: torch.dtype, form: WeightForm = WeightForm.PLAIN
) -> tuple[MoeMlp, MoeMlp]:
    """A layer whose experts have any form, and its plain twin of the same values."""
    torch.manual_seed(1)
    layer = MoeMlp(dim, config).requires_grad_(False)
    layer.router.weight.data, layer.router.bias.data = (
        torch.zeros(config.num_experts, dim),
        torch.zeros(config.num_experts),
    )
    plain = copy.deepcopy(layer)
    for leaf, outputs, width in (("fc1", 2 * config.expert_inner_dim, dim), ("fc2", dim, config.expert_inner_dim)):
        weight = random_weight(form, (config.num_experts, outputs, width), dtype, CPU)
        setattr(layer, leaf, KernelExperts(weight))
        getattr(plain, leaf).weight.data = weight.dequantise(dtype)
    return layer, plain


def plain_experts(plain: MoeMlp, x_ND: Tensor, logits_NX: Tensor) -> Tensor:
    """The plain loop, routed by given logits."""
    plain.router.forward = lambda _: logits_NX  # type: ignore[method-assign]
    return plain.run_experts(x_ND, plain.route(x_ND))


SIZES = {  # width, experts: of the tests' small model, as narrow as the golden cases, and as many as the real ones
    "small": (128, SMALL.text.moe),
    "narrow": (64, MoeConfig(num_experts=5, start_layer=0, experts_per_token=2, expert_inner_dim=16)),
    "many": (64, MoeConfig(num_experts=64, start_layer=0, experts_per_token=8, expert_inner_dim=64)),
}
# The interpreter takes tens of milliseconds a program: the narrow size alone is run at hundreds of rows.
ROWS = [("small", 1), ("small", 21), ("many", 1), ("many", 5), ("narrow", 2), ("narrow", 70), ("narrow", 300)]


@pytest.mark.process
@pytest.mark.parametrize(("size", "rows"), ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_experts_equal_the_plain_loop(size: str, dtype: torch.dtype, rows: int) -> None:
    dim, config = SIZES[size]
    layer, plain = layers(dim, config, dtype)
    experts = FusedExperts(layer, prefix_len=26)
    x, logits = normal(rows, dim, dtype=dtype, device=CPU), distinct_logits(rows, config.num_experts, dtype, CPU)
    live = torch.rand(rows) < 0.7
    live[0] = True
    expected = plain_experts(plain, x, logits)
    for kind in PassKind if rows < 20 else (PassKind.PREFIX,):
        found = experts.of_rows(x, logits, live, kind=kind)
        assert relative_error(found[live], expected[live]) < TOLERANCE[dtype]
        assert (found[~live] == 0).all()
    residual, branch = (normal(rows, dim, dtype=dtype, device=CPU) for _ in range(2))
    summed = experts.of_rows(x, logits, live, residual, branch, kind=PassKind.PREFIX)
    total = residual.float() + branch.float() + torch.where(live[:, None], expected.float(), 0.0)
    assert relative_error(summed, total) < TOLERANCE[dtype]


@pytest.mark.process
@pytest.mark.parametrize("kind", PassKind)
def test_an_expert_that_takes_all_and_experts_with_nobody(kind: PassKind) -> None:
    dim, config = SIZES["small"]
    layer, plain = layers(dim, config, torch.float16)
    x = normal(37, dim, dtype=torch.float16, device=CPU)
    logits = torch.tensor([3.0, -1.0, 2.0, -2.0, 1.0, -3.0], dtype=torch.float16).expand(37, -1).contiguous()
    found = FusedExperts(layer, prefix_len=26).of_rows(x, logits, kind=kind)
    assert relative_error(found, plain_experts(plain, x, logits)) < 1e-3


@pytest.mark.process
@pytest.mark.parametrize("form", WeightForm)
@pytest.mark.parametrize("kind", PassKind)
def test_a_row_has_the_same_bits_alone_and_in_company(kind: PassKind, form: WeightForm) -> None:
    dim, config = SIZES["small"]
    layer, _ = layers(dim, config, torch.float16, form)
    experts = FusedExperts(layer, prefix_len=26)
    x, logits = normal(20, dim, dtype=torch.float16, device=CPU), distinct_logits(20, 6, torch.float16, CPU)
    together = experts.of_rows(x, logits, kind=kind)
    loud, order = x * 20, torch.randperm(20)
    loud[7] = x[7]
    assert torch.equal(experts.of_rows(loud, logits, kind=kind)[7], together[7])
    assert torch.equal(experts.of_rows(x[order], logits[order], kind=kind), together[order])
    for row in (0, 19):
        alone = experts.of_rows(x[row : row + 1], logits[row : row + 1], kind=kind)
        assert torch.equal(alone[0], together[row])
        others_idle = torch.arange(20) == row
        assert torch.equal(experts.of_rows(x, logits, others_idle, kind=kind)[row], together[row])


@pytest.mark.process
@pytest.mark.parametrize("form", [form for form in WeightForm if form is not WeightForm.PLAIN])
def test_experts_in_few_bits_equal_the_plain_loop_over_their_values(form: WeightForm) -> None:
    dim, config = SIZES["small"]
    layer, plain = layers(dim, config, torch.float32, form)
    plain.float()
    x, logits = normal(19, dim, dtype=torch.float16, device=CPU), distinct_logits(19, 6, torch.float32, CPU)
    expected = plain_experts(plain, x.float(), logits)
    for kind in PassKind:
        found = FusedExperts(layer, prefix_len=26).of_rows(x, logits, kind=kind)
        assert relative_error(found, expected) < 2e-3


# -- low bits --------------------------------------------------------------------------------------


def decoded(weight: KernelWeight, dtype: torch.dtype) -> Tensor:
    """A dense weight's values [O, K] as the kernel reads them: its product with the unit matrix."""
    layer = KernelLinear(weight, None, prefix_len=730)
    return layer(torch.eye(weight.num_inputs, dtype=dtype)[None])[0].T


@pytest.mark.process
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_float8_code_is_read_exactly(dtype: torch.dtype) -> None:
    finite = [code for code in range(256) if code & 127 != 127]
    codes = torch.tensor((finite * 65)[: 128 * 128], dtype=torch.uint8).view(128, 128)
    stored = QuantisedWeight(LowBit.FP8, (128, 128), codes.view(torch.float8_e4m3fn), torch.ones(128))
    weight = KernelWeight.of_quantised(stored)
    expected = fp8_values()[codes.int()]
    assert len(expected.unique()) == 253  # 254 finite codes, of which two are zero
    assert torch.equal(expected, codes.view(torch.float8_e4m3fn).float())
    assert torch.equal(decoded(weight, dtype).float(), expected)
    assert torch.equal(weight.dequantise(torch.float32)[0], expected)


@pytest.mark.process
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_float8_codes_are_read_alike_by_the_instruction(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = KernelWeight.of_quantised(quantise(torch.randn(128, 128) * 0.05, LowBit.FP8))
    by_bits = decoded(weight, dtype)
    by_instruction = operators.kernel_form(WeightForm.FP8, torch.float16, (8, 9))
    assert by_instruction not in WeightForm.__members__.values()
    monkeypatch.setattr(operators, "kernel_form", lambda *_: by_instruction)
    assert torch.equal(decoded(weight, dtype), by_bits)


@pytest.mark.process
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_4_bit_code_is_read_exactly(dtype: torch.dtype) -> None:
    """With scales and zero points that are powers of two or whole, no rounding hides a wrong code."""
    torch.manual_seed(0)
    codes = torch.randint(0, INT4_MAX + 1, (2 * 128, 128)).to(torch.uint8)
    scale = torch.tensor([1.0, 0.5]).repeat(128)[:, None]
    zero = torch.tensor([8.0, 3.0]).repeat(128)[:, None]
    stored = QuantisedWeight(LowBit.INT4, (128, 256), codes, scale, zero)
    weight = KernelWeight.of_quantised(stored)
    expected = stored.dequantise(torch.float32)
    assert set(codes.unique().tolist()) == set(range(16))
    assert torch.equal(weight.dequantise(torch.float32)[0], expected)
    assert torch.equal(decoded(weight, dtype).float(), expected)


@pytest.mark.parametrize("kind", LowBit)
def test_repacked_weights_keep_their_values_and_their_size(kind: LowBit) -> None:
    torch.manual_seed(0)
    stored = quantise(torch.randn(3, 128, 256) * 0.05, kind)
    weight = KernelWeight.of_quantised(stored)
    assert torch.allclose(weight.dequantise(torch.float32), stored.dequantise(torch.float32), atol=1e-7)
    assert weight.num_matrices == 3
    assert (weight.num_outputs, weight.num_inputs) == (128, 256)
    assert weight.num_bytes < (0.6 if kind is LowBit.INT4 else 1.1) * 3 * 128 * 256


def test_float8_codes_that_are_no_number_are_refused() -> None:
    codes = torch.zeros(128, 128, dtype=torch.uint8)
    codes[5, 7] = 0xFF
    stored = QuantisedWeight(LowBit.FP8, (128, 128), codes.view(torch.float8_e4m3fn), torch.ones(128))
    with pytest.raises(CheckpointError, match="no number"):
        KernelWeight.of_quantised(stored)


def test_4_bits_are_kept_only_where_whole_tiles_cover_them() -> None:
    assert can_hold(LowBit.INT4, (64, 2048, 1024))
    assert not can_hold(LowBit.INT4, (64, 100))
    assert not can_hold(LowBit.INT4, (64, 128))
    assert can_hold(LowBit.FP8, (3, 5))


@pytest.mark.process
@pytest.mark.parametrize("form", [WeightForm.FP8, WeightForm.INT8, WeightForm.INT4])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_a_dense_layer_in_few_bits_equals_its_plain_twin(form: WeightForm, length: int) -> None:
    torch.manual_seed(0)
    weight = random_weight(form, (256, 128), torch.float16, CPU)
    bias = torch.nn.Parameter(torch.randn(256).half(), requires_grad=False)
    x = normal(2, length, 128, dtype=torch.float16, device=CPU)
    for with_bias in (bias, None):
        found = KernelLinear(weight, with_bias, prefix_len=26)(x)
        values = weight.dequantise(torch.float32)[0]
        expected = torch.nn.functional.linear(x.float(), values, with_bias.float() if with_bias is not None else None)
        assert found.shape == (2, length, 256)
        assert relative_error(found, expected) < 1e-3
