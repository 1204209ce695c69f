"""Pictures of a pool and parts of them: each decoded once, and again where it is no longer kept.

Whole pictures come from the pool (pool.py) and are cut by threads of this process: nothing is decoded here, so there is
nothing that a bad picture could crash. Apart from parts.py, which knows no pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from md3cli.images.crops import Cutter, PreparedImage, WholeImage
from md3cli.images.parts import KEPT_BYTES, KeptImages, Part, cut_rect, cut_region, cut_whole
from md3cli.images.pool import PicturePool, pass_failure, pass_on
from md3cli.images.rects import PixelRect
from md3cli.records import ImageItem, Region

MOST_CUTTERS = 4
T = TypeVar("T")


class PartCutter:
    """Pictures of a pool and parts of them, each picture decoded once while it is kept."""

    def __init__(self, pool: PicturePool, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._pool, self.crop_config = pool, pool.crop_config
        self._kept = KeptImages[ImageItem](kept_bytes)
        self._coming: dict[ImageItem, Future[WholeImage]] = {}
        self._lock = threading.Lock()  # guards _coming
        self._threads = ThreadPoolExecutor(max(1, min(MOST_CUTTERS, pool.num_workers)), "cut")
        self._cutter: Cutter | None = None

    def close(self) -> None:
        """Cancel what is not begun, and keep no picture any more; a second call does no harm."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._kept.close()

    def serve_gpu(self, cutter: Cutter | None) -> None:
        """From now on have pictures and parts cut by `cutter`, as `PicturePool.serve_gpu` does."""
        self._cutter = cutter
        self._pool.serve_gpu(cutter)

    def submit(self, item: ImageItem) -> Future[PreparedImage]:
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
        return cut_rect(whole, rect, self.crop_config, self._cutter)

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
        return cut_region(whole, region, self.crop_config, self._cutter)

    def _cut(self, whole: WholeImage) -> PreparedImage:
        return cut_whole(whole, self.crop_config, self._cutter)
