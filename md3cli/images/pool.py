"""The picture pool: worker processes read and cut pictures, so that a bad picture costs one record.

A C decoder that crashes, loops or eats memory takes its worker with it and nothing else: the picture fails with
`decoder_crash`, `timeout` or `too_large`, the worker is replaced, the pool goes on. A worker may also be killed for
no fault of its picture (by the kernel, when memory runs out): the picture gets a second try, with no other one beside
it, and only a picture that ends two workers is a `decoder_crash`.

Each thread of an executor owns one worker process (worker.py), tells it what to open, and receives the crops straight
into the array that the caller gets. A picture on the disk goes straight to a worker. The bytes of any other picture are
loaded first, by threads of this process, ahead of the decoder: remote ones by many threads, since they wait for the
network; those inside Parquet files by one, since they are read in order. Knows nothing of models or records.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from md3cli.child import Child
from md3cli.errors import ImageError, InputError
from md3cli.images.crops import CropConfig, ImageLimits, PreparedImage, parse_background, prepare_image, select_tiling
from md3cli.images.worker import Setup
from md3cli.records import ERROR_TYPES, ImageItem
from md3cli.remote.address import is_address
from md3cli.remote.hosts import FetchOptions
from md3cli.remote.retry import ByteBudget
from md3cli.source.manifest import open_input
from md3cli.source.parquet import CellReader

if TYPE_CHECKING:
    from md3cli.remote.reader import Fetcher

NUM_FETCHERS = 16
AHEAD_BYTES = 256 * 2**20  # of files loaded, or being loaded, and not decoded yet
_START_TIMEOUT_S = 60.0  # a worker needs 0.2 s here, many seconds where Python lies on a cold network disk
_WORKER = "md3cli.images.worker:serve"
_WORKER_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # numpy's threads are of no use here and slow the start
    # glibc gives the memory of every picture back and faults the next one in again, page by page; keeping it up
    # to these sizes (12 MB: 3 megapixels) saves a third of the time of a 640 x 427 JPEG (2026-11-21, 2 cores).
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(12 << 20),
}


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
    ) -> None:
        """Start no worker yet.

        `timeout_s` is for decoding one picture; its wait for another huge one does not count. `fetching` says how, and
        from which hosts, remote pictures are fetched.

        Raises:
            UsageError: `background` is no colour.
        """
        parse_background(background)
        self._setup = Setup(crop_config, limits, background)
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(num_workers, "decode") if num_workers > 0 else None
        self._of_thread = threading.local()
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()  # guards _workers and _is_closed
        self._is_closed = False
        self._huge = threading.Lock()  # held while a huge picture has its pixels in memory
        self._turns = _Turns()
        self._has_warned = False
        self._fetching = fetching or FetchOptions(limits.max_file_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def submit(self, item: ImageItem, data: bytes | None = None) -> Future[PreparedImage]:
        """Return the future of a picture, wherever it is; with `data`, which are its bytes, nothing is opened.

        The future raises ImageError; CancelledError when the pool was closed first; InputError when no worker
        can be started, which ends the run.
        """
        if data is None and item.row_group is not None:
            return self._decode_after(self._loader.read_cell, item, self._loader.cell_thread)
        if data is None and is_address(item.path):
            return self._decode_after(self._loader.fetcher.fetch, item, self._loader.fetch_threads)
        return self._decode(item, data)

    def close(self) -> None:
        """End the workers at once, and cancel what was not finished; a second call does no harm."""
        if "_loader" in vars(self):  # something was loaded
            self._loader.close()
        with self._lock:
            self._is_closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.kill()
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

    def _decode_after(
        self, load: Callable[[ImageItem, int], bytes], item: ImageItem, threads: ThreadPoolExecutor
    ) -> Future[PreparedImage]:
        done: Future[PreparedImage] = Future()
        loading = threads.submit(self._load_and_decode, load, item, done)
        loading.add_done_callback(lambda ended: _pass_failure(ended, done))
        return done

    def _load_and_decode(
        self, load: Callable[[ImageItem, int], bytes], item: ImageItem, done: Future[PreparedImage]
    ) -> None:
        budget = self._loader.budget
        number = budget.open()
        with contextlib.ExitStack() as undo:
            undo.callback(budget.give_back, number)
            decoding = self._decode(item, load(item, number))
            undo.pop_all()

        def pass_on(decoded: Future[PreparedImage]) -> None:
            budget.give_back(number)
            if not _pass_failure(decoded, done):
                done.set_result(decoded.result())

        decoding.add_done_callback(pass_on)

    # -- decoding ------------------------------------------------------------------------------------

    def _decode(self, item: ImageItem, data: bytes | None) -> Future[PreparedImage]:
        if self._threads is not None:
            return self._threads.submit(self._decode_in_worker, item, data)
        done: Future[PreparedImage] = Future()
        setup = self._setup
        try:
            done.set_result(prepare_image(item, setup.crop_config, setup.limits, setup.background, data=data))
        except ImageError as error:
            done.set_exception(error)
        return done

    def _decode_in_worker(self, item: ImageItem, data: bytes | None) -> PreparedImage:
        try:
            with self._turns.beside_others():
                return self._decode_once(item, data)
        except ImageError as error:
            if error.type != "decoder_crash":
                raise
            self._warn_once(error)
        with self._turns.alone():
            return self._decode_once(item, data)

    def _decode_once(self, item: ImageItem, data: bytes | None) -> PreparedImage:
        if self._is_closed:
            raise CancelledError
        try:
            return self._worker_of_thread().decode(item, data, self._timeout_s, self._huge)
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

    def _worker_of_thread(self) -> _Worker:
        worker: _Worker | None = getattr(self._of_thread, "worker", None)
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

    def _start_worker(self) -> _Worker:
        worker = self._of_thread.worker = _Worker(self._setup)
        with self._lock:
            self._workers.add(worker)
            is_closed = self._is_closed
        if is_closed:  # close() did not see this one
            worker.kill()
        worker.wait_until_ready()
        return worker


def _pass_failure(ended: Future[Any], done: Future[PreparedImage]) -> bool:
    """Make `done` fail as `ended` did; return whether it did."""
    error = None if ended.cancelled() else ended.exception()
    if ended.cancelled() or isinstance(error, CancelledError):
        done.cancel()
    elif isinstance(error, ImageError):  # a fresh one: the traceback of the old holds the bytes that came
        done.set_exception(ImageError(error.type, str(error)))
    elif error is not None:
        done.set_exception(error)
    return done.done()


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
        self._num_alone = 0  # at work or waiting

    @contextlib.contextmanager
    def beside_others(self) -> Iterator[None]:
        """Wait until nobody is, or wants to be, alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_alone == 0)
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


