"""The decode pool of a run, for pictures that are not files of their own: fetched, or cut out of Parquet, first.

A picture on the disk goes straight to the decode workers, which open it. The bytes of any other are loaded by
threads of this process, ahead of the decoder: remote ones by many, since they wait for the network; those inside
Parquet files by one, since they are read in order. The workers get the bytes, and everything else is the same: the
limits, the digest, the process that may die of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from md3cli.decode import DecodePool
from md3cli.embedded import CellReader
from md3cli.errors import ImageError
from md3cli.images import CropConfig, ImageLimits, PreparedImage
from md3cli.manifest import open_regular
from md3cli.records import ImageItem
from md3cli.remote.address import is_address
from md3cli.remote.byte_budget import ByteBudget
from md3cli.remote.options import FetchOptions

if TYPE_CHECKING:
    from md3cli.remote.fetching import Fetcher

NUM_FETCHERS = 16
AHEAD_BYTES = 256 * 2**20  # of files loaded, or being loaded, and not decoded yet

_Load = Callable[[ImageItem, int], bytes]


class PicturePool(DecodePool):
    """A `DecodePool` for pictures from anywhere."""

    def __init__(
        self,
        num_workers: int,
        crop_config: CropConfig,
        limits: ImageLimits,
        *,
        background: str | None = None,
        timeout_s: float = 20.0,
        fetching: FetchOptions | None = None,
    ) -> None:
        """`timeout_s` is for decoding; `fetching` says how, and from whom, remote pictures are fetched."""
        super().__init__(num_workers, crop_config, limits, background=background, timeout_s=timeout_s)
        self._options = fetching or FetchOptions(limits.max_file_size)
        self._budget = ByteBudget(AHEAD_BYTES)
        self._cells = CellReader(open_regular)
        self._fetcher: Fetcher | None = None
        self._fetch_threads = ThreadPoolExecutor(NUM_FETCHERS, "fetch")
        self._cell_thread = ThreadPoolExecutor(1, "cells")

    def submit(self, item: ImageItem, data: bytes | None = None) -> Future[PreparedImage]:
        """As `DecodePool.submit`, wherever the picture is."""
        if data is None and item.row_group is not None:
            return self._decode_after(self._read_cell, item, self._cell_thread)
        if data is None and is_address(item.path):
            if self._fetcher is None:
                self._fetcher = _make_fetcher(self._options, self._budget)
            return self._decode_after(self._fetcher.fetch, item, self._fetch_threads)
        return super().submit(item, data)

    def close(self) -> None:
        """As `DecodePool.close`; what is being fetched is dropped."""
        self._budget.close()
        if self._fetcher is not None:
            self._fetcher.close()
        self._fetch_threads.shutdown(wait=False, cancel_futures=True)  # a store without asyncio may keep one waiting
        self._cell_thread.shutdown(cancel_futures=True)
        self._cells.close()
        super().close()

    def _decode_after(self, load: _Load, item: ImageItem, threads: ThreadPoolExecutor) -> Future[PreparedImage]:
        done: Future[PreparedImage] = Future()
        loading = threads.submit(self._load_and_decode, load, item, done)
        loading.add_done_callback(lambda ended: _pass_failure(ended, done))
        return done

    def _load_and_decode(self, load: _Load, item: ImageItem, done: Future[PreparedImage]) -> None:
        number = self._budget.open()
        with contextlib.ExitStack() as undo:
            undo.callback(self._budget.give_back, number)
            decoding = super().submit(item, load(item, number))
            undo.pop_all()

        def pass_on(decoded: Future[PreparedImage]) -> None:
            self._budget.give_back(number)
            if not _pass_failure(decoded, done):
                done.set_result(decoded.result())

        decoding.add_done_callback(pass_on)

    def _read_cell(self, item: ImageItem, number: int) -> bytes:
        data = self._cells.read(item, self._options.limit_bytes)
        self._budget.take(number, len(data))
        return data


def _make_fetcher(options: FetchOptions, budget: ByteBudget) -> Fetcher:
    from md3cli.remote.fetching import Fetcher  # the extra, which local runs do without

    return Fetcher(options, budget)


def _pass_failure(ended: Future[Any], done: Future[PreparedImage]) -> bool:
    """Make `done` fail as `ended` did; whether it did."""
    error = None if ended.cancelled() else ended.exception()
    if ended.cancelled() or isinstance(error, CancelledError):
        done.cancel()
    elif isinstance(error, ImageError):  # a fresh one: the traceback of the old holds the bytes that came
        done.set_exception(ImageError(error.type, str(error)))
    elif error is not None:
        done.set_exception(error)
    return done.done()
