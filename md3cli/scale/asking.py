"""The requests of one shard through the model: what earlier attempts left is taken over, the rest is asked.

In this order: what is known to kill workers becomes error records; what was under way when a worker died is
asked alone, one by one, so that only the culprit can be blamed; the rest fills the batches. Records go to the
attempt's journal as they come, in any order.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from md3cli.decode import DecodePool
from md3cli.engine_port import Engine, Model
from md3cli.feed import Feed, Ticket, rows_ahead
from md3cli.journal import encode_record
from md3cli.ordering import error_of, record_of
from md3cli.records import OK_TAIL, RecordDict, Request, RowFailure, SourceRow
from md3cli.scale.attempts import AttemptJournal, ShardHistory, keep_damaged_lines, read_history
from md3cli.scale.layout import RunFolder
from md3cli.scale.plan import PlannedRow
from md3cli.whole_records import is_record_of

WAIT_SLICE_S = 0.2  # of waiting for a picture, so that a wish to stop is seen soon
BLAME = RowFailure("model", "the worker process died twice on this request")


class ShardStopped(Exception):
    """The shard was left on request; not a failure."""


class _PlannedIds:
    """The ids of rows that are fed, in the order in which the feed asks for them."""

    def __init__(self, asked: Iterable[PlannedRow]) -> None:
        self._ids = deque(record_id for row in asked for record_id in row.ids)

    def next_id(self, image: str | None, request: Request) -> str:
        return self._ids.popleft()


class WarmModel:
    """A model that is loaded once, by the first request that needs it."""

    def __init__(self, model: Model) -> None:
        self.identity, self.crop_config = model.identity, model.crop_config
        self.engine: Engine | None = None
        self.is_loading = False
        self._model = model

    def loaded(self) -> Engine:
        """The engine, loaded now if it was not."""
        if self.engine is None:
            self.is_loading = True
            self.engine = self._model.load()
            self.is_loading = False
        return self.engine


class Asking:
    """One attempt at a shard; `lines` are the finished records by id, each with its newline."""

    def __init__(
        self,
        history: ShardHistory,
        journal: AttemptJournal,
        pool: DecodePool,
        model: WarmModel,
        should_stop: Callable[[], bool],
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._journal, self._pool, self._model = journal, pool, model
        self._should_stop, self._on_progress = should_stop, on_progress
        self._left_open, self._blamed = history.left_open, history.blamed
        self.lines = dict(history.records)
        self.num_reused = len(self.lines)
        self._num_failed = sum(not line.endswith(OK_TAIL) for line in self.lines.values())
        self._new: list[tuple[str, RecordDict]] = []

    def to_the_end(self, rows: Sequence[PlannedRow]) -> None:
        """Ask all that is not finished.

        Raises:
            ShardStopped: it was asked to stop; what was finished is synced.
        """
        self._told()
        suspects = [one for row in rows for one in _singly(row, self._left_open)]
        for one in suspects:
            if one.ids[0] in self._blamed:
                self._fail(Ticket(0, one.ids[0], one.row.image, one.row.requests[0], one.row, True), BLAME)
        self._flush()
        for one in suspects:
            self._drive([one], is_alone=True)
        self._drive(rows, is_alone=False)
        self._journal.sync()

    def _drive(self, rows: Sequence[PlannedRow], *, is_alone: bool) -> None:
        if all(record_id in self.lines for row in rows for record_id in row.ids):
            return
        feed = Feed(
            iter([row.row for row in rows]),
            ids=_PlannedIds(rows),
            is_done=lambda record_id, row, request: record_id in self.lines,
            pool=self._pool,
            num_ahead=rows_ahead(self._model.crop_config),
            fail=self._fail,
            recall=lambda ticket: False,
            reading=contextlib.nullcontext,
        )
        in_flight: dict[int, Ticket] = {}
        while True:
            if self._should_stop():
                self._journal.stop()
                raise ShardStopped
            self._fill(feed, in_flight, is_alone)
            if in_flight:
                for answer in self._model.loaded().step():
                    ticket = in_flight.pop(answer.key)
                    self._new.append((ticket.record_id, record_of(ticket, answer, self._model.identity)))
            self._flush()
            self._journal.touch()
            if not in_flight:
                if feed.is_exhausted:
                    return
                feed.wait(WAIT_SLICE_S)

    def _fill(self, feed: Feed, in_flight: dict[int, Ticket], is_alone: bool) -> None:
        """Give the model what is ready, noting before each request that it is begun."""
        while (engine := self._model.engine) is None or engine.wants_more:
            ready = feed.poll()
            if ready is None:
                return
            engine = self._model.loaded()
            self._journal.begin(ready.ticket.record_id, is_alone=is_alone)
            in_flight[ready.ticket.key] = ready.ticket
            engine.add(ready.ticket.key, ready.picture, ready.ticket.request)

    def _fail(self, ticket: Ticket, failure: RowFailure) -> None:
        self._new.append((ticket.record_id, error_of(ticket, failure, self._model.identity)))

    def _flush(self) -> None:
        if not self._new:
            return
        lines = [(record_id, encode_record(record)) for record_id, record in self._new]
        self._journal.finish([line for _, line in lines])
        self._num_failed += sum(record["error"] is not None for _, record in self._new)
        self.lines |= dict(lines)
        self._new.clear()
        self._told()

    def _told(self) -> None:
        self._on_progress(len(self.lines) - self._num_failed, self._num_failed)


def history_of(folder: RunFolder, shard: int, rows: Sequence[PlannedRow]) -> ShardHistory:
    """What attempts at the shard of `rows` left; what is damaged, or another request's record, is copied and left out.

    Raises:
        OutputError: the copies cannot be written.
    """
    history = read_history(folder, shard)
    others = history.records.keys() - {
        record_id
        for record_id, row, request in asked(rows)
        if record_id in history.records and is_line_of(history.records[record_id], record_id, row, request)
    }
    history.damaged += sorted((history.places[record_id], history.records.pop(record_id)) for record_id in others)
    keep_damaged_lines(folder, shard, [line for _, line in history.damaged])
    return history


def asked(rows: Sequence[PlannedRow]) -> Iterator[tuple[str, SourceRow, Request]]:
    """Yield each request of `rows` with its id and its row."""
    for row in rows:
        for record_id, request in zip(row.ids, row.row.requests, strict=True):
            yield record_id, row.row, request


def is_line_of(line: bytes, record_id: str, row: SourceRow, request: Request) -> bool:
    """Return whether a whole line is the record of a request of `row`."""
    return is_record_of(line, record_id, row.image.name if row.image is not None else None, request)


def _singly(asked: PlannedRow, wanted: set[str]) -> list[PlannedRow]:
    """The wanted requests of a row, each as a row of its own."""
    row = asked.row
    return [
        PlannedRow(SourceRow(row.image, (request,), row.meta, row.failure), (record_id,))
        for request, record_id in zip(row.requests, asked.ids, strict=True)
        if record_id in wanted
    ]
