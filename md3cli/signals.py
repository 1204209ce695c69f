"""What a run does with SIGINT, SIGTERM and SIGHUP: the first stops it in order, the second at once.

A handler may interrupt Python anywhere, also between writing a record and noting that it was
written. So it raises only inside regions that are marked as having nothing to lose (the model
at work, weights loading); elsewhere it leaves a note that the next marked region acts on.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

STATUS_BASE = 128
SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(BaseException):
    """The run was asked to stop; not an `Exception`, so that no handler of bad images swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_status(self) -> int:
        """What a shell reports for a program ended by this signal."""
        return STATUS_BASE + self.signum


class StopSignals:
    """Handlers for the time of a `with` block; a no-op outside the main thread, where Python allows none.

    Once a signal has come the handlers stay: what is left of the process is its end, and a second
    signal cuts that short with the same status.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._may_raise = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name, None) for name in SIGNAL_NAMES):
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
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
        """A region where nothing is lost by leaving it anywhere: a signal raises at once."""
        self._may_raise = True
        try:
            self.check()
            yield
        finally:
            self._may_raise = False


@contextmanager
def lasting_status() -> Iterator[None]:
    """Keep the exit status of a stop, whatever signal comes while Python ends; the `with` block is the whole program.

    Before the process is gone, Python gives every signal its default action back: a second Ctrl-C in that
    moment would end the process as killed. So this registers a function to be called at exit, which ends the
    process itself. What is registered first is called last: all other such functions have been called by then.
    """
    status: list[int] = []
    atexit.register(lambda: _end_now(status[0]) if status else None)
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > STATUS_BASE:
            status.append(end.code)
        raise


def _end_now(status: int) -> None:
    """End the process; its streams are flushed first, as Python would do."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
