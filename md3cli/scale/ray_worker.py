"""What a Ray actor runs: one shard after another with a model that stays warm. Imports nothing of Ray.

Ray Data ends a whole run at the first exception of an actor, and starts an actor that died again and again.
So nothing is ever raised here: what went wrong is a column of the answer, and the driver decides. A request
that kills its process is found by the journals of its attempts (attempts.py), as everywhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from md3cli.errors import InputError, Md3Error
from md3cli.records import printable
from md3cli.scale.layout import RunFolder, host_name, open_run_folder
from md3cli.scale.run_options import read_run_options
from md3cli.scale.shards import ShardRunner, ShardStopped

GO_ON, STOP = b"go on\n", b"stop\n"  # what the session's file says
STOP_POLL_S = 2.0  # between two looks at it: on an object store each is a request


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """All that an actor is told; small, since Ray keeps it for restarts.

    `fingerprint` is the plan's as the driver knows it. `session` is a file of the run folder that this driver
    alone has made: an actor that does not find it looks at another folder, and STOP in it asks all to stop.
    `device` is what --device says inside an actor, which sees only the GPU that Ray gave it; `decode_workers`
    hold unless the run names a number. Relative paths of the plan are relative to `working_folder`.
    """

    run_uri: str
    fingerprint: str
    session: str
    device: str
    decode_workers: int
    working_folder: str
    finder: str


class ShardAnswer(NamedTuple):
    """How a call for a shard ended: committed (counts as in its marker), stopped, or with `failure` in words."""

    shard: int
    images: int = 0
    ok: int = 0
    errors: int = 0
    failure: str = ""
    is_stopped: bool = False
    worker: str = ""  # host and process


class ShardWorker:
    """An actor of Ray Data: called with one shard at a time, answers in plain columns."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._failure = ""
        self._runner: ShardRunner | None = None
        self._is_stopped = False
        self._looked_at = 0.0
        try:
            self._runner = _open_runner(setup)
        except Exception as error:  # noqa: BLE001 - whatever it is: Ray would try it for ever
            self._failure = _in_words(error)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The columns of a ShardAnswer for the one shard of `batch`."""
        answer = self._answer(int(batch["shard"][0]))
        return {name: [value] for name, value in answer._asdict().items()}

    def _answer(self, shard: int) -> ShardAnswer:
        worker = f"{host_name()}-{os.getpid()}"
        runner = self._runner
        if runner is None:
            return ShardAnswer(shard, failure=self._failure, worker=worker)
        try:
            if self._should_stop(runner.folder):
                return ShardAnswer(shard, is_stopped=True, worker=worker)
            commit = runner.run(shard, should_stop=lambda: self._should_stop(runner.folder)).commit
        except ShardStopped:
            return ShardAnswer(shard, is_stopped=True, worker=worker)
        except Exception as error:  # noqa: BLE001 - as above
            return ShardAnswer(shard, failure=_in_words(error), worker=worker)
        return ShardAnswer(shard, commit.images, commit.ok, commit.errors, worker=worker)

    def _should_stop(self, folder: RunFolder) -> bool:
        """Whether the driver asks for it; looked up now and then. Once yes, always yes."""
        now = time.monotonic()
        if not self._is_stopped and now - self._looked_at >= STOP_POLL_S:
            self._looked_at = now
            self._is_stopped = folder.store.read(self._setup.session) == STOP
        return self._is_stopped


def _open_runner(setup: WorkerSetup) -> ShardRunner:
    """The runner of the driver's plan, for the device that Ray gave this process.

    Raises:
        InputError: this machine does not see the driver's folders.
        Md3Error: the model cannot be had here.
    """
    try:
        os.chdir(setup.working_folder)
    except OSError as error:
        raise InputError(
            f"{printable(setup.working_folder)}, where the run was started, is not on {host_name()}; "
            "start it in a folder that all machines share"
        ) from error
    folder = open_run_folder(setup.run_uri)
    if folder.store.read(setup.session) is None:
        raise InputError(f"the run folder {printable(setup.run_uri)} is not on storage that {host_name()} shares")
    options = read_run_options(folder)
    model = replace(options.model, device=setup.device)
    decode = replace(options.decode, workers=options.decode.workers or setup.decode_workers)
    runner = ShardRunner(setup.run_uri, finder=setup.finder, model=model, decode=decode)
    if runner.plan.fingerprint != setup.fingerprint:
        raise InputError(f"the run folder {printable(setup.run_uri)} has another plan on {host_name()}")
    return runner


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, Md3Error) else f"unexpected {type(error).__name__}: {error}"
