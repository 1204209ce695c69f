"""Running one shard of a plan to its commit, with a model that stays warm: what every way of running shares.

    with ShardRunner(run_uri) as runner:      # in each process (or Ray actor); loads nothing yet
        result = runner.run(shard)            # -> ShardResult; the model is loaded by the first that needs it

`run_uri` is the path or URL of the run folder (`DIR/.md3run`) with its plan and run.json in it. `run` returns at once
for a shard that is committed, takes over what earlier attempts finished, and may run anywhere at the same time as
another `run` of the same shard: the first to commit wins, and the other gets its result. `run` raises Md3Error where
the run cannot go on here (no model, no disk), ShardStopped where `should_stop` said so; a bad picture or request is an
error record, never an exception.

What is known to kill workers becomes error records first. What was under way when a worker died is asked alone, one by
one, so that only the culprit can be blamed. The rest fills the batches. Records go to the attempt's journal as they
come, in any order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import NamedTuple, Self, cast

from md3cli.config import ModelOptions
from md3cli.errors import EngineError
from md3cli.images.pool import PicturePool
from md3cli.records import OK_TAIL, Answer, RecordDict, Request, RowFailure, SourceRow
from md3cli.refine.follow import FollowUps
from md3cli.run.drive import drive
from md3cli.run.feed import Feed, Following, Ticket, make_decode_pool, rows_ahead
from md3cli.run.journal import encode_record
from md3cli.run.model_handle import LazyEngine, Model
from md3cli.run.order import record_of
from md3cli.scale.attempts import AttemptJournal, ShardHistory, forget_attempts, keep_damaged_lines, read_history
from md3cli.scale.children import Asked, Families, is_line_of
from md3cli.scale.folder import METRICS, RunFolder, host_name, new_attempt, open_run_folder, part_name
from md3cli.scale.markers import Commit, RunOptions, put_commit, read_commit, read_run_options
from md3cli.scale.plan import PlannedRow, PlanReader

BLAME = RowFailure("model", "the worker process died twice on this request")
FINDER = "md3cli.run.model_handle:find_model"  # `module:function`, ModelOptions -> Model; tests name another


class ShardStopped(Exception):
    """The shard was left because that was asked for; not a failure."""


class ShardAttempt:
    """One attempt at a shard, the sink of its loop; `lines` are the finished records by id, each with its newline."""

    def __init__(
        self,
        history: ShardHistory,
        journal: AttemptJournal,
        pool: PicturePool,
        model: Model,
        engine: LazyEngine,
        should_stop: Callable[[], bool],
        on_progress: Callable[[int, int], None],
        families: Families,
    ) -> None:
        self._journal, self._pool, self._model, self._engine = journal, pool, model, engine
        self._should_stop, self._on_progress, self._families = should_stop, on_progress, families
        self._left_open, self._blamed, self._unsure = history.left_open, history.blamed, history.unsure
        self._feed: Feed | None = None
        self.lines = dict(history.records)
        self._num_failed = sum(not line.endswith(OK_TAIL) for line in self.lines.values())
        self._new: list[tuple[str, RecordDict]] = []
        self._in_flight: dict[int, Ticket] = {}
        self._is_alone = False

    def to_the_end(self, rows: Sequence[PlannedRow]) -> None:
        """Ask all that is not finished.

        Raises:
            ShardStopped: `should_stop` said so; what was finished is synced.
        """
        self._tell_progress()
        suspects = list(self._families.alone(rows, self.lines, self._left_open))
        for one in sorted(suspects, key=lambda one: one.record_id not in self._blamed):
            self._drive([one.row], one.ups, is_alone=True)
        self._drive(rows, self._families.ups if self._families.have_parents(rows) else None, is_alone=False)
        self._journal.sync()

    def _drive(self, rows: Sequence[PlannedRow], ups: FollowUps | None, *, is_alone: bool) -> None:
        """Ask what is not finished of `rows`, and of their records what `ups` say."""
        if ups is None and all(record_id in self.lines for row in rows for record_id in row.ids):
            return
        self._is_alone = is_alone
        ids = deque(record_id for row in rows for record_id in row.ids)  # in the order in which the feed asks
        self._feed = Feed(
            iter([row.row for row in rows]),
            next_id=lambda image, request: ids.popleft(),
            is_done=self._is_done,
            pool=self._pool,
            num_ahead=rows_ahead(self._model.crop_config),
            fail=self._fail,
            recall=self._is_blamed,
            reading=contextlib.nullcontext,
            following=None if ups is None else Following(ups, self._model.identity, self._record),
        )
        drive(self._feed, self._engine, self, self._check_stop)

    def _is_done(self, record_id: str, row: SourceRow, request: Request) -> bool:
        line = self.lines.get(record_id)
        if line is None or record_id not in self._unsure:
            return line is not None
        return is_line_of(line, record_id, row, request)

    def _is_blamed(self, ticket: Ticket) -> bool:
        """Return whether a request is not tried again; then its failure is its record."""
        if ticket.record_id in self._blamed:
            self._fail(ticket, BLAME)
        return ticket.record_id in self._blamed

    def _record(self, record_id: str) -> RecordDict:
        record: RecordDict = json.loads(self.lines[record_id])
        return record

    def _check_stop(self) -> None:
        if self._should_stop():
            self._journal.stop()
            raise ShardStopped

    def has_room(self, batch_size: int) -> bool:
        """Return True: answers are written as they come, so that none waits for another."""
        return True

    def expect(self, ticket: Ticket) -> None:
        """Note in the journal that a request is begun, before the model sees it."""
        self._journal.begin(ticket.record_id, is_alone=self._is_alone)
        self._in_flight[ticket.key] = ticket

    def answer(self, answer: Answer) -> None:
        """Make an answer a record, to be written by the next `flush`."""
        self._finish(self._in_flight.pop(answer.key), answer)

    def _fail(self, ticket: Ticket, failure: RowFailure) -> None:
        self._finish(ticket, Answer(ticket.key, failure=failure))

    def _finish(self, ticket: Ticket, answer: Answer) -> None:
        labels = self._families.ups.refinement.labels
        record = record_of(ticket, answer, self._model.identity, labels)
        self._new.append((ticket.record_id, record))
        if self._feed is not None:
            self._feed.follow(ticket, record)

    def flush(self) -> None:
        """Write the new records to the attempt's journal, and show that the attempt is alive."""
        self._journal.touch()
        if not self._new:
            return
        lines = [(record_id, encode_record(record)) for record_id, record in self._new]
        self._journal.finish([line for _, line in lines])
        self._num_failed += sum(record["error"] is not None for _, record in self._new)
        self.lines |= dict(lines)
        self._new.clear()
        self._tell_progress()

    def _tell_progress(self) -> None:
        self._on_progress(len(self.lines) - self._num_failed, self._num_failed)


