"""What processes of a run tell each other in its folder: how to run it, who started it when, which shards are done.

A commit marker names the part that holds the records of a shard; whoever puts a shard's marker first wins. A marker
that does not parse counts as none, for a file system without hard links can leave half of one. So does a marker that
names anything but a part: what it names is read, and removed where the shard is done again. This file knows nothing of
how a shard is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from md3cli import __version__
from md3cli.config import DecodeOptions, Everything, ModelOptions
from md3cli.errors import InputError
from md3cli.records import printable, request_fields
from md3cli.refine.labels import labels_of_tables
from md3cli.refine.refinement import Refinement
from md3cli.run.asked import request_of
from md3cli.run.run_info import RunCounts, utc_now
from md3cli.run.status import typed_command
from md3cli.scale.folder import (
    COMMITS,
    EXPORTED,
    PARTS,
    RUN,
    STARTS,
    RunFolder,
    commit_name,
    host_name,
    new_attempt,
    shard_of,
)

RUN_SCHEMA = "md3-run-folder/1"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a worker needs beside the plan. It may change from start to start, for it is no part of any record."""

    model: ModelOptions
    decode: DecodeOptions
    refinement: Refinement = field(default=Refinement())  # names of what is found, and what is not asked about
    everything: Everything | None = None  # what is made of lists; the same in all starts, for it is in the identity

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON, with a cache folder that is the same from any working folder."""
        model = asdict(self.model)
        model["cache_dir"] = None if self.model.cache_dir is None else os.path.abspath(self.model.cache_dir)
        chosen = {
            name: value for name, value in self.refinement.to_json().items() if value is not None and value is not False
        }
        if self.everything is not None:
            chosen["everything"] = _lists_to_json(self.everything)
        return {"model": model, "decode": asdict(self.decode), **chosen}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RunOptions:
        """Read what `to_json` gave; raises TypeError, KeyError where it is something else."""
        model = {field.name: document["model"][field.name] for field in fields(ModelOptions)}
        if model["cache_dir"] is not None:
            model["cache_dir"] = Path(model["cache_dir"])
        decode: dict[str, Any] = dict(document["decode"])
        decode |= {name: tuple(value) for name, value in decode.items() if isinstance(value, list)}
        labels = labels_of_tables(document.get("labels", ()), RUN, may_fill=True)
        refinement = replace(Refinement.from_json(dict(document)), labels=labels)
        lists = document.get("everything")
        everything = None if lists is None else _lists_from_json(lists)
        return cls(ModelOptions(**model), DecodeOptions(**decode), refinement, everything)


def _lists_to_json(everything: Everything) -> dict[str, Any]:
    asked = {name: request_fields(getattr(everything, name)) for name in ("listing", "template")}
    return {**asked, **{name: getattr(everything, name) for name in ("vocabulary", "most_names", "may_rows_ask")}}


def _lists_from_json(document: Mapping[str, Any]) -> Everything:
    names = document["vocabulary"]
    listing, template = request_of(document["listing"]), request_of(document["template"])
    names = None if names is None else tuple(names)
    return Everything(listing, template, names, document["most_names"], document["may_rows_ask"])


def write_run_options(folder: RunFolder, options: RunOptions, argv: tuple[str, ...]) -> None:
    """Note how this start runs the plan, in the place of what the start before noted."""
    document = {
        "schema": RUN_SCHEMA,
        "md3": __version__,
        "python": sys.version.split()[0],
        "arguments": [printable(argument) for argument in argv],
        **options.to_json(),
    }
    folder.store.put(RUN, (json.dumps(document, indent=1) + "\n").encode())


def read_run_options(folder: RunFolder) -> RunOptions:
    """Return how the latest start runs the plan.

    Raises:
        InputError: there is no run.json, or none of this version.
    """
    try:
        return RunOptions.from_json(json.loads(folder.store.read(RUN) or b""))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{printable(folder.uri)}/{RUN} is missing or of another version of md3") from error


class StartNote:
    """What one start leaves in a file of its own, so that processes on many machines never write the same one."""

    def __init__(self, folder: RunFolder, facts: Mapping[str, Any]) -> None:
        self._folder, self._name = folder, f"{STARTS}/{new_attempt()}.json"
        self._document = {"started": utc_now(), "host": host_name(), "pid": os.getpid(), **facts}
        self._put()

    def end(self, status: int, facts: Mapping[str, Any]) -> None:
        """Note with which exit status the start ended, and `facts` about what it did."""
        self._document |= {"ended": utc_now(), "exit_status": status, **facts}
        self._put()

    def _put(self) -> None:
        self._folder.store.put(self._name, (json.dumps(self._document, indent=1) + "\n").encode())


class OpenStart(NamedTuple):
    """A start that has not noted its end: `started` in seconds since 1970."""

    host: str
    pid: int
    started: float


def open_starts(folder: RunFolder) -> list[OpenStart]:
    """Return the starts that go on, or were killed."""
    names = [f"{STARTS}/{name}" for name in folder.store.names(STARTS)]
    found = []
    for _, data in folder.store.read_all(names):
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            note = json.loads(data)
            if not note.get("ended"):
                began = datetime.fromisoformat(str(note["started"])).timestamp()
                found.append(OpenStart(str(note["host"]), int(note["pid"]), began))
    return found


def last_command(folder: RunFolder) -> tuple[str, ...]:
    """Return what was typed to start the run the last time; empty where its run.json does not say."""
    try:
        return typed_command(json.loads(folder.store.read(RUN) or b"").get("arguments"))
    except (ValueError, AttributeError, RecursionError):
        return ()


_PART = re.compile(rf"{PARTS}/part-\d{{5,}}-[A-Za-z0-9-]+\.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What a marker says: `part` has the records of `rows` rows; `ok` of them are good and `errors` failed.

    `bytes` and `sha256` are the part's. `reused` of the records came from journals of earlier attempts: with
    `reused_errors` failures by type, and everything that is asked of `reused_images` images. `ended` is in seconds
    since 1970. `children` of the records were asked of others. `families` is `Families.digest` of the start that asked
    them, empty where no record of the shard may have children.
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
    children: int = 0
    families: str = ""

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
    """Return the shard's marker; None while there is none."""
    return _parsed(folder.store.read(commit_name(shard)))


