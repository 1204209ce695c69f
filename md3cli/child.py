"""Isolated child interpreters, and the wire between a child and its parent.

A child is a fresh interpreter that runs one function, not a fork of a process with threads and a CUDA context. The
wire is a Unix socketpair that carries JSON messages behind a 4-byte length, and raw bytes; nothing is pickled.
A child leaves stopping to its parent, and dies with it. This file imports the standard library alone, so that a decode
worker starts in 0.2 s. Knows nothing of what children do.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, Self

from md3cli.errors import EngineError
from md3cli.system import leave_stopping_to

MAX_MESSAGE_BYTES = 1 << 20  # options with thousands of hosts, an error that lists every tensor
_SLICE_S = 0.5
_TAIL_BYTES = 2000
_NO_CHILDREN_HERE = (
    "this system cannot hand a socket to a child process, as decoding pictures and several workers need; "
    "run md3 on Linux or macOS (on Windows: in WSL, `wsl --install`)"
)


class Channel:
    """JSON messages and raw bytes over a blocking Unix socket, with a deadline for each receive.

    Every receive raises TimeoutError after its deadline, and EOFError when the other side is gone or makes no sense.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        # A kernel timeout instead of settimeout(): the socket stays blocking, so that MSG_WAITALL can fetch
        # all crops in one call, with one wait for the interpreter's lock instead of one per 200 KB.
        seconds, fraction = divmod(_SLICE_S, 1)
        timeout = struct.pack("@ll", int(seconds), int(fraction * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def fileno(self) -> int:
        """Return the socket's number, which a selector can wait on."""
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a JSON object.

        Raises:
            OSError: the other side is gone.
        """
        text = json.dumps(message).encode()  # ASCII: lone surrogates of odd file names survive as \udcNN
        self.send_bytes(memoryview(len(text).to_bytes(4) + text))

    def send_bytes(self, data: memoryview, timeout_s: float | None = None) -> None:
        """Send `data`.

        Raises:
            TimeoutError: the other side does not take it in time.
            OSError: the other side is gone.
        """
        waited_s = 0.0
        while data.nbytes:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                waited_s += _SLICE_S
                if timeout_s is not None and waited_s >= timeout_s:
                    raise TimeoutError from None

    def receive(self, timeout_s: float | None, max_bytes: int = MAX_MESSAGE_BYTES) -> dict[str, Any]:
        """Return the next message, of at most `max_bytes` of JSON."""
        length = bytearray(4)
        self.receive_into(memoryview(length), timeout_s)
        num_bytes = int.from_bytes(length)
        if num_bytes > max_bytes:
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
        """Fill `view` with raw bytes."""
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
            # Time is counted in waits that ended too early, not read from a clock: a process that was stopped
            # and continued (Ctrl-Z, a frozen container) has not used up its pictures' time.
            waited_s += _SLICE_S
            if view.nbytes and timeout_s is not None and waited_s >= timeout_s:
                raise TimeoutError

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class Child:
    """A child process that calls one function, and the parent's end of the wire; a context ends it.

    `process` is the process, `channel` the wire.
    """

    def __init__(
        self,
        entry: str,
        *,
        environment: Mapping[str, str] | None = None,
        may_print: bool = False,
        fds: tuple[int, ...] = (),
    ) -> None:
        """Start an interpreter that calls `entry` ("module:function"), which begins with `connect`.

        It has the open files `fds` under the same numbers. The child dies when the thread that calls this does. With
        `may_print` its stdout and stderr go to a temporary file; without, its stdout goes nowhere and its stderr into a
        pipe, which a child that writes much would fill.

        Raises:
            EngineError: the system cannot hand a socket to a child (Windows); says what to do.
        """
        if not hasattr(socket, "AF_UNIX"):
            raise EngineError(_NO_CHILDREN_HERE)
        # Isolated mode: neither a numpy.py beside the pictures nor PYTHON* variables are any of a child's business.
        flags = "-IB" if sys.dont_write_bytecode else "-I"
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile() if may_print else None  # noqa: SIM115  # closed with the child
        with theirs:
            number = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, flags, "-c", code_of(entry), json.dumps(sys.path), str(number), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log or subprocess.DEVNULL,
                stderr=log or subprocess.PIPE,
                pass_fds=(number, *fds),
                env=os.environ | (environment or {}),
                process_group=0,  # Ctrl-C and Ctrl-Z at the terminal are for the parent to handle
            )
        self.channel = Channel(ours)
        said = log or self.process.stderr
        assert said is not None
        self._said = said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_alive(self) -> bool:
        """Return whether the process is still there."""
        return self.process.poll() is None

    def kill(self) -> None:
        """End the process at once, and wait for its end."""
        self.process.kill()
        self.process.wait()

    def last_words(self) -> str:
        """Return the last line that the child, which has ended, wrote to stderr; empty where it wrote nothing."""
        if self._said.seekable():
            end = self._said.seek(0, os.SEEK_END)
            self._said.seek(max(0, end - _TAIL_BYTES))
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""

    def close(self) -> None:
        """End the process at once, if it is there, and free what its handle holds open."""
        self.kill()
        self.channel.close()
        self._said.close()


def code_of(entry: str) -> str:
    """Return the program for a child's `-c`: it takes over the parent's sys.path and calls `entry`."""
    module, function = entry.split(":")
    return f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import {function}; {function}()"


def connect() -> Channel:
    """Return the wire to the parent; a child does this first, and from then on dies with its parent."""
    leave_stopping_to(parent_pid=int(sys.argv[3]))
    return Channel(socket.socket(fileno=int(sys.argv[2])))