def history_of(folder: RunFolder, shard: int, rows: Sequence[PlannedRow], families: Families) -> ShardHistory:
    """Return what attempts at the shard of `rows` left, without damaged lines and records of other requests.

    Those are copied to the folder's `damaged/`. While a record is missing that may have children, nobody knows which
    lines are theirs: all that may be stay.

    Raises:
        OutputError: the copies cannot be written.
    """
    history = read_history(folder, shard)
    lines = history.records
    found = {one.record_id for one in families.asked(rows, lines) if _has_line(lines, one)}
    others = lines.keys() - found
    if families.lack_parents(rows, found):
        planned = {record_id for row in rows for record_id in row.ids}
        history.unsure = {record_id for record_id in others if record_id not in planned}
    others -= history.unsure
    history.damaged += sorted((history.places[record_id], lines.pop(record_id)) for record_id in others)
    keep_damaged_lines(folder, shard, [line for _, line in history.damaged])
    return history


def _has_line(lines: Mapping[str, bytes], one: Asked) -> bool:
    line = lines.get(one.record_id)
    return line is not None and is_line_of(line, *one)


ModelFinder = Callable[[ModelOptions], Model]


class ShardResult(NamedTuple):
    """`commit` is the shard's marker; `is_ours` is False where another attempt had put it."""

    commit: Commit
    is_ours: bool