def _parsed(data: bytes | None) -> Commit | None:
    try:
        commit = Commit(**json.loads(data or b""))
    except (ValueError, TypeError, RecursionError):
        return None
    return commit if _is_sound(commit) else None


def _is_sound(commit: Commit) -> bool:
    """Return whether each value is of its type, and the part is a name that `part_name` makes."""
    document: dict[str, Any] = asdict(commit)
    errors = [document.pop(name) for name in ("error_types", "reused_errors")]
    texts = [document.pop(name) for name in ("part", "sha256", "attempt", "host", "families")]
    counts = [*document.values(), *(count for found in errors if isinstance(found, dict) for count in found.values())]
    return (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(found, dict) for found in errors)
        and all(isinstance(count, int | float) and isfinite(count) for count in counts)
        and _PART.fullmatch(commit.part) is not None
    )


def put_commit(folder: RunFolder, shard: int, commit: Commit) -> bool:
    """Commit the shard; return False where another attempt has committed it first."""
    document = {name: value for name, value in asdict(commit).items() if value or name not in ("children", "families")}
    data = json.dumps(document, separators=(",", ":")).encode()
    if folder.store.put_if_absent(commit_name(shard), data):
        return True
    if (found := read_commit(folder, shard)) is not None:
        # A store that is asked again after its answer was lost refuses a marker that is there because we put it.
        return found.attempt == commit.attempt
    folder.store.remove(commit_name(shard))  # half a marker, of a writer that died
    return folder.store.put_if_absent(commit_name(shard), data)


def remove_commit(folder: RunFolder, shard: int, commit: Commit) -> None:
    """Take a shard's marker away, and its part, so that the shard is done again."""
    folder.store.remove(commit_name(shard))
    folder.store.remove(commit.part)


def read_part(folder: RunFolder, commit: Commit) -> tuple[bytes | None, bool]:
    """Return what stands in a shard's part, None where it is missing; and whether that is what the marker says."""
    data = folder.store.read(commit.part)
    return data, data is not None and hashlib.sha256(data).hexdigest() == commit.sha256


def counts_of(commits: Mapping[int, Commit]) -> RunCounts:
    """Count the requests of committed shards by outcome."""
    errors = Counter[str]()
    for commit in commits.values():
        errors.update(commit.error_types)
    ok = sum(commit.ok for commit in commits.values())
    return RunCounts(ok, errors.total(), dict(sorted(errors.items())))


class CommitLog:
    """The markers read so far; `refresh` reads the new ones only."""

    def __init__(self, folder: RunFolder, num_shards: int | None = None) -> None:
        """With `num_shards` of the plan, markers of no shard of it are passed over; `md3 verify` tells of them."""
        self.found: dict[int, Commit] = {}
        self._folder, self._num_shards = folder, num_shards

    def refresh(self) -> Mapping[int, Commit]:
        """Return all markers by shard."""
        shards = map(shard_of, self._folder.store.names(COMMITS))
        new = {commit_name(shard): shard for shard in shards if shard is not None and self._is_wanted(shard)}
        for name, data in self._folder.store.read_all(sorted(new)):
            if (commit := _parsed(data)) is not None:
                self.found[new[name]] = commit
        return self.found

    def _is_wanted(self, shard: int) -> bool:
        return shard not in self.found and (self._num_shards is None or shard < self._num_shards)


@dataclass(frozen=True, slots=True)
class Exported:
    """The records file that the last export wrote, of so many plans."""

    records: int
    bytes: int
    sha256: str
    plans: int = 1


def read_exported(folder: RunFolder) -> Exported | None:
    """Return what the last export wrote; None while there was none."""
    try:
        return Exported(**json.loads(folder.store.read(EXPORTED) or b""))
    except (ValueError, TypeError):
        return None


def note_exported(folder: RunFolder, exported: Exported) -> None:
    """Note that OUTPUT has the records of all shards."""
    document = {key: value for key, value in asdict(exported).items() if (key, value) != ("plans", 1)}
    folder.store.put(EXPORTED, json.dumps(document).encode())
