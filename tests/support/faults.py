"""Faults on purpose, inside the process under test: death or an error at the k-th file operation.

Beside it a count of the model's answers, kept outside the process, to see what a kill cost.

An operation is whatever changes or opens something below one folder: open, write, fsync, fdatasync,
truncate, rename, unlink, mkdir. SQLite is tested the same way: the 1st, 2nd, ... k-th operation fails,
until a run gets through.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

AUDITED = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir"}
WRAPPED = ("write", "fsync", "fdatasync")  # these raise no audit event
ACTIONS = ("kill", "fail")  # SIGKILL before the operation, or ENOSPC from it
MOMENTS = ("before", "after")


def install(action: str, at: int, folder: str) -> None:
    """From now on count operations below `folder`, and at the `at`-th do `action`."""
    assert action in ACTIONS
    folder = os.path.join(os.path.realpath(folder), "")
    num_done = 0

    def note(path: object) -> None:
        nonlocal num_done
        if not isinstance(path, str | bytes | os.PathLike):
            return
        if not os.path.realpath(os.fsdecode(path)).startswith(folder):
            return
        num_done += 1
        if num_done == at:
            if action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in AUDITED:
            path = arguments[0]
            note(_path_of(path) if isinstance(path, int) else path)

    sys.addaudithook(hook)
    for name in WRAPPED:
        setattr(os, name, _noted(getattr(os, name), note))


def _path_of(fd: int) -> str | None:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return None


def _noted(call: Callable[..., Any], note: Callable[[object], None]) -> Callable[..., Any]:
    def noted(fd: int, *arguments: Any) -> Any:
        note(_path_of(fd))
        return call(fd, *arguments)

    return noted


def signal_at_absorption(signum: signal.Signals, moment: str, at: int) -> None:
    """Send this process a signal when the engine turns to the results of its `at`-th launch.

    `moment` "before": that launch still stands in the queue; "after": it has been taken out, and nobody has read it.
    """
    from md3cli.model.engine.flight import InFlight

    assert moment in MOMENTS
    arrivals, num_taken = InFlight.arrivals, 0

    def watched(queue: InFlight, most_left: int) -> Iterator[Any]:
        nonlocal num_taken
        while len(queue) > most_left:
            num_taken += 1
            if moment == "before" and num_taken == at:
                os.kill(os.getpid(), signum)
            launch = next(arrivals(queue, len(queue) - 1))
            if moment == "after" and num_taken == at:
                os.kill(os.getpid(), signum)
            yield launch

    InFlight.arrivals = watched  # type: ignore[method-assign]


class CountedModel:
    """A model whose engine leaves a byte in the file `count` for every answer it gives."""

    def __init__(self, model: Any, count: str) -> None:
        self._model, self._count = model, count
        self.identity, self.crop_config = model.identity, model.crop_config

    def refusal_of(self, request: Any) -> str | None:
        return self._model.refusal_of(request)

    def load(self) -> Any:
        return _CountedEngine(self._model.load(), os.open(self._count, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666))


class _CountedEngine:
    def __init__(self, engine: Any, fd: int) -> None:
        self._engine, self._fd, self._write = engine, fd, os.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> Sequence[Any]:
        answers: Sequence[Any] = self._engine.step()
        self._write(self._fd, b"." * len(answers))
        return answers
