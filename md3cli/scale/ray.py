"""`--engine ray`: Ray Data schedules the shards of a plan over a cluster; the records go the way they always do.

A row of Ray's is the number of a shard and nothing else, so its object store stays empty and nothing of the output is
Ray's: an actor runs the shard to its commit and answers with counts. Losing actors, nodes or this driver loses no more
than losing a process on one machine does, and any way of running can go on where this one stopped.

Facts of Ray 2.60 that shaped this: an actor that raises ends the run, so nothing is ever raised in one: what went
wrong is a column of the answer, and the driver decides. Actors that die are started again without end; constructor
arguments are kept for that, so they are small. `map_batches(**ray_remote_args)` is deprecated, so only named
parameters are passed. The only operator is the actor pool, fed from the driver: nothing else waits for CPUs, and a
small cluster cannot block itself.

Apart from workers.py, because only --engine ray loads it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

from md3cli.config import ScaleOptions
from md3cli.errors import EngineError, InputError, Md3Error
from md3cli.records import printable
from md3cli.scale import shard_runner
from md3cli.scale.folder import RunFolder, host_name, new_attempt, open_run_folder
from md3cli.scale.markers import read_commit, read_run_options
from md3cli.scale.plan import Plan
from md3cli.scale.ray_cluster import Placement, connected, place
from md3cli.scale.shard_runner import ShardRunner, ShardStopped
from md3cli.scale.workers import Driver, ShardQueue

GO_ON, STOP = b"go on\n", b"stop\n"  # what the session's file says
STOP_POLL_S = 2.0  # between two looks at it: on an object store each is a request
SESSIONS = "sessions"  # folder of the drivers' files, see WorkerSetup
MOST_BLOCKS = 20_000
SHARDS_AHEAD = 2  # handed to an actor at a time, so that it need not wait for the driver between two
LOOK_INTERVAL_S = 0.2  # between two looks for a wish to stop
LEAVE_WAIT_S = 5.0  # for Ray Data to end its threads; those of a worker that still loads a model take longer
STOP_WAIT_S = 20.0  # for actors to end a step and write what they have
_END = object()


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
        """Run the one shard of `batch`, and return a ShardAnswer as columns."""
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
        """Return whether the driver asks for it, looked up now and then; once it does, always."""
        now = time.monotonic()
        if not self._is_stopped and now - self._looked_at >= STOP_POLL_S:
            self._looked_at = now
            self._is_stopped = folder.store.read(self._setup.session) == STOP
        return self._is_stopped


def _open_runner(setup: WorkerSetup) -> ShardRunner:
    """Open the driver's plan to run its shards on the device that Ray gave this process.

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
    runner = ShardRunner(setup.run_uri, finder=setup.finder, options=replace(options, model=model, decode=decode))
    if runner.plan.fingerprint != setup.fingerprint:
        raise InputError(f"the run folder {printable(setup.run_uri)} has another plan on {host_name()}")
    return runner


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, Md3Error) else f"unexpected {type(error).__name__}: {error}"


