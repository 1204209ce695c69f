"""A run in its run folder: plan it or go on with its plan, run its shards, export. Loaded only where one is asked for.

However many processes run it and in whichever form it began, the files that OUTPUT names come out the same.
The records file of a run that is exported is as good as a single process's journal, and back: a plain command
goes on from it, and a run folder takes it over where INPUT has grown.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

from md3cli.config import ModelOptions, RunConfig
from md3cli.console import RunConsole
from md3cli.console.progress import Progress
from md3cli.console.progress import clock as duration
from md3cli.errors import DamagedPartError, EngineError, Md3Error, OutputError, UsageError
from md3cli.files import OutputLock, translate_errors
from md3cli.records import printable
from md3cli.run.model_handle import Model, check_skills
from md3cli.run.output import OutputPlan
from md3cli.run.run_info import RunDocument
from md3cli.scale.attempts import Teller
from md3cli.scale.finish import Finish
from md3cli.scale.folder import RunFolder
from md3cli.scale.inspect import damaged_journals, reopen_damaged
from md3cli.scale.markers import write_run_options
from md3cli.scale.plan import Plan
from md3cli.scale.ray_cluster import check_installed
from md3cli.scale.start import FormerRun, Start
from md3cli.scale.workers import Driver, LocalDriver, ShardQueue, Supervisor, seats_of
from md3cli.signals import Interrupted, StopSignals
from md3cli.source.source import Source

LOOK_INTERVAL_S = 2.0  # between two looks at what others have committed
TELL_INTERVAL_S = 0.2
ROWS_AT_ONCE = 64  # that may come from workers together, as far as time left goes
MOST_OWNERS_SHOWN = 3
SILENCE_S = 120.0  # without a new record, before a word on it; then after twice as long, and so on


def run_scaled(
    config: RunConfig,
    console: RunConsole,
    source: Source,
    outputs: OutputPlan,
    folder: RunFolder,
    find: Callable[[ModelOptions], Model],
) -> int:
    """Do what `config` says in the run folder; return the exit status, 0 or 3.

    Raises:
        Md3Error: the run could not be done; what was finished is on disk.
        Interrupted: a signal stopped it, in order.
    """
    _check_options(config)
    with StopSignals() as stop, contextlib.ExitStack() as stack:
        with stop.interruptible():
            model = find(config.model)
            check_skills(model, config.may_be_asked)
        start = Start(config, console, source, outputs, folder, model)
        files, deliveries, former = start.files, start.deliveries, FormerRun(start)
        for path in (files.journal, deliveries.lock):
            with translate_errors(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
        lock = OutputLock.acquire(deliveries.lock, deliveries.output, is_shared=not start.is_alone)
        stack.callback(lock.release)
        if start.is_alone:
            folder.wip.remove_temps()
        _check_store(folder, config, console)
        deliveries.fetch(files.run_info)
        if config.output.overwrite:
            former.set_aside()
            stack.callback(former.put_back)
        else:
            if start.is_alone:
                former.put_back()
            start.check_records()
        document = None
        if start.is_alone:
            document = start.begin_document(source.root)
            deliveries.deliver(files.run_info)
        with stop.interruptible():
            plan = start.plan()
        start.reopen(plan)
        if start.num_adopted:
            console.say(f"{start.num_adopted:,} records of an earlier start are taken over")
        write_run_options(folder, start.run_options, config.argv)
        return _ScaledRun(start, plan, stop, former, document).to_the_end()


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
    """Try whether the store refuses the second of two who put the same marker: on that exactly-once rests.

    Raises:
        OutputError: none is, and many processes would need it; or the store cannot be written at all.
    """
    if folder.store.has_put_if_absent():
        return
    what = f"{printable(folder.uri)}: the store replaces what it should refuse to replace (no conditional writes)"
    if config.scale.world_size > 1:
        raise OutputError(f"{what}, so ranks cannot share it; leave --world-size out, or choose another -o")
    console.warn(f"{what}; start no second run on this OUTPUT")


class _ScaledRun:
    """The state of one start between its plan and its end."""

    def __init__(
        self, start: Start, plan: Plan, stop: StopSignals, former: FormerRun, document: RunDocument | None
    ) -> None:
        """`former` gives way once there are new records."""
        self._start, self._plan, self._stop, self._former, self._document = start, plan, stop, former, document
        self._config, self._console, self._folder = start.config, start.console, start.folder
        self._queue = ShardQueue(self._folder, plan.shards, self._config.scale.rank, self._config.scale.world_size)
        self._finish = Finish(start, plan, document, self._queue.commits)
        self._looked_at = self._told_at = time.monotonic()
        self._rows_before = 0  # of shards that were committed when this start began
        self._others = Teller(self._console.say)
        self._silence = Teller(self._console.say, first_after_s=SILENCE_S, interval_s=SILENCE_S, growth=2.0)
        self._num_seen = -1  # records at the last look

    def to_the_end(self) -> int:
        """Run what is left, export, note in run.json how it ended, and return the exit status.

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
                self._finish.tell_how_to_resume(str(error))
            with contextlib.suppress(Md3Error):  # what ended the run is what is told
                self._finish.note(status)
            raise
        self._finish.note(status)
        self._finish.summarize()
        return status

    def _run_shards(self) -> None:
        try:
            with self._console.progress(self._plan.rows) as progress:
                self._rows_before = self._rows_committed()
                if progress is not None:
                    # Shards that others run are seen when they are done; how many rows workers hold is their matter.
                    at_once = ROWS_AT_ONCE if self._start.is_alone else self._plan.rows // max(self._plan.shards, 1)
                    progress.expect(at_once=at_once, num_before=self._rows_before)
                driver = self._driver()
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
        self._former.give_way(self._document)  # also where nothing was asked
        with self._stop.interruptible():
            return self._finish.export()

    def _reopen_damaged(self) -> None:
        """Put shards whose parts are damaged back into the queue, and tell the user."""
        sound = dict(self._queue.commits)
        for words in reopen_damaged(self._folder, self._plan, sound):
            self._console.warn(words)
        reopened = self._queue.commits.keys() - sound.keys()
        self._queue.reopen(reopened)
        self._finish.forget(reopened)

    def _driver(self) -> Driver:
        config, options = self._config, self._start.run_options
        if config.scale.engine == "ray":
            from md3cli.scale.ray import RayDriver

            return RayDriver(self._folder, self._plan, self._queue, config.scale, config.model.device)
        if config.scale.devices or config.scale.workers_per_device:
            devices = config.scale.devices or (config.model.device,)
            seats = seats_of(devices, config.scale.workers_per_device or 1)
            return Supervisor(self._folder, self._queue, options, seats, warn=self._console.warn)
        return LocalDriver(self._folder.uri, self._queue, options, self._start.model, self._stop.interruptible)

    def _on_step(self, driver: Driver, progress: Progress | None) -> None:
        """Look for a signal and for what others did, and tell how far the run is; called between any two steps."""
        if self._stop.received is not None:
            driver.stop()
        num_ok, num_failed = driver.under_way()
        commits = self._queue.commits.values()
        if num_ok or any(commit.ok for commit in commits):
            # Not of failures alone: pictures fail before a model that cannot be loaded is known.
            self._former.give_way(self._document)
        now = time.monotonic()
        if not self._start.is_alone and now - self._looked_at >= LOOK_INTERVAL_S:
            self._looked_at = now
            self._queue.refresh()
        if now - self._told_at >= TELL_INTERVAL_S:
            self._told_at = now
            self._tell_of_waiting(num_ok + num_failed)
            self._finish.note_progress(num_ok + num_failed)
            if progress is not None:
                # Requests are counted, and of an unfinished shard nothing else: a bad picture fails all its requests.
                children = sum(commit.children for commit in commits) / max(self._rows_committed(), 1)
                requests_a_row = max(self._plan.requests / max(self._plan.rows, 1) + children, 1)
                failed = sum(commit.errors for commit in commits) + num_failed
                rows = self._rows_committed() + int((num_ok + num_failed) / requests_a_row)
                rows = min(rows, self._plan.rows)  # how many children the first shard has nobody knows
                progress.update_to(rows, math.ceil(failed / requests_a_row), self._rows_before)

    def _rows_committed(self) -> int:
        return sum(commit.rows for commit in self._queue.commits.values()) // len(self._plan.each)

    def _tell_of_waiting(self, num_under_way: int) -> None:
        """Say, now and then, that nothing comes, and whose fault that is."""
        queue = self._queue
        num_records = sum(commit.num_records for commit in queue.commits.values()) + num_under_way
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
