"""A run in its run folder, as the commands call it: plan it or go on with its plan, run its shards, export.

However many processes run it and in whichever form it began, the files that OUTPUT names come out the same.
The records file of a run that is exported is as good as a single process's journal, and back: a plain command
goes on from it, and a run folder takes it over where INPUT has grown.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from md3cli.config import ModelOptions, RunConfig
from md3cli.console import Progress, RunConsole
from md3cli.console import clock as duration
from md3cli.errors import DamagedPartError, EngineError, Md3Error, OutputError, UsageError
from md3cli.files import OutputLock, output_error
from md3cli.records import printable
from md3cli.run.model_handle import Engine, FoundModel, Model, check_skills
from md3cli.run.output import OutputPlan
from md3cli.run.run_info import OutputPaths, RunDocument, identity_of
from md3cli.scale.attempts import Teller
from md3cli.scale.bucket import Deliveries
from md3cli.scale.finish import Finish
from md3cli.scale.folder import RunFolder
from md3cli.scale.inspect import damaged_journals, reopen_damaged
from md3cli.scale.markers import RunOptions, write_run_options
from md3cli.scale.plan import Plan
from md3cli.scale.ray_cluster import check_installed
from md3cli.scale.start import FormerRun, Start
from md3cli.scale.workers import LocalDriver, ShardQueue, Supervisor, seats_of
from md3cli.signals import Interrupted, StopSignals
from md3cli.source.source import Source

LOOK_INTERVAL_S = 2.0  # between two looks at what others have committed
TELL_INTERVAL_S = 0.2
MOST_OWNERS_SHOWN = 3
SILENCE_S = 120.0  # without a new record, before a word on it; then after twice as long, and so on


class _Driver(Protocol):
    """What runs the shards of a queue: this process, worker processes, or a cluster."""

    @property
    def num_ok(self) -> int: ...
    @property
    def num_failed(self) -> int: ...
    def run(self, on_step: Callable[[], None]) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


def run_scaled(
    config: RunConfig,
    console: RunConsole,
    source: Source,
    outputs: OutputPlan,
    folder: RunFolder,
    find: Callable[[ModelOptions], FoundModel],
) -> int:
    """Do what `config` says in the run folder; returns the exit status, 0 or 3.

    Raises:
        Md3Error: the run could not be done; what was finished is on disk.
        Interrupted: a signal stopped it, in order.
    """
    _check_options(config)
    assert outputs.files is not None
    files = outputs.files
    with StopSignals() as stop, contextlib.ExitStack() as stack:
        with stop.interruptible():
            model = find(config.model)
            check_skills(model, config.requests)
        deliveries = Deliveries(config.output, files, folder)
        for path in (files.journal, deliveries.lock):
            _make_folder(path.parent)
        lock = OutputLock.acquire(deliveries.lock, deliveries.output, is_shared=config.scale.world_size > 1)
        stack.callback(lock.release)
        if config.scale.world_size == 1:
            folder.wip.remove_temps()
        _check_store(folder, config, console)
        deliveries.fetch(files.run_info)
        start = Start(folder, config, files, deliveries, source, model.identity, console.say, console.warn)
        former = FormerRun(folder, outputs, deliveries)
        if config.output.overwrite:
            former.set_aside()
            stack.callback(former.put_back)
        else:
            if config.scale.world_size == 1:
                former.put_back()
            start.check_records()
        document = None
        if config.scale.world_size == 1:
            document = _document(config, files, source, model, deliveries.address_of(files.run_info))
            deliveries.deliver(files.run_info)
        with stop.interruptible():
            plan = start.plan()
        if config.output.retry_failed:
            start.reopen(plan)
        if start.num_adopted:
            console.say(f"{start.num_adopted:,} records of an earlier start are taken over")
        write_run_options(folder, RunOptions(config.model, config.decode), config.argv)
        finish = Finish(config, console, outputs, folder, deliveries, plan, model.identity, document)
        give_way = partial(former.give_way, document)
        return _ScaledRun(config, console, folder, plan, model, stop, finish, give_way).to_the_end()


def _make_folder(folder: Path) -> None:
    """Raises OutputError: it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from error


