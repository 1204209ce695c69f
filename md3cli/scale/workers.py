"""What runs the shards of a plan on one machine: this process, or one worker process per device.

A worker that dies costs the requests it had under way, which are asked again alone, and nothing else. A shard whose
workers keep dying without a single new record is given up; a run where that happens everywhere is ended.

A worker is a fresh interpreter with a model that stays warm, told over a socketpair how to run and then which shard to
run. When the supervisor is gone the worker ends at once, whatever it is doing. Ctrl-C is the supervisor's to handle.

Messages to a worker: `{"run": {...}}` once, `{"shard": k}`, `{"stop": true}`. From it: `{"ready": true}`, `{"shard": k,
"attempt": name}` when it begins, `{"ok": n, "failed": n}` of the shard so far, `{"done": k}`, `{"stopped": true}`,
`{"error": text}` when the run cannot go on.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

from md3cli.child import Channel, Child, connect
from md3cli.errors import EngineError, Md3Error
from md3cli.records import printable
from md3cli.run.feed import num_auto_workers
from md3cli.run.model_handle import Model
from md3cli.scale import shard_runner
from md3cli.scale.attempts import Signs, Teller, note_death, read_history, who_runs
from md3cli.scale.folder import RunFolder, host_name
from md3cli.scale.markers import Commit, CommitLog, RunOptions, read_commit
from md3cli.scale.shard_runner import ShardRunner, ShardStopped

WAIT_S = 0.5  # for others, before looking again
DEATHS_TO_GIVE_UP = 5  # of workers on one shard without a new record
POLL_S = 0.2  # so that a signal is seen soon
END_WAIT_S = 30.0  # for a worker that has said its last word
STOP_WAIT_S = 120.0  # for workers to finish the step they are in; what they finished before is on disk
TELL_INTERVAL_S = 0.25  # between two words of a worker on how far its shard is
_MESSAGE_TIMEOUT_S = 30.0  # for the rest of a message that has begun to come
_WORKER = "md3cli.scale.workers:serve"


class ShardQueue:
    """Hands out open shards; `owners` are the attempts at the shards that it waits for.

    With `world_size` n, rank r begins with the shards k where k % n == r. Of the others it takes, from the
    end, only those nobody seems to be working on. A shard may still be run by two: only the first commits.
    """

    def __init__(self, folder: RunFolder, num_shards: int, rank: int = 0, world_size: int = 1) -> None:
        self._folder, self._num_shards, self._log = folder, num_shards, CommitLog(folder, num_shards)
        done = self._log.refresh()
        todo = [shard for shard in range(num_shards) if shard not in done]
        self._own = deque(shard for shard in todo if shard % world_size == rank)
        self._others = deque(shard for shard in todo if shard % world_size != rank)
        self._running: set[int] = set()
        self.given_up: set[int] = set()
        self.owners: set[str] = set()
        self._signs = Signs()

    @property
    def commits(self) -> Mapping[int, Commit]:
        """The markers of the shards that are known to be done."""
        return self._log.found

    def refresh(self) -> None:
        """Learn what others have committed."""
        self._log.refresh()

    def take(self) -> int | None:
        """Return a shard to run now; None where there is none, or none at the moment."""
        self.owners.clear()
        while self._own:
            shard = self._own.popleft()
            if shard not in self.commits:
                self._running.add(shard)
                return shard
        for _ in range(len(self._others)):
            shard = self._others.pop()
            if shard in self.commits:
                continue
            owner = who_runs(self._folder, shard, host_name(), self._signs)
            if owner is None:
                self._running.add(shard)
                return shard
            self.owners.add(owner)
            self._others.appendleft(shard)
        return None

    def finish(self, shard: int, commit: Commit) -> None:
        """Count a shard as done."""
        self._running.discard(shard)
        self._log.found[shard] = commit

    def reopen(self, shards: Iterable[int]) -> None:
        """Have committed shards done again."""
        for shard in sorted(shards):
            del self._log.found[shard]
            self._own.append(shard)

    def put_back(self, shard: int) -> None:
        """Put the shard of a dead worker in front: it is the next to be taken."""
        self._running.discard(shard)
        self._own.appendleft(shard)

    def give_up(self, shard: int) -> None:
        """Leave out a shard whose workers keep dying, for the rest of this start."""
        self._running.discard(shard)
        self.given_up.add(shard)

    @property
    def is_waiting(self) -> bool:
        """Whether others run all that is left."""
        return not self._running and not self._own and bool(self.owners)

    @property
    def num_waiting(self) -> int:
        """How many shards this queue could still hand out."""
        return len(self._own) + len(self._others)

    @property
    def num_open(self) -> int:
        """How many shards are not known to be done."""
        return self._num_shards - len(self.commits)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to hand out or to wait for."""
        return self.num_open <= len(self.given_up - self.commits.keys())


