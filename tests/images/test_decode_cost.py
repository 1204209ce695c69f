"""What decoding in processes costs: as much time as in threads, and a bounded peak for the largest photographs."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from corpus import turned_exif
from PIL import Image

from md3cli.images.crops import CropConfig, ImageLimits, PreparedImage, prepare_image
from md3cli.images.pool import PicturePool
from md3cli.records import ImageItem

pytestmark = pytest.mark.slow

CFG = CropConfig(crop_size=378, patch_size=14, overlap_margin=4, max_crops=12)
LIMITS = ImageLimits()
PHOTO = Path(__file__).parents[2] / "examples" / "images" / "china.jpg"
NUM_WORKERS = 2


def cpu_seconds(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def drain(submit: Callable[[ImageItem], Future[PreparedImage]], items: list[ImageItem]) -> None:
    waiting: deque[Future[PreparedImage]] = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) > 4 * NUM_WORKERS:
            waiting.popleft().result()
    for future in waiting:
        future.result()


@pytest.mark.parametrize(("size", "count"), [((640, 427), 60), ((1920, 1280), 20), ((4000, 3000), 6)])
def test_processes_cost_at_most_15_percent_more_than_threads(tmp_path, size, count):
    """In processor time, which other work on the machine disturbs less than the clock."""
    path = tmp_path / "photo.jpg"
    Image.open(PHOTO).resize(size, Image.Resampling.BICUBIC).save(path, quality=88)
    items = [ImageItem("photo.jpg", str(path))] * count
    best = {"threads": float("inf"), "processes": float("inf")}
    with PicturePool(NUM_WORKERS, CFG, LIMITS) as pool, ThreadPoolExecutor(NUM_WORKERS) as threads:
        ways = {
            "threads": lambda item: threads.submit(prepare_image, item, CFG, LIMITS, None),
            "processes": pool.submit,
        }
        for submit in ways.values():
            drain(submit, items[: 4 * NUM_WORKERS])
        for _ in range(5):
            for name, submit in ways.items():
                before = cpu_seconds(pool.worker_pids())
                drain(submit, items)
                best[name] = min(best[name], cpu_seconds(pool.worker_pids()) - before)
    assert best["processes"] <= 1.15 * best["threads"], best


def test_a_200_megapixel_photograph_on_its_side_takes_less_than_1_5_gb(tmp_path):
    path = tmp_path / "huge.jpg"
    Image.new("RGB", (16320, 12240), "teal").save(path, exif=turned_exif(6))
    with PicturePool(1, CFG, LIMITS, timeout_s=120) as pool:
        got = pool.submit(ImageItem("huge.jpg", str(path))).result()
        assert (got.width, got.height) == (12240, 16320)
        status = Path(f"/proc/{pool.worker_pids()[0]}/status").read_text()
        peak, now = (int(status.split(kind)[1].split()[0]) * 1024 for kind in ("VmHWM:", "VmRSS:"))
        assert peak < 1.5e9
        assert now < 0.2e9
