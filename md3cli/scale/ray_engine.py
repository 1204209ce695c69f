"""`--engine ray`: Ray Data schedules the shards of a plan over a cluster; the records go the way they always do.

A row of Ray's is the number of a shard and nothing else, so its object store stays empty and nothing of the
output is Ray's: an actor runs the shard to its commit (ray_worker.py) and answers with counts. Losing actors,
nodes or this driver therefore loses no more than losing a process on one machine does, and any way of running
can go on where this one stopped.

Facts of Ray 2.60 that shaped this: an actor that raises ends the run; actors that die are started again
without end; constructor arguments are kept for that, so they are small; `map_batches(**ray_remote_args)` is
deprecated, so only named parameters are passed. The only operator is the actor pool, fed from the driver:
nothing else waits for CPUs, and a small cluster cannot block itself.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

from md3cli.errors import EngineError
from md3cli.records import printable
from md3cli.scale.layout import RunFolder, new_attempt
from md3cli.scale.plan import Plan
from md3cli.scale.ray_cluster import Placement, RayOptions, connected, place
from md3cli.scale.ray_worker import GO_ON, STOP, ShardAnswer, ShardWorker, WorkerSetup
from md3cli.scale.shards import FINDER

SESSIONS = "sessions"  # folder of the drivers' files, see WorkerSetup
MOST_BLOCKS = 20_000
SHARDS_AHEAD = 2  # handed to an actor at a time, so that it need not wait for the driver between two
LOOK_INTERVAL_S = 0.2
STOP_WAIT_S = 20.0  # for actors to end a step and write what they have

_END = object()


def run_on_ray(
    folder: RunFolder,
    plan: Plan,
    shards: Sequence[int],
    options: RayOptions,
    *,
    device: str,
    should_stop: Callable[[], bool],
    on_answer: Callable[[ShardAnswer], None],
    finder: str = FINDER,
) -> bool:
    """Have `shards` run to their commits; returns False where `should_stop` ended it before.

    Args:
        device: as --device says; `auto` takes the cluster's GPUs where it has any.
        should_stop: asked several times a second.
        on_answer: told of each shard that was committed, in any order.

    Raises:
        MissingExtraError: Ray is not installed.
        EngineError: no cluster, or a worker cannot go on; what was finished is in the run folder.
    """
    if not shards:
        return True
    session = f"{SESSIONS}/{new_attempt()}"
    folder.store.put(session, GO_ON)
    try:
        with connected(options) as ray:
            placement = place([node["Resources"] for node in ray.nodes() if node["Alive"]], device, options.per_device)
            setup = WorkerSetup(
                run_uri=folder.uri,
                fingerprint=plan.fingerprint,
                session=session,
                device=placement.device,
                decode_workers=placement.decode_workers,
                working_folder=os.getcwd(),
                finder=finder,
            )
            num_workers = min(placement.num_workers, len(shards))
            driver = _Driver(num_workers, lambda: folder.store.put(session, STOP), should_stop, on_answer)
            return driver.drain(_answers(shards, setup, placement, num_workers))
    finally:
        folder.store.remove(session)


def _answers(
    shards: Sequence[int], setup: WorkerSetup, placement: Placement, num_workers: int
) -> Iterator[ShardAnswer]:
    """What the actors say, as they say it."""
    data: Any = import_module("ray.data")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
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


class _Driver:
    """Takes answers while it looks out for a wish to stop."""

    def __init__(
        self,
        num_workers: int,
        ask_to_stop: Callable[[], None],
        should_stop: Callable[[], bool],
        on_answer: Callable[[ShardAnswer], None],
    ) -> None:
        self._num_workers, self._ask_to_stop = num_workers, ask_to_stop
        self._should_stop, self._on_answer = should_stop, on_answer
        self._failure = ""
        self._deadline: float | None = None  # for the actors to stop by
        self._stopped: set[str] = set()  # workers

    def drain(self, answers: Iterator[ShardAnswer]) -> bool:
        """Whether all was done; returns or raises soon after a wish to stop or a failure."""
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_pump, args=(answers, arrived), daemon=True).start()
        while True:
            if self._deadline is None and self._should_stop():
                self._stop()
            try:
                one = arrived.get(timeout=LOOK_INTERVAL_S)
            except queue.Empty:
                one = None
            if isinstance(one, ShardAnswer):
                self._take(one)
            if isinstance(one, Exception) and not self._failure:
                self._failure = f"Ray: {printable(str(one).strip().rpartition(chr(10))[2])}"
            is_over = one is _END or isinstance(one, Exception) or self._is_stopped
            if is_over and self._failure:
                raise EngineError(f"{self._failure}; what is finished is kept, and the same command goes on from there")
            if is_over:
                return self._deadline is None

    def _take(self, answer: ShardAnswer) -> None:
        if answer.is_stopped:
            self._stopped.add(answer.worker)
        elif answer.failure:
            self._failure = self._failure or f"worker {answer.worker}: {answer.failure}"
            self._stop()
        else:
            self._on_answer(answer)

    def _stop(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + STOP_WAIT_S
            self._ask_to_stop()

    @property
    def _is_stopped(self) -> bool:
        """All workers have said so, or those that have not have had their time (one may still load its model)."""
        if self._deadline is None:
            return False
        return len(self._stopped) >= self._num_workers or time.monotonic() > self._deadline


def _pump(answers: Iterator[ShardAnswer], arrived: queue.SimpleQueue[Any]) -> None:
    """Iterate in a thread: waiting inside Ray cannot be interrupted by a look at the signals."""
    try:
        for answer in answers:
            arrived.put(answer)
        arrived.put(_END)
    except BaseException as error:  # noqa: BLE001 - told by the thread that waits, which nothing else would wake
        arrived.put(error if isinstance(error, Exception) else EngineError(f"{type(error).__name__}: {error}"))