class _Worker(Child):
    """The parent's end of one worker process; used by one thread, killed from any."""

    def __init__(self, setup: Setup) -> None:
        """Start the process; it dies when the thread that calls this does."""
        super().__init__(_WORKER, environment=_WORKER_ENVIRONMENT)
        self._setup = setup
        self.was_killed = False  # by a signal, before it was ready

    def wait_until_ready(self) -> None:
        """Tell the worker how to cut, and wait for its answer.

        Raises:
            InputError: nothing can be decoded on this machine, which is no picture's fault.
        """
        try:
            self.channel.send(asdict(self._setup))
            self.channel.receive(_START_TIMEOUT_S)
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            self.was_killed = not isinstance(error, TimeoutError) and self._ended_by_signal()
            self.kill()
            said = self.last_words() or "it said nothing"
            raise InputError(f"a decode worker could not start ({said}); try md3 doctor") from error

    def decode(self, item: ImageItem, data: bytes | None, timeout_s: float, huge: threading.Lock) -> PreparedImage:
        """Have the worker decode one picture.

        Raises:
            ImageError: as the worker reports it, or of type `timeout` or `decoder_crash`, which end the worker.
        """
        try:
            self._send(item, data, timeout_s)
            answer = self.channel.receive(timeout_s)
            if "num_pixels" not in answer:
                return self._receive_picture(answer, timeout_s)
            with huge:
                self.channel.send({})
                return self._receive_picture(self.channel.receive(timeout_s), timeout_s)
        except TimeoutError as error:
            self.kill()
            raise ImageError("timeout", f"not decoded within {timeout_s:g} s (--decode-timeout)") from error
        except (OSError, EOFError, LookupError, TypeError, ValueError) as error:
            raise ImageError("decoder_crash", self._how_it_ended()) from error

    def _send(self, item: ImageItem, data: bytes | None, timeout_s: float) -> None:
        if data is None:
            self.channel.send({"name": item.name, "path": item.path, "offset": item.offset, "size": item.size})
        else:
            self.channel.send({"name": item.name, "path": "", "num_bytes": len(data)})
            self.channel.send_bytes(memoryview(data), timeout_s)

    def _receive_picture(self, answer: dict[str, Any], timeout_s: float) -> PreparedImage:
        if "type" in answer:
            if answer["type"] not in ERROR_TYPES:
                raise ValueError
            raise ImageError(answer["type"], str(answer["message"]))
        # Nothing that a worker says is trusted further than its size: the crops' number follows from it, here.
        width, height, sha256 = int(answer["width"]), int(answer["height"]), str(answer["sha256"])
        is_size = width > 0 and height > 0 and width * height <= self._setup.limits.max_pixels
        if not (is_size and re.fullmatch("[0-9a-f]{64}", sha256)):
            raise ValueError
        tiling = select_tiling(width, height, self._setup.crop_config)
        side = self._setup.crop_config.crop_size
        crops = np.empty((1 + tiling.rows * tiling.cols, side, side, 3), np.uint8)
        # A socket costs 2 ms a picture; a file in shared memory would cost 1 ms less, but falls under the run's file
        # size limit (RLIMIT_FSIZE), which is there to stop outputs.
        self.channel.receive_into(crops.data.cast("B"), timeout_s)
        return PreparedImage(crops, tiling, width, height, sha256)

    def _ended_by_signal(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=1.0) < 0
        return False

    def _how_it_ended(self) -> str:
        try:
            status = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self.kill()
            return "the decoder stopped making sense"
        if status >= 0:
            return f"the decoder ended with status {status}"
        return f"the decoder died of signal {-status} ({signal.strsignal(-status)})"
