"""A run, from INPUT to OUTPUT: rows, pictures decoded ahead, engine, records in input order, files.

`run` chains the stages in one thread (only pictures are decoded elsewhere, in worker processes) and
owns what happens at the end, whichever way it comes. Memory does not grow with the number of images:
rows are read as they are needed, a fixed number of pictures is decoded ahead, and records are
written as soon as all before them are.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence

from md3cli.config import RunConfig
from md3cli.console import Progress, RunConsole, Summary, loading, print_document
from md3cli.errors import Md3Error
from md3cli.finished.failures import Failure, NamedFailures, command_for_all
from md3cli.records import RETRYABLE, RecordDict, Request, SourceRow
from md3cli.run.feed import Feed, make_pool, rows_ahead
from md3cli.run.journal import Journal
from md3cli.run.journal_scan import damage_words
from md3cli.run.model_handle import Engine, Model
from md3cli.run.order import OrderedRecords
from md3cli.run.output import (
    TABLE,
    Output,
    publish,
    written_paths,
)
from md3cli.run.record_index import RequestIds, Unasked
from md3cli.run.run_info import RunCounts, RunDocument, Timeline
from md3cli.signals import Interrupted, StopSignals
from md3cli.source.source import Source, check_found, empty_words

STATUS_FAILED_RECORDS = 3
WAIT_SLICE_S = 0.2  # of waiting for a picture, so that a signal is seen soon
# How far answers may be ahead of the oldest that is missing. It bounds memory; a smaller number leaves the engine idle
# behind one long answer: at 4 to 8 it is 20 to 50 % slower where one answer in a hundred is ten times as long.
BATCHES_AHEAD = 32


class LocalRun:
    """The state of one run between its start and its end."""

    def __init__(
        self,
        config: RunConfig,
        console: RunConsole,
        source: Source,
        model: Model,
        output: Output,
        stop: StopSignals,
        first_write: contextlib.AbstractContextManager[None],
    ) -> None:
        """`first_write` is entered around the first write of records, and never where nothing is written."""
        self.config, self.console, self.source = config, console, source
        self.model, self.output, self.stop = model, output, stop
        self.first_write = first_write
        self.summary = Summary()
        self.engine: Engine | None = None
        self.failures = NamedFailures()
        self.num_damage_told = len(output.journal.damaged) if output.journal is not None else 0
        self.batch_sizes: list[int] = []  # the planned one, then each smaller one that memory asked for
        self.started_at = time.monotonic()
        self.records = OrderedRecords(model.identity, self._write, self.summary, output.early)
        self.timeline = Timeline(output.document.timeline if output.document is not None else ())

    def to_the_end(self) -> int:
        """Run, publish, tell; the exit status."""
        status = 1
        try:
            with self._feed() as feed, self._progress() as progress:
                self._drive(feed, progress)
            if not self._num_requests:
                check_found(self.source, self.config.source, is_allowed=self.config.allow_empty)
            with self.stop.interruptible():
                self._publish()
            status = self._status()
        except Interrupted as interrupt:
            status = interrupt.exit_status
            self._note_end(status)
            self._tell_how_to_resume(interrupt)
            raise
        except (Md3Error, BrokenPipeError):
            with contextlib.suppress(Md3Error):
                self._note_end(status)
            raise
        self._note_end(status)
        self._summarize()
        return status

    @contextlib.contextmanager
    def _feed(self) -> Iterator[Feed]:
        journal, retry_failed = self.output.journal, self.config.output.retry_failed

        def is_done(record_id: str, row: SourceRow, request: Request) -> bool:
            return journal is not None and journal.is_done(record_id, row, request, retry_failed=retry_failed)

        if journal is not None:
            self.source.watched_lines = frozenset(journal.lines_of_bad_rows())

        with make_pool(self.config, self.model.crop_config) as pool:
            yield Feed(
                self.source.rows_so_far(),
                ids=RequestIds(self.model.identity, journal.found if journal is not None else None),
                is_done=is_done,
                pool=pool,
                num_ahead=rows_ahead(self.model.crop_config),
                fail=self.records.fail,
                recall=self.records.recall,
                reading=self.stop.interruptible,
                wait_for_row=self.source.wait,
            )

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Progress | None]:
        total = self.source.count_rows() if self.console.has_progress else None
        with self.console.progress(total) as progress:
            yield progress

    def _drive(self, feed: Feed, progress: Progress | None) -> None:
        """Keep the engine full until nothing is left; looks for a signal between any two steps."""
        while True:
            self.stop.check()
            self._fill_engine(feed, progress)
            if self.engine is None or not self.engine.has_work:
                self._flush(feed, progress)
                if feed.is_exhausted:
                    if self.output.early is not None:
                        self.output.early.remove()
                    return
                feed.wait(WAIT_SLICE_S)
                continue
            for answer in self.engine.step():
                self.records.answer(answer)
            self._watch_memory()
            self._flush(feed, progress)

    def _fill_engine(self, feed: Feed, progress: Progress | None) -> None:
        while self.engine is None or (self.engine.wants_more and self._is_near_order()):
            ready = feed.poll()
            if ready is None:
                return
            if self.engine is None:
                self.engine = self._load(progress)
            self.records.expect(ready.ticket)
            self.engine.add(ready.ticket.key, ready.picture, ready.ticket.request)

    def _watch_memory(self) -> None:
        """Tell, once, that the batch did not fit the device's memory; the engine has made it smaller by itself."""
        assert self.engine is not None
        size = self.engine.batch_size
        if size == self.batch_sizes[-1]:
            return
        if len(self.batch_sizes) == 1:
            self.console.warn(
                f"out of memory with a batch of {self.batch_sizes[0]}: going on with {size}, and less where needed; "
                f"--batch-size {size} saves the tries next time"
            )
        self.batch_sizes.append(size)

    def _is_near_order(self) -> bool:
        """False while the oldest missing answer is so late that the others should wait for it."""
        assert self.engine is not None
        return self.records.num_ahead < BATCHES_AHEAD * self.engine.batch_size or not self.engine.has_work

    def _load(self, progress: Progress | None) -> Engine:
        started = time.monotonic()
        with self.stop.interruptible(), loading(progress):
            engine = self.model.load()
        self.summary.load_s = time.monotonic() - started
        self.batch_sizes = [engine.batch_size]
        return engine

    def _flush(self, feed: Feed, progress: Progress | None) -> None:
        self.records.flush()
        self._note_progress()
        if progress is not None:
            progress.update_to(self.summary.num_images + feed.num_rows_done_before, self.summary.num_failed)
        self.summary.num_done_before = feed.num_done_before

    def _note_progress(self, *, is_last: bool = False) -> None:
        num_done = self.summary.num_ok + self.summary.num_failed
        self.timeline.note(time.monotonic() - self.started_at, num_done, is_last=is_last)

    def _write(self, records: Sequence[RecordDict]) -> None:
        if records and self.engine is None and self.output.is_replacing:
            self.engine = self._load(None)  # failures come before it: the former records stay where it cannot be
        first_write, self.first_write = self.first_write, contextlib.nullcontext()
        with first_write:
            self.output.write(records)
        for record in records:
            self.failures.note(record)
        if self.console.is_verbose and self.output.plan.stdout != TABLE:
            for record in records:
                if record["error"] is not None:
                    self.console.warn(f"{record['image']}: {record['error']['type']}: {record['error']['message']}")

    # -- the end -----------------------------------------------------------------------------------

    def _publish(self) -> None:
        journal = self.output.journal
        if journal is None:
            return
        journal.settle(self._unasked() if journal.has_unasked else None, self._before_rewrite)
        self._tell_damage()
        self._note_end(None)  # a report made below tells of this run
        for document in self.output.plan.documents:
            for note in publish(document, journal.path, self.config, self.source.root):
                self.console.say(f"{document.format}: {note}")
            if self.output.plan.stdout is not None:
                print_document(document.path)

    def _unasked(self) -> Unasked:
        """What becomes of the records in OUTPUT that INPUT does not name."""
        source = self.source
        return Unasked(
            self.config.requests or (self.config.defaults,),
            self.model.identity,
            source.asks_nothing_else,
            frozenset(source.readable_lines),
            bool(source.readable_lines),
        )

    def _before_rewrite(self) -> None:
        if self.output.document is not None:
            self.output.document.forget_records()

    def _tell_damage(self) -> None:
        """Name the damaged lines that were found while the run came through INPUT."""
        journal = self.output.journal
        assert journal is not None
        if found := damage_words(journal.path, journal.damaged[self.num_damage_told :]):
            self.console.warn(found)
        self.num_damage_told = len(journal.damaged)

    def _counts(self) -> RunCounts:
        """Requests by outcome in all of OUTPUT."""
        journal = self.output.journal
        if journal is None:
            return RunCounts(self.summary.num_ok, self.summary.num_failed, self.summary.failed)
        failed = journal.num_failed
        return RunCounts(journal.num_ok, sum(failed.values()), failed)

    def _status(self) -> int:
        counts = self._counts()
        is_bad = self.config.fail_on.is_met(counts.failed, counts.ok + counts.failed)
        return STATUS_FAILED_RECORDS if is_bad else 0

    @property
    def _num_requests(self) -> int:
        """Requests of INPUT so far, done now or before."""
        return self.summary.num_ok + self.summary.num_failed + self.summary.num_done_before

    def _stages(self) -> Mapping[str, float]:
        return self.engine.stage_seconds() if self.engine is not None else {}

    def _note_end(self, status: int | None) -> None:
        self._note_progress(is_last=True)
        if self.output.journal is not None:
            self._tell_damage()
            self.output.journal.sync()
            if self.output.document is not None:
                if status in (None, 0, STATUS_FAILED_RECORDS):
                    self._note_records(self.output.journal, self.output.document)
                stages_s = {"load": self.summary.load_s, **self._stages()}
                self.output.document.finish(self._counts(), stages_s, status, self.timeline.points, self.batch_sizes)

    def _note_records(self, journal: Journal, document: RunDocument) -> None:
        """Keep the records file's digest, unless this start has left alone what an earlier one kept it of."""
        if journal.has_changed or not document.has_records:
            document.note_records(journal.digest())

    def _summarize(self) -> None:
        summary = self.summary
        summary.elapsed_s = time.monotonic() - self.started_at
        summary.stages_s = self._stages()
        summary.skipped = self.source.skipped
        summary.num_failed_before = self._counts().failed - summary.num_failed
        if self.output.plan.files is not None and self.output.plan.stdout is None:
            summary.outputs = written_paths(self.output.plan)
            summary.next_command = self._next_command()
            summary.failures_command = command_for_all(self.output.plan.files.journal)
        summary.failures = self._named_failures()
        if not self._num_requests:
            self.console.warn(empty_words(self.config.source))
        self.console.summarize(summary)

    def _named_failures(self) -> list[Failure]:
        """Some of this start's failures; of earlier ones only where it has none."""
        if self.output.journal is not None and not self.failures.found and self._counts().failed:
            # The run is over and its counts are told: a file that cannot be read now costs the names alone.
            with contextlib.suppress(OSError), open(self.output.journal.path, "rb") as lines:
                self.failures.note_lines(lines)
        return self.failures.found

    def _next_command(self) -> str | None:
        assert self.output.plan.files is not None
        if RETRYABLE & {kind for kind, count in self._counts().errors.items() if count}:
            return shlex.join([*_without_overwrite(self.config.argv), "--retry-failed"])
        if self.output.plan.documents:
            return None
        return shlex.join(["md3", "report", str(self.output.plan.files.journal), "-o", "report.html"])

    def _tell_how_to_resume(self, interrupt: Interrupted) -> None:
        done = self.summary.num_ok + self.summary.num_failed
        if self.output.journal is None or self.output.plan.stdout is not None:
            self.console.say(f"stopped by {interrupt} after {done:,} records; with -o OUTPUT a run can be resumed")
            return
        self.console.say(f"stopped by {interrupt}: {done:,} new records are in {self.output.journal.path}")
        self.console.say(f"resume with: {shlex.join(_without_overwrite(self.config.argv))}", style="cyan")


def _without_overwrite(argv: Sequence[str]) -> list[str]:
    """The command that goes on where this one stopped."""
    return [argument for argument in argv if argument != "--overwrite"]
