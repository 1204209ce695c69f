"""The kernels that resize, in Triton's interpreter: the bits of their twin for any axis, and Pillow's crops."""

from __future__ import annotations

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
from md3cli.model.kernels.tiles import RESIZED_VALUES

CPU = torch.device("cpu")
SMALL = CropConfig(crop_size=16, patch_size=2, overlap_margin=1, max_crops=12)  # 12 pixels from tile to tile

pytestmark = pytest.mark.usefixtures("unwritten_memory_shows")


def dark_noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Values up to 150: no weighted sum of them comes near 255, so a value nobody wrote is seen."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 151, (height, width, 3), np.uint8))


@pytest.mark.process
@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 50), width=st.integers(1, 50), new=st.integers(1, 60), axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_an_axis_is_resized_as_by_the_twin(height: int, width: int, new: int, axis: int, seed: int) -> None:
    pixels = dark_noise(height, width, seed)
    table = torch.from_numpy(weight_table(pixels.shape[axis], new))
    found = OPS.resize_axis(pixels, table, axis)
    assert found.shape == ((new, width, 3), (height, new, 3))[axis]
    assert torch.equal(found, plain_resize_axis(pixels, table, axis))


@pytest.mark.process
@pytest.mark.parametrize("rest", [-1, 0, 1])
def test_blocks_that_are_full_or_not_quite_are_whole(rest: int) -> None:
    """Values of a row, 3 for each pixel, and rows of a program."""
    width = (2 * RESIZED_VALUES) // 3 + rest
    for height in (4, 5, 6, 7):
        pixels = dark_noise(height, 19)
        table = torch.from_numpy(weight_table(19, width))
        assert torch.equal(OPS.resize_axis(pixels, table, 1), plain_resize_axis(pixels, table, 1))
    pixels = dark_noise(19, width)
    table = torch.from_numpy(weight_table(19, 4))
    assert torch.equal(OPS.resize_axis(pixels, table, 0), plain_resize_axis(pixels, table, 0))


@pytest.mark.process
@pytest.mark.parametrize("size", [(41, 23), (18, 67), (1, 1), (1, 101), (77, 5), (16, 40)], ids=str)
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