def _check_options(config: RunConfig) -> None:
    """Raises UsageError: options that cannot go together; MissingExtraError: Ray is asked for and not installed."""
    scale = config.scale
    if not 0 <= scale.rank < scale.world_size:
        raise UsageError(f"--worker-rank {scale.rank} of --world-size {scale.world_size}: ranks count from 0")
    for name, is_set in (("--overwrite", config.output.overwrite), ("--retry-failed", config.output.retry_failed)):
        if is_set and scale.world_size > 1:
            raise UsageError(f"{name} is for one process; run it once without --world-size, then start the ranks")
    if scale.engine == "ray":
        if scale.world_size > 1 or scale.devices:
            raise UsageError("--engine ray places its workers itself; leave out --devices and --world-size")
        check_installed()


def _check_store(folder: RunFolder, config: RunConfig, console: RunConsole) -> None:
    """Try whether of two who put the same marker one is refused, which all rests on.

    Raises:
        OutputError: none is, and many processes would need it; or the store cannot be written at all.
    """
    if folder.store.has_put_if_absent():
        return
    what = f"{printable(folder.uri)}: the store replaces what it should refuse to replace (no conditional writes)"
    if config.scale.world_size > 1:
        raise OutputError(f"{what}, so ranks cannot share it; leave --world-size out, or choose another -o")
    console.warn(f"{what}; start no second run on this OUTPUT")


def _document(config: RunConfig, files: OutputPaths, source: Source, model: Model, shown: str) -> RunDocument:
    """run.json beside OUTPUT, which refuses another run's OUTPUT."""
    return RunDocument.begin(
        files.run_info,
        identity=identity_of(config.requests, model.identity, source.root),
        arguments=config.argv,
        root=source.root,
        is_resume=not config.output.overwrite,
        shown=shown,
        is_held=config.output.overwrite,
    )


