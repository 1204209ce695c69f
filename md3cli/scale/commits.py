"""Commit markers: which part holds the records of a shard. Whoever puts a shard's marker first wins.

A marker that does not parse counts as none (a file system without hard links can leave half of one).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from md3cli.scale.layout import COMMITS, RunFolder, commit_name, shard_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What a marker says: `part` has the records of `rows` rows, `ok` and `errors` of them by outcome.

    `bytes` and `sha256` are the part's. Of the records `reused` were taken from journals of earlier attempts, with
    `reused_errors` failures by type and all that is asked of `reused_images`.
    `ended` is in seconds since 1970.
    """

    part: str
    rows: int
    images: int
    ok: int
    errors: int
    sha256: str
    bytes: int
    attempt: str
    host: str
    seconds: float
    ended: float
    reused: int = 0
    reused_images: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error_types: Mapping[str, int] = field(default_factory=dict)
    reused_errors: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_records(self) -> int:
        return self.ok + self.errors

    @property
    def new_errors(self) -> Counter[str]:
        """Failures of the committed attempt itself, by type."""
        return Counter(self.error_types) - Counter(self.reused_errors)

    @property
    def new_ok(self) -> int:
        """Good records of the committed attempt itself."""
        return self.ok - self.reused + sum(self.reused_errors.values())


def read_commit(folder: RunFolder, shard: int) -> Commit | None:
    """The shard's marker; None while there is none."""
    return _parsed(folder.store.read(commit_name(shard)))


def _parsed(data: bytes | None) -> Commit | None:
    try:
        document: Any = json.loads(data or b"")
        return Commit(**document)
    except (ValueError, TypeError, RecursionError):
        return None


def put_commit(folder: RunFolder, shard: int, commit: Commit) -> bool:
    """Commit the shard; False where another attempt has committed it first."""
    data = json.dumps(asdict(commit), separators=(",", ":")).encode()
    if folder.store.put_if_absent(commit_name(shard), data):
        return True
    if read_commit(folder, shard) is not None:
        return False
    folder.store.remove(commit_name(shard))  # half a marker, of a writer that died
    return folder.store.put_if_absent(commit_name(shard), data)


class CommitLog:
    """The markers read so far; `refresh` reads the new ones only."""

    def __init__(self, folder: RunFolder) -> None:
        self.found: dict[int, Commit] = {}
        self._folder = folder

    def refresh(self) -> Mapping[int, Commit]:
        """All markers by shard."""
        for name in self._folder.store.names(COMMITS):
            shard = shard_of(name)
            if shard is not None and shard not in self.found:
                commit = read_commit(self._folder, shard)
                if commit is not None:
                    self.found[shard] = commit
        return self.found
