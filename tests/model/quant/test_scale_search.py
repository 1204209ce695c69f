"""Searched scales: never worse than the extremes, clearly better where tails are heavy or columns matter unequally."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from md3cli.model.quant import search as search_module
from md3cli.model.quant.search import search, squared_error
from md3cli.model.weights.codes import LowBit, quantise

ROUNDING = 1e-5  # of float32 sums taken in another order


def draw(kind: str, *shape: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    if kind == "normal":
        return torch.randn(shape)
    return torch.distributions.StudentT(3.0).sample(torch.Size(shape))


def by_group(errors: Tensor, kind: LowBit, weight: Tensor) -> Tensor:
    """Errors of what shares a scale: rows, or for int4 all of the matrix, as groups are not rows."""
    return errors if kind is not LowBit.INT4 or weight.shape[-1] == 128 else errors.sum(-1)


@pytest.mark.parametrize("kind", LowBit)
@pytest.mark.parametrize("shape", [(6, 128), (4, 640), (3, 4, 256), (2, 8, 32)])
@pytest.mark.parametrize("drawn", ["normal", "heavy"])
@pytest.mark.parametrize("has_importance", [False, True])
def test_never_worse_than_the_extremes(kind: LowBit, shape: tuple[int, ...], drawn: str, has_importance: bool) -> None:
    weight = draw(drawn, *shape)
    importance = None
    if has_importance:
        importance = torch.rand(*shape[:-2], shape[-1], generator=torch.Generator().manual_seed(1)).pow(3) + 0.01
    plain = by_group(squared_error(weight, quantise(weight, kind), importance), kind, weight)
    found = by_group(squared_error(weight, search(weight, kind, importance), importance), kind, weight)
    assert (found <= plain * (1 + ROUNDING)).all()


@pytest.mark.parametrize(
    ("kind", "drawn", "most"),
    [
        (LowBit.INT4, "normal", 0.90),
        (LowBit.INT4, "heavy", 0.88),
        (LowBit.INT8, "heavy", 0.997),
        (LowBit.FP8, "heavy", 0.99),
    ],
)
def test_better_than_the_extremes(kind: LowBit, drawn: str, most: float) -> None:
    weight = draw(drawn, 256, 1024)
    plain, found = (squared_error(weight, made).sum() for made in (quantise(weight, kind), search(weight, kind)))
    assert found < most * plain


@pytest.mark.parametrize(("kind", "most"), [(LowBit.INT4, 0.85), (LowBit.INT8, 0.9), (LowBit.FP8, 0.96)])
def test_importance_moves_the_error_to_where_it_costs_little(kind: LowBit, most: float) -> None:
    """A few columns hold the large values and are seldom used, as outlier channels do."""
    weight = draw("normal", 256, 1024)
    weight[:, ::100] *= 4
    importance = torch.ones(1024)
    importance[::100] = 1e-3
    blind, weighted = search(weight, kind), search(weight, kind, importance)
    assert squared_error(weight, weighted, importance).sum() < most * squared_error(weight, blind, importance).sum()


def test_each_expert_has_its_own_importance() -> None:
    weight = draw("heavy", 3, 16, 128)
    importance = torch.rand(3, 128) + 0.01
    together = search(weight, LowBit.INT4, importance)
    for expert in range(3):
        alone = search(weight[expert], LowBit.INT4, importance[expert])
        assert torch.equal(together.dequantise(torch.float32)[expert], alone.dequantise(torch.float32))


@pytest.mark.parametrize("kind", LowBit)
def test_pieces_change_nothing(kind: LowBit, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = draw("heavy", 3, 40, 96), torch.rand(3, 96) + 0.01
    whole = search(weight, kind, importance).dequantise(torch.float32)
    monkeypatch.setattr(search_module, "_PIECE_ELEMENTS", 1000)
    assert torch.equal(search(weight, kind, importance).dequantise(torch.float32), whole)


@pytest.mark.parametrize("kind", LowBit)
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_weights_stay_what_they_are(kind: LowBit, value: float) -> None:
    weight = torch.full((2, 128), value)
    assert torch.allclose(search(weight, kind).dequantise(torch.float32), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", LowBit)
def test_columns_that_are_never_used_may_be_all_of_a_group(kind: LowBit) -> None:
    weight, importance = draw("normal", 4, 256), torch.zeros(256)
    importance[128:] = 1
    values = search(weight, kind, importance).dequantise(torch.float32)
    assert values.isfinite().all()
    assert (values - weight)[:, :128].abs().max() < weight.abs().max()


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(list(LowBit)),
    power=st.integers(-20, 20),
    seed=st.integers(0, 1 << 16),
    outlier=st.floats(1, 1e4),
)
def test_any_size_of_values_is_held(kind: LowBit, power: int, seed: int, outlier: float) -> None:
    weight = draw("heavy", 2, 256, seed=seed) * 2.0**power
    weight[0, 7] *= outlier
    plain, made = quantise(weight, kind), search(weight, kind)
    assert made.dequantise(torch.float32).isfinite().all()
    assert squared_error(weight, made).sum() <= squared_error(weight, plain).sum() * (1 + 1e-3)