class RayDriver(Driver):
    """Runs the shards of `queue` on a Ray cluster; progress comes by whole shards."""

    def __init__(self, folder: RunFolder, plan: Plan, queue: ShardQueue, scale: ScaleOptions, device: str) -> None:
        """`device` is as --device says; `auto` takes the cluster's GPUs where it has any."""
        self._folder, self._plan, self._queue, self._scale, self._device = folder, plan, queue, scale, device
        self._session = f"{SESSIONS}/{new_attempt()}"
        self._num_workers = 0
        self._failure = ""
        self._deadline: float | None = None  # for the actors to stop by
        self._stopped: set[str] = set()  # workers

    def run(self, on_step: Callable[[], None]) -> None:
        """Run the shards on the cluster, as `Driver.run` says.

        Raises:
            MissingExtraError: Ray is not installed.
            EngineError: no cluster, or a worker cannot go on; what was finished is in the run folder.
        """
        todo = [shard for shard in range(self._plan.shards) if shard not in self._queue.commits]
        if not todo:
            return
        self._folder.store.put(self._session, GO_ON)
        try:
            with connected(self._scale.ray_address) as ray:
                nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
                placement = place(nodes, self._device, self._scale.workers_per_device or 1)
                self._num_workers = min(placement.num_workers, len(todo))
                self._drain(_answers(todo, self._setup(placement), placement, self._num_workers), on_step)
        finally:
            self._folder.store.remove(self._session)

    def _setup(self, placement: Placement) -> WorkerSetup:
        return WorkerSetup(
            run_uri=self._folder.uri,
            fingerprint=self._plan.fingerprint,
            session=self._session,
            device=placement.device,
            decode_workers=placement.decode_workers,
            working_folder=os.getcwd(),
            finder=shard_runner.FINDER,
        )

    def _drain(self, answers: Generator[ShardAnswer], on_step: Callable[[], None]) -> None:
        """Take all answers; return or raise soon after a wish to stop or a failure."""
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        is_over = threading.Event()
        pump = threading.Thread(target=_pump, args=(answers, arrived, is_over), daemon=True)
        pump.start()
        try:
            self._take_all(arrived, on_step)
        finally:
            is_over.set()
            pump.join(LEAVE_WAIT_S)  # a thread inside Ray when the cluster goes would end this process with status 1
        if self._failure:
            raise EngineError(f"{self._failure}; what is finished is kept, and the same command goes on from there")

    def _take_all(self, arrived: queue.SimpleQueue[Any], on_step: Callable[[], None]) -> None:
        while True:
            on_step()
            if self.is_stopping:
                self._ask_to_stop()
            try:
                one = arrived.get(timeout=LOOK_INTERVAL_S)
            except queue.Empty:
                one = None
            if isinstance(one, ShardAnswer):
                self.take(one)
            if isinstance(one, Exception) and not self._failure:
                self._failure = f"Ray: {printable(str(one).strip().rpartition(chr(10))[2])}"
            if one is _END or isinstance(one, Exception) or self._is_stopped:
                return

    def take(self, answer: ShardAnswer) -> None:
        """Note what an actor says of a shard."""
        if answer.is_stopped:
            self._stopped.add(answer.worker)
        elif answer.failure:
            self._failure = self._failure or f"worker {answer.worker}: {answer.failure}"
            self._ask_to_stop()
        elif (commit := read_commit(self._folder, answer.shard)) is not None:
            self._queue.finish(answer.shard, commit)

    def _ask_to_stop(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + STOP_WAIT_S
            self._folder.store.put(self._session, STOP)

    @property
    def _is_stopped(self) -> bool:
        """Whether all workers have said so, or had their time to say so; one may still load its model."""
        if self._deadline is None:
            return False
        return len(self._stopped) >= self._num_workers or time.monotonic() > self._deadline


def _answers(
    shards: Sequence[int], setup: WorkerSetup, placement: Placement, num_workers: int
) -> Generator[ShardAnswer]:
    """Yield what the actors say, as they say it; once it is closed, no thread of Ray Data is at work."""
    data: Any = import_module("ray.data")
    # Its errors are raised, too, and told in a line; it logs a traceback whenever a run is stopped.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    data.DataContext.get_current().enable_progress_bars = False
    rows = data.from_items([{"shard": shard} for shard in shards], override_num_blocks=min(len(shards), MOST_BLOCKS))
    answers = rows.map_batches(
        ShardWorker,
        fn_constructor_args=(setup,),
        batch_size=1,
        num_cpus=placement.num_cpus,
        num_gpus=placement.num_gpus or None,
        compute=data.ActorPoolStrategy(
            min_size=1, max_size=num_workers, initial_size=num_workers, max_tasks_in_flight_per_actor=SHARDS_AHEAD
        ),
    )
    for batch in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from (ShardAnswer(**row) for row in batch.to_pylist())


def _pump(answers: Generator[ShardAnswer], arrived: queue.SimpleQueue[Any], is_over: threading.Event) -> None:
    """Hand answers on from a thread until `is_over`: waiting inside Ray cannot be interrupted by a look at signals."""
    try:
        with contextlib.closing(answers):
            for answer in answers:
                arrived.put(answer)
                if is_over.is_set():
                    break
        arrived.put(_END)
    except BaseException as error:  # noqa: BLE001 - told by the thread that waits, which nothing else would wake
        arrived.put(error if isinstance(error, Exception) else EngineError(f"{type(error).__name__}: {error}"))
