"""The picture pool: worker processes read and cut pictures, so that a bad picture costs one record.

A C decoder that crashes, loops or eats memory takes its worker with it and nothing else: the picture fails with
`decoder_crash`, `timeout` or `too_large`, the worker is replaced, the pool goes on. A worker may also be killed for
no fault of its picture (by the kernel, when memory runs out): the picture gets a second try, with no other one beside
it, and only a picture that ends two workers is a `decoder_crash`.

Each thread of an executor owns one worker process (worker.py), tells it what to open, and receives the crops straight
into the array that the caller gets. Where a GPU cuts (`serve_gpu`), the thread gets the picture whole, through memory
that the worker shares (arena.py), and has it cut; sockets carry everything else. A picture on the disk goes straight
to a worker. The bytes of any other picture are loaded first, by threads of this process, ahead of the decoder: remote
ones by many threads, since they wait for the network; those inside Parquet files by one, since they are read in order.
Knows nothing of models or records.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, TypeVar

from md3cli.errors import ImageError, InputError
from md3cli.images.arena import arena_bytes
from md3cli.images.crops import (
    CropConfig,
    Cutter,
    ImageLimits,
    PreparedImage,
    WholeImage,
    parse_background,
    prepare_image,
    read_whole,
)
from md3cli.images.decoder import Decoder
from md3cli.images.parts import cut_whole
from md3cli.images.worker import CROPS, PIXELS, Setup
from md3cli.records import ImageItem
from md3cli.remote.address import is_address
from md3cli.remote.hosts import FetchOptions
from md3cli.remote.retry import ByteBudget
from md3cli.source.manifest import open_input
from md3cli.source.parquet import CellReader
from md3cli.system import num_cores

if TYPE_CHECKING:
    from md3cli.remote.reader import Fetcher

CORES_BESIDE_GPU = 2  # left to the thread that launches the engine's work, and to the one that keeps encodings
NUM_FETCHERS = 16
AHEAD_BYTES = 256 * 2**20  # of files loaded, or being loaded, and not decoded yet
T = TypeVar("T")
_Decode = Callable[[ImageItem, bytes | None], T]


def num_beside_gpu(num_workers: int) -> int:
    """Return how many of so many workers decode at once where a GPU's engine needs cores, too."""
    return max(1, min(num_workers, num_cores() - CORES_BESIDE_GPU))


