"""Every fast form computes what its plain form does, and a row alone what it computes in company."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from md3cli.model.engine import kernels
from md3cli.model.network.config import MoeConfig
from md3cli.model.network.layers import Linear, Mlp, MoeMlp, Routing, attention, bmm_attention

DIM, NUM_TOKENS = 128, 37


def filled(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(dtype)
    return module.requires_grad_(False)


def tokens(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(NUM_TOKENS, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def moe_layer(dtype: torch.dtype) -> MoeMlp:
    layer = filled(
        MoeMlp(DIM, MoeConfig(num_experts=6, start_layer=0, experts_per_token=3, expert_inner_dim=64)), dtype
    )
    assert isinstance(layer, MoeMlp)
    return layer


FORMS = {
    "all experts": (kernels.AllExperts, torch.float32, 1e-5),
    "grouped": (kernels.GroupedExperts, torch.bfloat16, 1e-6),
    "packed": (kernels.PackedExperts, torch.bfloat16, 0.02),
    "packed float32": (kernels.PackedExperts, torch.float32, 1e-5),
    "all experts packed": (partial(kernels.AllExperts, is_packed=True), torch.float32, 1e-5),
}


@pytest.mark.parametrize("name", FORMS)
def test_experts_equal_the_plain_loop(name: str) -> None:
    kind, dtype, tolerance = FORMS[name]
    layer, x = moe_layer(dtype), tokens(dtype)
    routing = layer.route(x)
    expected = layer.run_experts(x, routing)
    found = kind(copy.deepcopy(layer))(x, routing)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", FORMS)
def test_a_token_gets_the_same_alone_and_in_company(name: str) -> None:
    kind, dtype, _ = FORMS[name]
    layer, x = moe_layer(dtype), tokens(dtype)
    routing, run = layer.route(x), kind(copy.deepcopy(layer))
    together = run(x, routing)
    loud = x.clone()
    loud[1:] *= 20  # companions must not matter however large they are
    assert torch.allclose(run(loud, layer.route(loud))[0].float(), together[0].float(), rtol=1e-5, atol=1e-6)
    for row in (0, 11, 36):
        pick = slice(row, row + 1)
        alone = run(x[pick], Routing(routing.experts_NA[pick], routing.weights_NA[pick]))
        assert torch.allclose(alone[0].float(), together[row].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, NUM_TOKENS])
def test_packed_products_equal_plain_ones_at_any_batch(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    x = tokens(dtype)[:rows]
    linear, mlp = filled(Linear(DIM, 96), dtype), filled(Mlp(DIM, 96, DIM), dtype)
    assert isinstance(linear, Linear)
    assert isinstance(mlp, Mlp)
    packed = kernels.PackedLinear(linear.weight, linear.bias)
    assert (packed(x) - linear(x)).abs().max() <= tolerance * linear(x).abs().max()
    assert torch.equal(packed(x)[:1], packed(x[:1]))
    fused = kernels.PackedMlp(mlp)
    assert (fused(x) - mlp(x)).abs().max() <= 2 * tolerance * mlp(x).abs().max()


def test_attention_by_products_equals_the_fused_one() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(3, 2, length, 64, generator=generator) for length in (4, 9, 9))
    mask = torch.rand(3, 1, 4, 9, generator=generator) > 0.3
    mask[..., 0] = True
    assert torch.allclose(attention(q, k, v, mask), bmm_attention(q, k, v, mask), atol=1e-6)
    assert torch.allclose(attention(q, k, v, None), bmm_attention(q, k, v, None), atol=1e-6)


@pytest.mark.parametrize("mask_rows", [None, 1, 3])
@pytest.mark.parametrize("scores_in_cache", [1, 4 * 9 * 2, 1 << 20])
def test_attention_in_blocks_equals_attention_at_once(
    mask_rows: int | None, scores_in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "SCORES_IN_CACHE", scores_in_cache)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(3, 5, length, 64, generator=generator) for length in (4, 9, 9))
    mask = None
    if mask_rows is not None:
        mask = torch.rand(mask_rows, 1, 4, 9, generator=generator) > 0.3
        mask[..., 0] = True
    found = kernels.blocked_attention(q, k, v, mask)
    assert torch.allclose(found, bmm_attention(q, k, v, mask), atol=1e-6)
    alone = kernels.blocked_attention(q[1:2], k[1:2], v[1:2], mask if mask_rows != 3 else mask[1:2])
    assert torch.allclose(alone, found[1:2], atol=1e-6)


@pytest.mark.process
def test_optimised_models_answer_like_plain_ones() -> None:
    from golden_cases import assert_answer, load_case

    case = load_case("a")
    model = copy.deepcopy(case.model)
    kernels.optimise(model)
    for answer in case.engine(4, model).run(case.job(k) for k in range(len(case.requests)) if case.is_certain(k)):
        assert_answer(answer, case.expected[answer.key])
