"""The journal: one JSON Lines file of records, the only state a run has.

One writer under a lock, whole lines, one `write` a batch, O_APPEND. Whatever kills the process, what
was appended is there; a torn tail is cut on the next start and its requests are simply not done.
Knows nothing of images, models or tasks. What a crash can lose: nothing for a killed process, at most
the last 5 s or 256 records for a power cut.

Memory: 29 bytes a record found at the start (10 million: 290 MB), nothing for those appended later,
and 24 bytes a record more while `rewrite` runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Literal

from md3cli.digest_set import digest_of
from md3cli.errors import OutputError, OutputMismatchError
from md3cli.found_records import FoundRecords
from md3cli.journal_rewrite import copy_latest
from md3cli.journal_scan import HEAD, ForeignLineError, first_record, scan_journal
from md3cli.publish import OutputLock, atomic_publish, output_error, remove_stale_temps
from md3cli.records import RecordDict, printable

SYNC_RECORDS = 256
SYNC_INTERVAL_S = 5.0


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
        cut_bytes: what was cut from its end on opening because it was torn or damaged.
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
        self._num_added: dict[str | None, int] = {}
        self._end = 0
        self._num_unsynced = 0
        self._synced_at = time.monotonic()

    @classmethod
    def open(
        cls, path: Path, *, mode: Literal["resume", "overwrite"] = "resume", lock_path: Path | None = None
    ) -> Journal:
        """Lock, repair and read the journal at `path`, made with its folder where it is not there.

        `lock_path` defaults to `path` + `.lock`. `overwrite` empties the file.

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
            journal._load(mode)
        except BaseException:
            journal.close()
            raise
        return journal

    def _load(self, mode: Literal["resume", "overwrite"]) -> None:
        try:
            if mode == "overwrite":
                os.ftruncate(self._fd, 0)
                return
            with open(self._fd, "rb", buffering=0, closefd=False) as file:
                self.found, self._end = scan_journal(file)
                file.seek(0)
                self.first_record = first_record(file) if self._end else None
            size = os.fstat(self._fd).st_size
            if self._end == 0 and size and not _may_be_torn_record(os.pread(self._fd, len(HEAD), 0)):
                raise ForeignLineError
            self.cut_bytes = size - self._end
            if self.cut_bytes:
                os.ftruncate(self._fd, self._end)
        except OSError as error:
            raise output_error(self.path, error) from error
        except ForeignLineError:
            raise OutputMismatchError(
                f"{printable(str(self.path))} holds something else than records of this version of md3; "
                "choose another -o, or --overwrite to replace it"
            ) from None

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
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)  # a failed cut is repaired by the next start
            raise output_error(self.path, error) from error
        self._end += len(data)

    def sync(self) -> None:
        """Make what was appended safe from a power cut.

        Raises:
            OutputError: the disk refuses.
        """
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise output_error(self.path, error) from error
        self._num_unsynced = 0
        self._synced_at = time.monotonic()

    def rewrite(self) -> None:
        """Replace the file by one with a single record a request, the last, where the first one stood.

        As every run goes through INPUT in order, that is input order.

        Raises:
            OutputError: no space for the copy, or not writable; the file is as before.
        """
        with atomic_publish(self.path) as temp, open(self.path, "rb", buffering=0) as old, open(temp, "wb") as new:
            copy_latest(old, new)
        try:
            fd = _open_append(self.path)
        except OSError as error:
            raise output_error(self.path, error) from error
        os.close(self._fd)
        self._fd, self._end = fd, os.fstat(fd).st_size
        self.found.has_superseded = False

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
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "not a regular file")
    return fd


def _may_be_torn_record(start: bytes) -> bool:
    """Whether a file without one good line can be what a killed run or a power cut (zeros) left."""
    return all(found in (0, ours) for found, ours in zip(start, HEAD, strict=False))
