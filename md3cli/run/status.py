"""How a run stands, asked from outside: done of total, failures, speed, whether somebody is at it, how to go on.

`Standing` is what `md3 status` says of any run, one process or many; `standing_of` finds it for one process, from its
records, its run.json and its lock, while the run goes on or long after. It writes nothing, and holds 37 bytes a record
of a run that is not finished. Knows nothing of shards, which scale/ counts. Apart from journal_scan.py, which only
reads.
"""

from __future__ import annotations

import mmap
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from md3cli.console.progress import clock
from md3cli.errors import InputError
from md3cli.files import lock_holder
from md3cli.finished.digest import DigestSet, digest_of
from md3cli.finished.run_json import (
    RECORDS_NAME,
    counts_of,
    find_records,
    is_finished,
    kept_digest,
    number_of,
    read_document,
    run_info_paths,
    starts_of,
)
from md3cli.records import RETRYABLE, printable
from md3cli.run.journal_scan import scan_journal
from md3cli.run.run_info import RunCounts

PROGRAM = "md3"
_TEXT = rb'"(?:[^"\\]|\\.)*+"'
_REGION = b',"region":{'
_CORNERS = b"".join(rb'"%s":[^"]*+' % name for name in (b"x_min", b"y_min", b"x_max", b"y_max"))
_OF_RECORD = re.compile(
    rb'"id":"([0-9a-f]{32})".*"prompt":(?:null|%s),"region":\{%s"label":%s,"of":"[0-9a-f]{32}"'
    % (_TEXT, _CORNERS, _TEXT)
)
_OF_NAME = re.compile(rb'"id":"([0-9a-f]{32})".*"task":"detect",')


class State(StrEnum):
    """Whether somebody is at a run: a process holds its lock, its work is done, or neither.

    `unknown`: records without a run.json, which says nothing.
    """

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a run stands. `requests` None: INPUT has not been counted. `children` are about what others found.

    `rate` is requests a second of the last start, 0 where it is not known. `holder` says who is at it, and `command`
    is what was typed, with the program's name; empty where run.json does not say.
    """

    run: str
    requests: int | None
    counts: RunCounts
    state: State
    children: int = 0
    rate: float = 0.0
    seconds_since_record: float | None = None
    holder: str = ""
    command: Sequence[str] = field(default=())

    @property
    def done(self) -> int:
        return self.counts.ok + self.counts.failed

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "requests": self.requests,
            "done": self.done,
            "ok": self.counts.ok,
            "failed": self.counts.failed,
            "error_types": dict(self.counts.errors),
            "children": self.children,
            "state": str(self.state),
        }

    def lines(self) -> list[str]:
        """Return the same for people, and how to go on."""
        state = {State.UNKNOWN: "no run.json beside these records says whether the run is finished"}
        words = f"{state.get(self.state, self.state)}{f' ({self.holder})' if self.holder else ''}"
        lines = [f"{printable(self.run)}: {words}", self._counts()]
        if self.children:
            more = "" if self.state is State.FINISHED else "; more may come"
            lines.append(f"{self.children:,} of them about what others found{more}")
        if self.seconds_since_record is not None:
            lines.append(f"last record {clock(self.seconds_since_record)} ago{self._speed()}")
        return [*lines, *self._next()]

    def _counts(self) -> str:
        errors = ", ".join(f"{printable(kind)} {count:,}" for kind, count in sorted(self.counts.errors.items()))
        failed = f", {self.counts.failed:,} failed{f' ({errors})' if errors else ''}" if self.counts.failed else ""
        total = "" if self.requests is None else f" of {self.requests:,}"
        share = f" ({self.done / self.requests:.1%})" if self.requests else ""
        requests = "request" if (self.done if self.requests is None else self.requests) == 1 else "requests"
        return f"{self.done:,}{total} {requests} done{share}: {self.counts.ok:,} ok{failed}"

    def _speed(self) -> str:
        if not self.rate:
            return ""
        is_timed = self.state is State.RUNNING and self.requests is not None and self.requests > self.done
        is_timed = is_timed and not self.children  # how many more objects will be found, nobody knows
        left = f", {clock((self.requests - self.done) / self.rate)} left" if is_timed and self.requests else ""
        return f", {self.rate:,.1f} requests/s{left}"

    def _next(self) -> list[str]:
        if self.state is State.RUNNING or not self.command:
            return []
        typed = [argument for argument in self.command if argument not in ("--overwrite", "--retry-failed")]
        if self.state is not State.FINISHED:
            return [f"go on with: {shlex.join(typed)}"]
        if any(self.counts.errors.get(kind) for kind in RETRYABLE):
            return [f"try the failed ones again with: {shlex.join([*typed, '--retry-failed'])}"]
        return []


def typed_command(arguments: object) -> tuple[str, ...]:
    """Return the command that a run.json says was typed; empty where it is none of this program's."""
    if not isinstance(arguments, list) or not all(isinstance(argument, str) for argument in arguments):
        return ()
    return tuple(map(printable, arguments)) if arguments[:1] == [PROGRAM] else ()


