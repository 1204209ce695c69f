"""Records made before there was a plan, or before failures are done again, taken over as journals of shards.

A run that one process began has its records in OUTPUT's journal. They are found by id, wherever they stand and
whatever INPUT has become since, and copied line by line; the old file stays as it is until the export replaces it.
Memory: 32 bytes a record of the old journal.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from md3cli.damaged_lines import damage_words, damaged_path, keep_damaged, line_number
from md3cli.digest_set import digest_of
from md3cli.early import early_records
from md3cli.journal import encode_record
from md3cli.journal_scan import DamagedLines, journal_lines
from md3cli.records import OK_TAIL, Request, SourceRow
from md3cli.scale.asking import asked, is_line_of
from md3cli.scale.attempts import ADOPTED, attempt_files, read_history
from md3cli.scale.commits import Commit
from md3cli.scale.layout import KEPT, WIP, RunFolder, commit_name, journal_name, new_attempt
from md3cli.scale.plan import Plan, PlanReader
from md3cli.whole_records import read_record

ID_WITHIN_BYTES = 100  # of a line
_KEY_BYTES = 8  # of a digest, to look it up by; the rest is compared in the line itself


def adopt(folder: RunFolder, plan: Plan, journal: Path, *, with_failed: bool, warn: Callable[[str], None]) -> int:
    """Copy the records in `journal`, and those waiting beside it, to the shards of `plan`; returns how many.

    Records of requests that are not in the plan are kept for the export. `with_failed` False leaves the failed ones
    behind, to be done again. Damaged lines are copied to OUT.damaged, and `warn` is told. A crash in the middle loses
    copies only.

    Raises:
        OutputError: the folder cannot be written.
    """
    if not journal.is_file() or not journal.stat().st_size:
        return 0
    early = {record["id"]: encode_record(record) for record in early_records(journal)}
    num_adopted, reader = 0, PlanReader(folder, plan)
    with open(journal, "rb") as file:
        index = _Index(file, with_failed)
        for shard in range(plan.shards):
            found = [_line_of(*one, index, early) for one in asked(reader.shard(shard))]
            if lines := [line for line in found if line is not None]:
                keep_lines(folder, shard, lines)
            num_adopted += len(lines)
        _keep_others(folder, index)
        index.damaged.sort()
        keep_damaged(damaged_path(journal), file.fileno(), [(lines.start, lines.end) for lines in index.damaged])
    if words := damage_words(journal, index.damaged):
        warn(words)
    return num_adopted


def _line_of(
    record_id: str, row: SourceRow, request: Request, index: _Index, early: Mapping[str, bytes]
) -> bytes | None:
    """The line of a request; none that is another's, nor the failure of a row that can be read now."""
    found = index.line_of(record_id)
    if found is not None and not is_line_of(found, record_id, row, request):
        index.drop_damaged(record_id)
        found = None
    for line in (found, early.get(record_id)):
        if line is not None and is_line_of(line, record_id, row, request) and not _is_mended(line, row):
            return line
    return None


def _is_mended(line: bytes, row: SourceRow) -> bool:
    """Whether it is the failure to read a row that can be read now."""
    if row.failure is not None or line.endswith(OK_TAIL):
        return False
    record = read_record(line)
    return record is not None and record["error"] is not None and record["error"]["type"] == "bad_row"


def _keep_others(folder: RunFolder, index: _Index) -> None:
    if not index.has_others:
        folder.store.remove(KEPT)  # of a start that was killed before its plan was there
    else:
        with folder.store.put_file(KEPT) as path, open(path, "wb") as file:
            file.writelines(index.others())


def keep_lines(folder: RunFolder, shard: int, lines: list[bytes]) -> None:
    """Leave records as the journal of an attempt at `shard`, so that they are not done again."""
    folder.wip.put(journal_name(shard, f"{ADOPTED}{new_attempt()}"), b"".join(lines))


