"""Commit markers: which part holds the records of a shard. Whoever puts a shard's marker first wins.

A marker that does not parse counts as none (a file system without hard links can leave half of one), and so does
one that names anything but a part: what it names is read, and removed where a shard is done again.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from md3cli.scale.layout import COMMITS, PARTS, RunFolder, commit_name, shard_of

_PART = re.compile(rf"{PARTS}/part-\d{{5,}}-[A-Za-z0-9-]+\.jsonl")


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
        commit = Commit(**json.loads(data or b""))
    except (ValueError, TypeError, RecursionError):
        return None
    return commit if _is_sound(commit) else None


def _is_sound(commit: Commit) -> bool:
    """Whether each value is of its type, and the part is a name that `part_name` makes."""
    document: dict[str, Any] = asdict(commit)
    errors = [document.pop(name) for name in ("error_types", "reused_errors")]
    texts = [document.pop(name) for name in ("part", "sha256", "attempt", "host")]
    counts = [*document.values(), *(count for found in errors if isinstance(found, dict) for count in found.values())]
    return (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(found, dict) for found in errors)
        and all(isinstance(count, int | float) and isfinite(count) for count in counts)
        and _PART.fullmatch(commit.part) is not None
    )


def put_commit(folder: RunFolder, shard: int, commit: Commit) -> bool:
    """Commit the shard; False where another attempt has committed it first.

    A store that is tried again after its answer was lost refuses a marker that is there because we put it: whose it
    is decides, not the answer.
    """
    data = json.dumps(asdict(commit), separators=(",", ":")).encode()
    if folder.store.put_if_absent(commit_name(shard), data):
        return True
    if (found := read_commit(folder, shard)) is not None:
        return found.attempt == commit.attempt
    folder.store.remove(commit_name(shard))  # half a marker, of a writer that died
    return folder.store.put_if_absent(commit_name(shard), data)


class CommitLog:
    """The markers read so far; `refresh` reads the new ones only."""

    def __init__(self, folder: RunFolder, num_shards: int | None = None) -> None:
        """With `num_shards` of the plan, markers of no shard of it are passed over; `md3 verify` tells of them."""
        self.found: dict[int, Commit] = {}
        self._folder, self._num_shards = folder, num_shards

    def refresh(self) -> Mapping[int, Commit]:
        """All markers by shard."""
        shards = map(shard_of, self._folder.store.names(COMMITS))
        new = {commit_name(shard): shard for shard in shards if shard is not None and self._is_wanted(shard)}
        for name, data in self._folder.store.read_all(sorted(new)):
            if (commit := _parsed(data)) is not None:
                self.found[new[name]] = commit
        return self.found

    def _is_wanted(self, shard: int) -> bool:
        return shard not in self.found and (self._num_shards is None or shard < self._num_shards)