def lock_of(records: Path) -> Path:
    """Return the lock of the run that writes `records`: beside `records.jsonl`, or beside OUT."""
    name = records.name
    is_journal = name != RECORDS_NAME and name.endswith(f".{RECORDS_NAME}")
    return records.with_name(f"{name.removesuffix(f'.{RECORDS_NAME}') if is_journal else name}.lock")


def standing_of(typed: str) -> Standing:
    """Return how the run of one process stands whose OUTPUT was `typed`.

    Raises:
        InputError: there is none, or its records cannot be read.
    """
    records = _find(Path(typed))
    holder = lock_holder(lock_of(records))  # first, for a run that ends meanwhile has noted its end then
    document = next((read_document(place) for place in run_info_paths(records) if place.is_file()), {})
    has_schema = str(document.get("schema", "")).startswith(("md3-run/", "md3-selection/"))
    is_over = is_finished(document)
    idle = (State.FINISHED if is_over else State.STOPPED) if has_schema else State.UNKNOWN
    state = State.RUNNING if holder is not None else idle
    try:
        stat = records.stat() if records.is_file() else None
        counts = _counts(records, document) if stat is not None and stat.st_size else RunCounts()
    except OSError as error:
        raise InputError(f"cannot read {printable(str(records))}: {error.strerror or error}") from error
    done = counts.ok + counts.failed
    if stat is not None and not done and not has_schema and state is not State.RUNNING:
        raise InputError(f"{printable(str(records))} holds no record of md3")
    noted, children = number_of(document.get("requests")), _num_children(records, document) if done else 0
    total = done if state is State.FINISHED else None if noted is None else max(int(noted) + children, done)
    return Standing(
        run=typed,
        requests=total,
        counts=counts,
        state=state,
        children=children,
        rate=_rate(document, done, stat.st_mtime if stat is not None else 0.0),
        seconds_since_record=max(0.0, time.time() - stat.st_mtime) if stat is not None and done else None,
        holder=holder or "",
        command=typed_command(document.get("arguments")),
    )


def _find(path: Path) -> Path:
    """Return where the records of a run are, or will be."""
    try:
        records = find_records(path)
    except InputError:
        records = path / RECORDS_NAME if path.is_dir() else path
        if not any(place.is_file() for place in run_info_paths(records)):
            raise InputError(
                f"no run at {printable(str(path))}; give what stood after -o: a file, a folder or an address"
            ) from None
    return records


def _counts(records: Path, document: Mapping[str, Any]) -> RunCounts:
    """Count the records by outcome, by run.json where it still is about this file, else one by one."""
    facts = dict(document)
    kept, noted = kept_digest(facts), counts_of(facts)
    if is_finished(facts) and kept is not None and noted is not None and kept.bytes == records.stat().st_size:
        return RunCounts(int(noted["ok"]), int(noted["failed"]), {kind: int(n) for kind, n in noted["errors"].items()})
    with open(records, "rb", buffering=0) as file:
        found = scan_journal(file).found
    return RunCounts(found.num_ok, sum(found.num_failed.values()), found.num_failed)


def _num_children(records: Path, document: Mapping[str, Any]) -> int:
    """Return how many records were asked for by others: about objects, or about names in lists.

    Lines are not parsed: behind a prompt stands a region only where md3 has put one, and `of` is a record's id.
    """
    identity = document.get("identity")
    has_lists = isinstance(identity, dict) and identity.get("everything") is True
    found = DigestSet()  # one that was done again counts once
    with open(records, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        if not has_lists and text.find(_REGION) < 0:
            return 0
        for line in iter(text.readline, b""):
            child = _OF_NAME.search(line) if has_lists else _REGION in line and _OF_RECORD.search(line)
            if child:
                found.add(digest_of(child[1].decode()))
    return len(found)


def _rate(document: Mapping[str, Any], done: int, last_record: float) -> float:
    """Return requests a second of the last start, from its begin to its last record, loading included."""
    starts = starts_of(dict(document))
    if not starts or (found := number_of(starts[-1].get("records_found"))) is None:
        return 0.0
    try:
        began = datetime.fromisoformat(str(starts[-1].get("started"))).timestamp()
    except (ValueError, OverflowError):
        return 0.0
    span_s = last_record - began
    return max(0.0, (done - found) / span_s) if span_s > 0 else 0.0
