"""What a run does with SIGINT, SIGTERM and SIGHUP, and with standard streams that are missing or go away.

The first signal stops a run in order, the second at once. A handler may interrupt Python anywhere, also between writing
a record and noting that it was written. So it raises only inside regions that are marked as having nothing to lose (the
model at work, weights loading); elsewhere it leaves a note that the next marked region acts on.

The reader of stdout may leave, which ends the program (cli.py). A reader of stderr who leaves, or a full disk under a
log, must not: records are still to be written, and the exit status still counts.
"""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from md3cli.errors import OutputError
from md3cli.system import STOP_SIGNALS

STATUS_BASE = 128  # of what a shell reports for a program that a signal ended
STDOUT_CLOSED = "stdout is closed, so nothing can be printed; name a file with -o, or send stdout somewhere (> FILE)"


# -- streams ---------------------------------------------------------------------------------------


class LastingStderr:
    """A stream whose writes never fail: what cannot be written is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written of `text`; returns its whole length."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except BrokenPipeError:  # what is buffered would fail again, and again at the interpreter's end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        except OSError:  # a full disk; there may be space for the next line
            return


def secure_streams() -> None:
    """Keep the numbers of closed streams from becoming an output's; called once, before any file is opened.

    A closed stdout still refuses what is written to it, so that nothing is lost without a word.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # `os.open` takes the lowest number that is free, which is `fd`
            os.open(os.devnull, os.O_RDONLY if fd == 1 else os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = LastingStderr(sys.stderr or os.fdopen(2, "w"))


def check_stdout() -> None:
    """Refuse to begin a command that prints at its end, where stdout is closed.

    Raises:
        OutputError: nothing can be printed.
    """
    try:
        os.write(sys.stdout.fileno(), b"")  # nothing at all; a reader who has left does not show by it
    except ValueError:  # no file of the system: a notebook, a test
        return
    except OSError as error:
        if is_closed(error):
            raise OutputError(STDOUT_CLOSED) from error


def is_closed(error: OSError) -> bool:
    """Return whether a write failed because the stream was closed before the program began."""
    return error.errno == errno.EBADF and error.filename is None


@contextmanager
def silenced_stderr() -> Iterator[None]:
    """Let nothing through to the process's stderr, whoever writes: libraries print their panics past Python."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# -- signals ---------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """The run was asked to stop; not an `Exception`, so that no handler of bad images swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_status(self) -> int:
        """Return the status that a shell reports for a program which this signal ended."""
        return STATUS_BASE + self.signum


class StopSignals:
    """Handlers of the stop signals for the time of a `with` block; outside the main thread Python allows none.

    Once a signal has come the handlers stay: what is left of the process is its end, and a second
    signal cuts that short with the same status.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._may_raise = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.received is None:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(STATUS_BASE + signum)
        self.received = signum
        if self._may_raise:
            raise Interrupted(signum)

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Mark a region where nothing is lost by leaving it anywhere: in it, a signal raises `Interrupted` at once."""
        self._may_raise = True
        try:
            self.check()
            yield
        finally:
            self._may_raise = False


@contextmanager
def lasting_status() -> Iterator[None]:
    """Keep the exit status of a stop, whatever signal comes while Python ends; the block is the whole program."""
    # Before the process is gone, Python gives every signal its default action back: a second Ctrl-C in that moment
    # would end the process as killed. So a function called at exit ends the process itself. What is registered
    # first is called last: all other such functions have been called by then.
    status: list[int] = []
    atexit.register(lambda: _end_now(status[0]) if status else None)
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > STATUS_BASE:
            status.append(end.code)
        raise


def _end_now(status: int) -> None:
    """End the process after its streams are flushed, as Python would do."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
