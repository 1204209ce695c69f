"""Pictures -> JPEG data URIs for the page, through the same door as everywhere (images.read_image)."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from threading import Lock

from PIL import Image

from md3cli.errors import ImageError
from md3cli.exporters.pictures import FoundPicture, Pictures
from md3cli.report.items import Item

JPEG_QUALITY = 78
MAX_THREADS = 4  # Pillow decodes outside the interpreter's lock; more threads only hold more pictures
LARGE_PIXELS = 50_000_000  # pictures of this size (150 MB decoded) are opened one at a time

_one_large = Lock()


def with_thumbnails(items: Iterable[Item], pictures: Pictures, long_side_px: int) -> Iterator[Item]:
    """The same items, each with its `thumbnail` or the reason why it is `missing`; a few in flight."""
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    todo = iter(items)
    with ThreadPoolExecutor(num_threads) as pool:

        def submit(number: int) -> list[Future[Item]]:
            found = ((item, _find(item, pictures)) for item in islice(todo, number))
            return [pool.submit(_fill, item, picture, pictures, long_side_px) for item, picture in found]

        in_flight = submit(2 * num_threads)
        while in_flight:
            yield in_flight.pop(0).result()
            in_flight += submit(1)


def _find(item: Item, pictures: Pictures) -> FoundPicture | None:
    records = (entry.record for entry in item.entries)
    known = next((record for record in records if record.get("sha256")), item.first)
    return None if item.first["image"] is None else pictures.find(known)


def _fill(item: Item, picture: FoundPicture | None, pictures: Pictures, long_side_px: int) -> Item:
    if item.first["image"] is None:
        return item
    if picture is None:
        item.missing = "the picture is not there"
        return item
    is_large = (item.width or 0) * (item.height or 0) >= LARGE_PIXELS
    try:
        with _one_large if is_large else nullcontext():
            item.thumbnail = data_uri(pictures.read(picture), long_side_px)
    except ImageError as error:
        item.missing = str(error)
    return item


def data_uri(image: Image.Image, long_side_px: int) -> str:
    """`image` (RGB; changed in place) as a JPEG no larger than `long_side_px`; never enlarged."""
    image.thumbnail((long_side_px, long_side_px), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
