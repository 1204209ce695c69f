"""Reading a journal back: which lines are whole, which ids are done, which failed, what is damaged; writes nothing.

A damaged line costs itself only; one into which a whole record is glued, because its neighbour's newline has gone, is
damaged up to that record. `scan_journal` tells a start what is done, `LineIndex` and `order_of` tell the rewrite at
the end which lines stay in which order, and `RecordsVerification` tells a user whether a finished run's records are
what the run left. Knows nothing of INPUT. A scan holds one block, the longest line, and 37 bytes a record.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from md3cli.errors import InputError
from md3cli.finished.digest import DIGEST_BYTES
from md3cli.finished.record_shape import LINE_LIMIT_BYTES, WHOLE_LINES, read_record
from md3cli.finished.run_json import (
    change_since,
    counts_of,
    digest_of_file,
    is_finished,
    kept_digest,
    load_run_info,
)
from md3cli.records import OK_TAIL, SCHEMA, RecordDict, printable, strict_json
from md3cli.run.log import DamagedLines
from md3cli.run.record_index import RecordIndex, Visits, latest_lines, outcome_code
from md3cli.system import read_at

BLOCK_BYTES = 1 << 20
_COPY_BYTES = 1 << 20

HEAD = f'{{"schema":"{SCHEMA}","id":"'.encode()
_ID = slice(len(HEAD), len(HEAD) + 2 * DIGEST_BYTES)
_MOST_GLUED = 4  # heads inside a damaged line that are tried
_ERROR_TYPE = re.compile(rb'.*"error":\{"type":"([a-z_]++)",', re.DOTALL)  # the last: `error` is the last key


class JournalLines(NamedTuple):
    """Whole lines in a row.

    `starts` and `ends` [lines] are their offsets, the ends behind the newlines; `digests` [lines, 16] stand for
    their ids, `outcomes` [lines] say how each ended (`record_index.outcome_code`).
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    digests: NDArray[np.uint8]
    outcomes: NDArray[np.uint8]


def journal_lines(file: IO[bytes]) -> Iterator[JournalLines | DamagedLines]:
    """Yield the lines from the file's position on, which is the start of a line; not a torn end without a newline."""
    number = 1
    for block in _whole_lines(file):
        if block.text is None:
            yield DamagedLines(number, number, block.start, block.end, False)
            number += 1
            continue
        ends = np.flatnonzero(np.frombuffer(block.text, np.uint8) == ord("\n")) + 1
        yield from _read_block(block.text, ends, block.start, number)
        number += len(ends)


class _Block(NamedTuple):
    """Whole lines, or None for one that is too long to be ours."""

    start: int
    end: int
    text: bytes | None


def _whole_lines(file: IO[bytes]) -> Iterator[_Block]:
    """Yield the file in blocks of whole lines, each with its newline; a torn end is left out."""
    start = position = file.tell()
    rest: list[bytes] = []
    while chunk := file.read(BLOCK_BYTES):
        whole, newline, tail = chunk.rpartition(b"\n")
        is_too_long = position - start > LINE_LIMIT_BYTES
        if newline and is_too_long:
            line, _, whole = chunk[: len(whole) + 1].partition(b"\n")
            yield _Block(start, position + len(line) + 1, None)
            start, rest = position + len(line) + 1, []
            if whole:
                yield _Block(start, start + len(whole), whole)
        elif newline:
            text = b"".join((*rest, whole, newline))
            yield _Block(start, start + len(text), text)
        position += len(chunk)
        if newline:
            start, rest = position - len(tail), [tail]
        elif not is_too_long:
            rest.append(chunk)


def _read_block(
    text: bytes, ends: NDArray[np.int64], offset: int, number: int
) -> Iterator[JournalLines | DamagedLines]:
    """Yield the lines of `text`, which end at `ends` in it.

    `offset` is the place of `text` in the file, and `number` that of its first line among the lines.
    """
    starts = np.concatenate(([0], ends[:-1]))
    is_readable = _readable(text, starts, ends)
    line = 0
    while line < len(ends):
        # Whole lines up to the next that has to be looked at by itself.
        limit = line + int(np.argmin(is_readable[line:])) if not is_readable[line:].all() else len(ends)
        match = WHOLE_LINES.match(text, int(starts[line]), int(ends[limit - 1]) if limit > line else int(starts[line]))
        stop = line + int(np.searchsorted(ends[line:], match.end() if match else 0, side="right"))
        if stop > line:
            yield _whole(text, starts[line:stop], ends[line:stop], offset)
        if stop < len(ends):
            yield from _one_line(text[starts[stop] : ends[stop]], offset + int(starts[stop]), number + stop)
        line = stop + 1


