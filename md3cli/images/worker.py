"""The worker's side of the decode pool, and the wire between the two sides.

A worker is a fresh interpreter that imports numpy and Pillow only. It is told once how to cut, then
gets a picture per message (a path, or the bytes themselves behind it) and answers with a message and
the raw crops, until the other side is gone. Knows nothing of pools, deadlines or models.

The wire is a Unix socketpair carrying JSON messages behind a 4-byte length, and raw pixels. Nothing
is pickled.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Any

from md3cli.errors import ImageError
from md3cli.images.crops import CropConfig, ImageLimits, prepare_image
from md3cli.images.pixels import HUGE_PIXELS, start_pillow
from md3cli.records import ImageItem

_SLICE_S = 0.5
_MAX_MESSAGE_BYTES = 1 << 20  # options with thousands of hosts, an error that lists every tensor


@dataclass(frozen=True, slots=True)
class Setup:
    """What every worker is told once."""

    crop_config: CropConfig
    limits: ImageLimits
    background: str | None


class Channel:
    """JSON messages and raw bytes over a blocking Unix socket, with a deadline for each receive.

    Every receive raises TimeoutError, and EOFError when the other side is gone or makes no sense.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        # A kernel timeout instead of settimeout(): the socket stays blocking, so that MSG_WAITALL can fetch
        # all crops in one call, with one wait for the interpreter's lock instead of one per 200 KB.
        seconds, fraction = divmod(_SLICE_S, 1)
        timeout = struct.pack("@ll", int(seconds), int(fraction * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def send(self, message: dict[str, Any]) -> None:
        text = json.dumps(message).encode()  # ASCII: lone surrogates of odd file names survive as \udcNN
        self.send_bytes(memoryview(len(text).to_bytes(4) + text))

    def send_bytes(self, data: memoryview, timeout_s: float | None = None) -> None:
        """Raises TimeoutError: the other side does not take them."""
        waited_s = 0.0
        while data.nbytes:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                waited_s += _SLICE_S
                if timeout_s is not None and waited_s >= timeout_s:
                    raise TimeoutError from None

    def receive(self, timeout_s: float | None) -> dict[str, Any]:
        """The next message."""
        length = bytearray(4)
        self.receive_into(memoryview(length), timeout_s)
        num_bytes = int.from_bytes(length)
        if num_bytes > _MAX_MESSAGE_BYTES:
            raise EOFError
        text = bytearray(num_bytes)
        self.receive_into(memoryview(text), timeout_s)
        try:
            message = json.loads(text)
        except ValueError as error:
            raise EOFError from error
        if not isinstance(message, dict):
            raise EOFError
        return message

    def receive_into(self, view: memoryview, timeout_s: float | None) -> None:
        """Fill `view`.

        Time is counted in waits that ended too early, not read from a clock: a process that was
        stopped and continued (Ctrl-Z, a frozen container) has not used up its pictures' time.
        """
        waited_s = 0.0
        while view.nbytes:
            try:
                num_received = self._socket.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                num_received = -1
            except OSError as error:
                raise EOFError from error
            if num_received == 0:
                raise EOFError
            view = view[max(num_received, 0) :]
            waited_s += _SLICE_S
            if view.nbytes and timeout_s is not None and waited_s >= timeout_s:
                raise TimeoutError

    def close(self) -> None:
        self._socket.close()


def serve() -> None:
    """Life of a worker: set up, say so, then a picture per message until the other side is gone."""
    _isolate(parent_pid=int(sys.argv[3]))
    channel = Channel(socket.socket(fileno=int(sys.argv[2])))
    message = channel.receive(None)
    setup = Setup(CropConfig(**message["crop_config"]), ImageLimits(**message["limits"]), message["background"])
    start_pillow()
    _limit_memory(setup.limits)
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
    """The bytes of a picture that the other side has fetched."""
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


def _isolate(parent_pid: int) -> None:
    """Leave stopping to the parent, die with it, leave no core dump, be the first to go when memory runs out."""
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, signal.SIG_IGN)  # sent to a whole service, they would make bad records of good pictures
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)  # of the *thread* that started this process
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("500")
    if os.getppid() != parent_pid:  # it died before the lines above
        os._exit(0)


def _limit_memory(limits: ImageLimits) -> None:
    """Address space for the file, four pictures of 4 bytes a pixel (WebP's canvases, one turned, one RGB), and us."""
    most = limits.max_file_size + 16 * limits.max_pixels + (1 << 30)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