class PicturePool:
    """Reads and cuts pictures in `num_workers` processes, started one by one as work comes in; a context closes it.

    `num_workers` 0 does the same work in the calling thread, without deadline or protection: the plain
    path that tests compare with. `submit` never waits, and a result is 4 to 6 MB for a photograph
    (77 MB for the most extreme shape): the caller bounds memory by the number of futures that it keeps.
    """

    def __init__(
        self,
        num_workers: int,
        crop_config: CropConfig,
        limits: ImageLimits,
        *,
        background: str | None = None,
        timeout_s: float = 20.0,
        fetching: FetchOptions | None = None,
        num_beside_gpu: int | None = None,
    ) -> None:
        """Start no worker yet.

        `timeout_s` is for decoding one picture; its wait for another huge one does not count. `fetching` says how, and
        from which hosts, remote pictures are fetched. `num_beside_gpu` are the most that decode at once after
        `serve_gpu`.

        Raises:
            UsageError: `background` is no colour.
        """
        parse_background(background)
        self.crop_config = crop_config
        self._setup = Setup(crop_config, limits, background)
        self._timeout_s = timeout_s
        self.num_workers = num_workers
        self._threads = ThreadPoolExecutor(num_workers, "decode") if num_workers > 0 else None
        self._of_thread = threading.local()
        self._workers: set[Decoder] = set()
        self._lock = threading.Lock()  # guards _workers and _is_closed
        self._is_closed = False
        self._huge = threading.Lock()  # held while a huge picture has its pixels in memory
        self._turns = _Turns()
        self._num_beside_gpu = num_beside_gpu or max(1, num_workers)
        self._cutter: Cutter | None = None  # of a GPU; without one the workers cut
        self._arena_bytes = arena_bytes(num_workers) if num_workers > 0 else 0
        self._has_warned = False
        self._fetching = fetching or FetchOptions(limits.max_file_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def submit(self, item: ImageItem, data: bytes | None = None) -> Future[PreparedImage]:
        """Return the future of a picture, wherever it is; with `data`, which are its bytes, nothing is opened.

        The future raises ImageError; CancelledError when the pool was closed first; InputError when no worker
        can be started, and EngineError when the GPU that cuts has failed, which end the run.
        """
        return self._load(item, data, self._decode_in_worker)

    def whole(self, item: ImageItem) -> Future[WholeImage]:
        """Return the future of a picture's own pixels; its errors are those of `submit`."""
        return self._load(item, None, self._decode_whole)

    def serve_gpu(self, cutter: Cutter | None) -> None:
        """From now on serve an engine on a GPU: leave it cores, and have pictures cut by `cutter`.

        Where that is None, or a picture too large for it or for the memory shared with a worker, the worker cuts.
        """
        self._cutter = cutter
        self._turns.limit(self._num_beside_gpu)

    def close(self) -> None:
        """End the workers at once, and cancel what was not finished; a second call does no harm."""
        if "_loader" in vars(self):  # something was loaded
            self._loader.close()
        with self._lock:
            self._is_closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.stop()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for worker in workers:  # only now: a thread may have been reading
            worker.close()

    def worker_pids(self) -> list[int]:
        """Return the process ids of the workers that were started and not found dead yet."""
        with self._lock:
            return sorted(worker.pid for worker in self._workers)

    # -- loading -------------------------------------------------------------------------------------

    @cached_property
    def _loader(self) -> _Loader:
        return _Loader(self._fetching)

    def _load(self, item: ImageItem, data: bytes | None, decode: _Decode[T]) -> Future[T]:
        """Have the bytes of a picture loaded where no worker can open it, and then decoded."""
        if data is None and item.row_group is not None:
            return self._decode_after(self._loader.read_cell, item, self._loader.cell_thread, decode)
        if data is None and is_address(item.path):
            return self._decode_after(self._loader.fetcher.fetch, item, self._loader.fetch_threads, decode)
        return self._decode(item, data, decode)

    def _decode_after(
        self, load: Callable[[ImageItem, int], bytes], item: ImageItem, threads: ThreadPoolExecutor, decode: _Decode[T]
    ) -> Future[T]:
        done: Future[T] = Future()
        loading = threads.submit(self._load_and_decode, load, item, decode, done)
        loading.add_done_callback(lambda ended: pass_failure(ended, done))
        return done

    def _load_and_decode(
        self, load: Callable[[ImageItem, int], bytes], item: ImageItem, decode: _Decode[T], done: Future[T]
    ) -> None:
        budget = self._loader.budget
        number = budget.open()
        with contextlib.ExitStack() as undo:
            undo.callback(budget.give_back, number)
            decoding = self._decode(item, load(item, number), decode)
            undo.pop_all()

        def end(decoded: Future[T]) -> None:
            budget.give_back(number)
            pass_on(decoded, done)

        decoding.add_done_callback(end)

    # -- decoding ------------------------------------------------------------------------------------

    def _decode(self, item: ImageItem, data: bytes | None, decode: _Decode[T]) -> Future[T]:
        if self._threads is not None:
            return self._threads.submit(decode, item, data)
        done: Future[T] = Future()
        try:
            done.set_result(decode(item, data))
        except ImageError as error:
            done.set_exception(error)
        return done

    def _decode_whole(self, item: ImageItem, data: bytes | None) -> WholeImage:
        if self._threads is None:
            return read_whole(item, self._setup.limits, self._setup.background, data=data)
        whole = self._decode_twice(item, data, PIXELS)
        assert isinstance(whole, WholeImage)
        return whole

    def _decode_in_worker(self, item: ImageItem, data: bytes | None) -> PreparedImage:
        if self._threads is None:
            return self._decode_here(item, data)
        picture = self._decode_twice(item, data, CROPS)
        assert isinstance(picture, PreparedImage)
        return picture

    def _decode_here(self, item: ImageItem, data: bytes | None) -> PreparedImage:
        setup = self._setup
        if self._cutter is None:
            return prepare_image(item, setup.crop_config, setup.limits, setup.background, data=data)
        whole = read_whole(item, setup.limits, setup.background, data=data)
        return cut_whole(whole, setup.crop_config, self._cutter)

    def _decode_twice(self, item: ImageItem, data: bytes | None, wanted: str) -> PreparedImage | WholeImage:
        """Have a picture decoded, and where its decoder crashes once more, with no other one beside it."""
        try:
            with self._turns.beside_others():
                return self._decode_once(item, data, wanted, self._cutter)
        except ImageError as error:
            if error.type != "decoder_crash":
                raise
            self._warn_once(error)
        with self._turns.alone():
            return self._decode_once(item, data, wanted, None)  # memory may be what ran out

    def _decode_once(
        self, item: ImageItem, data: bytes | None, wanted: str, cutter: Cutter | None
    ) -> PreparedImage | WholeImage:
        if self._is_closed:
            raise CancelledError
        try:
            return self._worker_of_thread().decode(item, data, self._timeout_s, self._huge, wanted, cutter)
        except Exception:
            if self._is_closed:  # close() killed the worker, which is no fault of the picture
                raise CancelledError from None
            raise

    def _warn_once(self, error: ImageError) -> None:
        with self._lock:
            had_warned, self._has_warned = self._has_warned, True
        if not had_warned:
            advice = "if memory runs out, use fewer --workers"
            warnings.warn(f"{error}: its picture is tried once more, as any later one will be; {advice}", stacklevel=2)

    def _worker_of_thread(self) -> Decoder:
        worker: Decoder | None = getattr(self._of_thread, "worker", None)
        if worker is not None:
            if worker.is_alive():
                return worker
            worker.close()  # lost over the last picture, or died between two: not this picture's fault
            with self._lock:
                self._workers.discard(worker)
        try:
            return self._start_worker()
        except InputError:
            if not self._of_thread.worker.was_killed or self._is_closed:
                raise
            return self._start_worker()  # killed from outside before it could do any harm

    def _start_worker(self) -> Decoder:
        worker = self._of_thread.worker = Decoder(self._setup, self._arena_bytes)
        with self._lock:
            self._workers.add(worker)
            is_closed = self._is_closed
        if is_closed:  # close() did not see this one
            worker.stop()
        worker.wait_until_ready()
        return worker


def pass_failure(ended: Future[Any], done: Future[Any]) -> bool:
    """Make `done` fail as `ended` did; return whether it did."""
    error = None if ended.cancelled() else ended.exception()
    if ended.cancelled() or isinstance(error, CancelledError):
        done.cancel()
    elif isinstance(error, ImageError):  # a fresh one: the traceback of the old holds the bytes that came
        done.set_exception(ImageError(error.type, str(error)))
    elif error is not None:
        done.set_exception(error)
    return done.done()


def pass_on(ended: Future[T], done: Future[T]) -> None:
    """Make `done` end as `ended` did."""
    if not pass_failure(ended, done):
        done.set_result(ended.result())


class _Loader:
    """Loads the bytes of pictures that no worker can open: remote ones, and those inside Parquet files."""

    def __init__(self, options: FetchOptions) -> None:
        self._options = options
        self._cells = CellReader(open_input)
        self.budget = ByteBudget(AHEAD_BYTES)
        self.fetch_threads = ThreadPoolExecutor(NUM_FETCHERS, "fetch")
        self.cell_thread = ThreadPoolExecutor(1, "cells")

    @cached_property
    def fetcher(self) -> Fetcher:
        from md3cli.remote.reader import Fetcher  # needs the extra `remote`

        return Fetcher(self._options, self.budget)

    def read_cell(self, item: ImageItem, number: int) -> bytes:
        """Return the bytes of a picture inside a Parquet file, taken from the budget under `number`."""
        data = self._cells.read(item, self._options.limit_bytes)
        self.budget.take(number, len(data))
        return data

    def close(self) -> None:
        """Cancel what is under way."""
        self.budget.close()
        if "fetcher" in vars(self):
            self.fetcher.close()
        self.fetch_threads.shutdown(wait=False, cancel_futures=True)  # a store without asyncio may keep one waiting
        self.cell_thread.shutdown(cancel_futures=True)
        self._cells.close()


class _Turns:
    """Who may decode: many threads beside each other, or one alone; while one waits to be alone, no other begins."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_running = 0
        self._most: float = math.inf  # running at a time
        self._num_alone = 0  # at work or waiting

    def limit(self, most: int) -> None:
        """From now on let no more than so many begin while others are at it."""
        with self._changed:
            self._most = most
            self._changed.notify_all()

    @contextlib.contextmanager
    def beside_others(self) -> Iterator[None]:
        """Wait until nobody is, or wants to be, alone, and there are not too many others."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_alone == 0 and self._num_running < self._most)
            self._num_running += 1
        yield from self._run()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody else decodes."""
        with self._changed:
            self._num_alone += 1
            self._changed.wait_for(lambda: self._num_running == 0)
            self._num_running += 1
        try:
            yield from self._run()
        finally:
            with self._changed:
                self._num_alone -= 1
                self._changed.notify_all()

    def _run(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()
