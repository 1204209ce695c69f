"""Crops cut as on a GPU against Pillow's, byte for byte: sizes at random, examples, and what the cutter promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from md3cli.images.crops import CropConfig, ImageLimits, cut_crops, read_image
from md3cli.model.engine import resize
from md3cli.model.engine.resize import MAX_SIDE, PictureCutter, can_cut, plain_resize_axis, weight_table
from md3cli.model.network.config import ModelConfig
from md3cli.records import ImageItem

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
REAL = ModelConfig().vision.crop_config
SMALL = CropConfig(crop_size=56, patch_size=14, overlap_margin=1, max_crops=12)  # as the golden cases' models
NUM_RANDOM = 500
LARGE = ((4032, 3024), (3024, 4032), (20000, 40), (30, 20000), (MAX_SIDE, 3), (2, MAX_SIDE), (8000, 500))
IMAGES = {".png", ".jpg", ".webp", ".tif", ".bmp", ".gif"}
EXAMPLES = sorted(p for d in ("examples", "tests/golden", "docs") for p in (ROOT / d).rglob("*") if p.suffix in IMAGES)


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def num_different(pixels: np.ndarray, config: CropConfig, cutter: PictureCutter | None = None) -> int:
    """How many values of the distinct crops are not Pillow's."""
    wanted = cut_crops(Image.fromarray(pixels), config)
    found = (cutter or PictureCutter(CPU, config)).cut(torch.from_numpy(pixels), wanted.tiling).numpy()
    num_distinct = 1 if wanted.tiling == (1, 1) else len(wanted.pixels)
    assert found.shape == (num_distinct, *wanted.pixels.shape[1:])
    return int(np.count_nonzero(found != wanted.pixels[:num_distinct]))


@pytest.mark.parametrize("part", range(10))
def test_random_sizes_are_cut_as_by_pillow(part: int) -> None:
    """Sides from 1 to 1,500, small ones as often as large ones."""
    random, cutter = np.random.default_rng(part), PictureCutter(CPU, REAL)
    for _ in range(NUM_RANDOM // 10):
        width, height = (int(side) for side in np.exp(random.uniform(0, np.log(1501), 2)))
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        assert num_different(pixels, REAL, cutter) == 0, (width, height)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_pictures_are_cut_as_by_pillow(path: Path) -> None:
    image = read_image(ImageItem(path.name, str(path)), ImageLimits()).image
    assert num_different(np.array(image), REAL) == 0


def test_there_are_example_pictures() -> None:
    assert len(EXAMPLES) > 40


@pytest.mark.slow
@pytest.mark.parametrize("size", LARGE, ids=str)
def test_large_pictures_are_cut_as_by_pillow(size: tuple[int, int]) -> None:
    assert num_different(noise(*size), REAL) == 0


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), seed=st.integers(0, 9))
@example(width=1, height=101, seed=0)  # begins with its height
@example(width=1, height=100, seed=0)  # the last that does not
@example(width=300, height=1, seed=0)
@example(width=56, height=56, seed=0)  # nothing to do
@example(width=56, height=200, seed=0)  # one axis keeps its length
def test_any_picture_is_cut_as_by_pillow(width: int, height: int, seed: int) -> None:
    assert num_different(noise(width, height, seed), SMALL) == 0


@pytest.mark.parametrize("value", [0, 255])
def test_flat_pictures_stay_flat(value: int) -> None:
    """Weights of an output add up to 1 within less than a rounding; sums of extremes do not wrap."""
    pixels = np.full((333, 777, 3), value, np.uint8)
    assert num_different(pixels, REAL) == 0


# -- weights ---------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(old=st.integers(1, 3000), new=st.integers(1, 3000))
def test_a_table_reads_inputs_that_exist_and_its_sums_fit_32_bits(old: int, new: int) -> None:
    table = weight_table(old, new).astype(np.int64)
    first, weights = table[0], table[1:]
    assert first.min() >= 0
    assert (first + len(weights)).max() <= old
    assert 255 * np.abs(weights).sum(axis=0).max() + (1 << 21) < 2**31
    assert np.abs(weights).sum(axis=0).max() < 1.6 * 2**22
    assert np.abs(weights.sum(axis=0) - 2**22).max() <= len(weights)


def test_weights_near_a_half_come_from_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, where everything counts as near: the scalar formula and numpy's give the same table."""
    sizes = ((4032, 378), (640, 756), (7, 378), (1, 378), (5000, 3), (378, 378))
    expected = [weight_table(old, new) for old, new in sizes]
    monkeypatch.setattr(resize, "NEAR_HALF", 2.0)
    for (old, new), table in zip(sizes, expected, strict=True):
        assert np.array_equal(weight_table(old, new), table), (old, new)


def test_the_scalar_formula_is_used_for_a_weight_near_a_half(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(resize, "NEAR_HALF", 1e-3)
    scalar = resize._weights_in_order
    monkeypatch.setattr(resize, "_weights_in_order", lambda *given: called.append(given) or scalar(*given))
    weight_table(4032, 378)
    assert 0 < len(called) < 378


# -- the cutter ------------------------------------------------------------------------------------


def test_the_cutter_finds_no_fault() -> None:
    assert PictureCutter(CPU, REAL).fault() is None
    assert PictureCutter(CPU, SMALL).fault() is None


def test_one_wrong_value_is_a_fault() -> None:
    cutter = PictureCutter(CPU, REAL)

    def wrong(pixels: torch.Tensor, table: torch.Tensor, axis: int) -> torch.Tensor:
        resized = plain_resize_axis(pixels, table, axis)
        resized[-1, -1, -1] ^= 1
        return resized

    cutter._resize_axis = wrong
    fault = cutter.fault()
    assert fault is not None
    assert "1203 x 817" in fault
    assert "\n" not in fault


def test_tables_are_kept_and_the_oldest_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    cutter = PictureCutter(CPU, SMALL)
    first = cutter._table(1000, 56)
    assert cutter._table(1000, 56) is first
    monkeypatch.setattr(resize, "TABLE_BYTES", 3 * first.nbytes)
    cutter._table(1001, 56)
    cutter._table(1000, 56)  # used again: 1001 is now the oldest
    cutter._table(1002, 56)
    cutter._table(1003, 56)
    assert cutter._table(1000, 56) is first
    assert (1001, 56) not in cutter._tables
    assert cutter._table_bytes == sum(table.nbytes for table in cutter._tables.values()) <= 3 * first.nbytes


def test_sides_that_are_too_long_are_left_to_pillow() -> None:
    assert can_cut(MAX_SIDE, 1)
    assert not can_cut(1, MAX_SIDE + 1)
    assert not can_cut(0, 5)
