"""Parts of pictures: cut from whole pictures that are kept for a while, and what is found there put in its place.

A part is cut from the picture at full resolution, and the model sees it as if it had been a file of its own. Whole
pictures are kept up to a number of bytes, those asked for last; one that is no longer there is decoded again. Source:
product contract, section 9.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from md3cli.errors import ImageError
from md3cli.images.crops import CropConfig, PreparedImage, UncutImage, WholeImage, cut_crops
from md3cli.images.pool import Picture, PicturePool, pass_failure, pass_on
from md3cli.images.rects import PixelRect, padded_rect
from md3cli.records import ImageFacts, ImageItem, Region

KEPT_BYTES = 512 * 2**20  # of whole pictures: 14 photographs of 12 megapixels
MOST_CUTTERS = 4
T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


class Part(NamedTuple):
    """A part of a picture for the engine, and what is known of the whole; `rect` is where it was cut out."""

    picture: Picture
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
            while self._num_bytes > self._limit_bytes:
                _, oldest = self._images.popitem(last=False)
                self._num_bytes -= oldest.pixels.nbytes


class PartCutter:
    """Pictures of a pool and parts of them, each picture decoded once while it is kept; a context ends its threads."""

    def __init__(self, pool: PicturePool, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._pool, self.crop_config = pool, pool.crop_config
        self._kept = KeptImages[ImageItem](kept_bytes)
        self._coming: dict[ImageItem, Future[WholeImage]] = {}
        self._lock = threading.Lock()  # guards _coming
        self._threads = ThreadPoolExecutor(max(1, min(MOST_CUTTERS, pool.num_workers)), "cut")
        self._longest_whole = 0

    def close(self) -> None:
        """Cancel what is not begun; a second call does no harm."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def serve_gpu(self, longest_whole: int) -> None:
        """From now on leave the cutting into crops to an engine on a GPU, as `PicturePool.serve_gpu` does."""
        self._longest_whole = longest_whole
        self._pool.serve_gpu(longest_whole)

    def submit(self, item: ImageItem) -> Future[Picture]:
        """Return the future of a picture, as `PicturePool.submit` does; its pixels are kept for parts of it."""
        return self._after(item, self._cut)

    def cut(self, item: ImageItem, region: Region) -> Future[Part]:
        """Return the future of a part of a picture with the room around it.

        The future raises what that of `submit` does, and ImageError (`bad_request`) where nothing of the part is inside
        the picture, or it has no size.
        """
        return self._after(item, lambda whole: self._part(whole, region))

    def cut_rect(self, whole: WholeImage, rect: PixelRect) -> Future[Part]:
        """Return the future of whole pixels of a picture that is at hand."""
        return self._threads.submit(self.part_of, whole, rect)

    def whole(self, item: ImageItem) -> Future[WholeImage]:
        """Return the future of a whole picture, decoded once however often it is asked for meanwhile."""
        done: Future[WholeImage] = Future()
        if (found := self._kept.find(item)) is not None:
            done.set_result(found)
            return done
        with self._lock:
            coming = self._coming.get(item)
            if coming is not None:
                return coming
            self._coming[item] = done

        def take(decoded: Future[WholeImage]) -> None:
            if not decoded.cancelled() and decoded.exception() is None:
                self._kept.keep(item, decoded.result())
            with self._lock:
                del self._coming[item]
            pass_on(decoded, done)

        self._pool.whole(item).add_done_callback(take)
        return done

    def part_of(self, whole: WholeImage, rect: PixelRect) -> Part:
        """Cut whole pixels out of a picture."""
        return cut_rect(whole, rect, self.crop_config, self._longest_whole)

    def _after(self, item: ImageItem, make: Callable[[WholeImage], T]) -> Future[T]:
        """Return the future of what is made of a whole picture, by a thread of this cutter."""
        done: Future[T] = Future()

        def cut(whole: Future[WholeImage]) -> None:
            if pass_failure(whole, done):
                return
            try:
                making = self._threads.submit(make, whole.result())
            except RuntimeError:  # closed
                done.cancel()
                return
            making.add_done_callback(lambda made: pass_on(made, done))

        self.whole(item).add_done_callback(cut)
        return done

    def _part(self, whole: WholeImage, region: Region) -> Part:
        return cut_region(whole, region, self.crop_config, self._longest_whole)

    def _cut(self, whole: WholeImage) -> Picture:
        return cut_whole(whole, self.crop_config, self._longest_whole)


def cut_whole(whole: WholeImage, cfg: CropConfig, longest_whole: int = 0) -> Picture:
    """Cut a picture into crops; one whose sides are not over `longest_whole` is left to the engine."""
    if max(whole.width, whole.height) <= longest_whole:
        return UncutImage.of(whole, cfg)
    crops = cut_crops(Image.fromarray(whole.pixels), cfg)
    return PreparedImage(crops.pixels, crops.tiling, whole.width, whole.height, whole.sha256)


def cut_rect(whole: WholeImage, rect: PixelRect, cfg: CropConfig, longest_whole: int = 0) -> Part:
    """Cut whole pixels out of a picture, and those into crops as `cut_whole` does."""
    facts = ImageFacts(whole.width, whole.height, whole.sha256)
    pixels = np.ascontiguousarray(whole.pixels[rect.top : rect.bottom, rect.left : rect.right])
    return Part(cut_whole(WholeImage(pixels, part_key(whole, rect)), cfg, longest_whole), facts, rect)


def cut_region(whole: WholeImage, region: Region, cfg: CropConfig, longest_whole: int = 0) -> Part:
    """Cut a region with the room around it out of a picture, as `cut_rect` does.

    Raises:
        ImageError: nothing of it is inside the picture, or it has no size.
    """
    rect = padded_rect(region.box._asdict(), whole.width, whole.height, region.pad)
    if rect is None:
        raise ImageError("bad_request", "the region has no size, or nothing of it is inside the picture")
    return cut_rect(whole, rect, cfg, longest_whole)


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
