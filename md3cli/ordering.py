"""Records in input order: what finishes early waits for what was asked before it.

Whoever feeds the engine bounds the buffer by looking at `num_ahead`. Knows no formats: `write` takes
each batch of records that are next in order, `early` keeps those that have to wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from md3cli.console import Summary
from md3cli.early import EarlyRecords
from md3cli.engine_port import Answer
from md3cli.feed import Ticket
from md3cli.records import RecordDict, RowFailure, RunIdentity, make_error_record, make_record


def record_of(ticket: Ticket, answer: Answer, run: RunIdentity) -> RecordDict:
    """The record of a request that the model answered, or failed on."""
    if answer.failure is not None or answer.result is None:
        return error_of(ticket, answer.failure or RowFailure("model", "the model gave no answer"), run)
    return make_record(
        ticket.record_id,
        ticket.image,
        ticket.facts,
        ticket.request,
        run,
        result=answer.result,
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_tokens,
        output_tokens=answer.output_tokens,
        meta=ticket.row.meta,
    )


def error_of(ticket: Ticket, failure: RowFailure, run: RunIdentity) -> RecordDict:
    """The record of a request that has no answer."""
    return make_error_record(
        ticket.record_id, ticket.image, ticket.facts, ticket.request, run, failure=failure, meta=ticket.row.meta
    )


class OrderedRecords:
    """Collects outcomes by key and hands records on in the order of the keys, from 0 on.

    `summary` is kept up to date with what was handed on. `early` None: what waits is lost by a kill.
    """

    def __init__(
        self,
        run: RunIdentity,
        write: Callable[[Sequence[RecordDict]], None],
        summary: Summary,
        early: EarlyRecords | None = None,
    ) -> None:
        self._run, self._write, self._summary, self._early = run, write, summary, early
        self._in_flight: dict[int, Ticket] = {}
        self._finished: dict[int, tuple[Ticket, RecordDict]] = {}
        self._answered: list[int] = []  # keys since the last flush
        self._next_key = self._newest_key = 0

    @property
    def num_ahead(self) -> int:
        """How far the newest request given to the engine is ahead of the oldest record that is missing."""
        return self._newest_key - self._next_key

    def expect(self, ticket: Ticket) -> None:
        """`ticket` went to the engine; its answer will come by its key."""
        self._in_flight[ticket.key] = ticket
        self._newest_key = max(self._newest_key, ticket.key)

    def recall(self, ticket: Ticket) -> bool:
        """Whether an earlier start left the record of `ticket`; it is then written in its turn."""
        name = ticket.image.name if ticket.image is not None else None
        record = self._early.take(ticket.record_id, name, ticket.request) if self._early is not None else None
        if record is not None:
            self._finished[ticket.key] = (ticket, record)
        return record is not None

    def answer(self, answer: Answer) -> None:
        """An answer of the engine becomes a record."""
        ticket = self._in_flight.pop(answer.key)
        self._finished[ticket.key] = (ticket, record_of(ticket, answer, self._run))
        if answer.failure is None and answer.result is not None:
            self._answered.append(ticket.key)

    def fail(self, ticket: Ticket, failure: RowFailure) -> None:
        """A request that has no answer becomes an error record."""
        self._finished[ticket.key] = (ticket, error_of(ticket, failure, self._run))

    def flush(self) -> None:
        """Write every record that is next in order, and keep the others safe; counts only what was written."""
        batch: list[tuple[Ticket, RecordDict]] = []
        while self._next_key + len(batch) in self._finished:
            batch.append(self._finished[self._next_key + len(batch)])
        if batch:
            self._write([record for _, record in batch])
        for ticket, record in batch:
            del self._finished[ticket.key]
            self._count(ticket, record)
        self._next_key += len(batch)
        if self._early is not None:
            self._early.forget(record for _, record in batch)
            new = [self._finished[key][1] for key in self._answered if key in self._finished]
            self._early.keep(new, self._waiting)
        self._answered.clear()

    def _waiting(self) -> list[RecordDict]:
        return [record for _, record in self._finished.values() if record["error"] is None]

    def _count(self, ticket: Ticket, record: RecordDict) -> None:
        summary = self._summary
        summary.num_images += ticket.is_last_of_row and ticket.image is not None
        if record["error"] is None:
            summary.num_ok += 1
            summary.prompt_tokens += record["tokens"]["prompt"]
            summary.output_tokens += record["tokens"]["output"]
        else:
            failed = summary.failed
            failed[record["error"]["type"]] = failed.get(record["error"]["type"], 0) + 1
