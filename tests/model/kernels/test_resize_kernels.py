"""The kernel that resizes, in Triton's interpreter: the bits of its twin for any axis, and Pillow's crops."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("triton", reason="the kernels need triton, which the development extra brings on Linux")

from md3cli.images.crops import CropConfig, cut_crops
from md3cli.model.engine.resize import PictureCutter, plain_resize_axis, weight_table
from md3cli.model.kernels.forms import OPS
from md3cli.model.kernels.tiles import HEIGHT_BLOCK, WIDTH_BLOCK

CPU = torch.device("cpu")
SMALL = CropConfig(crop_size=56, patch_size=14, overlap_margin=1, max_crops=12)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_white() -> Iterator[None]:
    """What a kernel forgets to write stays 255."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def dark_noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Values up to 150: no weighted sum of them comes near 255, so a value nobody wrote is seen."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 151, (height, width, 3), np.uint8))


@pytest.mark.process
@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 70), width=st.integers(1, 70), new=st.integers(1, 100), axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_an_axis_is_resized_as_by_the_twin(height: int, width: int, new: int, axis: int, seed: int) -> None:
    pixels = dark_noise(height, width, seed)
    table = torch.from_numpy(weight_table(pixels.shape[axis], new))
    found = OPS.resize_axis(pixels, table, axis)
    assert found.shape == ((new, width, 3), (height, new, 3))[axis]
    assert torch.equal(found, plain_resize_axis(pixels, table, axis))


@pytest.mark.process
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rest", [-1, 0, 1])
def test_blocks_that_fit_just_or_not_quite_are_whole(axis: int, rest: int) -> None:
    lines, values = WIDTH_BLOCK if axis == 1 else HEIGHT_BLOCK
    other = 2 * lines + rest if axis == 1 else (2 * values) // 3 + rest
    pixels = dark_noise(other, 31) if axis == 1 else dark_noise(31, max(1, other))
    for new in (values // 3, values // 3 + 1, 1):
        table = torch.from_numpy(weight_table(31, new))
        assert torch.equal(OPS.resize_axis(pixels, table, axis), plain_resize_axis(pixels, table, axis))


@pytest.mark.process
@pytest.mark.parametrize("size", [(91, 143), (150, 87), (1, 1), (1, 101), (77, 5), (56, 120)], ids=str)
def test_crops_are_pillows(size: tuple[int, int]) -> None:
    width, height = size
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    cutter = PictureCutter(CPU, SMALL)
    cutter._resize_axis = OPS.resize_axis
    wanted = cut_crops(Image.fromarray(pixels), SMALL)
    found = cutter.cut(torch.from_numpy(pixels), wanted.tiling).numpy()
    assert np.array_equal(found, wanted.pixels[: len(found)])


@pytest.mark.parametrize("pixels", [torch.zeros(9, 9, 3), torch.zeros(9, 9, 4, dtype=torch.uint8)])
def test_other_pictures_are_refused(pixels: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        OPS.resize_axis(pixels, torch.from_numpy(weight_table(9, 4)), 1)


def test_strides_are_refused() -> None:
    pixels = dark_noise(9, 18)[:, ::2]
    with pytest.raises(AssertionError):
        OPS.resize_axis(pixels, torch.from_numpy(weight_table(9, 4)), 1)
