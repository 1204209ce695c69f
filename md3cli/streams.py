"""Standard streams that may be missing or go away: what is said on stderr never decides how a run ends.

The reader of stdout may leave, which ends the program (cli.py). A reader of stderr who leaves, or a
full disk under a log, must not: records are still to be written, and the exit status still counts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class LastingStderr:
    """`stream` as it is, but that a write which fails is a write that nobody sees."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """All of `text`, as far as the caller can tell."""
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
    """To be called once, before any file is opened: a closed stream's number must not become an output's."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is `fd`
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = LastingStderr(sys.stderr or os.fdopen(2, "w"))


@contextmanager
def silenced_stderr() -> Iterator[None]:
    """Lets nothing through to stderr, whoever writes: libraries print their panics past Python.

    It holds for the whole process, so keep what is inside short.
    """
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