class _ScaledRun:
    """The state of one start between its plan and its end."""

    def __init__(
        self,
        config: RunConfig,
        console: RunConsole,
        folder: RunFolder,
        plan: Plan,
        model: Model,
        stop: StopSignals,
        finish: Finish,
        give_way: Callable[[], None],
    ) -> None:
        """`give_way` is called once there are new records."""
        self._give_way = give_way
        self._config, self._console, self._folder, self._plan = config, console, folder, plan
        self._model, self._stop, self._finish = model, stop, finish
        self._queue = ShardQueue(folder, plan.shards, config.scale.rank, config.scale.world_size)
        self._looked_at = self._told_at = time.monotonic()
        self._others = Teller(console.say)
        self._silence = Teller(console.say, first_after_s=SILENCE_S, interval_s=SILENCE_S, growth=2.0)
        self._num_seen = -1  # records at the last look
        finish.begin(self._queue.commits)

    def to_the_end(self) -> int:
        """Run what is left, export, and note in run.json how it ended; returns the exit status.

        Raises:
            EngineError: shards are left that this start could not do.
            Interrupted: a signal stopped it; the user has been told how to resume.
        """
        status = 1
        try:
            for words in damaged_journals(self._folder, self._plan, self._queue.commits):
                self._console.warn(words)
            self._run_shards()
            try:
                status = self._export()
            except DamagedPartError:
                self._reopen_damaged()
                self._run_shards()
                status = self._export()
        except BaseException as error:
            if isinstance(error, Interrupted):
                status = error.exit_status
                self._finish.tell_how_to_resume(str(error), self._queue.commits)
            with contextlib.suppress(Md3Error):  # what ended the run is what is told
                self._finish.note(status, self._queue.commits)
            raise
        self._finish.note(status, self._queue.commits)
        self._finish.summarize(self._queue.commits)
        return status

    def _run_shards(self) -> None:
        try:
            with self._console.progress(self._plan.rows) as progress, contextlib.closing(self._driver()) as driver:
                driver.run(lambda: self._on_step(driver, progress))
        except Exception as error:
            if self._stop.received is None:
                raise
            self._console.warn(f"while stopping: {error}")  # what breaks once a signal has come breaks of the stop
        self._stop.check()
        if num_open := self._queue.num_open:
            why = "their workers kept dying" if self._queue.given_up else "their markers are gone again"
            raise EngineError(
                f"{num_open:,} of {self._plan.shards:,} shards are not done, for {why}; "
                "the same command tries them again"
            )

    def _export(self) -> int:
        self._give_way()  # also where nothing was asked
        with self._stop.interruptible():
            return self._finish.export(self._queue.commits)

    def _reopen_damaged(self) -> None:
        """Put shards whose parts are damaged back into the queue; the user is told."""
        sound = dict(self._queue.commits)
        for words in reopen_damaged(self._folder, self._plan, sound):
            self._console.warn(words)
        reopened = self._queue.commits.keys() - sound.keys()
        self._queue.reopen(reopened)
        self._finish.forget(reopened)

    def _driver(self) -> _Driver:
        config, options = self._config, RunOptions(self._config.model, self._config.decode)
        if config.scale.engine == "ray":
            from md3cli.scale.ray import RayDriver

            return RayDriver(self._folder, self._plan, self._queue, config)
        if config.scale.devices or config.scale.workers_per_device:
            devices = config.scale.devices or (config.model.device,)
            seats = seats_of(devices, config.scale.workers_per_device or 1)
            return Supervisor(self._folder, self._queue, options, seats, warn=self._console.warn)
        return LocalDriver(self._folder.uri, self._queue, options, lambda _: _Interruptible(self._model, self._stop))

    def _on_step(self, driver: _Driver, progress: Progress | None) -> None:
        """Between any two steps: look for a signal, for what others did, and tell how far the run is."""
        if self._stop.received is not None:
            driver.stop()
        if driver.num_ok or any(commit.ok for commit in self._queue.commits.values()):
            self._give_way()  # not of failures alone: pictures fail before a model that cannot be loaded is known
        now = time.monotonic()
        if self._config.scale.world_size > 1 and now - self._looked_at >= LOOK_INTERVAL_S:
            self._looked_at = now
            self._queue.refresh()
        if now - self._told_at >= TELL_INTERVAL_S:
            self._told_at = now
            self._tell_of_waiting(driver)
            self._finish.note_progress(self._queue.commits, driver.num_ok + driver.num_failed)
            if progress is not None:
                self._tell(driver, progress)

    def _tell_of_waiting(self, driver: _Driver) -> None:
        """Say, now and then, that nothing comes, and whose fault that is."""
        queue = self._queue
        num_records = sum(commit.num_records for commit in queue.commits.values()) + driver.num_ok + driver.num_failed
        if queue.is_waiting:
            shown = ", ".join(sorted(queue.owners)[:MOST_OWNERS_SHOWN])
            self._others.tell(f"waiting for {queue.num_open:,} shards that others run, such as {printable(shown)}")
        else:
            self._others.forget()
        if queue.is_waiting or num_records != self._num_seen:
            self._silence.forget()
        self._num_seen = num_records
        self._silence.tell(
            lambda: (
                f"no new record for {duration(self._silence.waited_s)}: a model is loading, an answer is long, "
                "or a device is not free; Ctrl-C stops in order, and the same command goes on"
            )
        )

    def _tell(self, driver: _Driver, progress: Progress) -> None:
        commits = self._queue.commits.values()
        num_under_way = driver.num_ok + driver.num_failed
        rows = sum(commit.rows for commit in commits)
        rows += num_under_way * self._plan.rows // max(self._plan.requests, 1)
        progress.update_to(rows, sum(commit.errors for commit in commits) + driver.num_failed)


class _Interruptible:
    """A model whose loading a signal may cut short: nothing is lost by that."""

    def __init__(self, model: Model, stop: StopSignals) -> None:
        self.identity, self.crop_config = model.identity, model.crop_config
        self._model, self._stop = model, stop

    def load(self) -> Engine:
        with self._stop.interruptible():
            return self._model.load()