class _Index:
    """Where the last record of each id stands in a file of records."""

    def __init__(self, file: IO[bytes], with_failed: bool) -> None:
        self._fd, self._with_failed = file.fileno(), with_failed
        self._starts, self._ends, keys, self._is_failed = array("q"), array("q"), bytearray(), bytearray()
        self.damaged: list[DamagedLines] = []
        for lines in journal_lines(file):
            if isinstance(lines, DamagedLines):
                self.damaged.append(lines)
                continue
            self._starts.frombytes(lines.starts.tobytes())
            self._ends.frombytes(lines.ends.tobytes())
            keys += lines.digests[:, :_KEY_BYTES].tobytes()
            self._is_failed += (lines.outcomes != 0).tobytes()
        found = np.frombuffer(bytes(keys), dtype=">u8").astype(np.uint64)
        self._order = np.argsort(found, kind="stable")
        self._keys = found[self._order]
        self._is_other = self._latest()

    def _latest(self) -> bytearray:
        """1 for the last line of each id; a collision of keys only keeps a line too few from `others`."""
        is_last = np.ones(len(self._order), dtype=np.uint8)
        is_last[self._order[:-1][self._keys[1:] == self._keys[:-1]]] = 0
        return bytearray(is_last.tobytes())

    def line_of(self, record_id: str) -> bytes | None:
        """The last line of an id; None where there is none, or a failure that is not wanted."""
        number = self._number_of(record_id)
        if number is None:
            return None
        self._is_other[number] = 0
        return self._line(number) if self._with_failed or not self._is_failed[number] else None

    def _number_of(self, record_id: str) -> int | None:
        key = np.uint64(int.from_bytes(digest_of(record_id)[:_KEY_BYTES]))
        for number in self._lines_with(key):
            if record_id.encode() in self._line(number)[:ID_WITHIN_BYTES]:
                return number
        return None

    def drop_damaged(self, record_id: str) -> None:
        """Count the last line of an id among what is damaged: it says something else than its id."""
        number = self._number_of(record_id)
        assert number is not None
        start, end = self._starts[number], self._ends[number]
        line = line_number(self._fd, start)
        self.damaged.append(DamagedLines(line, line, start, end, True))

    def _lines_with(self, key: np.uint64) -> Iterator[int]:
        """The lines that may be it, the last one first."""
        place = int(np.searchsorted(self._keys, key, side="right")) - 1
        while place >= 0 and self._keys[place] == key:
            yield int(self._order[place])
            place -= 1

    def _line(self, number: int) -> bytes:
        start, end = self._starts[number], self._ends[number]
        return os.pread(self._fd, end - start, start)

    @property
    def has_others(self) -> bool:
        """Whether there are lines that nobody asked for."""
        return any(self._is_other)

    def others(self) -> Iterator[bytes]:
        """The last line of each id that nobody asked for, in the file's order."""
        return (self._line(number) for number, is_other in enumerate(self._is_other) if is_other)


def _is_failed(line: bytes) -> bool:
    """Whether it is the whole record of a failure; a damaged line is none, so that it is found and told of."""
    record = None if line.endswith(OK_TAIL) else read_record(line)
    return record is not None and record["error"] is not None


def reopen_failed(folder: RunFolder, plan: Plan, commits: dict[int, Commit]) -> None:
    """Have all failed requests done again: shards that have any are no longer committed, their good records stay.

    For one process that holds the output's lock. The old export keeps the failed records until it is replaced.
    """
    for shard in range(plan.shards):
        commit = commits.get(shard)
        if commit is not None and commit.errors:
            lines = (folder.store.read(commit.part) or b"").splitlines(keepends=True)
            keep_lines(folder, shard, [line for line in lines if not _is_failed(line)])
            folder.store.remove(commit_name(shard))
            folder.store.remove(commit.part)
            del commits[shard]
        elif commit is None and (names := attempt_files(folder.wip, shard)):
            records = read_history(folder, shard).records.values()
            keep_lines(folder, shard, [line for line in records if line.endswith(OK_TAIL)])
            for name in names:
                folder.wip.remove(f"{WIP}/{name}")
