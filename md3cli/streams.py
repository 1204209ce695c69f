"""Standard streams that may be missing or go away: what is said on stderr never decides how a run ends.

The reader of stdout may leave, which ends the program (cli.py). A reader of stderr who leaves, or a
full disk under a log, must not: records are still to be written, and the exit status still counts.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from md3cli.errors import OutputError

STDOUT_CLOSED = "stdout is closed, so nothing can be printed; name a file with -o, or send stdout somewhere (> FILE)"


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
    """To be called once, before any file is opened: a closed stream's number must not become an output's.

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
    """Refuse to begin what would be printed at its end, where stdout is closed.

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
