"""Answers that came before their turn, kept on disk meanwhile, so that a kill does not cost them.

Records are written in input order, and one long answer may hold back hundreds that were asked after
it. The journal alone says what is done: this file is only a memory of answers that need not be
computed again. Lost, torn or stale it costs time, never a record. Knows nothing of models or images.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from md3cli.journal import encode_record
from md3cli.records import SCHEMA, RecordDict

SUFFIX = ".early"
SLACK_LINES = 64  # lines that nobody waits for any more, before the file is written anew


class EarlyRecords:
    """The file beside the journal at `journal_path`; used by the process that holds the output's lock.

    It holds the records that wait, and at most as many again that have been written since. A disk that
    refuses it is no failure; the next time all of it is tried again.
    """

    def __init__(self, journal_path: Path, *, is_done: Callable[[str], bool], is_fresh: bool = False) -> None:
        """Read what an earlier start left, unless `is_fresh`; `is_done`: whether an id's record is written."""
        self._path = journal_path.with_name(journal_path.name + SUFFIX)
        self._temp = self._path.with_name(self._path.name + ".new")
        self._left = {} if is_fresh else {r["id"]: r for r in _read(self._path) if not is_done(r["id"])}
        self._fd: int | None = None
        self._num_lines = 0

    def take(self, record_id: str) -> RecordDict | None:
        """The record an earlier start left for a request, to be written when its turn comes."""
        return self._left.get(record_id)

    def keep(self, new: Sequence[RecordDict], waiting: Callable[[], Sequence[RecordDict]]) -> None:
        """Keep records until they are written; `waiting` are all that wait now, `new` those of them not kept yet."""
        if not new:
            return
        try:
            if self._fd is None or self._num_lines + len(new) > 2 * len(waiting()) + SLACK_LINES:
                self._rewrite(waiting())
            else:
                _write_all(self._fd, new)
                self._num_lines += len(new)
        except OSError:
            self.close()

    def _rewrite(self, waiting: Sequence[RecordDict]) -> None:
        """A file of what waits and of what was left and has not had its turn, in the old one's place."""
        records = list({record["id"]: record for record in (*self._left.values(), *waiting)}.values())
        fd = os.open(self._temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            _write_all(fd, records)
            os.replace(self._temp, self._path)
        except OSError:
            os.close(fd)
            raise
        self.close()
        self._fd, self._num_lines = fd, len(records)

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
    rest = memoryview(b"".join(map(encode_record, records)))
    while rest:
        rest = rest[os.write(fd, rest) :]


def _read(path: Path) -> Iterable[RecordDict]:
    """The whole records in a file that a kill may have left in any state."""
    if not path.is_file():  # a FIFO would be waited for
        return
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if _is_answer(record):
                    yield record


def _is_answer(record: Any) -> bool:
    is_ours = isinstance(record, dict) and record.get("schema") == SCHEMA and isinstance(record.get("id"), str)
    return is_ours and "error" in record and record["error"] is None and isinstance(record.get("tokens"), dict)