class Driver(ABC):
    """What runs the shards of a queue: this process, worker processes, or a cluster."""

    is_stopping = False

    @abstractmethod
    def run(self, on_step: Callable[[], None]) -> None:
        """Run shards until none is left, or a stop was asked for; `on_step` is called several times a second.

        Raises:
            Md3Error: the run cannot go on here.
        """

    def under_way(self) -> tuple[int, int]:
        """Return how many requests of the shards under way are finished: those that are ok, those that failed."""
        return 0, 0

    def stop(self) -> None:
        """Have what runs finish the step it is in, and `run` return."""
        self.is_stopping = True


class LocalDriver(Driver):
    """Runs the shards of `queue` in this process, one after another."""

    def __init__(
        self,
        uri: str,
        queue: ShardQueue,
        options: RunOptions,
        model: Model,
        while_loading: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """`while_loading` is entered around the loading of `model`."""
        self._uri, self._queue, self._options = uri, queue, options
        self._model, self._while_loading = model, while_loading
        self._under_way = 0, 0

    def under_way(self) -> tuple[int, int]:
        return self._under_way

    def run(self, on_step: Callable[[], None]) -> None:
        """Work on the run's shards in this process until none is left, or the run is to stop."""

        def should_stop() -> bool:
            on_step()
            return self.is_stopping

        if self._queue.is_finished:
            return
        with ShardRunner(
            self._uri,
            finder=lambda _: self._model,
            options=self._options,
            while_loading=self._while_loading,
        ) as runner:
            while not (should_stop() or self._queue.is_finished):
                shard = self._queue.take()
                if shard is None:
                    time.sleep(WAIT_S)
                    continue
                try:
                    result = runner.run(shard, should_stop=should_stop, on_progress=self._note)
                except ShardStopped:
                    return
                self._queue.finish(shard, result.commit)
                self._note(0, 0)

    def _note(self, ok: int, failed: int) -> None:
        self._under_way = ok, failed


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a worker runs: its device as the model's options name it, and variables of its environment."""

    device: str
    environment: dict[str, str] = field(default_factory=dict)


def seats_of(devices: Sequence[str], workers_per_device: int) -> list[Seat]:
    """Return a seat for each worker.

    A worker sees no CUDA device but its own, so that it takes no memory on another's. Workers on the processor share
    its cores out.
    """
    num_seats = len(devices) * workers_per_device
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seats = []
    for device in devices:
        kind, _, index = device.partition(":")
        environment: dict[str, str] = {}
        if kind == "cuda" and index:
            names, number = visible.split(",") if visible else [], int(index)
            environment["CUDA_VISIBLE_DEVICES"] = names[number] if number < len(names) else index
            device = "cuda"
        if kind == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_seats))
        seats += [Seat(device, environment)] * workers_per_device
    return seats


class _Worker(Child):
    """The supervisor's end of one worker process."""

    def __init__(self, seat: Seat, uri: str, options: RunOptions) -> None:
        super().__init__(_WORKER, environment=seat.environment, may_print=True)
        self.seat, self.shard, self.attempt = seat, -1, ""
        self.num_ok = self.num_failed = 0
        self.is_ready = False
        model = replace(options.model, device=seat.device)
        setup = {"uri": uri, "finder": shard_runner.FINDER, "options": replace(options, model=model).to_json()}
        self.send({"run": setup})

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it died: the end of its messages says so
            self.channel.send(message)

    def end(self) -> int:
        """Wait for the process to end by itself, and kill it where it does not; return its exit status."""
        try:
            status = self.process.wait(END_WAIT_S)
        except subprocess.TimeoutExpired:  # it hangs in some library's own end
            self.kill()
            status = self.process.wait()
        self.channel.close()
        return status


