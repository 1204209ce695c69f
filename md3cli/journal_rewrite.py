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

from md3cli.found_records import latest_lines
from md3cli.journal_scan import journal_lines

_COPY_BYTES = 1 << 20


class _Span(NamedTuple):
    start: int
    end: int


def copy_latest(old: IO[bytes], new: IO[bytes]) -> None:
    """Copy to `new` the last line of each id in `old`, in the order of the ids' first lines."""
    ends, digests = array("q"), bytearray()
    for lines in journal_lines(old):
        ends.frombytes(lines.ends.tobytes())
        digests += lines.digests.tobytes()
    if not ends:
        return
    latest = latest_lines(np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2))
    for span in _spans(latest, np.frombuffer(ends, dtype=np.int64)):
        _copy(old, new, span)


def _spans(lines: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[_Span]:
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
