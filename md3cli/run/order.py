"""Records in input order: a record that is made early waits until all that were asked before it are written.

Records that wait are also kept in a file, because one long answer may hold back hundreds that were asked after it, and
a kill would lose them. The journal alone says what is done: the file of waiting records only saves computing them
again, and where it is lost, torn or stale it costs time, never a record. Its first line says of which journal it is
(how long that was, and a digest of its end); beside any other journal it is not believed. Knows no format of OUTPUT.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from md3cli.console.summary import Summary
from md3cli.errors import OutputError
from md3cli.finished.record_shape import is_record_of, read_record
from md3cli.images.parts import placed
from md3cli.records import (
    SCHEMA,
    Answer,
    RecordDict,
    Request,
    RowFailure,
    RunIdentity,
    compact_json,
    make_record,
)
from md3cli.refine.labels import Labels
from md3cli.refine.refinement import named
from md3cli.run.feed import Place, Ticket
from md3cli.run.journal import encode_record
from md3cli.run.log import AppendLog
from md3cli.system import read_at

WAITING_SUFFIX = ".early"
_END_BYTES = 1 << 12  # of a journal, by which it is known
_HEAD_LIMIT_BYTES = 1 << 10
# How far answers may be ahead of the oldest that is missing. It bounds memory; a smaller number leaves the engine idle
# behind one long answer: at 4 to 8 it is 20 to 50 % slower where one answer in a hundred is ten times as long.
BATCHES_AHEAD = 32
SLACK_LINES = 64  # lines that nobody waits for any more, before the file is written anew


class WaitingRecords:
    """The file of waiting records beside a journal; used by the process that holds the output's lock.

    The file holds the records that wait, and at most as many again that have been written since. It is never synced,
    for a power cut costs time only. A disk that refuses the file is no failure: the next `keep` writes it anew.
    """

    def __init__(self, journal_path: Path, *, is_done: Callable[[str], bool], is_fresh: bool = False) -> None:
        """Read what an earlier start left, unless `is_fresh`; `is_done` says whether an id's record is written."""
        self._journal_path = journal_path
        self._path = journal_path.with_name(journal_path.name + WAITING_SUFFIX)
        self._temp = self._path.with_name(self._path.name + ".new")
        self._left = {} if is_fresh else {r["id"]: r for r in waiting_records(journal_path) if not is_done(r["id"])}
        self._log: AppendLog | None = None
        self._num_lines = 0
        self._says_empty = False

    def find(self, record_id: str, image: str | None, request: Request) -> RecordDict | None:
        """Return the record that an earlier start left for a request; None where it left none of this request."""
        record = self._left.get(record_id)
        is_its_own = record is not None and is_record_of(encode_record(record), record_id, image, request)
        return record if is_its_own else None

    def keep(self, new: Sequence[RecordDict], waiting: Callable[[], Sequence[RecordDict]]) -> None:
        """Keep the `new` records until they are written; `waiting` gives all that wait now."""
        if not new:
            return
        try:
            is_long = self._num_lines + len(new) > 2 * len(waiting()) + SLACK_LINES
            if self._log is None or is_long or self._has_left_empty:
                self._rewrite(waiting())
            else:
                self._log.append(_lines_of(new))
                self._num_lines += len(new)
        except (OSError, OutputError):
            self.close()

    @property
    def _has_left_empty(self) -> bool:
        """Return whether the file says that the journal is empty, as any journal once was, and it no longer is."""
        return self._says_empty and os.stat(self._journal_path).st_size > 0

    def _rewrite(self, waiting: Sequence[RecordDict]) -> None:
        """Put a file of what waits, and of what an earlier start left and is still to be written, in the place of ours.

        A failure leaves no file open, so that the next `keep` writes it anew.
        """
        self.close()
        records = {record["id"]: record for record in (*self._left.values(), *waiting)}.values()
        with contextlib.suppress(FileNotFoundError):
            self._temp.unlink()  # a killed writer's, or a link that somebody else has put there
        self._log = AppendLog(self._temp, is_new=True)
        self._log.append(_head_of(self._journal_path) + _lines_of(records))
        os.replace(self._temp, self._path)
        self._num_lines = len(records)
        self._says_empty = not os.stat(self._journal_path).st_size

    def mark_written(self, records: Iterable[RecordDict]) -> None:
        """Forget `records`, which are in the journal now."""
        for record in records:
            self._left.pop(record["id"], None)

    def remove(self) -> None:
        """Remove the file at the end of a run that came through INPUT: nothing waits any more."""
        self.close()
        for path in (self._path, self._temp):
            with contextlib.suppress(OSError):
                path.unlink()

    def close(self) -> None:
        """Let go of the file and leave it there; a second call does nothing."""
        if self._log is not None:
            self._log.close()
            self._log = None


