"""Records that stand in OUTPUT are taken over by a plan: copied to the journals of the shards that ask for them.

They are found by id, wherever they stand and whatever INPUT has become since, and copied line by line; the old file
stays until the export replaces it. Memory: 38 bytes a record of the old journal. Apart from start.py, which decides
what is gone on with, taken over or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from md3cli.finished.digest import digest_of
from md3cli.finished.record_shape import read_record
from md3cli.records import OK_TAIL, Request, SourceRow
from md3cli.run.journal import encode_record
from md3cli.run.journal_scan import journal_lines
from md3cli.run.log import DamagedLines, damage_words, keep_damaged
from md3cli.run.order import waiting_records
from md3cli.run.record_index import RecordIndex, line_of_bad_row
from md3cli.scale.attempts import keep_lines
from md3cli.scale.children import Families, asked, is_line_of
from md3cli.scale.folder import KEPT, RunFolder
from md3cli.scale.plan import Plan, PlanReader


def adopt(
    folder: RunFolder,
    plan: Plan,
    journal: Path,
    families: Families,
    *,
    with_failed: bool,
    warn: Callable[[str], None],
    readable_of: Callable[[frozenset[int]], Container[int]] = lambda lines: (),
) -> int:
    """Copy the records in `journal`, and those waiting beside it, to the shards of `plan`; return how many.

    Records of requests that are not in the plan are kept for the export, but for those of lines of a manifest that
    can be read now, which `readable_of` knows, or have another record now. `with_failed` False leaves failed records
    behind, so that their requests are done again. Damaged lines are copied to OUT.damaged, and `warn` is told. A crash
    in the middle loses copies only.

    Raises:
        OutputError: the folder cannot be written.
    """
    if not journal.is_file() or not journal.stat().st_size:
        return 0
    waiting = {record["id"]: encode_record(record) for record in waiting_records(journal)}
    num_adopted, reader, bad_lines = 0, PlanReader(folder, plan), set[int | None]()
    incomplete: list[int] = []  # shards
    with open(journal, "rb") as file:
        index = _Index(file, with_failed)
        for shard in range(plan.shards):
            rows = reader.shard(shard)
            bad_lines |= {_bad_line_of(row.row) for row in rows}
            lines: dict[str, bytes] = {}
            for requests in (asked(rows), families.children(rows, lines)):
                found = ((one.record_id, _line_of(*one, index, waiting)) for one in requests)
                lines |= {record_id: line for record_id, line in found if line is not None}
            if lines:
                keep_lines(folder, shard, list(lines.values()))
            num_adopted += len(lines)
            if families.lack_parents(rows, lines):
                incomplete.append(shard)
        if incomplete:
            num_adopted += _adopt_orphans(folder, reader, incomplete, index, families)
        _keep_others(folder, index, bad_lines, readable_of)
        index.damaged.sort()
        keep_damaged(journal, file.fileno(), index.damaged)
    if words := damage_words(journal, index.damaged):
        warn(words)
    return num_adopted


def _adopt_orphans(
    folder: RunFolder, reader: PlanReader, shards: Sequence[int], index: _Index, families: Families
) -> int:
    """Copy what may be of children whose parent's record is missing to the parent's shard; return how many.

    Which of them are is seen there, once the parent has a record again.
    """
    orphans: dict[str, list[str]] = {}  # ids by that of the parent, or by the name of the picture
    for other in index.others():
        if (record := read_record(other)) is not None:
            key = record["region"]["of"] if record.get("region") is not None else record.get("image")
            orphans.setdefault(str(key), []).append(record["id"])
    num_adopted = 0
    for shard in shards if orphans else ():
        ids: list[str] = []
        for one in asked(reader.shard(shard)):
            if families.ups.may_follow(one.row, one.request):
                is_about_parts = bool(one.row.then)
                name = one.row.image.name if one.row.image is not None else None
                ids += orphans.pop(str(one.record_id if is_about_parts else name), [])
        if lines := [line for record_id in ids if (line := index.line_of(record_id)) is not None]:
            keep_lines(folder, shard, lines)
        num_adopted += len(lines)
    return num_adopted


def _line_of(
    record_id: str, row: SourceRow, request: Request, index: _Index, waiting: Mapping[str, bytes]
) -> bytes | None:
    """Return the record of a request; None for another request's, and for the failure of a row that is mended."""
    found = index.line_of(record_id)
    if found is not None and not is_line_of(found, record_id, row, request):
        index.drop_damaged(record_id)
        found = None
    for line in (found, waiting.get(record_id)):
        if line is not None and is_line_of(line, record_id, row, request):
            message = _bad_row_in(line)
            if message is None or (row.failure is not None and line_of_bad_row(message) == _bad_line_of(row)):
                return line  # else of a line that is mended: ids of bad lines are counted, and the next one has its id
    return None


