"""The journal: one JSON Lines file of records, the only state a run has.

One writer under a lock appends whole lines, one `write` a batch, with O_APPEND. Whatever kills the process, what was
appended is there; the next start cuts a torn tail, and the requests of that tail are simply not done. A damaged line
costs itself only: it is copied to OUT.damaged at once, its request is done again, and the rewrite at the end leaves
it out. A crash loses nothing for a killed process, at most the last 5 s or 256 records for a power cut.

The rewrite puts one whole record a request in input order, in two passes: an index of 33 bytes a line, then a copy of
the byte ranges that stay. `Visits` holds that order as runs of neighbours, of which a resumed run has two however
long it is.

Memory: 37 bytes a record found at the start (10 million: 370 MB), nothing for those appended later, and 100 bytes a
record more during the rewrite.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from md3cli.errors import OutputError, OutputMismatchError
from md3cli.files import OutputLock, atomic_publish, output_error, remove_stale_temps
from md3cli.finished.digest import RecordsDigest, digest_of, digest_of_file
from md3cli.finished.record_shape import is_record_of, read_json, read_record
from md3cli.records import SCHEMA, RecordDict, Request, SourceRow, printable
from md3cli.run.journal_scan import (
    HEAD,
    LINE_LIMIT_BYTES,
    DamagedLines,
    damaged_path,
    first_record,
    journal_lines,
    keep_damaged,
    line_number,
    scan_journal,
)
from md3cli.run.record_index import Fate, FoundRecords, Unasked, latest_lines, line_of_bad_row
from md3cli.system import open_regular, read_at, sync_data


class Visits:
    """The places visited, in order."""

    def __init__(self, num_found: int) -> None:
        self._num_found = self._next_new = num_found
        self._firsts, self._counts = array("q"), array("q")
        self._last = -1

    def note(self, place: int | None) -> None:
        """Note that the next request in input order stands at `place`; None: it is new."""
        if place is None:
            place = self._next_new
            self._next_new += 1
        if place == self._last + 1 and self._counts:
            self._counts[-1] += 1
        else:
            self._firsts.append(place)
            self._counts.append(1)
        self._last = place

    def places(self) -> NDArray[np.int64]:
        """Return all of them, in the order of the visits."""
        runs = [np.arange(first, first + count) for first, count in zip(self._firsts, self._counts, strict=True)]
        return np.concatenate(runs) if runs else np.empty(0, np.int64)

    def not_visited(self) -> NDArray[np.int64]:
        """Return the places found at the start that no request of this run has, in their order."""
        is_left = np.ones(self._num_found, bool)
        for first, count in zip(self._firsts, self._counts, strict=True):
            is_left[first : first + count] = False
        return np.flatnonzero(is_left)


_COPY_BYTES = 1 << 20


class Spans(NamedTuple):
    """Byte ranges of a file [ranges], in the order in which they are wanted."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class LineIndex:
    """The whole lines of a journal: the last of each id, ordered by the first of each.

    Attributes:
        starts, ends: their offsets [ids].
        digests: their ids as two halves [ids, 2].
    """

    def __init__(self, file: IO[bytes]) -> None:
        starts, ends, digests = array("q"), array("q"), bytearray()
        for lines in journal_lines(file):
            if not isinstance(lines, DamagedLines):
                starts.frombytes(lines.starts.tobytes())
                ends.frombytes(lines.ends.tobytes())
                digests += lines.digests.tobytes()
        halves = np.frombuffer(digests, np.uint64).reshape(-1, 2)
        latest = latest_lines(halves) if len(starts) else np.empty(0, np.int64)
        self.starts: NDArray[np.int64] = np.frombuffer(starts, np.int64)[latest]
        self.ends: NDArray[np.int64] = np.frombuffer(ends, np.int64)[latest]
        self.digests: NDArray[np.uint64] = halves[latest]

    def resembling(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """For each of `places`: whether another's id is the same in one half and not in the other.

        Hashes are never alike by chance: one of the two has been changed.
        """
        found = np.zeros(len(places), bool)
        for half in range(2):
            values = np.sort(self.digests[:, half])
            own = self.digests[places, half]
            counts = np.searchsorted(values, own, side="right") - np.searchsorted(values, own, side="left")
            found |= counts > 1
        return found


def order_of(index: LineIndex, visits: Visits, gone: Collection[int]) -> Spans:
    """Return the lines that stay, in input order; what no request of this run has stays behind what it stood behind.

    `gone` are offsets of lines that do not stay.
    """
    num_lines = len(index.starts)
    visited = visits.places()
    visited = visited[visited < num_lines]
    rank = np.full(num_lines, -1, np.int64)
    rank[visited] = np.arange(len(visited))
    # Forward: the rank of the nearest one before it that was visited; -1 before all.
    nearest = np.maximum.accumulate(np.where(rank >= 0, np.arange(num_lines), -1))
    anchors = np.where(nearest >= 0, rank[nearest], -1)
    order = np.lexsort((rank < 0, anchors))  # stable: what has one anchor keeps its order
    kept = order[~np.isin(index.starts[order], np.fromiter(gone, np.int64, len(gone)))]
    return _joined(index.starts[kept], index.ends[kept])


def _joined(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Spans:
    """Neighbours as one."""
    is_first = np.ones(len(starts), bool)
    is_first[1:] = starts[1:] != ends[:-1]
    return Spans(starts[is_first], ends[np.roll(is_first, -1)])


def copy_spans(old: IO[bytes], new: IO[bytes], spans: Spans) -> None:
    """Copy `spans` of `old` to `new`, one behind the other."""
    for position, end in zip(spans.starts.tolist(), spans.ends.tolist(), strict=True):
        while position < end:
            data = read_at(old.fileno(), min(_COPY_BYTES, end - position), position)
            if not data:
                raise OSError(0, "the file shrank while it was read")
            new.write(data)
            position += len(data)


SYNC_RECORDS = 256
SYNC_INTERVAL_S = 5.0
_FEW_BYTES, _MANY_BYTES = 1 << 12, 1 << 18  # read at a time: of one line, and of lines in order
_MOST_CHANGED = 2  # bytes of a head that still is ours


def encode_record(record: RecordDict) -> bytes:
    """A record as its line: UTF-8, no spaces, newline at the end.

    A lone surrogate has no UTF-8; it becomes `?` rather than a line that other readers refuse.
    """
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace") + b"\n"


class Journal:
    """An open journal; a context manager. See the module's text for what it promises.

    Attributes:
        path: the file.
        cut_bytes: what was cut from its end on opening because it was torn.
        damaged: what is damaged, found on opening and since; all of it is in OUT.damaged.
        is_replacing: whether the file still holds what the first append replaces.
        has_changed: whether this process has changed the file.
        found: the records found on opening, and what became of them since.
        first_record: the first of them, to compare an old run with this one.
        is_locked: False where the file system has no locks.
    """

    def __init__(self, path: Path, fd: int, lock: OutputLock) -> None:
        self.path = path
        self.cut_bytes = 0
        self.first_record: RecordDict | None = None
        self.is_locked = lock.is_held
        self._fd = fd
        self._lock = lock
        self.found = FoundRecords()
        self.damaged: list[DamagedLines] = []
        self.has_changed = False
        self.is_replacing = False
        self._digest: RecordsDigest | None = None
        self._visits = Visits(0)
        self._recorded_bad_rows: set[int] = set()  # lines of the manifest that cannot be read now either
        self._buffer, self._buffer_start = b"", 0
        self._num_added: dict[str | None, int] = {}
        self._end = 0
        self._num_unsynced = 0
        self._synced_at = time.monotonic()

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

        `lock_path` defaults to `path` + `.lock`. `overwrite`: the first records that are appended take the place of
        all that is there. `is_ours`: it is known that md3 wrote it, however damaged it may be.

        Raises:
            OutputError: held by another process (named), not a regular file, or not writable.
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
            fd = _open_append(path)
            journal = cls(path, fd, lock)
        except OSError as error:
            lock.release()
            raise output_error(path, error) from error
        try:
            journal._load(mode, is_ours)
        except BaseException:
            journal.close()
            raise
        return journal

    def _load(self, mode: Literal["resume", "overwrite"], is_ours: bool) -> None:
        try:
            if mode == "overwrite":
                self.is_replacing = os.fstat(self._fd).st_size > 0
                self.has_changed = not self.is_replacing
                return
            with open(self._fd, "rb", buffering=0, closefd=False) as file:
                self.found, self._end, self.damaged = scan_journal(file)
                file.seek(0)
                self.first_record = first_record(file) if len(self.found) else None
            size = os.fstat(self._fd).st_size
            if size and not len(self.found) and not is_ours and not _may_be_ours(read_at(self._fd, 1 << 16, 0)):
                raise OutputMismatchError(
                    f"{printable(str(self.path))} holds something else than records of this version of md3; "
                    "choose another -o, or --overwrite to replace it"
                )
            self._keep_damaged(self.damaged)
            self.cut_bytes = size - self._end
            if self.cut_bytes:
                os.ftruncate(self._fd, self._end)
                self.has_changed = True
            self._visits = Visits(len(self.found))
        except OSError as error:
            raise output_error(self.path, error) from error

    def _keep_damaged(self, damaged: Sequence[DamagedLines]) -> None:
        if damaged:
            keep_damaged(damaged_path(self.path), self._fd, [(lines.start, lines.end) for lines in damaged])

    # -- what is done --------------------------------------------------------------------------------

    def is_done(self, record_id: str, row: SourceRow, request: Request, *, retry_failed: bool = False) -> bool:
        """Whether the next request in input order stands in the file since before this run; called once for each.

        Not done is what failed, with `retry_failed`; a row that could not be read and can now; and a record that is
        not this request's, whatever its id says.

        Raises:
            OutputError: its line cannot be copied to OUT.damaged.
        """
        place = self.found.place_of(digest_of(record_id))
        self._visits.note(place)
        if place is None:
            return False
        line = self._line_at(self.found.start_of(place))
        if not is_record_of(line, record_id, row.image.name if row.image is not None else None, request):
            self._drop_damaged(place, line)
            return False
        if self.found.is_ok(place):
            return True
        if not self.found.is_failed(place) or retry_failed:
            return False
        return not self.found.is_failed_with(place, "bad_row") or self._is_still_bad(line, row)

    def _is_still_bad(self, line: bytes, row: SourceRow) -> bool:
        """Whether the failure of a row that could not be read is what it would be now."""
        if row.failure is None or row.failure.type != "bad_row":
            return False
        number = line_of_bad_row(row.failure.message)
        self._recorded_bad_rows |= {number} if number is not None else set()
        record = read_record(line)
        return record is not None and line_of_bad_row(record["error"]["message"]) == number

    def _drop_damaged(self, place: int, line: bytes) -> None:
        start = self.found.start_of(place)
        number = line_number(self._fd, start)
        lines = DamagedLines(number, number, start, start + len(line), True)
        self._keep_damaged([lines])
        self.found.supersede(place)
        self.damaged.append(lines)

    def _line_at(self, start: int) -> bytes:
        """The line from `start`; cheap where they are asked for in their order."""
        at = start - self._buffer_start
        end = self._buffer.find(b"\n", at) if 0 <= at < len(self._buffer) else -1
        if end >= 0:
            return self._buffer[at : end + 1]
        is_next = 0 <= at <= len(self._buffer)
        num_bytes = _MANY_BYTES if is_next else _FEW_BYTES
        while True:
            try:
                self._buffer, self._buffer_start = read_at(self._fd, num_bytes, start), start
            except OSError as error:
                raise output_error(self.path, error) from error
            end = self._buffer.find(b"\n")
            if end >= 0 or len(self._buffer) < num_bytes or num_bytes > LINE_LIMIT_BYTES:
                return self._buffer[: end + 1]
            num_bytes *= 4

    def lines_of_bad_rows(self) -> set[int]:
        """Return the lines of a manifest that could not be read when their records were made."""
        places = self.found.failures_of("bad_row")
        records = (read_record(self._line_at(self.found.start_of(place))) for place in places)
        numbers = {line_of_bad_row(record["error"]["message"]) for record in records if record is not None}
        return {number for number in numbers if number is not None}

    def state(self, record_id: str) -> Literal["ok", "failed"] | None:
        """What stands in the file for a request since before this run; None: it is still to do."""
        if not self.has(record_id, even_failed=True):
            return None
        return "ok" if self.has(record_id) else "failed"

    def has(self, record_id: str, *, even_failed: bool = False) -> bool:
        """Whether the answer to a request stands in the file since before this run, or `even_failed` its failure."""
        place = self.found.place_of(digest_of(record_id))
        return place is not None and (self.found.is_ok(place) or (even_failed and self.found.is_failed(place)))

    @property
    def num_ok(self) -> int:
        """Requests answered, in this run and before."""
        return self.found.num_ok + self._num_added.get(None, 0)

    @property
    def num_failed(self) -> dict[str, int]:
        """Requests failed, in this run and before, by error type."""
        before = self.found.num_failed
        types = sorted(before.keys() | {name for name in self._num_added if name is not None})
        counts = {name: before.get(name, 0) + self._num_added.get(name, 0) for name in types}
        return {name: count for name, count in counts.items() if count}

    @property
    def has_superseded(self) -> bool:
        """Whether failed records were done again, so that `rewrite` is due at the end."""
        return self.found.has_superseded

    def append(self, records: Iterable[RecordDict]) -> None:
        """Put a batch of records at the end with one write; on disk to stay when this returns.

        Raises:
            OutputError: not all of it could be written. Then none of it was: the file is as before.
        """
        batch = list(records)
        self._write(b"".join(map(encode_record, batch)))
        self.has_changed = True
        for record in batch:
            self._note(record)
        self._num_unsynced += len(batch)
        if self._num_unsynced >= SYNC_RECORDS or time.monotonic() - self._synced_at >= SYNC_INTERVAL_S:
            self.sync()

    def _note(self, record: RecordDict) -> None:
        place = self.found.place_of(digest_of(record["id"]))
        if place is not None and self.found.is_failed(place):
            self.found.supersede(place)
        error_type = record["error"]["type"] if record["error"] else None
        self._num_added[error_type] = self._num_added.get(error_type, 0) + 1

    def _write(self, data: bytes) -> None:
        if self.is_replacing and data:
            self._replace(data)
            return
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)  # a failed cut is repaired by the next start
            raise output_error(self.path, error) from error
        self._end += len(data)

    def _replace(self, data: bytes) -> None:
        """Put `data` in the place of the whole file by rename: a kill leaves the old file or the new one."""
        with atomic_publish(self.path) as temp:
            temp.write_bytes(data)
        try:
            os.close(self._fd)
            self._fd = _open_append(self.path)
        except OSError as error:
            raise output_error(self.path, error) from error
        self._end, self.is_replacing = len(data), False

    def sync(self) -> None:
        """Make what was appended safe from a power cut.

        Raises:
            OutputError: the disk refuses.
        """
        try:
            sync_data(self._fd)
        except OSError as error:
            raise output_error(self.path, error) from error
        self._num_unsynced = 0
        self._synced_at = time.monotonic()

    @property
    def is_rewrite_due(self) -> bool:
        """Whether the file has more than one whole record of each request."""
        return self.has_superseded or bool(self.damaged)

    @property
    def has_unasked(self) -> bool:
        """Whether records stand there that no request of this run has."""
        return bool(len(self._visits.not_visited()))

    def settle(self, unasked: Unasked | None = None, before_rewrite: Callable[[], None] = lambda: None) -> None:
        """Bring the file in order at the end of a run that came through INPUT; leaves it alone where it is.

        Each request has one record then, the last one made, in input order. What INPUT does not name stays, behind
        what it stood behind, unless `unasked` says otherwise. `before_rewrite` is called before the file is replaced.

        Raises:
            OutputError: no space for the copy, or not writable; the file is as before.
        """
        if unasked is None and not self.is_rewrite_due:
            return
        try:
            with open(self.path, "rb", buffering=0) as old:
                index = LineIndex(old)
                gone = self._gone(index, unasked) if unasked is not None else set()
                if not gone and not self.is_rewrite_due:
                    return
                spans = order_of(index, self._visits, gone | {lines.start for lines in self.damaged})
                before_rewrite()
                with atomic_publish(self.path) as temp, open(temp, "wb") as new:
                    copy_spans(old, new, spans)
            fd = _open_append(self.path)
        except OSError as error:
            raise output_error(self.path, error) from error
        os.close(self._fd)
        self._fd, self._end = fd, os.fstat(fd).st_size
        self._num_unsynced = 0
        self._digest = None
        self.has_changed, self.found.has_superseded, self._visits = True, False, Visits(0)

    def _gone(self, index: LineIndex, unasked: Unasked) -> set[int]:
        """Where the records begin that no request of this run has and that do not stay; damaged ones are copied."""
        places = self._visits.not_visited()
        gone, damaged = set(), []
        for place, has_twin in zip(places.tolist(), index.resembling(places).tolist(), strict=True):
            fate = self._fate(int(index.starts[place]), unasked, has_twin)
            if fate is not Fate.KEPT:
                gone.add(int(index.starts[place]))
                self.found.supersede(place)
            if fate is Fate.DAMAGED:
                start, end = int(index.starts[place]), int(index.ends[place])
                number = line_number(self._fd, start)
                damaged.append(DamagedLines(number, number, start, end, True))
        self._keep_damaged(damaged)
        self.damaged += damaged
        return gone

    def _fate(self, start: int, unasked: Unasked, has_twin: bool) -> Fate:
        if not has_twin and not unasked.is_parsing_worth_it:
            return Fate.KEPT
        record = read_record(self._line_at(start))
        return Fate.DAMAGED if record is None else unasked.fate_of(record, self._recorded_bad_rows, has_twin)

    def rewrite(self) -> None:
        """Replace the file by one with a single record a request, the last, where the first one stood.

        Raises:
            OutputError: no space for the copy, or not writable; the file is as before.
        """
        self.settle()

    def digest(self) -> RecordsDigest:
        """Return what the file is now; it is read unless nothing has been written since the last call.

        Raises:
            OutputError: it cannot be read.
        """
        if self._digest is None or self._digest.bytes != self._end:
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
        if self._fd < 0:
            return
        try:
            if self._num_unsynced:
                self.sync()
        finally:
            os.close(self._fd)
            self._fd = -1
            self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_append(path: Path) -> int:
    return open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)


def _may_be_ours(start: bytes) -> bool:
    """Whether a file without one whole record can be what a kill, a power cut (zeros) or damage left of ours."""
    line = start.partition(b"\n")[0]
    changed = sum(found not in (0, ours) for found, ours in zip(line, HEAD, strict=False))
    try:
        value = read_json(line)
    except (ValueError, RecursionError):
        return changed <= (_MOST_CHANGED if len(line) >= len(HEAD) else 0)
    return isinstance(value, dict) and value.get("schema") == SCHEMA