class Supervisor(Driver):
    """Runs the shards of `queue` in worker processes, one for each of `seats`."""

    def __init__(
        self,
        folder: RunFolder,
        queue: ShardQueue,
        options: RunOptions,
        seats: Sequence[Seat],
        *,
        warn: Callable[[str], None],
    ) -> None:
        if options.decode.workers is None:
            decode = replace(options.decode, workers=max(1, num_auto_workers() // len(seats)))
            options = replace(options, decode=decode)
        self._folder, self._queue, self._options, self._warn = folder, queue, options, warn
        self._waiting_seats = list(seats)
        self._workers: dict[int, _Worker] = {}  # by their socket's number
        self._selector = selectors.DefaultSelector()
        self._deaths: dict[int, int] = {}  # of a shard, since its last new record
        self._num_finished: dict[int, int] = {}  # of a shard's requests, at its last death
        self._deaths_in_a_row = 0  # since any worker got anything done
        self._stop_teller = Teller(warn)

    def under_way(self) -> tuple[int, int]:
        workers = self._workers.values()
        return sum(worker.num_ok for worker in workers), sum(worker.num_failed for worker in workers)

    def run(self, on_step: Callable[[], None]) -> None:
        """Start workers, hand them shards and take their news until all shards are finished, or the run is to stop."""
        try:
            while not self._queue.is_finished or self._workers:
                on_step()
                self._share_out()
                for key, _ in self._selector.select(POLL_S):
                    self._hear(self._workers[key.fd])
                if self.is_stopping and not self._is_still_stopping():
                    return
        finally:
            for worker in self._workers.values():
                worker.close()
            self._workers.clear()
            self._selector.close()

    def _is_still_stopping(self) -> bool:
        """Return whether to wait on for workers that finish their step."""
        if not self._workers or self._stop_teller.waited_s >= STOP_WAIT_S:
            return False
        pids = ", ".join(str(worker.pid) for worker in self._workers.values())
        self._stop_teller.tell(f"waiting for workers to finish their step (processes {pids}); Ctrl-C ends them")
        return True

    def stop(self) -> None:
        if not self.is_stopping:
            self.is_stopping = True
            for worker in self._workers.values():
                worker.send({"stop": True})

    def _share_out(self) -> None:
        """Give a shard to every worker that has none, and start workers while there are shards for them."""
        if self.is_stopping:
            return
        for worker in [worker for worker in self._workers.values() if worker.is_ready and worker.shard < 0]:
            self._hand_out(worker)
        num_starting = sum(not worker.is_ready for worker in self._workers.values())
        while self._waiting_seats and num_starting < self._queue.num_waiting:
            worker = _Worker(self._waiting_seats.pop(0), self._folder.uri, self._options)
            self._workers[worker.channel.fileno()] = worker
            self._selector.register(worker.channel, selectors.EVENT_READ)
            num_starting += 1

    def _hand_out(self, worker: _Worker) -> None:
        shard = self._queue.take()
        if shard is not None:
            worker.shard, worker.attempt = shard, ""
            worker.send({"shard": shard})
        elif self._queue.is_finished:
            self._forget(worker)
            worker.send({"stop": True})
            worker.end()
            worker.close()

    def _forget(self, worker: _Worker) -> None:
        self._selector.unregister(worker.channel)
        del self._workers[worker.channel.fileno()]

    def _hear(self, worker: _Worker) -> None:
        try:
            message = worker.channel.receive(_MESSAGE_TIMEOUT_S)
        except (EOFError, OSError):
            self._bury(worker)
            return
        if "error" in message:
            raise EngineError(message["error"])
        if "ready" in message:
            worker.is_ready = True
        elif "attempt" in message:
            worker.attempt = message["attempt"]
        elif "ok" in message:
            if message["ok"] > worker.num_ok:
                self._deaths_in_a_row = 0
            worker.num_ok, worker.num_failed = message["ok"], message["failed"]
        elif "done" in message:
            self._finish(worker)

    def _finish(self, worker: _Worker) -> None:
        commit = read_commit(self._folder, worker.shard)
        if commit is None:  # removed under us
            self._queue.put_back(worker.shard)
        else:
            self._queue.finish(worker.shard, commit)
        worker.shard, worker.num_ok, worker.num_failed = -1, 0, 0
        self._deaths_in_a_row = 0

    def _bury(self, worker: _Worker) -> None:
        """Note how a worker ended, put its shard back, and free its seat."""
        self._forget(worker)
        status, words = worker.end(), printable(worker.last_words())
        worker.close()
        self._waiting_seats.append(worker.seat)
        if self.is_stopping:
            return
        self._deaths_in_a_row += 1
        if worker.shard >= 0:
            self._return_shard(worker, status)
        self._warn(f"a worker on {worker.seat.device} died ({_how(status)}){f': {words}' if words else ''}; replaced")
        if self._deaths_in_a_row >= DEATHS_TO_GIVE_UP + len(self._waiting_seats) + len(self._workers):
            raise EngineError(
                f"{self._deaths_in_a_row} workers in a row died before they got anything done, the last "
                f"{_how(status)}{f': {words}' if words else ''}; the same command tries again"
            )

    def _return_shard(self, worker: _Worker, status: int) -> None:
        shard = worker.shard
        if worker.attempt:
            note_death(self._folder, shard, worker.attempt, status)
        history = read_history(self._folder, shard)
        num_finished = len(history.records) + len(history.blamed)
        is_progress = num_finished > self._num_finished.get(shard, 0)
        self._num_finished[shard] = num_finished
        self._deaths[shard] = 1 if is_progress else self._deaths.get(shard, 0) + 1
        if self._deaths[shard] < DEATHS_TO_GIVE_UP:
            self._queue.put_back(shard)
        else:
            self._queue.give_up(shard)
            self._warn(f"shard {shard} is given up: {DEATHS_TO_GIVE_UP} workers died on it without a new record")


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


# -- inside a worker process ---------------------------------------------------------------------------


def serve() -> None:
    """Run the shards that a supervisor sends, and tell it of each, until it sends no more or is gone."""
    with contextlib.suppress(OSError):  # the supervisor is gone
        _Served(connect()).to_the_end()


class _Served:
    """The worker's side: a model that stays warm, and a thread that listens."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._shards: SimpleQueue[int | None] = SimpleQueue()
        self._is_stopped = False
        self._runner: ShardRunner | None = None
        self._told_at = 0.0

    def to_the_end(self) -> None:
        """Run the shards that the supervisor names, until it names no more or asks for an end; send what ended it."""
        setup = self._channel.receive(None)["run"]
        threading.Thread(target=self._listen, daemon=True).start()
        options = RunOptions.from_json(setup["options"])
        try:
            with ShardRunner(setup["uri"], finder=setup["finder"], options=options) as self._runner:
                self._channel.send({"ready": True})
                while (shard := self._shards.get()) is not None:
                    self._run(self._runner, shard)
        except ShardStopped:
            self._channel.send({"stopped": True})
        except Md3Error as error:
            self._channel.send({"error": str(error)})

    def _run(self, runner: ShardRunner, shard: int) -> None:
        self._told_at = 0.0
        runner.run(shard, should_stop=lambda: self._is_stopped, on_start=self._begin, on_progress=self._tell)
        self._channel.send({"done": shard})

    def _begin(self, shard: int, attempt: str) -> None:
        self._channel.send({"shard": shard, "attempt": attempt})

    def _tell(self, ok: int, failed: int) -> None:
        if time.monotonic() - self._told_at >= TELL_INTERVAL_S:
            self._told_at = time.monotonic()
            self._channel.send({"ok": ok, "failed": failed})

    def _listen(self) -> None:
        while True:  # in a thread of its own, so that a supervisor's death is noticed in the middle of a step
            try:
                message: dict[str, Any] = self._channel.receive(None)
            except (EOFError, OSError):
                os._exit(1)
            if "shard" in message:
                self._shards.put(message["shard"])
            else:
                self._is_stopped = True
                self._shards.put(None)
                if self._runner is not None and self._runner.is_loading:  # nothing to lose, and it may take minutes
                    os._exit(0)