def _readable(text: bytes, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each line whether it is UTF-8."""
    if text.isascii() or _is_utf8(text):
        return np.ones(len(ends), bool)
    lines = zip(starts.tolist(), ends.tolist(), strict=True)
    return np.fromiter((_is_utf8(text[start:end]) for start, end in lines), bool, len(ends))


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _whole(text: bytes, starts: NDArray[np.int64], ends: NDArray[np.int64], offset: int) -> JournalLines:
    """Read lines that WHOLE_LINES has matched, so that ids and tails stand where md3 puts them."""
    codes = np.frombuffer(text, np.uint8)
    nibbles = _NIBBLES[sliding_window_view(codes, _ID.stop - _ID.start)[starts + _ID.start]]
    digests = nibbles[:, ::2] << np.uint8(4) | nibbles[:, 1::2]
    tails = sliding_window_view(codes, len(OK_TAIL))[ends - len(OK_TAIL)]
    outcomes = np.zeros(len(ends), np.uint8)
    for line in np.flatnonzero((tails != np.frombuffer(OK_TAIL, np.uint8)).any(axis=1)).tolist():
        error_type = _ERROR_TYPE.match(text, int(starts[line]), int(ends[line]))
        assert error_type is not None
        outcomes[line] = outcome_code(error_type[1].decode())
    return JournalLines(starts + offset, ends + offset, digests, outcomes)


def _nibble_table() -> NDArray[np.uint8]:
    """Return the value of each hexadecimal digit by its character; 255 for all other characters."""
    table = np.full(256, 255, np.uint8)
    for value, digit in enumerate("0123456789abcdef"):
        table[ord(digit)] = value
    return table


_NIBBLES = _nibble_table()


# -- any other line ----------------------------------------------------------------------------------


def _one_line(line: bytes, start: int, number: int) -> Iterator[JournalLines | DamagedLines]:
    end = start + len(line)
    heads = (found.start() for found in islice(re.finditer(re.escape(HEAD), line[1:]), _MOST_GLUED))
    for glued in (0, *(head + 1 for head in heads)):
        record = read_record(line[glued:])
        if record is not None:
            if glued:
                yield DamagedLines(number, number, start, start + glued, False)
            yield _alone(record, start + glued, end)
            return
    yield DamagedLines(number, number, start, end, _is_json(line))


def _alone(record: RecordDict, start: int, end: int) -> JournalLines:
    error_type = record["error"]["type"] if record["error"] is not None else None
    digest = np.frombuffer(bytes.fromhex(record["id"]), np.uint8).reshape(1, -1)
    return JournalLines(np.array([start]), np.array([end]), digest, np.array([outcome_code(error_type)], np.uint8))


def _is_json(line: bytes) -> bool:
    try:
        strict_json(line)
    except (ValueError, RecursionError):
        return False
    return True


# -- the whole ---------------------------------------------------------------------------------------


class ScannedJournal(NamedTuple):
    """What a journal says; `end` is the offset behind its last line that is not torn."""

    found: RecordIndex
    end: int
    damaged: list[DamagedLines]


def scan_journal(file: IO[bytes]) -> ScannedJournal:
    """Read a whole journal: one million records of 420 bytes in 1.5 s.

    A last line that does not parse is torn, as one without a newline is: it stands behind `end`.
    """
    starts, digests, outcomes, end = bytearray(), bytearray(), bytearray(), 0
    damaged: list[DamagedLines] = []
    for lines in journal_lines(file):
        if isinstance(lines, DamagedLines):
            _join(damaged, lines)
            end = lines.end
            continue
        starts += lines.starts.tobytes()
        digests += lines.digests.tobytes()
        outcomes += lines.outcomes.tobytes()
        end = int(lines.ends[-1])
    if damaged and damaged[-1].end == end and not damaged[-1].is_json and damaged[-1].first == damaged[-1].last:
        end = damaged.pop().start
    return ScannedJournal(RecordIndex(digests, outcomes, starts), end, damaged)


def _join(damaged: list[DamagedLines], lines: DamagedLines) -> None:
    """Add lines to what is damaged, as one entry with damaged neighbours of their kind."""
    if damaged and damaged[-1].end == lines.start and damaged[-1].is_json == lines.is_json:
        lines = lines._replace(first=damaged[-1].first, start=damaged.pop().start)
    damaged.append(lines)


def first_record(file: IO[bytes]) -> RecordDict | None:
    """Return the first whole record from the file's position on; None where there is none.

    Raises:
        OSError: it cannot be read.
    """
    for lines in journal_lines(file):
        if isinstance(lines, JournalLines):
            file.seek(int(lines.starts[0]))
            return read_record(file.read(int(lines.ends[0] - lines.starts[0])))
    return None


# -- in input order ------------------------------------------------------------------------------------


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
        """Return for each of `places` whether another's id is the same in one half and not in the other.

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
    """Return the lines that stay, in input order; `gone` are the offsets of lines that do not stay.

    A line that no request of this run has stays behind the line it stood behind.
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
    """Return spans with neighbours joined to one, so that they are copied together."""
    is_first = np.ones(len(starts), bool)
    is_first[1:] = starts[1:] != ends[:-1]
    return Spans(starts[is_first], ends[np.roll(is_first, -1)])


def copy_spans(old: int, new: IO[bytes], spans: Spans) -> None:
    """Copy `spans` of the open file `old` to `new`, one behind the other."""
    for position, end in zip(spans.starts.tolist(), spans.ends.tolist(), strict=True):
        while position < end:
            data = read_at(old, min(_COPY_BYTES, end - position), position)
            if not data:
                raise OSError(0, "the file shrank while it was read")
            new.write(data)
            position += len(data)


# -- the records of a finished run ---------------------------------------------------------------------

_MOST_DAMAGE_NAMED = 20


class RecordsVerification:
    """One look at a records file; `num_records` is known once all `findings` have been asked for."""

    def __init__(self, records: Path) -> None:
        """Raises InputError: its run.json is not JSON."""
        self._records = records
        self._document = load_run_info(records).document
        self.num_records = 0

    def findings(self) -> Iterator[str]:
        """Yield what is wrong, in words; nothing where all is as it should be.

        Raises:
            InputError: the records cannot be read, or it is a file of something else.
        """
        try:
            yield from self._line_findings()
            if change := change_since(self._document, self._records):
                yield f"{printable(str(self._records))} was changed after the run: {change}"
        except OSError as error:
            raise InputError(f"cannot read {printable(str(self._records))}: {error.strerror or error}") from error
        if not self._document:
            yield "no run.json stands beside the records, so nothing tells whether the run is finished"
        elif not is_finished(self._document):
            yield f"the run is not finished ({self.num_records:,} records so far); the same command goes on"
        elif kept_digest(self._document) is None:
            yield from self._count_findings()

    def digest(self) -> str:
        """Return the SHA-256 of the records, of a run without findings as run.json keeps it."""
        kept = kept_digest(self._document)
        return digest_of_file(self._records).sha256 if kept is None else kept.sha256

    def _line_findings(self) -> Iterator[str]:
        with open(self._records, "rb", buffering=0) as file:
            scanned = scan_journal(file)
            size = self._records.stat().st_size
        self.num_records = len(scanned.found)
        if not self.num_records and not self._document:
            raise InputError(f"{printable(str(self._records))} holds no record of md3")
        for lines in scanned.damaged[:_MOST_DAMAGE_NAMED]:
            yield f"{_damage(lines, printable(str(self._records)))}; the same command mends it"
        if len(scanned.damaged) > _MOST_DAMAGE_NAMED:
            yield f"{len(scanned.damaged) - _MOST_DAMAGE_NAMED:,} more places are damaged"
        if size > scanned.end:
            yield f"a torn end of {size - scanned.end:,} bytes; the same command repairs it"
        if scanned.found.has_replaced:
            yield "some requests have more than one record; the same command puts them in order"

    def _count_findings(self) -> Iterator[str]:
        """Compare the counts of a run of before run.json kept digests."""
        counts = counts_of(self._document)
        if counts is not None and counts["ok"] + counts["failed"] != self.num_records:
            noted = counts["ok"] + counts["failed"]
            yield f"the run was finished with {noted:,} records, and there are {self.num_records:,}"


def _damage(lines: DamagedLines, file: str) -> str:
    if lines.first == lines.last:
        return f"line {lines.first} of {file} is no whole record"
    return f"lines {lines.first} to {lines.last} of {file} are no whole records"
