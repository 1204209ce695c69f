"""What a step computes beside its layers, in Triton's interpreter against its plain twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which the development extra brings on Linux")

from gpu.triton_cases import OPS, normal, relative_error

from md3cli.model.kernels.forms import RotaryAngles, fused_bins, fused_features
from md3cli.model.network.config import ModelConfig
from md3cli.model.network.moondream import fourier_features, read_bins
from md3cli.model.network.text import rotary_table

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16)
NAN = float("nan")

pytestmark = pytest.mark.process


@pytest.mark.parametrize("shape", [(1, 1), (3, 730), (65, 1)])
def test_angles_equal_the_plain_table(shape: tuple[int, int]) -> None:
    theta = replace(ModelConfig()).text.rope_theta
    position = torch.randint(0, 4096, (shape[0], 1)) + torch.arange(shape[1])
    found, expected = RotaryAngles(theta, CPU)(position), rotary_table(position, theta)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-6
    one_for_all = position[:1].expand(shape)
    assert torch.equal(RotaryAngles(theta, CPU)(one_for_all)[:, -1], found[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1024), (5, 2, 1024), (3, 2, 24), (4, 7)])
def test_bins_are_read_as_by_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = normal(*shape, dtype=dtype, device=CPU, scale=3.0)
    logits[..., 0, -1] = 20.0  # the last bin, whose neighbours are cut off
    logits[0, ..., 0] = 19.0
    found, expected = fused_bins(logits), read_bins(logits)
    assert torch.equal(found.bins, expected.bins)
    assert (found.masses - expected.masses).abs().max() < 1e-6
    assert found.are_finite.all()


def test_the_first_of_equal_bins_is_chosen() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert fused_bins(logits).bins.tolist() == read_bins(logits).bins.tolist() == [1, 0]


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_said_and_choose_a_bin_that_exists(bad: float) -> None:
    logits = torch.randn(3, 2, 24)
    logits[1, 0, 5] = bad
    found = fused_bins(logits)
    assert (
        found.are_finite.tolist()
        == read_bins(logits).are_finite.tolist()
        == [[True, True], [False, True], [True, True]]
    )
    assert found.bins.min() >= 0
    assert found.bins.max() < 24
    nothing = fused_bins(torch.full((1, 24), bad))
    assert not nothing.are_finite.any()
    assert 0 <= nothing.bins.item() < 24


def test_a_rows_reading_knows_no_company() -> None:
    logits = torch.randn(7, 2, 1024)
    together = OPS.read_bins(logits, 16)
    for row in range(7):
        for one, all_of_them in zip(OPS.read_bins(logits[row : row + 1], 16), together, strict=True):
            assert torch.equal(one[0], all_of_them[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(1, 128), (2, 256), (2, 5)])
def test_features_equal_the_plain_ones(count: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values, frequencies = torch.rand(6, count), normal(count, width, dtype=dtype, device=CPU, scale=4.0)
    found, expected = fused_features(values, frequencies), fourier_features(values, frequencies)
    assert found.dtype is dtype
    assert found.shape == (6, 2 * width)
    assert relative_error(found, expected) < (1e-5 if dtype is torch.float32 else 1e-3)
    assert torch.equal(fused_features(values[2:3], frequencies)[0], found[2])
