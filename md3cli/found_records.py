"""What a run found in its journal: which requests stand there, and how each ended.

Two arrays in the order of the file and an index over them. INPUT is read in the order in which the
records were written, so a request is looked for behind the one found last, and only then by search.

Memory: 37 bytes a record (10 million: 370 MB), less than twice that while the index is made.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from md3cli.digest_set import DIGEST_BYTES
from md3cli.records import ERROR_TYPES

_TYPES: tuple[str | None, ...] = (None, *sorted(ERROR_TYPES))
_CODES = {error_type: code for code, error_type in enumerate(_TYPES)}
_REDONE = len(_TYPES)
_KEY_BYTES = 8  # of a digest, by which it is searched


def outcome_code(error_type: str | None) -> int:
    """How a record ended as one byte; None is a success."""
    return _CODES[error_type]


class FoundRecords:
    """The requests of a journal, each once, in its order.

    Attributes:
        has_superseded: some request stood there more than once; the last record counts, in the first one's place.
    """

    def __init__(
        self, digests: bytes | bytearray = b"", outcomes: bytes | bytearray = b"", starts: bytes | bytearray = b""
    ) -> None:
        """Take all lines, one behind the other.

        `digests` are 16 bytes a line, `outcomes` one byte (see `outcome_code`), `starts` the lines' offsets in the
        file, eight bytes each; these may be left out.
        """
        order = _order_of(digests)
        self.has_superseded = _has_repeats(digests, order)
        if self.has_superseded:
            latest = latest_lines(_halves(digests))
            digests, outcomes = _halves(digests)[latest].tobytes(), np.frombuffer(outcomes, np.uint8)[latest].tobytes()
            starts = np.frombuffer(starts, np.int64)[latest].tobytes() if starts else b""
            order = _order_of(digests)
        self._starts = array("q", bytes(starts))
        self._digests, self._outcomes = digests, bytearray(outcomes)
        self._order = array("I", order.astype(np.uint32).tobytes())
        self._sorted_keys = array("Q", _keys(digests)[order].tobytes())
        self._counts = np.bincount(np.frombuffer(outcomes, np.uint8), minlength=_REDONE + 1)
        self._last_place, self._last_digest = -1, b""

    def __len__(self) -> int:
        return len(self._outcomes)

    def place_of(self, digest: bytes) -> int | None:
        """Which record it is, counted from 0; None: it is not there."""
        if digest == self._last_digest:
            return self._last_place
        place: int | None = self._last_place + 1
        if self._digest_at(self._last_place + 1) != digest:
            place = self._search(digest)
        if place is not None:
            self._last_place, self._last_digest = place, digest
        return place

    def _digest_at(self, place: int) -> bytes | bytearray:
        return self._digests[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES]

    def _search(self, digest: bytes) -> int | None:
        key = int.from_bytes(digest[:_KEY_BYTES], "little")
        at = bisect_left(self._sorted_keys, key)
        while at < len(self._sorted_keys) and self._sorted_keys[at] == key:
            if self._digest_at(self._order[at]) == digest:
                return self._order[at]
            at += 1
        return None

    def start_of(self, place: int) -> int:
        """Return where in the file its line begins."""
        return self._starts[place]

    def failures_of(self, error_type: str) -> list[int]:
        """Return the places of failures of one type that have not been done again."""
        found = np.frombuffer(self._outcomes, np.uint8) == _CODES[error_type]
        return [int(place) for place in np.flatnonzero(found)]

    def is_failed_with(self, place: int, error_type: str) -> bool:
        """Return whether it is a failure of that type, which has not been done again."""
        return self._outcomes[place] == _CODES[error_type]

    def is_ok(self, place: int) -> bool:
        """Whether it is a success; else it is a failure, or was one and has been done again."""
        return self._outcomes[place] == 0

    def is_failed(self, place: int) -> bool:
        """Whether it is a failure that has not been done again."""
        return 0 < self._outcomes[place] < _REDONE

    def supersede(self, place: int) -> None:
        """The record there counts no more: its request was, or will be, done again."""
        self._counts[self._outcomes[place]] -= 1
        self._outcomes[place] = _REDONE
        self.has_superseded = True

    @property
    def num_ok(self) -> int:
        return int(self._counts[0])

    @property
    def num_failed(self) -> dict[str, int]:
        """Failures by error type."""
        return {name: int(self._counts[code]) for name, code in _CODES.items() if name and self._counts[code]}


def latest_lines(digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For digests [lines, 2 halves]: the last line of each, ordered by the first line of each."""
    order = np.lexsort((digests[:, 0], digests[:, 1]))  # stable: within an id in file order
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = False
    for half in range(2):  # one at a time: at ten million lines a copy is 80 MB
        by_id = digests[:, half][order]
        is_first[1:] |= by_id[1:] != by_id[:-1]
    first_lines, last_lines = order[is_first], order[np.roll(is_first, -1)]
    return last_lines[np.argsort(first_lines)]


def _halves(digests: bytes | bytearray) -> NDArray[np.uint64]:
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


def _keys(digests: bytes | bytearray) -> NDArray[np.uint64]:
    return _halves(digests)[:, 0]


def _order_of(digests: bytes | bytearray) -> NDArray[np.int64]:
    return np.argsort(_keys(digests))


def _has_repeats(digests: bytes | bytearray, order: NDArray[np.int64]) -> bool:
    """Whether a digest stands there twice; by its first half, as good as only then are two of those equal."""
    keys = _keys(digests)[order]
    if not (keys[1:] == keys[:-1]).any():
        return False
    return len(latest_lines(_halves(digests))) < len(order)
