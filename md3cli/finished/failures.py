"""The failures that a summary names: the first few, each once, and the command that lists all."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from md3cli.records import OK_TAIL

MOST_NAMED = 5


class Failure(NamedTuple):
    """A picture (the prompt, where there is none) and why there is no answer; as the record has them."""

    name: str
    type: str
    message: str


class NamedFailures:
    """Collects the first `MOST_NAMED` different failures of the records it is shown."""

    def __init__(self) -> None:
        self.found: list[Failure] = []

    @property
    def is_full(self) -> bool:
        return len(self.found) >= MOST_NAMED

    def note(self, record: Mapping[str, Any]) -> None:
        """Take `record` in, where it failed; several requests of one picture that fail alike are one failure."""
        if self.is_full or not record["error"]:
            return
        name = record["image"] if record["image"] is not None else record["prompt"] or "-"
        failure = Failure(str(name), str(record["error"]["type"]), str(record["error"]["message"]))
        if failure not in self.found:
            self.found.append(failure)

    def note_lines(self, lines: Iterable[bytes]) -> None:
        """Take in the records of a records file, as far as it takes; lines that are no records are passed over."""
        for line in lines:
            if self.is_full:
                return
            if not line.endswith(OK_TAIL):
                try:
                    self.note(json.loads(line))
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue


def command_for_all(records: Path) -> str:
    """Return the command that prints every failed record of a records file of ours, whose last key is `error`."""
    if os.name == "nt":
        return f'findstr /v /e /l /c:"\\"error\\":null}}" "{records}"'
    return shlex.join(["grep", "-v", '"error":null}$', str(records)])