class ShardRunner:
    """Runs shards of one run folder, one at a time, in one thread; a context manager.

    Attributes:
        folder: the opened run folder.
        plan: what is to be done.
        attempt: name of the attempt under way, before and after that the one it will have or had.
    """

    def __init__(
        self,
        run_uri: str,
        *,
        finder: str | ModelFinder = FINDER,
        options: RunOptions | None = None,
        while_loading: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        """`options` default to those in the folder's run.json; `while_loading` is as for LazyEngine.

        Raises:
            InputError: no plan there, or run.json is missing.
            CheckpointError: no such model.
            EngineError: it is another model than the plan's.
        """
        self.folder = open_run_folder(run_uri)
        self._reader = PlanReader(self.folder)
        self.plan = self._reader.plan
        options = options or read_run_options(self.folder)
        self._decode, self._families = options.decode, Families.of(self.plan, options)
        self._model = _find(finder, options.model)
        self._engine = LazyEngine(self._model, while_loading)
        if self._model.identity != self.plan.identity:
            raise EngineError(
                f"the model here is {self._model.identity}, the plan was made for {self.plan.identity}; "
                "name the same --model and --revision on every machine"
            )
        self._worker = new_attempt()
        self._pool: PicturePool | None = None
        self.attempt = new_attempt()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End the decode workers."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def run(
        self,
        shard: int,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_start: Callable[[int, str], None] = lambda shard, attempt: None,
        on_progress: Callable[[int, int], None] = lambda ok, failed: None,
    ) -> ShardResult:
        """Run a shard to its commit.

        Args:
            should_stop: asked between two steps of the model.
            on_start: told the shard and the attempt's name before anything is asked.
            on_progress: told how many requests of the shard are ok and how many have failed so far.

        Raises:
            ShardStopped: `should_stop` said so; what was finished is in the attempt's journal. The runner is
                spent: its model still has requests under way.
            Md3Error: the run cannot go on here.
        """
        if (committed := read_commit(self.folder, shard)) is not None:
            forget_attempts(self.folder, shard)
            return ShardResult(committed, False)
        started = time.monotonic()
        rows = self._reader.shard(shard)
        self.attempt = new_attempt()
        history = history_of(self.folder, shard, rows, self._families)
        journal = AttemptJournal(self.folder, shard, self.attempt)
        on_start(shard, self.attempt)
        try:
            attempt = ShardAttempt(
                history,
                journal,
                self._pool_of_run(),
                self._model,
                self._engine,
                should_stop,
                on_progress,
                self._families,
            )
            attempt.to_the_end(rows)
        finally:
            journal.close()
        return self._commit(shard, rows, history, attempt, started)

    @property
    def is_loading(self) -> bool:
        """Whether the model is being loaded; another thread may ask."""
        return self._engine.is_loading

    def _pool_of_run(self) -> PicturePool:
        if self._pool is None:
            self._pool = make_decode_pool(self._decode, self.plan.identity.background, self._model.crop_config)
        return self._pool

    def _commit(
        self, shard: int, rows: Sequence[PlannedRow], history: ShardHistory, attempt: ShardAttempt, started: float
    ) -> ShardResult:
        ids = [self._families.ids_of(row, attempt.lines) for row in rows]
        lines = [attempt.lines[record_id] for of_row in ids for record_id in of_row]
        reused = [history.records[record_id] for of_row in ids for record_id in of_row if record_id in history.records]
        data, counts, before = b"".join(lines), Counts.of(lines), Counts.of(reused)
        pictured = [of_row for row, of_row in zip(rows, ids, strict=True) if row.row.image is not None and of_row]
        self._keep_strangers(shard, attempt, ids)
        part = part_name(shard, self.attempt)
        commit = Commit(
            part=part,
            rows=len(rows),
            images=len(pictured),
            ok=counts.ok,
            errors=counts.num_failed,
            error_types=counts.error_types,
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            attempt=self.attempt,
            host=host_name(),
            seconds=round(time.monotonic() - started, 3),
            ended=round(time.time(), 3),
            reused=len(reused),
            reused_errors=before.error_types,
            reused_images=sum(all(record_id in history.records for record_id in of_row) for of_row in pictured),
            prompt_tokens=counts.prompt_tokens - before.prompt_tokens,
            output_tokens=counts.output_tokens - before.output_tokens,
            children=len(lines) - sum(len(row.ids) for row in rows),
            families=self._families.digest if self._families.have_parents(rows) else "",
        )
        self.folder.store.put(part, data)
        is_ours = put_commit(self.folder, shard, commit)
        if not is_ours:
            self.folder.store.remove(part)
            commit = read_commit(self.folder, shard) or commit
        forget_attempts(self.folder, shard)
        self._note_metrics(shard, commit, is_ours)
        return ShardResult(commit, is_ours)

    def _keep_strangers(self, shard: int, attempt: ShardAttempt, ids: Sequence[Sequence[str]]) -> None:
        """Copy lines that turn out to be of no request of the shard to where damaged ones are."""
        if strangers := attempt.lines.keys() - {record_id for of_row in ids for record_id in of_row}:
            keep_damaged_lines(self.folder, shard, [attempt.lines[record_id] for record_id in sorted(strangers)])

    def _note_metrics(self, shard: int, commit: Commit, is_ours: bool) -> None:
        """Append a line about the shard to this worker's file; a disk that refuses it is no failure."""
        if self.folder.store is not self.folder.wip:  # object stores take no appending; the marker has the times
            return
        line = {
            "time": commit.ended,
            "shard": shard,
            "records": commit.num_records,
            "seconds": commit.seconds,
            "committed": is_ours,
            "stages": {name: round(seconds, 3) for name, seconds in self._engine.stage_seconds().items()},
        }
        path = self.folder.wip.path(f"{METRICS}/{self._worker}.jsonl")
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            with open(path, "ab") as file:
                file.write(json.dumps(line).encode() + b"\n")


class Counts(NamedTuple):
    """Records by outcome, and their tokens."""

    ok: int
    error_types: dict[str, int]
    prompt_tokens: int
    output_tokens: int

    @property
    def num_failed(self) -> int:
        return sum(self.error_types.values())

    @classmethod
    def of(cls, lines: Iterable[bytes]) -> Counts:
        """Count `lines`, which are whole records."""
        ok = prompt = output = 0
        errors = Counter[str]()
        for line in lines:
            record: RecordDict = json.loads(line)
            if record["error"] is None:
                ok += 1
                prompt += record["tokens"]["prompt"]
                output += record["tokens"]["output"]
            else:
                errors[record["error"]["type"]] += 1
        return cls(ok, dict(sorted(errors.items())), prompt, output)


def _find(finder: str | ModelFinder, options: ModelOptions) -> Model:
    if not isinstance(finder, str):
        return finder(options)
    module, _, function = finder.partition(":")
    return cast("Model", getattr(import_module(module), function)(options))
