"""Making a journal clean again after failed records were done a second time.

Two passes: an index of 24 bytes a line, then a copy of the byte ranges that stay. Records are
never parsed or held.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from md3cli.journal_scan import journal_lines

_COPY_BYTES = 1 << 20


class _Span(NamedTuple):
    start: int
    end: int


def copy_latest(old: IO[bytes], new: IO[bytes]) -> None:
    """Copy to `new` the last line of each id in `old`, in the order of the ids' first lines."""
    ends, digests = array("Q"), bytearray()
    for line in journal_lines(old):
        ends.append(line.end)
        digests += line.digest
    if not ends:
        return
    latest = _latest_lines(np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2))
    for span in _spans(latest, np.frombuffer(ends, dtype=np.uint64)):
        _copy(old, new, span)


def _latest_lines(digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For digests [lines, 2 halves]: the last line of each, ordered by the first line of each."""
    order = np.lexsort((digests[:, 0], digests[:, 1]))  # stable: within an id in file order
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = False
    for half in range(2):  # one at a time: at ten million lines a copy is 80 MB
        by_id = digests[:, half][order]
        is_first[1:] |= by_id[1:] != by_id[:-1]
    first_lines, last_lines = order[is_first], order[np.roll(is_first, -1)]
    return last_lines[np.argsort(first_lines)]


def _spans(lines: NDArray[np.int64], ends: NDArray[np.uint64]) -> Iterator[_Span]:
    """The byte ranges of `lines`, neighbours joined; `ends` is the offset behind each line."""
    breaks = np.flatnonzero(np.diff(lines) != 1) + 1
    for start, stop in zip([0, *breaks], [*breaks, len(lines)], strict=True):
        first, last = int(lines[start]), int(lines[stop - 1])
        yield _Span(int(ends[first - 1]) if first else 0, int(ends[last]))


def _copy(old: IO[bytes], new: IO[bytes], span: _Span) -> None:
    position = span.start
    while position < span.end:
        data = os.pread(old.fileno(), min(_COPY_BYTES, span.end - position), position)
        if not data:
            raise OSError(0, "the file shrank while it was read")
        new.write(data)
        position += len(data)
