"""Making a journal clean again: one whole record a request, in input order, without what was damaged or mended.

Two passes: an index of 33 bytes a line, then a copy of the byte ranges that stay. Records are never held, and only
those that INPUT no longer names are parsed.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Collection
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from md3cli.found_records import latest_lines
from md3cli.journal_scan import DamagedLines, journal_lines
from md3cli.visits import Visits

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
            data = os.pread(old.fileno(), min(_COPY_BYTES, end - position), position)
            if not data:
                raise OSError(0, "the file shrank while it was read")
            new.write(data)
            position += len(data)
