"""The parent's end of a decode worker: what the pool sends to it, what comes back, and how it ends.

Nothing that a worker says is believed further than worker.py's `Facts`. Apart from the pool, which knows many of them
and shares out the work.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from dataclasses import asdict
from typing import Any

import numpy as np

from md3cli.child import Child
from md3cli.errors import ImageError, InputError
from md3cli.images.arena import make_arena
from md3cli.images.crops import Cutter, PreparedImage, WholeImage
from md3cli.images.parts import cut_whole
from md3cli.images.worker import CROPS, PIXELS, SHARED, Facts, Setup
from md3cli.records import ImageItem

CHANNELS = 3
_START_TIMEOUT_S = 60.0  # a worker needs 0.2 s here, many seconds where Python lies on a cold network disk
_END_TIMEOUT_S = 10.0  # of a worker whose channel is closed
_WORKER = "md3cli.images.worker:serve"
_WORKER_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # numpy's threads are of no use here and slow the start
    # glibc gives the memory of every picture back and faults the next one in again, page by page; keeping it up
    # to these sizes (12 MB: 3 megapixels) saves a third of the time of a 640 x 427 JPEG (2026-11-21, 2 cores).
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(12 << 20),
}


class Decoder(Child):
    """The parent's end of one worker process; used by one thread, killed from any."""

    def __init__(self, setup: Setup, arena_bytes: int) -> None:
        """Start the process; it dies when the thread that calls this does."""
        self._arena = make_arena(arena_bytes)
        super().__init__(_WORKER, environment=_WORKER_ENVIRONMENT, fds=(self._arena.fd,) if self._arena else ())
        self._setup = setup
        self.was_killed = False  # by a signal, before it was ready

    def stop(self) -> None:
        """End the process at once, and whatever waits for it; any thread may say so."""
        self.kill()

    def close(self) -> None:
        super().close()
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def wait_until_ready(self) -> None:
        """Tell the worker how to cut, and wait for its answer.

        Raises:
            InputError: nothing can be decoded on this machine, which is no picture's fault.
        """
        try:
            arena = (self._arena.fd, self._arena.num_bytes) if self._arena is not None else (-1, 0)
            self.channel.send(asdict(self._setup) | {"arena": arena})
            self.channel.receive(_START_TIMEOUT_S)
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            self.was_killed = not isinstance(error, TimeoutError) and self._ended_by_signal()
            self.kill()
            said = self.last_words() or "it said nothing"
            raise InputError(f"a decode worker could not start ({said}); try md3 doctor") from error

    def decode(
        self,
        item: ImageItem,
        data: bytes | None,
        timeout_s: float,
        huge: threading.Lock,
        wanted: str,
        cutter: Cutter | None,
    ) -> PreparedImage | WholeImage:
        """Have the worker decode one picture, and cut it unless its pixels are wanted, or `cutter` does that.

        Raises:
            ImageError: as the worker reports it, or of type `timeout` or `decoder_crash`, which end the worker.
            EngineError: `cutter` raised it.
        """
        try:
            if wanted == CROPS and cutter is not None and self._arena is not None:
                wanted = SHARED
            self._send(item, data, timeout_s, wanted)
            answer = self.channel.receive(timeout_s)
            if "num_pixels" not in answer:
                found = self._receive(answer, timeout_s, wanted, cutter)
            else:
                with huge:
                    self.channel.send({})
                    found = self._receive(self.channel.receive(timeout_s), timeout_s, wanted, cutter)
        except TimeoutError as error:
            self.kill()
            raise ImageError("timeout", f"not decoded within {timeout_s:g} s (--decode-timeout)") from error
        except (OSError, EOFError, LookupError, TypeError, ValueError) as error:
            raise ImageError("decoder_crash", self._how_it_ended()) from error
        if wanted == SHARED and isinstance(found, WholeImage):
            return cut_whole(found, self._setup.crop_config, cutter)
        return found

    def _send(self, item: ImageItem, data: bytes | None, timeout_s: float, wanted: str) -> None:
        if data is None:
            place = {"path": item.path, "offset": item.offset, "size": item.size}
        else:
            place = {"path": "", "num_bytes": len(data)}
        self.channel.send({"name": item.name, **place, "wanted": wanted})
        if data is not None:
            self.channel.send_bytes(memoryview(data), timeout_s)

    def _receive(
        self, answer: dict[str, Any], timeout_s: float, wanted: str, cutter: Cutter | None
    ) -> PreparedImage | WholeImage:
        if wanted == PIXELS:
            facts = Facts.of(answer, self._setup)
            pixels = np.empty((facts.height, facts.width, CHANNELS), np.uint8)
            self.channel.receive_into(pixels.data.cast("B"), timeout_s)
            self._receive_nothing(timeout_s)
            return WholeImage(pixels, facts.sha256)
        if "is_whole" in answer:
            if wanted != SHARED or cutter is None:
                raise ValueError
            whole = self._receive_shared(Facts.of(answer, self._setup), timeout_s, cutter.longest_side)
            if whole is not None:
                return whole
            answer = self.channel.receive(timeout_s)
        facts = Facts.of(answer, self._setup)
        side = self._setup.crop_config.crop_size
        crops = np.empty((facts.tiling.num_crops, side, side, 3), np.uint8)
        # 4 MB cost 0.7 ms of processor time here and 0.2 ms in shared memory (Zen 4): nothing beside decoding. A whole
        # photograph of 37 MB would cost 13 ms, and 3 ms there.
        self.channel.receive_into(crops.data.cast("B"), timeout_s)
        return PreparedImage(crops, *facts)

    def _receive_shared(self, facts: Facts, timeout_s: float, longest_side: int) -> WholeImage | None:
        """Let the worker copy a picture to the memory that both share; return None where it has to cut it."""
        assert self._arena is not None
        size = facts.width * facts.height * CHANNELS
        lent = self._arena.first(size) if max(facts.width, facts.height) <= longest_side else None
        self.channel.send({"is_wanted": lent is not None})
        if lent is None:
            return None
        self._receive_nothing(timeout_s)
        return WholeImage(lent.reshape(facts.height, facts.width, CHANNELS), facts.sha256)

    def _receive_nothing(self, timeout_s: float) -> None:
        """Receive what is said of a whole picture that is there; raise what is said of one that is not."""
        if failed := self.channel.receive(timeout_s):
            Facts.of(failed, self._setup)
            raise ValueError

    def _ended_by_signal(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(_END_TIMEOUT_S) < 0
        return False

    def _how_it_ended(self) -> str:
        try:
            status = self.process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return "the decoder stopped making sense"
        if status >= 0:
            return f"the decoder ended with status {status}"
        return f"the decoder died of signal {-status} ({signal.strsignal(-status)})"
