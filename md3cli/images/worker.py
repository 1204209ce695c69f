"""The worker's side of the picture pool.

A worker is a child interpreter (child.py). The pool tells it once how to cut; then each message names a picture (a
path, or bytes that follow it), and the worker answers with a message and the raw crops, until the pool is gone. Apart
from the pool, so that a worker imports numpy and Pillow alone and starts in 0.2 s. Knows nothing of deadlines.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from md3cli.child import Channel, connect
from md3cli.errors import ImageError
from md3cli.images.crops import CropConfig, ImageLimits, prepare_image
from md3cli.images.pixels import HUGE_PIXELS, start_pillow
from md3cli.records import ImageItem
from md3cli.system import be_expendable, limit_memory


@dataclass(frozen=True, slots=True)
class Setup:
    """What the pool tells every worker once."""

    crop_config: CropConfig
    limits: ImageLimits
    background: str | None


def serve() -> None:
    """Set up, say so, and answer each message with a picture's crops until the pool is gone."""
    channel = connect()
    be_expendable()
    message = channel.receive(None)
    setup = Setup(CropConfig(**message["crop_config"]), ImageLimits(**message["limits"]), message["background"])
    start_pillow()
    # The file, four pictures of 4 bytes a pixel (WebP's canvases, one turned, one RGB), and the interpreter.
    limit_memory(setup.limits.max_file_size + 16 * setup.limits.max_pixels + (1 << 30))
    channel.send({})
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # libtiff and libjpeg write there at will
    with contextlib.suppress(EOFError, OSError):
        while True:
            message = channel.receive(None)
            num_bytes = message.pop("num_bytes", None)
            data = None if num_bytes is None else _received(channel, num_bytes)
            _serve_one(channel, ImageItem(**message), data, setup)


def _received(channel: Channel, num_bytes: int) -> bytes:
    data = bytearray(num_bytes)
    channel.receive_into(memoryview(data), None)
    return bytes(data)


def _serve_one(channel: Channel, item: ImageItem, data: bytes | None, setup: Setup) -> None:
    def wait_if_huge(num_pixels: int) -> None:
        if num_pixels > HUGE_PIXELS:
            channel.send({"num_pixels": num_pixels})
            channel.receive(None)

    try:
        picture = prepare_image(
            item, setup.crop_config, setup.limits, setup.background, on_header=wait_if_huge, data=data
        )
    except ImageError as error:
        channel.send({"type": error.type, "message": str(error)})
        return
    channel.send({"width": picture.width, "height": picture.height, "sha256": picture.sha256})
    channel.send_bytes(picture.crops.data.cast("B"))
