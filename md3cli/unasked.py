"""Records in OUTPUT that no request of this run has: those that stay, and the few that go.

INPUT may have become less, or be narrowed; what it no longer names stays. What goes: a record whose id was changed
by damage, and that of a manifest's row that could not be read and has been mended.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from md3cli.records import RecordDict, Request, RunIdentity, Task, id_name, request_id

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

    `requests` are what the command asks, of every picture and with nothing else where `asks_nothing_else`.
    `readable_lines` are lines of the manifest that could not be read before and can now.
    """

    requests: Sequence[Request]
    identity: RunIdentity
    asks_nothing_else: bool
    readable_lines: Container[int] = frozenset()
    has_mended: bool = False

    @property
    def is_parsing_worth_it(self) -> bool:
        """Whether a record can have to go that resembles no other."""
        return self.asks_nothing_else or self.has_mended

    def fate_of(self, record: RecordDict, recorded_lines: Container[int], has_twin: bool) -> Fate:
        """Decide about a whole record.

        `recorded_lines` are lines of the manifest that cannot be read now either and have their own record.
        `has_twin`: another record's id resembles its id as no two hashes do.
        """
        if record["error"] is not None and record["error"]["type"] == "bad_row":
            number = line_of_bad_row(record["error"]["message"])
            if number is not None and (number in self.readable_lines or number in recorded_lines):
                return Fate.MENDED
        is_suspect = has_twin or self.asks_nothing_else
        return Fate.DAMAGED if is_suspect and not self._has_its_id(record) else Fate.KEPT

    def _has_its_id(self, record: RecordDict) -> bool:
        """Whether a record's id is that of its image, task and prompt with the command's settings."""
        asked = [_as_in(record, request) for request in self.requests]
        name = id_name(record["image"], record.get("image_b64")) if record["image"] is not None else None
        return any(
            request_id(name, request, self.identity, repeat) == record["id"]
            for repeat in range(_MOST_REPEATS)
            for request in dict.fromkeys(asked)
        )


def _as_in(record: RecordDict, request: Request) -> Request:
    length = record.get("length") or request.length
    return replace(request, task=Task(record["task"]), prompt=record["prompt"], length=length)