def _lines_of(records: Iterable[RecordDict]) -> bytes:
    return b"".join(map(encode_record, records))


def _head_of(journal_path: Path, num_bytes: int | None = None) -> bytes:
    """Return the first line of the file beside a journal of `num_bytes`; None: as long as the journal is now."""
    with open(journal_path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size if num_bytes is None else num_bytes
        end = read_at(file.fileno(), min(size, _END_BYTES), max(0, size - _END_BYTES))
    head = {"early": SCHEMA, "journal": {"bytes": size, "end": hashlib.sha256(end).hexdigest()}}
    return compact_json(head) + b"\n"


def waiting_records(journal_path: Path) -> Iterator[RecordDict]:
    """Yield the whole answers that wait beside a journal, from a file that a kill may have left in any state."""
    path = journal_path.with_name(journal_path.name + WAITING_SUFFIX)
    if not path.is_file():  # a FIFO would be waited for
        return
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if not _is_of(file.readline(_HEAD_LIMIT_BYTES), journal_path):
            return
        for line in file:
            record = read_record(line)
            if record is not None and record["error"] is None:
                yield record


def _is_of(head: bytes, journal_path: Path) -> bool:
    """Return whether `head` is the first line of the file beside this journal, which may have grown since."""
    try:
        num_bytes = json.loads(head)["journal"]["bytes"]
        is_size = isinstance(num_bytes, int) and 0 <= num_bytes <= os.stat(journal_path).st_size
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return is_size and head == _head_of(journal_path, num_bytes)


def record_of(ticket: Ticket, answer: Answer, run: RunIdentity, labels: Labels) -> RecordDict:
    """Make the record of an answered request, or of one that failed; what it found gets the name of its prompt."""
    facts, request = ticket.facts, ticket.request
    if ticket.rect is not None and facts is not None and answer.result is not None:
        answer = replace(answer, result=placed(answer.result, ticket.rect, facts.width, facts.height))
    record = make_record(ticket.record_id, ticket.image, facts, request, run, answer, ticket.row.meta)
    return named(record, labels, (ticket.row.typed or {}).get(request.prompt or ""))


class OrderedRecords:
    """Collects outcomes by place, and writes records in that order: a request of INPUT, its children, the next one.

    Attributes:
        follow: told of each ticket and its record; whoever asks more of it says with `grown` how much.
        visit: told the id of each record whose turn it is, also of one that stands in OUTPUT already.
    """

    def __init__(
        self,
        run: RunIdentity,
        write: Callable[[Sequence[RecordDict]], None],
        summary: Summary,
        waiting: WaitingRecords | None = None,
        on_flush: Callable[[], None] = lambda: None,
        labels: Labels | None = None,
    ) -> None:
        """Make an empty buffer.

        Args:
            run: what made the answers, for their records.
            write: takes each batch of records that are next in order.
            summary: kept up to date with what was written.
            waiting: keeps the records that wait; None: a kill loses them.
            on_flush: called at the end of each `flush`.
            labels: how what is found is called.
        """
        self._run, self._write, self._summary, self._labels = run, write, summary, labels or Labels()
        self._waiting, self._on_flush = waiting, on_flush
        self.follow: Callable[[Ticket, RecordDict], None] = lambda ticket, record: None
        self.visit: Callable[[str], None] = lambda record_id: None
        self._in_flight: dict[int, Ticket] = {}
        self._finished: dict[Place, tuple[Ticket, RecordDict | None]] = {}  # None: it stands in OUTPUT
        self._answered: list[Place] = []  # since the last flush
        self._next = Place(0)
        self._num_children: dict[int, int] = {}
        self._has_row_failed = False  # a request of the row that is being written

    def has_room(self, batch_size: int) -> bool:
        """Return False while the oldest missing answer is so late that new requests should wait for it."""
        return len(self._in_flight) + len(self._finished) < BATCHES_AHEAD * batch_size

    def expect(self, ticket: Ticket) -> None:
        """Note that `ticket` went to the engine; its answer will come by its key."""
        self._in_flight[ticket.key] = ticket

    def recall(self, ticket: Ticket) -> bool:
        """Return whether an earlier start left the record of `ticket`, which is then written when its turn comes."""
        if self._waiting is None:
            return False
        name = ticket.image.name if ticket.image is not None else None
        record = self._waiting.find(ticket.record_id, name, ticket.request)
        if record is not None:
            self._finish(ticket, record)
        return record is not None

    def pass_by(self, ticket: Ticket) -> None:
        """Note that the record of `ticket` stands in OUTPUT, before those that are still to come."""
        self._finished[ticket.place] = (ticket, None)

    def grown(self, number: int, count: int) -> None:
        """Note how many children the record of a request of INPUT has; for each ticket that has a family."""
        self._num_children[number] = count

    def answer(self, answer: Answer) -> None:
        """Make a record of an answer of the engine."""
        ticket = self._in_flight.pop(answer.key)
        if answer.failure is None and answer.result is not None:
            self._answered.append(ticket.place)
        self._finish(ticket, record_of(ticket, answer, self._run, self._labels))

    def fail(self, ticket: Ticket, failure: RowFailure) -> None:
        """Make an error record of a request that has no answer."""
        self._finish(ticket, record_of(ticket, Answer(ticket.key, failure=failure), self._run, self._labels))

    def _finish(self, ticket: Ticket, record: RecordDict) -> None:
        self._finished[ticket.place] = (ticket, record)
        self.follow(ticket, record)

    def flush(self) -> None:
        """Write every record that is next in order, keep the others safe, and count what was written."""
        turn, behind = self._those_in_turn()
        written = [(ticket, record) for ticket, record in turn if record is not None]
        if written:
            self._write([record for _, record in written])
        self._next = behind
        for ticket, _ in turn:
            del self._finished[ticket.place]
            if ticket.place.number < behind.number:
                self._num_children.pop(ticket.place.number, None)
            self.visit(ticket.record_id)
        for ticket, record in written:
            self._count(ticket, record)
        if self._waiting is not None:
            self._waiting.mark_written(record for _, record in written)
            waiting = map(self._waiting_at, self._answered)
            self._waiting.keep([record for record in waiting if record is not None], self._answers_waiting)
        self._answered.clear()
        self._on_flush()

    def _those_in_turn(self) -> tuple[list[tuple[Ticket, RecordDict | None]], Place]:
        """Return what is next in order, and the place behind it."""
        turn, place = [], self._turn_at(self._next)
        while (found := self._finished.get(place)) is not None:
            turn.append(found)
            is_alone = not place.child and found[0].family is None
            place = Place(place.number + 1) if is_alone else self._turn_at(Place(place.number, place.child + 1))
        return turn, place

    def _turn_at(self, place: Place) -> Place:
        """Return a place, or that of the next request of INPUT where it is known that no such child comes."""
        is_behind = place.child and self._num_children.get(place.number, place.child) < place.child
        return Place(place.number + 1) if is_behind else place

    def _waiting_at(self, place: Place) -> RecordDict | None:
        return self._finished[place][1] if place in self._finished else None

    def _answers_waiting(self) -> list[RecordDict]:
        records = (record for _, record in self._finished.values() if record is not None)
        return [record for record in records if record["error"] is None]

    def _count(self, ticket: Ticket, record: RecordDict) -> None:
        summary = self._summary
        if not ticket.place.child:
            self._has_row_failed = self._has_row_failed or record["error"] is not None
        if ticket.is_last_of_row:
            summary.num_rows += 1
            summary.num_rows_failed += self._has_row_failed
            summary.num_images += ticket.image is not None
            self._has_row_failed = False
        if record["error"] is None:
            summary.num_ok += 1
            summary.prompt_tokens += record["tokens"]["prompt"]
            summary.output_tokens += record["tokens"]["output"]
        else:
            failed = summary.failed
            failed[record["error"]["type"]] = failed.get(record["error"]["type"], 0) + 1
