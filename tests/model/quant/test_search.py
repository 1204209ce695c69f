"""Searched scales: never worse than the extremes; codes found once are found again, and no others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from md3cli.config import ModelOptions
from md3cli.file_cache import FileCache
from md3cli.model.engine.load import load_weights
from md3cli.model.network.moondream import Moondream3
from md3cli.model.quant import load
from md3cli.model.quant import search as search_module
from md3cli.model.quant.search import CodeCache, search
from md3cli.model.weights.codes import LowBit, QuantisedWeight, quantise
from md3cli.model.weights.files import WeightFiles, find_weight_files
from md3cli.model.weights.hub import model_path
from md3cli.model.weights.plan import plan_checkpoint

ROUNDING = 1e-5  # of float32 sums taken in another order


def squared_error(weight: Tensor, made: QuantisedWeight, importance: Tensor | None = None) -> Tensor:
    """What `search` minimises, summed over the columns: float32 [..., out]."""
    error = made.dequantise(torch.float32).sub_(weight).square_()
    if importance is not None:
        error *= importance.unsqueeze(-2)
    return error.sum(dim=-1)


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


@pytest.mark.process
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


# -- kept for the next start ----------------------------------------------------------------------

TINY = model_path("tiny")
SHAPE = (4, 512, 512)
CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path) -> CodeCache:
    return CodeCache(FileCache(tmp_path, 1 << 30), find_weight_files(TINY), torch.bfloat16, CPU)


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", LowBit)
def test_codes_come_back_bit_for_bit(kind: LowBit, cache: CodeCache) -> None:
    made = quantise(weight(*SHAPE), kind)
    assert cache.load("w", kind, SHAPE) is None
    cache.save("w", made)
    found = cache.load("w", kind, SHAPE)
    assert found is not None
    assert torch.equal(found.dequantise(torch.float32), made.dequantise(torch.float32))
    assert all(cache.load("w", other, SHAPE) is None for other in LowBit if other is not kind)
    assert cache.load("v", kind, SHAPE) is None
    assert cache.load("w", kind, (8, 512, 512)) is None


def test_small_weights_are_not_worth_a_file(cache: CodeCache) -> None:
    cache.save("w", quantise(weight(64, 128), LowBit.INT8))
    assert cache.files.info().num_files == 0


def test_a_checkpoint_that_changed_has_other_codes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    files = FileCache(tmp_path, 1 << 30)

    def of_now() -> CodeCache:
        return CodeCache(files, WeightFiles(tmp_path, (file,), None, None, {}), torch.bfloat16, CPU)

    of_now().save("w", quantise(weight(*SHAPE), LowBit.INT8))
    assert of_now().load("w", LowBit.INT8, SHAPE) is not None
    os.utime(file, ns=(1, 1))
    assert of_now().load("w", LowBit.INT8, SHAPE) is None


def test_codes_of_weights_read_in_another_dtype_are_others(cache: CodeCache) -> None:
    cache.save("w", quantise(weight(*SHAPE), LowBit.INT8))
    same, other = (
        CodeCache(cache.files, find_weight_files(TINY), dtype, CPU) for dtype in (torch.bfloat16, torch.half)
    )
    assert same.load("w", LowBit.INT8, SHAPE) is not None
    assert other.load("w", LowBit.INT8, SHAPE) is None, "rounded otherwise before scales were searched"


@pytest.mark.parametrize("kind", LowBit)
def test_codes_come_back_on_the_device_that_asks(kind: LowBit, cache: CodeCache) -> None:
    cache.save("w", quantise(weight(*SHAPE), kind))
    meta = torch.device("meta")  # stands in for a GPU
    found = CodeCache(cache.files, find_weight_files(TINY), torch.bfloat16, meta).load("w", kind, SHAPE)
    assert found is not None
    assert {found.codes.device, found.scale.device} == {meta}


def test_a_full_disk_ends_keeping_not_the_start(cache: CodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(key: str, payload: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.files, "put", refuse)
    cache.save("w", quantise(weight(*SHAPE), LowBit.INT8))
    assert not cache.is_writable


@pytest.mark.process
def test_a_second_start_searches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "LEAST_ELEMENTS", 0)
    options = ModelOptions(model=str(TINY), quant="int4", cache_dir=tmp_path)

    def start() -> Moondream3:
        return load_weights(options, plan_checkpoint(TINY), dtype=torch.float32, device=CPU)

    first = start()

    def refuse(weight: torch.Tensor, kind: LowBit) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(load, "search", refuse)
    second = start()
    x = torch.randn(1, 5, first.config.text.dim)
    position = torch.arange(5)[None]
    with torch.inference_mode():
        assert torch.equal(first.text(x, position), second.text(x, position))
