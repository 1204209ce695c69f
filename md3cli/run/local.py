"""A run in this process, from INPUT to OUTPUT: rows, pictures decoded ahead, engine, records in input order, files.

`LocalRun` chains the stages in one thread, while worker processes decode pictures, and says how the run ended,
whichever way that was. Memory does not grow with the number of images: rows are read as they are needed, a fixed number
of pictures is decoded ahead, and a record is written as soon as all before it are. Apart from pipeline.py, because that
only chooses a kind of run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from md3cli.config import RunConfig
from md3cli.console import RunConsole, print_document
from md3cli.console.progress import Progress, loading
from md3cli.console.summary import Failure, Summary
from md3cli.errors import Md3Error
from md3cli.exporters.early import EarlyDrawings
from md3cli.images.pool import PicturePool
from md3cli.records import RecordDict, Request, SourceRow
from md3cli.refine.follow import FollowUps, may_follow
from md3cli.run.drive import drive
from md3cli.run.feed import Feed, Following, make_pool, rows_ahead
from md3cli.run.finish import STATUS_FAILED_RECORDS, NamedFailures, exit_status, summarize, tell_how_to_resume
from md3cli.run.live import LiveEngine
from md3cli.run.log import damage_words
from md3cli.run.model_handle import LazyEngine, Model
from md3cli.run.order import OrderedRecords
from md3cli.run.output import ANSWER, TABLE, Output, export_options, publish, say_once, words_of_others, written_paths
from md3cli.run.record_index import RequestIds, Unasked
from md3cli.run.run_info import RunCounts, Timeline
from md3cli.signals import Interrupted, StopSignals
from md3cli.source.emptiness import check_found
from md3cli.source.source import Source


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
        self.live = console.live_text() if output.plan.stdout == ANSWER else None
        load = self._while_loading
        self.engine = LazyEngine(model, load) if self.live is None else LiveEngine(model, load, self.live)
        self.feed: Feed | None = None
        self.progress: Progress | None = None
        self.is_memory_told = False
        self.failures = NamedFailures()
        self.num_damage_told = len(output.journal.damaged) if output.journal is not None else 0
        self.started_at = time.monotonic()
        self.records = OrderedRecords(
            model.identity, self._write, self.summary, output.waiting, self._on_flush, config.refinement.labels
        )
        self.early = self._early_drawings()
        self.timeline = Timeline(output.document.timeline if output.document is not None else ())

    def to_the_end(self) -> int:
        """Run, publish, tell how it went, and return the exit status."""
        with self.early or contextlib.nullcontext():
            return self._to_the_end()

    def _to_the_end(self) -> int:
        status = 1
        try:
            total = self._count_input()
            with make_pool(self.config, self.model.crop_config) as pool, self._shown(total):
                self.feed = self._make_feed(pool)
                self._expect_what_is_done()
                drive(self.feed, self.engine, self.records, self.stop.check)
                self.summary.answering_s = time.monotonic() - self.started_at
            if self.early is not None:
                self.early.stop()
            if self.output.waiting is not None:
                self.output.waiting.remove()
            if not self._num_requests:
                check_found(self.source, self.config.source, is_allowed=self.config.allow_empty)
            with self.stop.interruptible():
                self._publish()
            status = exit_status(self.config, self._counts())
        except Interrupted as interrupt:
            status = interrupt.exit_status
            self.output.print_rest()
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

    def _early_drawings(self) -> EarlyDrawings | None:
        """Return what draws overlays while the run goes on, where it writes some and no picture has records already."""
        output = self.config.output
        overlay = next((document for document in self.output.plan.documents if document.format == "overlay"), None)
        if overlay is None or self.output.journal is None or output.add or output.retry_failed:
            return None
        return EarlyDrawings(self.output.journal.path, overlay.path, export_options(self.config, self.source.root))

    def _count_input(self) -> int | None:
        """Return how many rows INPUT has, where somebody wants to know and it is soon counted; note the requests."""
        document = self.output.document
        if document is None and not self.console.has_progress:
            return None
        counted = self.source.count()
        if document is not None:
            document.note_requests(None if counted is None else counted.requests)
        return None if counted is None else counted.rows

    def _make_feed(self, pool: PicturePool) -> Feed:
        journal, retry_failed = self.output.journal, self.config.output.retry_failed
        following = self._following()

        def is_done(record_id: str, row: SourceRow, request: Request) -> bool:
            return journal is not None and journal.is_done(
                record_id, row, request, retry_failed=retry_failed, is_visit=following is None
            )

        if journal is not None:
            self.source.watched_lines = frozenset(journal.lines_of_bad_rows())

        return Feed(
            self.source.rows_so_far(),
            next_id=RequestIds(self.model.identity, journal.found if journal is not None else None).next_id,
            is_done=is_done,
            pool=pool,
            num_ahead=rows_ahead(self.model.crop_config),
            fail=self.records.fail,
            recall=self.records.recall,
            reading=self.stop.interruptible,
            wait_for_row=self.source.wait,
            following=following,
        )

    def _following(self) -> Following | None:
        """Return how records are followed where they may ask more; then they are written in another order."""
        journal, records = self.output.journal, self.records
        if not may_follow(self.config, self.source):
            return None
        records.follow = lambda ticket, record: self.feed.follow(ticket, record) if self.feed is not None else None
        if journal is not None:
            records.visit = journal.visit
        return Following(
            FollowUps.of(self.config),
            self.model.identity,
            record_of=lambda record_id: journal.record(record_id) if journal is not None else None,
            passed=records.pass_by,
            grown=records.grown,
        )

    def _expect_what_is_done(self) -> None:
        """Tell the bar how many rows an earlier start finished, before the feed comes by them."""
        journal = self.output.journal
        if self.progress is None or journal is None:
            return
        num_done = journal.num_ok + (0 if self.config.output.retry_failed else sum(journal.num_failed.values()))
        self.progress.expect(num_before=num_done // self._requests_a_row)

    @property
    def _requests_a_row(self) -> int:
        return max(1, len(self.config.requests))

    @contextlib.contextmanager
    def _shown(self, total: int | None) -> Iterator[None]:
        """Show progress while the run goes on; a single answer has its line ended instead, however that goes."""
        if self.live is None:
            with self.console.progress(total) as self.progress:
                yield
            return
        try:
            yield
        finally:
            self.live.end()

    @contextlib.contextmanager
    def _while_loading(self) -> Iterator[None]:
        words = "loading the model and compiling" if self.config.model.compile else "loading the model"
        if self.live is not None:
            self.live.wait(words)
        with self.stop.interruptible(), loading(self.progress, words):
            yield

    def _on_flush(self) -> None:
        assert self.feed is not None
        self._tell_memory()
        self._note_progress()
        if self.progress is not None:
            before, summary = self.feed.num_rows_done_before, self.summary
            self.progress.expect(at_once=self.engine.batch_size // self._requests_a_row)
            self.progress.update_to(summary.num_rows + before, summary.num_rows_failed, before)
        self.summary.num_done_before = self.feed.num_done_before

    def _tell_memory(self) -> None:
        """Tell, once, that the batch did not fit the device's memory; the engine has made it smaller by itself."""
        if self.is_memory_told or len(self.engine.batch_sizes) < 2:
            return
        self.is_memory_told = True
        planned, size = self.engine.batch_sizes[:2]
        self.console.warn(
            f"out of memory with a batch of {planned}: going on with {size}, and less where needed; "
            f"--batch-size {size} saves the tries next time"
        )

    def _note_progress(self, *, is_last: bool = False) -> None:
        num_done = self.summary.num_ok + self.summary.num_failed
        self.timeline.note(time.monotonic() - self.started_at, num_done, is_last=is_last)

    def _write(self, records: Sequence[RecordDict]) -> None:
        if records and self.output.is_replacing:
            self.engine.load()  # failures come before it: the former records stay where it cannot be
        first_write, self.first_write = self.first_write, contextlib.nullcontext()
        with first_write:
            self.output.write(records)
        if self.early is not None:
            self.early.add(records)
        is_told = self.console.is_verbose and self.output.plan.stdout != TABLE
        for record in records:
            if record["error"] is not None:
                self.failures.note(record)
                if is_told:
                    self.console.warn(f"{record['image']}: {record['error']['type']}: {record['error']['message']}")

    def _publish(self) -> None:
        journal = self.output.journal
        if journal is None:
            self.output.print_rest()
            return
        run_info = self.output.document
        journal.settle(
            self._unasked() if journal.has_unasked else None,
            self._before_rewrite,
            has_grown=may_follow(self.config, self.source) or (run_info is not None and run_info.has_grown),
        )
        self._tell_damage()
        self._note_end(None)  # a report made below tells of this run
        notes: list[tuple[str, str]] = []
        for document in self.output.plan.documents:
            found = publish(document, journal.path, self.config, self.source.root, self.console, self.early)
            notes += [(document.format, note) for note in found]
            if self.output.plan.stdout is not None:
                print_document(document.path)
        say_once(notes, self.console)
        if self.config.output.add and journal.has_changed and (words := words_of_others(self.output.plan)):
            self.console.warn(words)

    def _unasked(self) -> Unasked:
        """Return what decides about the records in OUTPUT that INPUT does not name."""
        source, everything = self.source, self.config.everything
        listed = () if everything is None else (everything.template,)
        return Unasked(
            (*(self.config.requests or (self.config.defaults,)), *self.config.then, *listed),
            self.model.identity,
            source.asks_nothing_else,
            frozenset(source.readable_lines),
            bool(source.readable_lines),
            self.config.pad,
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
        """Count the requests in all of OUTPUT by outcome."""
        journal = self.output.journal
        if journal is None:
            return RunCounts(self.summary.num_ok, self.summary.num_failed, self.summary.failed)
        failed = journal.num_failed
        return RunCounts(journal.num_ok, sum(failed.values()), failed)

    @property
    def _num_requests(self) -> int:
        """Requests of INPUT so far, done now or before."""
        return self.summary.num_ok + self.summary.num_failed + self.summary.num_done_before

    def _note_end(self, status: int | None) -> None:
        self._tell_memory()
        self._note_progress(is_last=True)
        if self.output.journal is not None:
            self._tell_damage()
            self.output.journal.sync()
            if self.output.document is not None:
                document, journal = self.output.document, self.output.journal
                is_over = status in (None, 0, STATUS_FAILED_RECORDS)
                if is_over and (journal.has_changed or not document.has_records):  # else an earlier digest still holds
                    document.note_records(journal.digest())
                stages_s = {"load": self.engine.load_s, **self.engine.stage_seconds()}
                document.finish(self._counts(), stages_s, status, self.timeline.points, self.engine.batch_sizes)

    def _summarize(self) -> None:
        summary = self.summary
        summary.writing_s = time.monotonic() - self.started_at - summary.answering_s
        summary.load_s, summary.stages_s = self.engine.load_s, self.engine.stage_seconds()
        summary.skipped = self.source.skipped
        summary.num_failed_before = self._counts().failed - summary.num_failed
        if self.output.plan.files is not None and self.output.plan.stdout is None:
            summary.outputs = written_paths(self.output.plan)
        summary.failures = self._named_failures()
        if self.live is not None and summary.num_ok and not self.console.is_verbose:
            return  # the answer is all that was asked for
        is_empty = not self._num_requests
        summarize(self.config, self.console, summary, self.output.plan, self._counts(), is_empty=is_empty)

    def _named_failures(self) -> list[Failure]:
        """Return some of this start's failures, or of earlier starts' where it has none."""
        if self.output.journal is not None and not self.failures.found and self._counts().failed:
            # The run is over and its counts are told: a file that cannot be read now costs the names alone.
            with contextlib.suppress(OSError), open(self.output.journal.path, "rb") as lines:
                self.failures.note_lines(lines)
        return self.failures.found

    def _tell_how_to_resume(self, interrupt: Interrupted) -> None:
        if self.live is not None:
            self.console.say(f"stopped by {interrupt}")
            return
        done = self.summary.num_ok + self.summary.num_failed
        if self.output.journal is None or self.output.plan.stdout is not None:
            self.console.say(f"stopped by {interrupt} after {done:,} records; with -o OUTPUT a run can be resumed")
            return
        tell_how_to_resume(self.config, self.console, str(interrupt), done, str(self.output.journal.path))
