"""Parts of pictures: cut from whole pictures, which are kept for a while, and what is found there put in its place.

A part is cut from the picture at full resolution, and the model sees it as if it had been a file of its own. Whole
pictures are kept up to a number of bytes, those asked for last. Source: product contract, section 9.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from md3cli.errors import ImageError
from md3cli.images.crops import CropConfig, Cutter, PreparedImage, WholeImage, cut_crops
from md3cli.images.pixels import TOO_LITTLE_MEMORY
from md3cli.images.rects import PixelRect, padded_rect
from md3cli.records import ImageFacts, Region

KEPT_BYTES = 512 * 2**20  # of whole pictures: 14 photographs of 12 megapixels
Key = TypeVar("Key", bound=Hashable)


class Part(NamedTuple):
    """A part of a picture for the engine, and what is known of the whole; `rect` is where it was cut out."""

    picture: PreparedImage
    facts: ImageFacts
    rect: PixelRect


class KeptImages(Generic[Key]):
    """The whole pictures that were asked for last, as many as fit `limit_bytes`; for any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._num_bytes = limit_bytes, 0
        self._images: OrderedDict[Key, WholeImage] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, item: Key) -> WholeImage | None:
        """Return a picture that is kept."""
        with self._lock:
            if item in self._images:
                self._images.move_to_end(item)
            return self._images.get(item)

    def keep(self, item: Key, image: WholeImage) -> None:
        """Keep a picture, and let go of those that were not asked for longest; one that never fits is not kept."""
        with self._lock:
            if image.pixels.nbytes > self._limit_bytes or item in self._images:
                return
            self._images[item] = image
            self._num_bytes += image.pixels.nbytes
            self._let_go()

    def close(self) -> None:
        """Let go of all, and keep none from now on."""
        with self._lock:
            self._limit_bytes = 0
            self._let_go()

    def _let_go(self) -> None:
        while self._num_bytes > self._limit_bytes:
            _, oldest = self._images.popitem(last=False)
            self._num_bytes -= oldest.pixels.nbytes


def cut_whole(whole: WholeImage, cfg: CropConfig, cutter: Cutter | None = None) -> PreparedImage:
    """Cut a picture into crops, by `cutter` where there is one that cuts pictures of its size.

    Raises:
        ImageError: there is no memory for it.
        EngineError: `cutter` raised it.
    """
    try:
        if cutter is not None and max(whole.width, whole.height) <= cutter.longest_side:
            crops = cutter.crops_of(whole.pixels)
        else:
            crops = cut_crops(Image.fromarray(whole.pixels), cfg)
    except MemoryError as error:
        raise ImageError("too_large", TOO_LITTLE_MEMORY) from error
    return PreparedImage(crops.pixels, crops.tiling, whole.width, whole.height, whole.sha256)


def cut_rect(whole: WholeImage, rect: PixelRect, cfg: CropConfig, cutter: Cutter | None = None) -> Part:
    """Cut whole pixels out of a picture, and those into crops as `cut_whole` does."""
    facts = ImageFacts(whole.width, whole.height, whole.sha256)
    pixels = np.ascontiguousarray(whole.pixels[rect.top : rect.bottom, rect.left : rect.right])
    return Part(cut_whole(WholeImage(pixels, part_key(whole, rect)), cfg, cutter), facts, rect)


def cut_region(whole: WholeImage, region: Region, cfg: CropConfig, cutter: Cutter | None = None) -> Part:
    """Cut a region with the room around it out of a picture, as `cut_rect` does.

    Raises:
        ImageError: nothing of it is inside the picture, or it has no size.
    """
    rect = padded_rect(region.box._asdict(), whole.width, whole.height, region.pad)
    if rect is None:
        raise ImageError("bad_request", "the region has no size, or nothing of it is inside the picture")
    return cut_rect(whole, rect, cfg, cutter)


def part_key(whole: WholeImage, rect: PixelRect) -> str:
    """Return by what a part's encoding is known: 64 hex digits; the whole picture has its own."""
    if rect == (0, 0, whole.width, whole.height):
        return whole.sha256
    return hashlib.sha256(f"{whole.sha256} {rect.left} {rect.top} {rect.right} {rect.bottom}".encode()).hexdigest()


# -- results in their place ------------------------------------------------------------------------------


def placed(result: Mapping[str, Any], rect: PixelRect, width: int, height: int) -> dict[str, Any]:
    """Return what was found in a part, in coordinates of the whole picture.

    Args:
        result: the result keys of a record; its coordinates are 0-1 of the part.
        rect: where the part lies.
        width, height: of the whole picture, in pixels.
    """
    place = _Place.of(rect, width, height)
    found = dict(result)
    for key in ("objects", "points"):
        if key in found:
            found[key] = [place.of_all(thing) for thing in found[key]]
    if "segments" in found:  # a path is relative to its bbox
        found["segments"] = [thing | {"bbox": place.of_all(thing["bbox"])} for thing in found["segments"]]
    if "reasoning" in found:
        reasoning = found["reasoning"]
        grounding = [
            part | {"points": [[place.x(x), place.y(y)] for x, y in part["points"]]} for part in reasoning["grounding"]
        ]
        found["reasoning"] = {**reasoning, "grounding": grounding}
    return found


class _Place(NamedTuple):
    """How 0-1 of a part becomes 0-1 of the whole: an offset and a scale for each direction."""

    left: float
    top: float
    x_scale: float
    y_scale: float

    @classmethod
    def of(cls, rect: PixelRect, width: int, height: int) -> _Place:
        return cls(rect.left / width, rect.top / height, rect.width / width, rect.height / height)

    def x(self, value: float) -> float:
        return self.left + value * self.x_scale

    def y(self, value: float) -> float:
        return self.top + value * self.y_scale

    def of_all(self, thing: Mapping[str, Any]) -> dict[str, Any]:
        """Return a thing with its coordinates moved, whatever else it has."""
        move = {"x": self.x, "x_min": self.x, "x_max": self.x, "y": self.y, "y_min": self.y, "y_max": self.y}
        return {name: move[name](value) if name in move else value for name, value in thing.items()}
