"""A benchmark's pictures as JPEG files, on their way through decode workers into the engine.

The files lie in a temporary folder; `DecodePool` reads and cuts them as in any run. Unix only, as the
pool is.
"""

from __future__ import annotations

import io
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from md3cli.decode import DecodePool
from md3cli.images import CropConfig, ImageLimits, PreparedImage
from md3cli.model.tasks import Job
from md3cli.records import ImageItem, Request

SIZE = (1920, 1080)  # 2 megapixels; the real model cuts them into nine crops
NUM_SCENES = 4  # with different pixels; the files differ in a comment, and so in their digest
AHEAD_PER_WORKER = 4  # pictures being decoded, or decoded and not taken


class PhotoFiles:
    """JPEG files and the workers that decode them."""

    def __init__(self, paths: Sequence[Path], pool: DecodePool, num_ahead: int) -> None:
        self._items = [ImageItem(path.name, str(path)) for path in paths]
        self._pool, self._num_ahead = pool, num_ahead

    def decode_all(self) -> list[PreparedImage]:
        """All pictures, cut, in order; afterwards every worker has been started."""
        return [future.result() for future in [self._pool.submit(item) for item in self._items]]

    def jobs(self, request: Request, count: int) -> Iterator[Job | None]:
        """One request for each of the first `count` files, in order; None while the next is not decoded."""
        items = iter(self._items[:count])
        decoding: deque[Future[PreparedImage]] = deque()
        for key in range(count):
            decoding.extend(self._pool.submit(item) for item in islice(items, self._num_ahead - len(decoding)))
            while not decoding[0].done():
                yield None
            yield Job(key, decoding.popleft().result(), request)


@contextmanager
def photo_files(
    count: int, crop_config: CropConfig, num_workers: int, seed: int, size: tuple[int, int] = SIZE
) -> Iterator[PhotoFiles]:
    """`count` photographs of `size` (width, height) in a temporary folder, with `num_workers` decode workers."""
    with (
        tempfile.TemporaryDirectory(prefix="md3-bench-") as folder,
        DecodePool(num_workers, crop_config, ImageLimits()) as pool,
    ):
        yield PhotoFiles(write_photos(Path(folder), count, seed, size), pool, AHEAD_PER_WORKER * num_workers)


def write_photos(folder: Path, count: int, seed: int, size: tuple[int, int] = SIZE) -> list[Path]:
    """JPEG files, no two with the same bytes."""
    scenes = [_scene(seed + number, size) for number in range(min(count, NUM_SCENES))]
    paths = [folder / f"{number:04}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(with_comment(scenes[number % NUM_SCENES], f"picture {number}"))
    return paths


def _scene(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG as hard to decode as a photograph: soft light, shapes with edges, grain; 2 bits a pixel."""
    random = np.random.default_rng(seed)
    light = Image.fromarray(random.integers(0, 256, (9, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(light)
    for left, top, width, height, red, green, blue in random.integers(0, (*size, 500, 400, 256, 256, 256), (60, 7)):
        pen.ellipse((left, top, left + width, top + height), (red, green, blue))
    grain = random.normal(0, 8, (*reversed(size), 1))
    pixels = (np.asarray(light) + grain).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


def with_comment(jpeg: bytes, text: str) -> bytes:
    """The same picture in other bytes: a comment right behind the start marker."""
    comment = text.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]
