"""Pictures -> JPEG data URIs for the page, through the same door as everywhere (images.read_image)."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from PIL import Image

from md3cli.errors import ImageError
from md3cli.finished_run import picture_of
from md3cli.images import ImageLimits, read_image
from md3cli.report.items import Item

JPEG_QUALITY = 78
MAX_THREADS = 4  # Pillow decodes outside the interpreter's lock; more threads only hold more pictures


@dataclass(frozen=True, slots=True)
class PictureSource:
    """Where the pictures are and how small they become: `long_side_px` of a thumbnail."""

    root: Path
    is_confined: bool = False
    long_side_px: int = 320
    limits: ImageLimits = field(default_factory=ImageLimits)


def with_thumbnails(items: Iterable[Item], source: PictureSource) -> Iterator[Item]:
    """The same items, each with its `thumbnail` or the reason why it is `missing`; a few in flight."""
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    todo = iter(items)
    with ThreadPoolExecutor(num_threads) as pool:
        in_flight = [pool.submit(_fill, item, source) for item in islice(todo, 2 * num_threads)]
        while in_flight:
            done: Future[Item] = in_flight.pop(0)
            yield done.result()
            in_flight += [pool.submit(_fill, item, source) for item in islice(todo, 1)]


def _fill(item: Item, source: PictureSource) -> Item:
    if item.first["image"] is None:
        return item
    try:
        picture = picture_of(item.first, source.root, is_confined=source.is_confined)
        item.thumbnail = data_uri(read_image(picture, source.limits).image, source.long_side_px)
    except ImageError as error:
        item.missing = str(error)
    return item


def data_uri(image: Image.Image, long_side_px: int) -> str:
    """`image` (RGB; changed in place) as a JPEG no larger than `long_side_px`; never enlarged."""
    image.thumbnail((long_side_px, long_side_px), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
