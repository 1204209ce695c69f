"""The journal: one JSON Lines file of records, the only state of a run.

One writer under a lock appends whole lines, one `write` a batch. Whatever kills the process, what was appended is
there; a power cut takes at most the last 5 s or 256 records. The next start cuts a torn end, and the requests of that
end are simply not done. A damaged line costs itself only: it is copied to OUT.damaged at once, its request is done
again, and the rewrite at the end leaves it out. The rewrite puts one whole record a request in input order, in two
passes: an index of 33 bytes a line, then a copy of the byte ranges that stay.

Memory: 37 bytes a record found at the start (10 million: 370 MB), nothing for those appended later (32 bytes a picture
in a run that grows), and 100 bytes a record more during the rewrite. Knows nothing of formats, and of INPUT only what
is asked of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Literal

from md3cli.errors import OutputError, OutputMismatchError
from md3cli.files import OutputLock, output_error, remove_stale_temps
from md3cli.finished.digest import digest_of
from md3cli.finished.record_shape import is_record_of, read_record
from md3cli.finished.run_json import RecordsDigest, digest_of_file
from md3cli.records import SCHEMA, RecordDict, Request, SourceRow, compact_json, printable, strict_json
from md3cli.run.journal_scan import HEAD, LineIndex, copy_spans, first_record, order_of, scan_journal
from md3cli.run.log import AppendLog, DamagedLines, SyncAfter, keep_damaged
from md3cli.run.record_index import Fate, RecordIndex, Unasked, Visits, line_of_bad_row
from md3cli.system import read_at

SYNC_AFTER = SyncAfter(records=256, seconds=5.0)
_MOST_CHANGED = 2  # bytes of the first line's head, which is ours all the same


def encode_record(record: RecordDict) -> bytes:
    """Return a record as its line: `compact_json` with a newline at the end."""
    return compact_json(record) + b"\n"


class Journal:
    """An open journal; as a context manager it is closed in the end.

    Attributes:
        path: the file.
        cut_bytes: how much of a torn end was cut off on opening.
        damaged: the lines found damaged on opening and since; all of them are in OUT.damaged.
        is_replacing: whether the file still holds what the first append replaces.
        has_changed: whether this process has changed the file.
        found: the records found on opening, and what became of them since.
        first_record: the first of those, to compare an old run with this one.
        is_locked: False where the file system has no locks.
    """

    def __init__(self, log: AppendLog, lock: OutputLock) -> None:
        self.path = log.path
        self.cut_bytes = 0
        self.first_record: RecordDict | None = None
        self.is_locked = lock.is_held
        self._log, self._lock = log, lock
        self.found = RecordIndex()
        self.damaged: list[DamagedLines] = []
        self.has_changed = False
        self.is_replacing = False
        self._digest: RecordsDigest | None = None
        self._visits = Visits(0)
        self._recorded_bad_rows: set[int] = set()  # lines of the manifest that cannot be read now either
        self._num_added: dict[str | None, int] = {}

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        mode: Literal["resume", "overwrite"] = "resume",
        lock_path: Path | None = None,
        is_ours: bool = False,
    ) -> Journal:
        """Lock, repair and read the journal at `path`, made with its folder where it is not there.

        `lock_path` defaults to `path` + `.lock`. With `overwrite` the first records that are appended take the place of
        all that is there. `is_ours` where md3 is known to have written the file, however damaged it may be.

        Raises:
            OutputError: another process (named) holds it, or it is no regular file or cannot be written.
            OutputMismatchError: it holds something that is not md3 records; nothing was changed.
        """
        path = Path(os.path.realpath(path))  # two names of one file share the lock
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise OutputError(f"{printable(str(path))} is not a regular file; leave out -o to write to stdout")
        except OSError as error:
            raise output_error(path, error) from error
        lock = OutputLock.acquire(lock_path or path.with_name(path.name + ".lock"), path)
        try:
            remove_stale_temps(path)
            journal = cls(AppendLog(path, sync_after=SYNC_AFTER), lock)
        except BaseException:
            lock.release()
            raise
        try:
            journal._load(mode, is_ours)
        except BaseException:
            journal.close()
            raise
        return journal

    def _load(self, mode: Literal["resume", "overwrite"], is_ours: bool) -> None:
        try:
            if mode == "overwrite":
                self.is_replacing = self._log.size > 0
                self.has_changed = not self.is_replacing
                return
            fd = self._log.fileno()
            with open(fd, "rb", buffering=0, closefd=False) as file:
                self.found, end, self.damaged = scan_journal(file)
                file.seek(0)
                self.first_record = first_record(file) if len(self.found) else None
            size = self._log.size
            if size and not len(self.found) and not is_ours and not _may_be_ours(read_at(fd, 1 << 16, 0)):
                raise OutputMismatchError(
                    f"{printable(str(self.path))} holds something else than records of this version of md3; "
                    "choose another -o, or --overwrite to replace it"
                )
            keep_damaged(self.path, fd, self.damaged)
            self.cut_bytes = size - end
            if self.cut_bytes:
                self._log.cut(end)
                self.has_changed = True
            self._visits = Visits(len(self.found))
        except OSError as error:
            raise output_error(self.path, error) from error

    # -- what is done --------------------------------------------------------------------------------

    def is_done(
        self, record_id: str, row: SourceRow, request: Request, *, retry_failed: bool = False, is_visit: bool = True
    ) -> bool:
        """Return whether the next request in input order was done before this run; called once for each request.

        With `is_visit` False it may be any request, and `visit` is called when its turn comes.

        A failed request is not done with `retry_failed`, or where its row could not be read and can be now. A record
        that is not this request's, whatever its id says, is dropped as damaged.

        Raises:
            OutputError: the record's line cannot be copied to OUT.damaged.
        """
        place = self.found.find(digest_of(record_id))
        if is_visit:
            self._visits.note(place)
        if place is None:
            return False
        line = self._log.line_at(self.found.start_of(place))
        if not is_record_of(line, record_id, row.image.name if row.image is not None else None, request):
            self._drop_damaged(place, line)
            return False
        if self.found.is_ok(place):
            return True
        if not self.found.is_failed(place) or retry_failed:
            return False
        return not self.found.is_failed_with(place, "bad_row") or self._is_still_bad(line, row)

    def visit(self, record_id: str) -> None:
        """Note that the next record in input order is that of a request, new or not."""
        self._visits.note(self.found.find(digest_of(record_id)))

    def record(self, record_id: str) -> RecordDict | None:
        """Return the record of a request that was done before this run."""
        place = self.found.find(digest_of(record_id))
        return None if place is None else read_record(self._log.line_at(self.found.start_of(place)))

    def _is_still_bad(self, line: bytes, row: SourceRow) -> bool:
        """Return whether a row that could not be read fails now as its record says."""
        if row.failure is None or row.failure.type != "bad_row":
            return False
        number = line_of_bad_row(row.failure.message)
        self._recorded_bad_rows |= {number} if number is not None else set()
        record = read_record(line)
        return record is not None and line_of_bad_row(record["error"]["message"]) == number

    def _drop_damaged(self, place: int, line: bytes) -> None:
        start = self.found.start_of(place)
        lines = DamagedLines.at(self._log.fileno(), start, start + len(line))
        keep_damaged(self.path, self._log.fileno(), [lines])
        self.found.mark_replaced(place)
        self.damaged.append(lines)

    def lines_of_bad_rows(self) -> set[int]:
        """Return the lines of a manifest that could not be read when their records were made."""
        places = self.found.failures_of("bad_row")
        records = (read_record(self._log.line_at(self.found.start_of(place))) for place in places)
        numbers = {line_of_bad_row(record["error"]["message"]) for record in records if record is not None}
        return {number for number in numbers if number is not None}

    def state(self, record_id: str) -> Literal["ok", "failed"] | None:
        """Return how a request stands in the file since before this run; None: it is still to do."""
        place = self.found.find(digest_of(record_id))
        if place is None or not (self.found.is_ok(place) or self.found.is_failed(place)):
            return None
        return "ok" if self.found.is_ok(place) else "failed"

    @property
    def num_ok(self) -> int:
        """Return how many requests were answered, in this run and before."""
        return self.found.num_ok + self._num_added.get(None, 0)

    @property
    def num_failed(self) -> dict[str, int]:
        """Return how many requests failed, in this run and before, by error type."""
        before = self.found.num_failed
        types = sorted(before.keys() | {name for name in self._num_added if name is not None})
        counts = {name: before.get(name, 0) + self._num_added.get(name, 0) for name in types}
        return {name: count for name, count in counts.items() if count}

    def append(self, records: Iterable[RecordDict]) -> None:
        """Put a batch of records at the end with one write; once this returns no kill can lose them.

        Raises:
            OutputError: not all of it could be written. Then none of it was: the file is as before.
        """
        batch = list(records)
        data = b"".join(map(encode_record, batch))
        if self.is_replacing and data:
            with self._log.replaced() as new:
                new.write(data)
            self.is_replacing = False
        else:
            self._log.append(data, len(batch))
        self.has_changed = True
        for record in batch:
            self._note(record)
        self._log.sync_in_time()

    def _note(self, record: RecordDict) -> None:
        place = self.found.find(digest_of(record["id"]))
        if place is not None and self.found.is_failed(place):
            self.found.mark_replaced(place)
        error_type = record["error"]["type"] if record["error"] else None
        self._num_added[error_type] = self._num_added.get(error_type, 0) + 1

    def sync(self) -> None:
        """Make what was appended safe from a power cut.

        Raises:
            OutputError: the disk refuses.
        """
        self._log.sync()

    @property
    def is_rewrite_due(self) -> bool:
        """Return whether the file holds anything but one whole record of each request."""
        return self.found.has_replaced or bool(self.damaged)

    @property
    def has_unasked(self) -> bool:
        """Return whether records stand there that no request of this run has."""
        return bool(len(self._visits.not_visited()))

    def settle(
        self,
        unasked: Unasked | None = None,
        before_rewrite: Callable[[], None] = lambda: None,
        *,
        has_grown: bool = False,
    ) -> None:
        """Bring the file in order at the end of a run that came through INPUT; a file in order is left alone.

        Each request has one record then, the last one made, in input order. A record that INPUT does not name stays,
        behind the one it stood behind, unless `unasked` says otherwise. `before_rewrite` is called before the file is
        replaced. `has_grown`: new requests stand behind all old ones, which is no order to leave; new pictures may.

        Raises:
            OutputError: no space for the copy, or not writable; the file is as before.
        """
        is_due = self.is_rewrite_due or (has_grown and not self._visits.is_in_order)
        if unasked is None and not is_due:
            return
        try:
            with open(self.path, "rb", buffering=0) as old:
                index = LineIndex(old)
                gone = self._gone(index, unasked) if unasked is not None else set()
                if not gone and not (is_due or self.is_rewrite_due):
                    return
                spans = order_of(index, self._visits, gone | {lines.start for lines in self.damaged})
                before_rewrite()
                with self._log.replaced() as new:
                    copy_spans(old.fileno(), new, spans)
        except OSError as error:
            raise output_error(self.path, error) from error
        self._digest = None
        self.has_changed, self.found.has_replaced, self._visits = True, False, Visits(0)

    def _gone(self, index: LineIndex, unasked: Unasked) -> set[int]:
        """Return where the records begin that no request of this run has and that go; damaged ones are copied."""
        places = self._visits.not_visited()
        gone, damaged = set(), []
        for place, has_twin in zip(places.tolist(), index.resembling(places).tolist(), strict=True):
            fate = self._fate(int(index.starts[place]), unasked, has_twin)
            if fate is not Fate.KEPT:
                gone.add(int(index.starts[place]))
                self.found.mark_replaced(place)
            if fate is Fate.DAMAGED:
                start, end = int(index.starts[place]), int(index.ends[place])
                damaged.append(DamagedLines.at(self._log.fileno(), start, end))
        keep_damaged(self.path, self._log.fileno(), damaged)
        self.damaged += damaged
        return gone

    def _fate(self, start: int, unasked: Unasked, has_twin: bool) -> Fate:
        if not has_twin and not unasked.is_parsing_worth_it:
            return Fate.KEPT
        record = read_record(self._log.line_at(start))
        return Fate.DAMAGED if record is None else unasked.fate_of(record, self._recorded_bad_rows, has_twin)

    def digest(self) -> RecordsDigest:
        """Return the digest of the file; the file is read unless nothing was written since the last call.

        Raises:
            OutputError: it cannot be read.
        """
        if self._digest is None or self._digest.bytes != self._log.size:
            try:
                self._digest = digest_of_file(self.path)
            except OSError as error:
                raise output_error(self.path, error) from error
        return self._digest

    def close(self) -> None:
        """Sync, close and unlock; a second call does nothing.

        Raises:
            OutputError: the last records could not be synced.
        """
        try:
            self._log.close()
        finally:
            self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _may_be_ours(start: bytes) -> bool:
    """Return whether a file without a whole record can be what a kill, a power cut (zeros) or damage left of ours."""
    line = start.partition(b"\n")[0]
    changed = sum(found not in (0, ours) for found, ours in zip(line, HEAD, strict=False))
    try:
        value = strict_json(line)
    except (ValueError, RecursionError):
        return changed <= (_MOST_CHANGED if len(line) >= len(HEAD) else 0)
    return isinstance(value, dict) and value.get("schema") == SCHEMA