def _bad_line_of(row: SourceRow) -> int | None:
    """Return the number of a manifest's line that cannot be read; None for any other row."""
    is_bad = row.failure is not None and row.failure.type == "bad_row"
    return line_of_bad_row(row.failure.message) if row.failure is not None and is_bad else None


def error_in(line: bytes) -> Mapping[str, Any] | None:
    """Return a failure; None for a good record, and for a damaged line, so that it is found and told of."""
    record = None if line.endswith(OK_TAIL) else read_record(line)
    return None if record is None else record["error"]


def _bad_row_in(line: bytes) -> str | None:
    """Return the message of a `bad_row` record; None for any other line."""
    error = error_in(line)
    return error["message"] if error is not None and error["type"] == "bad_row" else None


def _keep_others(
    folder: RunFolder,
    index: _Index,
    bad_lines: Container[int | None],
    readable_of: Callable[[frozenset[int]], Container[int]],
) -> None:
    noted = frozenset(filter(None, (line_of_bad_row(_bad_row_in(line) or "") for line in index.others())))
    readable = readable_of(noted) if noted else ()
    gone = {number for number in noted if number in readable or number in bad_lines}
    others = (line for line in index.others() if not gone or line_of_bad_row(_bad_row_in(line) or "") not in gone)
    if (first := next(others, None)) is None:
        folder.store.remove(KEPT)  # of a start that was killed before its plan was there
        return
    with folder.store.put_file(KEPT) as path, open(path, "wb") as file:
        file.write(first)
        file.writelines(others)


class _Index:
    """The records of a journal by id: the last line of an id counts. `damaged` grows by what turns out to be so."""

    def __init__(self, file: IO[bytes], with_failed: bool) -> None:
        self._file, self._with_failed = file, with_failed
        self.damaged: list[DamagedLines] = []
        digests, outcomes, starts = bytearray(), bytearray(), bytearray()
        for lines in journal_lines(file):
            if isinstance(lines, DamagedLines):
                self.damaged.append(lines)
                continue
            digests += lines.digests.tobytes()
            outcomes += lines.outcomes.tobytes()
            starts += lines.starts.tobytes()
        self._found = RecordIndex(digests, outcomes, starts)
        self._is_asked = bytearray(len(self._found))

    def line_of(self, record_id: str) -> bytes | None:
        """Return the line of an id; None where there is none, or a failure that is not wanted."""
        place = self._found.find(digest_of(record_id))
        if place is None:
            return None
        self._is_asked[place] = 1
        return self._line_at(self._found.start_of(place)) if self._with_failed or self._found.is_ok(place) else None

    def drop_damaged(self, record_id: str) -> None:
        """Count the line of an id among what is damaged: it says something else than its id."""
        place = self._found.find(digest_of(record_id))
        assert place is not None
        start = self._found.start_of(place)
        self.damaged.append(DamagedLines.at(self._file.fileno(), start, start + len(self._line_at(start))))

    def _line_at(self, start: int) -> bytes:
        self._file.seek(start)
        return self._file.readline()

    def others(self) -> Iterator[bytes]:
        """Yield the lines that nobody asked for, in the file's order."""
        places = np.flatnonzero(np.frombuffer(self._is_asked, np.uint8) == 0)
        starts = np.fromiter((self._found.start_of(place) for place in places.tolist()), np.int64, len(places))
        return map(self._line_at, np.sort(starts).tolist())
