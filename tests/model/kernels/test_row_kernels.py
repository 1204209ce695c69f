"""What a step computes beside its layers, in Triton's interpreter against its plain twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which the development extra brings on Linux")

from gpu.triton_cases import normal, relative_error

from md3cli.model.kernels.forms import RotaryAngles, fused_features
from md3cli.model.network.config import ModelConfig
from md3cli.model.network.moondream import fourier_features
from md3cli.model.network.text import rotary_table

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16)

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
@pytest.mark.parametrize(("count", "width"), [(1, 128), (2, 256), (2, 5)])
def test_features_equal_the_plain_ones(count: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values, frequencies = torch.rand(6, count), normal(count, width, dtype=dtype, device=CPU, scale=4.0)
    found, expected = fused_features(values, frequencies), fourier_features(values, frequencies)
    assert found.dtype is dtype
    assert found.shape == (6, 2 * width)
    assert relative_error(found, expected) < (1e-5 if dtype is torch.float32 else 1e-3)
    assert torch.equal(fused_features(values[2:3], frequencies)[0], found[2])
