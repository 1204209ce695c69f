"""Pictures cut beside the engine: the bytes that decode workers give, from any thread, whatever the device does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from md3cli.errors import EngineError
from md3cli.images.crops import CropConfig, cut_crops
from md3cli.model.engine import cutting
from md3cli.model.engine.cutting import DeviceCutter
from md3cli.model.engine.resize import PictureCutter

CFG = CropConfig(crop_size=42, patch_size=6, overlap_margin=2, max_crops=12)
CPU = torch.device("cpu")
SIZES = ((300, 200), (30, 20), (64, 48), (90, 700), (1, 1))


def pixels_of(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)


def check(cutter: DeviceCutter, width: int, height: int) -> None:
    pixels = pixels_of(width, height)
    wanted, found = cut_crops(Image.fromarray(pixels), CFG), cutter.crops_of(pixels)
    assert found.tiling == wanted.tiling
    np.testing.assert_array_equal(found.pixels, wanted.pixels)


def test_crops_are_those_of_the_decode_workers() -> None:
    cutter = DeviceCutter(CPU, CFG)
    for size in SIZES:
        check(cutter, *size)


def test_many_threads_have_their_pictures_cut_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "FIRST_BUFFER_BYTES", 1)  # buffers grow while others are at it
    cutter = DeviceCutter(CPU, CFG)
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda size: check(cutter, *size), SIZES * 6))


def test_crops_stay_when_the_next_picture_is_cut() -> None:
    cutter = DeviceCutter(CPU, CFG)
    first = [cutter.crops_of(pixels_of(300, 200)).pixels for _ in range(cutting.NUM_LANES)]
    for _ in range(2 * cutting.NUM_LANES):
        cutter.crops_of(pixels_of(301, 200))
    for pixels in first:
        np.testing.assert_array_equal(pixels, cut_crops(Image.fromarray(pixels_of(300, 200)), CFG).pixels)


def test_pillow_cuts_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "MOST_BYTES", 3 * 300 * 200 - 1)
    cut: list[tuple[int, ...]] = []
    plain = PictureCutter.cut

    def see(self: PictureCutter, pixels: torch.Tensor, *rest: object) -> torch.Tensor:
        cut.append(tuple(pixels.shape))
        return plain(self, pixels, *rest)  # type: ignore[arg-type]  # whatever it is given

    monkeypatch.setattr(PictureCutter, "cut", see)
    cutter = DeviceCutter(CPU, CFG)
    check(cutter, 300, 200)
    check(cutter, 300, 199)
    assert cut == [(199, 300, 3)]


def test_pillow_cuts_while_the_device_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [torch.OutOfMemoryError("out of memory (made up)")] * 3
    plain = PictureCutter.cut

    def fail(self: PictureCutter, *given: object) -> torch.Tensor:
        if failures:
            raise failures.pop()
        return plain(self, *given)  # type: ignore[arg-type]  # whatever it is given

    monkeypatch.setattr(PictureCutter, "cut", fail)
    cutter = DeviceCutter(CPU, CFG)
    for _ in range(5):
        check(cutter, 300, 200)
    assert not failures


def test_a_device_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: PictureCutter, *given: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(PictureCutter, "cut", fail)
    cutter = DeviceCutter(CPU, CFG)
    for _ in range(2 * cutting.NUM_LANES):  # a lane that failed is not lost: nobody waits for ever
        with pytest.raises(EngineError, match="the model failed on cpu: CUDA error: device-side assert triggered"):
            cutter.crops_of(pixels_of(300, 200))
