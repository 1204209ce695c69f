"""Which requests a run found in its journal, and how each ended; ids of requests; records that no request has.

The index is two arrays in the order of the file and a table over them: 37 bytes a record (10 million: 370 MB), less
than twice that while it is made. `RequestIds` gives what `records.request_id` gives, ten times as fast: a run that
resumes behind a million records makes a million ids first.

Records that INPUT does not name any more stay, for INPUT may have been narrowed. Two kinds go: a record whose id was
changed by damage, and that of a manifest's row that could not be read and has been mended. Knows nothing of files.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from json.encoder import encode_basestring_ascii

import numpy as np
from numpy.typing import NDArray

from md3cli.finished.digest import DIGEST_BYTES, DigestSet
from md3cli.records import (
    ERROR_TYPES,
    Box,
    RecordDict,
    Region,
    Request,
    RunIdentity,
    Task,
    id_fields,
    id_name,
    request_id,
)

_MOST_REPEATS = 256  # of one request, that are tried
_WHERE = re.compile(r"(?:line|row) ([0-9]{1,15}): ")  # how the message of a `bad_row` begins


class Fate(Enum):
    """What becomes of a record that nobody has asked for."""

    KEPT = "kept"
    DAMAGED = "damaged"
    MENDED = "mended"


def line_of_bad_row(message: str) -> int | None:
    """Return the number of the manifest's line that a `bad_row` failure is about; None where it does not say."""
    where = _WHERE.match(message)
    return int(where[1]) if where else None


@dataclass(frozen=True, slots=True)
class Unasked:
    """Decides about records that INPUT does not name.

    `requests` are what the command asks; `asks_nothing_else` where it asks all of them of every picture, and no more.
    `readable_lines` are lines of the manifest that could not be read before and can now, `has_mended` says whether
    there are any. `requests` also have what records ask next; `pad` is the room around regions.
    """

    requests: Sequence[Request]
    identity: RunIdentity
    asks_nothing_else: bool
    readable_lines: Container[int] = frozenset()
    has_mended: bool = False
    pad: float = 0.0

    @property
    def is_parsing_worth_it(self) -> bool:
        """Return whether a record may have to go although its id resembles no other."""
        return self.asks_nothing_else or self.has_mended

    def fate_of(self, record: RecordDict, recorded_lines: Container[int], has_twin: bool) -> Fate:
        """Decide about a whole record.

        `recorded_lines` are lines of the manifest that cannot be read now either and have their own record;
        `has_twin` says whether another record's id resembles this one's as no two hashes do.
        """
        if record["error"] is not None and record["error"]["type"] == "bad_row":
            number = line_of_bad_row(record["error"]["message"])
            if number is not None and (number in self.readable_lines or number in recorded_lines):
                return Fate.MENDED
        is_suspect = has_twin or self.asks_nothing_else
        return Fate.DAMAGED if is_suspect and not self._has_its_id(record) else Fate.KEPT

    def _has_its_id(self, record: RecordDict) -> bool:
        """Return whether a record's id is that of its image, task and prompt with the command's settings."""
        asked = [_as_in(record, request, self.pad) for request in self.requests]
        name = id_name(record["image"], record.get("image_b64")) if record["image"] is not None else None
        return any(
            request_id(name, request, self.identity, repeat) == record["id"]
            for repeat in range(_MOST_REPEATS)
            for request in dict.fromkeys(asked)
        )


def _as_in(record: RecordDict, request: Request, pad: float) -> Request:
    length, part = record.get("length") or request.length, record.get("region")
    region = None
    if part is not None:
        region = Region(Box(*(part[name] for name in Box._fields)), part["label"], part["of"], int(part["index"]), pad)
    return replace(request, task=Task(record["task"]), prompt=record["prompt"], length=length, region=region)


_TYPES: tuple[str | None, ...] = (None, *sorted(ERROR_TYPES))
_CODES = {error_type: code for code, error_type in enumerate(_TYPES)}
_REDONE = len(_TYPES)
_KEY_BYTES = 8  # of a digest, by which it is searched


def outcome_code(error_type: str | None) -> int:
    """Return how a record ended as one byte; None is a success."""
    return _CODES[error_type]


