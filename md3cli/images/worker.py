"""The worker's side of the picture pool, and what both sides say: `Setup` goes to a worker, `Facts` come back.

A worker is a child interpreter (child.py). The pool tells it once how to cut, and which memory they share; then each
message names a picture (a path, or bytes that follow it), and the worker answers with a message and the raw crops,
until the pool is gone. Where the pool asks for a picture's pixels, they come in the place of crops, and a message
behind them says whether they are all there. Where it asks for them in the memory that both share, the worker tells
the size first, hears whether they are wanted, and copies them there; a picture for which there is no room is cut after
all. Apart from the pool, so that a worker imports numpy and Pillow alone and starts in 0.2 s. Knows nothing of
deadlines.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from md3cli.child import Channel, connect
from md3cli.errors import ImageError
from md3cli.images.crops import (
    BAND_ROWS,
    CropConfig,
    DecodedImage,
    ImageLimits,
    Tiling,
    copy_pixels,
    cut_crops,
    read_image,
    select_tiling,
)
from md3cli.images.pixels import HUGE_PIXELS, TOO_LITTLE_MEMORY, start_pillow
from md3cli.records import ERROR_TYPES, ImageItem
from md3cli.system import be_expendable, limit_memory

_NO_MEMORY = {"type": "too_large", "message": TOO_LITTLE_MEMORY}
CROPS, PIXELS, SHARED = "crops", "pixels", "shared"  # what a message wants of a picture


@dataclass(frozen=True, slots=True)
class Setup:
    """What the pool tells every worker once."""

    crop_config: CropConfig
    limits: ImageLimits
    background: str | None


class Facts(NamedTuple):
    """What a worker says of a picture it has decoded, as far as it is believed: in the order of `PreparedImage`."""

    tiling: Tiling
    width: int
    height: int
    sha256: str

    @classmethod
    def of(cls, answer: dict[str, Any], setup: Setup) -> Facts:
        """Read a worker's answer; nothing of it is trusted further than a size within the limits.

        Raises:
            ImageError: as the worker reports it.
            LookupError, TypeError, ValueError: it makes no sense.
        """
        if "type" in answer:
            if answer["type"] not in ERROR_TYPES:
                raise ValueError
            raise ImageError(answer["type"], str(answer["message"]))
        width, height, sha256 = int(answer["width"]), int(answer["height"]), str(answer["sha256"])
        is_size = width > 0 and height > 0 and width * height <= setup.limits.max_pixels
        if not (is_size and re.fullmatch("[0-9a-f]{64}", sha256)):
            raise ValueError
        return cls(select_tiling(width, height, setup.crop_config), width, height, sha256)


def serve() -> None:
    """Set up, say so, and answer each message with a picture until the pool is gone."""
    channel = connect()
    be_expendable()
    message = channel.receive(None)
    setup = Setup(CropConfig(**message["crop_config"]), ImageLimits(**message["limits"]), message["background"])
    start_pillow()
    arena_fd, arena_bytes = message["arena"]
    # The file, four pictures of 4 bytes a pixel (WebP's canvases, one turned, one RGB), and the interpreter.
    limit_memory(setup.limits.max_file_size + 16 * setup.limits.max_pixels + arena_bytes + (1 << 30))
    arena = mmap.mmap(arena_fd, arena_bytes) if arena_bytes else None
    channel.send({})
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # libtiff and libjpeg write there at will
    with contextlib.suppress(EOFError, OSError):
        while True:
            message = channel.receive(None)
            num_bytes, wanted = message.pop("num_bytes", None), message.pop("wanted")
            data = None if num_bytes is None else _received(channel, num_bytes)
            _serve_one(channel, ImageItem(**message), data, setup, wanted, arena)


def _received(channel: Channel, num_bytes: int) -> bytes:
    data = bytearray(num_bytes)
    channel.receive_into(memoryview(data), None)
    return bytes(data)


def _serve_one(
    channel: Channel, item: ImageItem, data: bytes | None, setup: Setup, wanted: str, arena: mmap.mmap | None
) -> None:
    """Answer with what is wanted of a picture: its crops, its pixels, or those in `arena` where there is room."""

    def wait_if_huge(num_pixels: int) -> None:
        if num_pixels > HUGE_PIXELS:
            channel.send({"num_pixels": num_pixels})
            channel.receive(None)

    try:
        picture = read_image(item, setup.limits, setup.background, on_header=wait_if_huge, data=data)
        if wanted == PIXELS:
            _send_pixels(channel, picture)
        elif wanted == CROPS or arena is None or not _put_whole(channel, picture, arena):
            crops = cut_crops(picture.image, setup.crop_config).pixels
            channel.send(_facts(picture))
            channel.send_bytes(crops.data.cast("B"))
    except ImageError as error:
        channel.send({"type": error.type, "message": str(error)})
    except MemoryError:
        channel.send(_NO_MEMORY)


def _send_pixels(channel: Channel, picture: DecodedImage) -> None:
    """Send a picture's facts, its pixels row by row from the top, some rows at a time, and then nothing.

    Where there is no memory for some rows, blank ones stand in for them and all below, and the last message says so.
    """
    image, failure = picture.image, dict[str, str]()
    blank = np.zeros((BAND_ROWS, image.width, 3), np.uint8)  # made before anything is said
    channel.send(_facts(picture))
    for top in range(0, image.height, BAND_ROWS):
        bottom = min(top + BAND_ROWS, image.height)
        band = blank[: bottom - top]
        try:
            if not failure:
                band = np.ascontiguousarray(np.asarray(image.crop((0, top, image.width, bottom))))
        except MemoryError:
            failure = _NO_MEMORY
        channel.send_bytes(band.data.cast("B"))
    channel.send(failure)


def _facts(picture: DecodedImage) -> dict[str, int | str]:
    return {"width": picture.image.width, "height": picture.image.height, "sha256": picture.sha256}


def _put_whole(channel: Channel, picture: DecodedImage, arena: mmap.mmap) -> bool:
    """Copy a picture to the start of `arena` where the pool wants it there; return whether it does."""
    channel.send({**_facts(picture), "is_whole": True})
    if not channel.receive(None)["is_wanted"]:
        return False
    width, height = picture.image.size
    target = np.frombuffer(arena, np.uint8, height * width * 3).reshape(height, width, 3)
    copy_pixels(picture.image, target)
    channel.send({})
    return True
