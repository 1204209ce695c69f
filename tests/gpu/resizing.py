"""Part `resizing`: pictures cut on the device, byte for byte against Pillow's crops, and how long that takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from md3cli.images.crops import CropConfig, Crops, ImageLimits, cut_crops, read_image, select_tiling
from md3cli.model.engine.machine import upload
from md3cli.model.engine.resize import PictureCutter, plain_resize_axis, weight_table
from md3cli.records import ImageItem

from .child import Run
from .files import CPU_SIZES, SIZES
from .timing import median_ms, replayed_ms

ROOT = Path(__file__).parents[2]
PICTURE_NAMES = {".png", ".jpg", ".webp", ".tif", ".bmp", ".gif"}
NUM_RANDOM, NUM_RANDOM_CPU = 500, 40
LONGEST_RANDOM = 1500
HUGE = 30_000  # pixels a side: 2.7 GB, beyond what 32 bits can count
MOST_NAMED = 5


def measure(run: Run) -> None:
    """The check that a load makes, random sizes, the repository's pictures, one huge picture, and times."""
    cutter = PictureCutter(run.device, run.config.vision.crop_config)
    fault = cutter.fault()
    run.figure("faults found at load", float(fault is not None), "count")
    if fault is not None:
        run.fail(fault)
    compare(run, cutter, "random sizes", random_pictures(NUM_RANDOM if run.is_cuda else NUM_RANDOM_CPU))
    compare(run, cutter, "examples", example_pictures())
    if run.is_cuda:
        with run.if_it_fits("a huge picture"):
            compare_huge(run, cutter)
    for what, (width, height) in (SIZES if run.is_cuda else CPU_SIZES).items():
        time_cut(run, cutter, what, width, height)


# -- bytes -----------------------------------------------------------------------------------------


def random_pictures(count: int) -> Iterator[np.ndarray]:
    """Noise with sides from 1 to 1,500, short ones as often as long ones."""
    random = np.random.default_rng(16)
    for _ in range(count):
        width, height = (int(side) for side in np.exp(random.uniform(0, np.log(LONGEST_RANDOM + 1), 2)))
        yield random.integers(0, 256, (height, width, 3), np.uint8)


def example_pictures() -> Iterator[np.ndarray]:
    """Every picture in the repository's examples and golden cases."""
    for folder in ("examples", "tests/golden"):
        for path in sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in PICTURE_NAMES):
            yield np.array(read_image(ImageItem(path.name, str(path)), ImageLimits()).image)


def compare(run: Run, cutter: PictureCutter, what: str, pictures: Iterator[np.ndarray]) -> None:
    """Cut each picture on the device and by Pillow; a byte that differs is a failure."""
    wrong, count = [], 0
    with ThreadPoolExecutor() as pool:  # Pillow resizes without the interpreter's lock
        for pixels, wanted in pool.map(lambda pixels: (pixels, by_pillow(pixels, cutter.config)), pictures):
            found = cutter.cut(upload(torch.from_numpy(pixels), cutter.device), wanted.tiling).cpu().numpy()
            count += 1
            if not np.array_equal(found, wanted.pixels[: len(found)]):
                wrong.append(f"{pixels.shape[1]} x {pixels.shape[0]}")
    run.figure(f"pictures compared, {what}", count, "count")
    run.figure(f"pictures that differ from Pillow's, {what}", len(wrong), "count")
    if wrong:
        run.fail(f"{what}: {len(wrong)} of {count} differ: {', '.join(wrong[:MOST_NAMED])}")


def by_pillow(pixels: np.ndarray, config: CropConfig) -> Crops:
    return cut_crops(Image.fromarray(pixels), config)


@torch.inference_mode()
def compare_huge(run: Run, cutter: PictureCutter) -> None:
    """One picture of more than 2^31 bytes, each axis against the plain twin on the same card."""
    pixels = torch.randint(0, 256, (HUGE, HUGE, 3), dtype=torch.uint8, device=run.device)
    size = cutter.config.crop_size
    table = upload(torch.from_numpy(weight_table(HUGE, size)), run.device)
    narrow = plain_resize_axis(pixels, table, 1)
    found = cutter.cut(pixels, select_tiling(HUGE, HUGE, cutter.config))[0]
    is_equal = torch.equal(found, plain_resize_axis(narrow, table, 0))
    tall = pixels.view(HUGE * HUGE // 50_000, 50_000, 3)  # the same bytes as rows of another length
    wide_table = upload(torch.from_numpy(weight_table(len(tall), size)), run.device)
    is_equal &= torch.equal(cutter.resize(tall, 50_000, size), plain_resize_axis(tall, wide_table, 0))
    run.figure("axes of a huge picture that differ from the twin's", float(not is_equal), "count")
    if not is_equal:
        run.fail(f"a picture of {HUGE} x {HUGE} pixels differs from the twin's")


# -- times -----------------------------------------------------------------------------------------


@torch.inference_mode()
def time_cut(run: Run, cutter: PictureCutter, what: str, width: int, height: int) -> None:
    """Milliseconds of one picture: as launched, replayed (the device alone), of a size not met before, by Pillow."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    on_device, tiling = upload(torch.from_numpy(pixels), run.device), select_tiling(width, height, cutter.config)

    def cut() -> object:
        return cutter.cut(on_device, tiling)

    def cut_new_size() -> object:
        return PictureCutter(run.device, cutter.config).cut(on_device, tiling)

    run.figure(f"cut, {what}", median_ms(cut, run.device, repeats=20 if run.is_cuda else 3), "ms")
    if run.is_cuda:
        run.figure(f"cut, {what}, replayed", replayed_ms(cut, run.device, repeats=20), "ms")
    run.figure(f"cut, {what}, size not met before", median_ms(cut_new_size, run.device, repeats=5), "ms")
    started = time.perf_counter()
    by_pillow(pixels, cutter.config)
    run.figure(f"cut, {what}, by Pillow on one core", 1e3 * (time.perf_counter() - started), "ms")