class RecordIndex:
    """The records of a journal by id: one a request, counted from 0 in the journal's order.

    Attributes:
        has_replaced: whether some request has more than one record; the last one counts, in the first one's place.
    """

    def __init__(
        self, digests: bytes | bytearray = b"", outcomes: bytes | bytearray = b"", starts: bytes | bytearray = b""
    ) -> None:
        """Index lines: 16 bytes of `digests` and one of `outcomes` (see `outcome_code`) for each.

        `starts` are the offsets of the lines in the file, eight bytes each; without them `start_of` has no answer.
        """
        order = _order_of(digests)
        self.has_replaced = _has_repeats(digests, order)
        if self.has_replaced:
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

    def find(self, digest: bytes) -> int | None:
        """Return the place of the record with an id's digest; None: there is none."""
        if digest == self._last_digest:
            return self._last_place
        # INPUT is mostly read in the order in which the records were written: the next one is behind the last one.
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
        """Return where in the file the line of a record begins."""
        return self._starts[place]

    def failures_of(self, error_type: str) -> list[int]:
        """Return the places of failures of one type that have not been done again."""
        found = np.frombuffer(self._outcomes, np.uint8) == _CODES[error_type]
        return [int(place) for place in np.flatnonzero(found)]

    def is_failed_with(self, place: int, error_type: str) -> bool:
        """Return whether a record is a failure of one type that has not been done again."""
        return self._outcomes[place] == _CODES[error_type]

    def is_ok(self, place: int) -> bool:
        """Return whether a record is a success; else it is a failure, or was one and has been done again."""
        return self._outcomes[place] == 0

    def is_failed(self, place: int) -> bool:
        """Return whether a record is a failure that has not been done again."""
        return 0 < self._outcomes[place] < _REDONE

    def mark_replaced(self, place: int) -> None:
        """Count a record no more: its request was done again, or will be."""
        self._counts[self._outcomes[place]] -= 1
        self._outcomes[place] = _REDONE
        self.has_replaced = True

    @property
    def num_ok(self) -> int:
        return int(self._counts[0])

    @property
    def num_failed(self) -> dict[str, int]:
        """Return how many records are failures that have not been done again, by error type."""
        return {name: int(self._counts[code]) for name, code in _CODES.items() if name and self._counts[code]}


class Visits:
    """The places of records in the order in which INPUT asks for them, for the rewrite at the end.

    They are held as runs of neighbours, 16 bytes each. A resumed run has two, however long it is; one that grows has
    two a picture until its file is in order.

    Attributes:
        is_in_order: whether each place so far stands behind the one before.
    """

    def __init__(self, num_found: int) -> None:
        """Begin with `num_found` places; new records are counted on from there."""
        self._num_found = self._next_new = num_found
        self._firsts, self._counts = array("q"), array("q")
        self._last = -1
        self.is_in_order = True

    def note(self, place: int | None) -> None:
        """Note that the next request in input order stands at `place`; None: it is new."""
        if place is None:
            place = self._next_new
            self._next_new += 1
        self.is_in_order &= place > self._last
        if place == self._last + 1 and self._counts:
            self._counts[-1] += 1
        else:
            self._firsts.append(place)
            self._counts.append(1)
        self._last = place

    def places(self) -> NDArray[np.int64]:
        """Return all places, in the order of the visits."""
        firsts, counts = np.frombuffer(self._firsts, np.int64), np.frombuffer(self._counts, np.int64)
        ends = np.cumsum(counts)
        places: NDArray[np.int64] = np.arange(counts.sum()) + np.repeat(firsts - (ends - counts), counts)
        return places

    def not_visited(self) -> NDArray[np.int64]:
        """Return the places found at the start that no request of this run has, in their order."""
        is_left, places = np.ones(self._num_found, bool), self.places()
        is_left[places[places < self._num_found]] = False
        return np.flatnonzero(is_left)


def latest_lines(digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for digests [lines, 2 halves] the last line of each digest, ordered by the first line of each."""
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
    """Return whether a digest stands there twice; `order` sorts their first halves."""
    keys = _keys(digests)[order]
    if not (keys[1:] == keys[:-1]).any():  # first halves are as good as only equal where the digests are
        return False
    return len(latest_lines(_halves(digests))) < len(order)


class RequestIds:
    """`records.request_id` with the parts that repeat encoded once, and repeats counted.

    The k-th repeat of a request gets k. Memory is 21 bytes a request, and one byte for a request in `found`.
    """

    def __init__(self, run: RunIdentity, found: RecordIndex | None = None) -> None:
        """Begin at the first request of INPUT; `found` are the records that stand in OUTPUT already."""
        self._run = _compact(run.id_parts())
        self._found = found or RecordIndex()
        self._is_seen = bytearray(len(self._found))  # of the found ones
        self._seen = DigestSet()  # the others
        self._repeats: dict[bytes, int] = {}
        self._request = lru_cache(maxsize=4096)(lambda request: _compact(id_fields(request)))
        self._last: tuple[Request | None, str] = (None, "")  # most rows ask what the row before asked

    def next_id(self, image: str | None, request: Request) -> str:
        """Return the id of the next request in input order, and count it."""
        first = self._digest(image, request, 0)
        repeat = self._count(first)
        return self.id_of(image, request, repeat) if repeat else first.hex()

    def next_repeat(self, image: str | None, request: Request) -> int:
        """Return how often the next request was asked before in input order, and count it."""
        return self._count(self._digest(image, request, 0))

    def id_of(self, image: str | None, request: Request, repeat: int) -> str:
        """Return the id of the k-th repeat of a request; counts nothing."""
        return self._digest(image, request, repeat).hex()

    def _count(self, first: bytes) -> int:
        place = self._found.find(first)
        if place is not None and not self._is_seen[place]:
            self._is_seen[place] = True
            return 0
        if place is None and self._seen.add(first):
            return 0
        self._repeats[first] = repeat = self._repeats.get(first, 0) + 1
        return repeat

    def _digest(self, image: str | None, request: Request, repeat: int) -> bytes:
        name = "null" if image is None else encode_basestring_ascii(image)
        if self._last[0] is not request:
            self._last = (request, self._request(request))
        text = f"[{name},{self._last[1]},{self._run},{repeat}]"
        return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
