"""Records in input order: what finishes early waits for what was asked before it.

`has_room` bounds the buffer. `write` takes each batch of records that are next in order; no format is known here.

Records that wait are also kept on disk, because one long answer may hold back hundreds that were asked after it, and
a kill would cost them. The journal alone says what is done: the file of early records only saves computing them
again, and lost, torn or stale it costs time, never a record. Its first line says of which journal it is (how long
that was, and a digest of its end); beside any other journal it is not believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from md3cli.console import Summary
from md3cli.finished.record_shape import is_record_of, read_record
from md3cli.records import (
    SCHEMA,
    Answer,
    RecordDict,
    Request,
    RowFailure,
    RunIdentity,
    answered_record,
    make_error_record,
)
from md3cli.run.feed import Ticket
from md3cli.run.journal import encode_record
from md3cli.system import open_at_once, read_at

SUFFIX = ".early"
_END_BYTES = 1 << 12  # of a journal, by which it is known
_HEAD_LIMIT_BYTES = 1 << 10
# How far answers may be ahead of the oldest that is missing. It bounds memory; a smaller number leaves the engine idle
# behind one long answer: at 4 to 8 it is 20 to 50 % slower where one answer in a hundred is ten times as long.
BATCHES_AHEAD = 32
SLACK_LINES = 64  # lines that nobody waits for any more, before the file is written anew


class EarlyRecords:
    """The file beside the journal at `journal_path`; used by the process that holds the output's lock.

    It holds the records that wait, and at most as many again that have been written since. A disk that
    refuses it is no failure; the next time all of it is tried again.
    """

    def __init__(self, journal_path: Path, *, is_done: Callable[[str], bool], is_fresh: bool = False) -> None:
        """Read what an earlier start left, unless `is_fresh`; `is_done`: whether an id's record is written."""
        self._journal_path = journal_path
        self._path = journal_path.with_name(journal_path.name + SUFFIX)
        self._temp = self._path.with_name(self._path.name + ".new")
        self._left = {} if is_fresh else {r["id"]: r for r in early_records(journal_path) if not is_done(r["id"])}
        self._fd: int | None = None
        self._num_lines = 0
        self._says_empty = False

    def take(self, record_id: str, image: str | None, request: Request) -> RecordDict | None:
        """The record an earlier start left for a request, to be written when its turn comes."""
        record = self._left.get(record_id)
        is_its_own = record is not None and is_record_of(encode_record(record), record_id, image, request)
        return record if is_its_own else None

    def keep(self, new: Sequence[RecordDict], waiting: Callable[[], Sequence[RecordDict]]) -> None:
        """Keep records until they are written; `waiting` are all that wait now, `new` those of them not kept yet."""
        if not new:
            return
        try:
            if (
                self._fd is None
                or self._has_left_empty
                or self._num_lines + len(new) > 2 * len(waiting()) + SLACK_LINES
            ):
                self._rewrite(waiting())
            else:
                _write_all(self._fd, new)
                self._num_lines += len(new)
        except OSError:
            self.close()

    @property
    def _has_left_empty(self) -> bool:
        """Whether the file says that the journal is empty, as any journal once was, and it is so no more."""
        return self._says_empty and os.stat(self._journal_path).st_size > 0

    def _rewrite(self, waiting: Sequence[RecordDict]) -> None:
        """A file of what waits and of what was left and has not had its turn, in the old one's place."""
        records = list({record["id"]: record for record in (*self._left.values(), *waiting)}.values())
        with contextlib.suppress(FileNotFoundError):
            self._temp.unlink()  # a killed writer's, or a link that somebody else has put there
        fd = open_at_once(self._temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        try:
            _write_bytes(fd, _head_of(self._journal_path))
            _write_all(fd, records)
            os.replace(self._temp, self._path)
        except OSError:
            os.close(fd)
            raise
        self.close()
        self._fd, self._num_lines = fd, len(records)
        self._says_empty = not os.stat(self._journal_path).st_size

    def forget(self, records: Iterable[RecordDict]) -> None:
        """Drop `records`, which are written where they belong."""
        for record in records:
            self._left.pop(record["id"], None)

    def remove(self) -> None:
        """Nothing waits any more: the run is through INPUT."""
        self.close()
        for path in (self._path, self._temp):
            with contextlib.suppress(OSError):
                path.unlink()

    def close(self) -> None:
        """Let go of the file and leave it there; a second call does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _write_all(fd: int, records: Sequence[RecordDict]) -> None:
    _write_bytes(fd, b"".join(map(encode_record, records)))


def _write_bytes(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _head_of(journal_path: Path, num_bytes: int | None = None) -> bytes:
    """The first line beside a journal that is, or was when it had `num_bytes`, as the journal is now."""
    with open(journal_path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size if num_bytes is None else num_bytes
        end = read_at(file.fileno(), min(size, _END_BYTES), max(0, size - _END_BYTES))
    head = {"early": SCHEMA, "journal": {"bytes": size, "end": hashlib.sha256(end).hexdigest()}}
    return json.dumps(head, separators=(",", ":")).encode() + b"\n"


def early_records(journal_path: Path) -> Iterator[RecordDict]:
    """Yield the whole answers that wait beside a journal, in a file that a kill may have left in any state."""
    path = journal_path.with_name(journal_path.name + SUFFIX)
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
    """Whether `head` is the first line beside this journal; that may have grown since."""
    try:
        num_bytes = json.loads(head)["journal"]["bytes"]
        is_size = isinstance(num_bytes, int) and 0 <= num_bytes <= os.stat(journal_path).st_size
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return is_size and head == _head_of(journal_path, num_bytes)


def record_of(ticket: Ticket, answer: Answer, run: RunIdentity) -> RecordDict:
    """The record of a request that the model answered, or failed on."""
    return answered_record(
        ticket.record_id, ticket.image, ticket.facts, ticket.request, run, answer, meta=ticket.row.meta
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
        on_flush: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_flush` is called at the end of each `flush`."""
        self._on_flush = on_flush
        self._run, self._write, self._summary, self._early = run, write, summary, early
        self._in_flight: dict[int, Ticket] = {}
        self._finished: dict[int, tuple[Ticket, RecordDict]] = {}
        self._answered: list[int] = []  # keys since the last flush
        self._next_key = self._newest_key = 0

    def has_room(self, batch_size: int) -> bool:
        """Return False while the oldest missing answer is so late that new requests should wait for it."""
        return self._newest_key - self._next_key < BATCHES_AHEAD * batch_size

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
        self._on_flush()

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
