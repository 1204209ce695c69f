"""Whether a run folder is what it claims: each request exactly once, every part as its marker says, nothing astray.

Reads all of it once; memory is a shard.

Damage in a run folder, found and told: lines of attempts' journals, and parts that are not what their markers say.

A damaged line costs itself only. Of a part whose digest is wrong the good records stay where damaged lines explain
it; where every line is whole, nothing tells which was changed, and all of the shard is done again. What is left out
is copied to the run folder's `damaged/` first.

Removing what no run needs any more: parts that lost the race for a marker, journals of committed shards.

How far a run is, from its markers alone: works while it runs elsewhere, on any machine that sees the folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, NamedTuple

from md3cli.console import clock
from md3cli.finished.record_shape import read_record
from md3cli.records import printable
from md3cli.run.journal_scan import DamagedLines, journal_lines
from md3cli.scale.attempts import Place, attempt_files, damage_of, keep_damaged_lines
from md3cli.scale.folder import DAMAGED, EXPORTED, PARTS, WIP, RunFolder, commit_name, records_of, shard_of
from md3cli.scale.make_plan import Fingerprint
from md3cli.scale.markers import Commit, CommitLog, read_commit, read_exported
from md3cli.scale.plan import Plan, PlannedRow, PlanReader
from md3cli.scale.shard_runner import asked, history_of, is_line_of
from md3cli.scale.start import keep_lines

_MOST_TOLD = 5


def damaged_journals(folder: RunFolder, plan: Plan, commits: Mapping[int, Commit]) -> Iterator[str]:
    """Yield in words which lines of attempts at open shards are damaged, once they are copied; of many only the first.

    Raises:
        OutputError: the copies cannot be written.
    """
    reader, words = PlanReader(folder, plan), []
    for shard in range(plan.shards):
        if shard not in commits and attempt_files(folder.wip, shard):
            words += damage_of(folder, shard, history_of(folder, shard, reader.shard(shard)).damaged)
    yield from _bounded(words, "journals")


def reopen_damaged(folder: RunFolder, plan: Plan, commits: dict[int, Commit]) -> Iterator[str]:
    """Have the shards of damaged or missing parts done again, taken out of `commits`; yield what became of each.

    Raises:
        OutputError: the folder cannot be changed.
    """
    reader, words = PlanReader(folder, plan), []
    for shard, commit in sorted(commits.items()):
        data = folder.store.read(commit.part)
        if data is None or hashlib.sha256(data).hexdigest() != commit.sha256:
            words += _reopen(folder, shard, commit, data, reader.shard(shard))
            del commits[shard]
    yield from _bounded(words, "parts")


def _reopen(folder: RunFolder, shard: int, commit: Commit, data: bytes | None, rows: Sequence[PlannedRow]) -> list[str]:
    good, damaged = sort_part(data or b"", rows)
    if damaged:
        keep_damaged_lines(folder, shard, list(damaged.values()))
        keep_lines(folder, shard, good)
        places = [(Place(commit.part, number), line) for number, line in damaged.items()]
        words = damage_of(folder, shard, places)
    elif data is not None and len(good) < commit.num_records:
        keep_lines(folder, shard, good)
        words = [f"{_shown(folder, commit)} lacks {commit.num_records - len(good):,} records; they are done again"]
    elif data is not None:
        copy = f"{DAMAGED}/{commit.part.removeprefix(f'{PARTS}/')}"
        folder.wip.put(copy, data)
        words = [
            f"{_shown(folder, commit)} was changed inside its values, where nothing tells which: its {len(good):,} "
            f"records are done again; a copy is {printable(folder.wip.uri)}/{copy}"
        ]
    else:
        words = [f"{_shown(folder, commit)} is missing; its {commit.num_records:,} records are done again"]
    if read_commit(folder, shard) == commit:  # else somebody was faster
        folder.store.remove(commit_name(shard))
        folder.store.remove(commit.part)
    return words


def sort_part(data: bytes, rows: Sequence[PlannedRow]) -> tuple[list[bytes], dict[int, bytes]]:
    """Sort the lines of a part.

    Returns:
        The records of the requests of `rows`, one of each, and by number, from 1, all other lines.
    """
    planned = {record_id: (record_id, row, request) for record_id, row, request in asked(rows)}
    good: dict[str, bytes] = {}
    damaged: dict[int, bytes] = {}
    for number, line in enumerate(io.BytesIO(data), start=1):
        record = read_record(line)
        one = planned.get(record["id"]) if record is not None and line.endswith(b"\n") else None
        if one is not None and one[0] not in good and is_line_of(line, *one):
            good[one[0]] = line
        else:
            damaged[number] = line.removesuffix(b"\n") + b"\n"
    return list(good.values()), damaged


def _shown(folder: RunFolder, commit: Commit) -> str:
    return f"{printable(folder.uri)}/{commit.part}"


def _bounded(words: Sequence[str], what: str) -> Iterator[str]:
    yield from words[:_MOST_TOLD]
    if len(words) > _MOST_TOLD:
        yield f"{len(words) - _MOST_TOLD:,} more {what} were damaged, and are repaired in the same way"


_BLOCK_BYTES = 1 << 20
_MOST_NAMED = 20  # damaged lines of a file


class Verification:
    """One look at a run folder; `findings` are what is wrong, in words, the counts what was seen.

    Attributes:
        num_shards, num_rows: of the plan, both.
        num_records: in committed shards.
    """

    def __init__(self, folder: RunFolder) -> None:
        """Raises InputError, OutputError: it has no readable plan."""
        self._folder = folder
        self._reader = PlanReader(folder)
        self._commits = CommitLog(folder).refresh()
        self.num_shards, self.num_rows = self._reader.plan.shards, self._reader.plan.rows
        self.num_records = sum(commit.num_records for commit in self._commits.values())

    def findings(self) -> Iterator[str]:
        """What is wrong; nothing, where all is as it should be."""
        yield from self._plan_findings()
        num_open = sum(shard not in self._commits for shard in range(self.num_shards))
        if num_open:
            yield f"{num_open:,} of {self.num_shards:,} shards are not done; the same command goes on"
        for shard, commit in sorted(self._commits.items()):
            yield from (f"shard {shard}: {finding}" for finding in self.shard_findings(shard, commit))
        yield from self._orphans()
        if not num_open:
            yield from self._export_findings()

    def _plan_findings(self) -> Iterator[str]:
        fingerprint, num_rows = Fingerprint(), 0
        for shard in range(self.num_shards):
            if columns := list(self._reader.columns(shard)):
                fingerprint.note(columns)
                num_rows += len(columns)
        if num_rows != self.num_rows:
            yield f"the manifest has {num_rows:,} rows, the plan says {self.num_rows:,}"
        if fingerprint.hexdigest() != self._reader.plan.fingerprint:
            yield "the manifest's rows are not those of the plan"

    def shard_findings(self, shard: int, commit: Commit) -> Iterator[str]:
        """What is wrong with the records of one shard."""
        if not 0 <= shard < self.num_shards:
            yield "the plan has no such shard"
            return
        data = self._folder.store.read(commit.part)
        if data is None:
            yield f"{commit.part} is missing"
            return
        if len(data) != commit.bytes or hashlib.sha256(data).hexdigest() != commit.sha256:
            yield f"{commit.part} is not what its marker says{_where(data, self._reader.shard(shard))}"
            return
        planned = [record_id for row in self._reader.shard(shard) for record_id in row.ids]
        found = _ids_in(data)
        if found != planned:
            yield f"{commit.part} {_difference(planned, found)}"
        elif (len(found), sum(commit.error_types.values())) != (commit.num_records, commit.errors):
            yield "its marker's counts are wrong"

    def _orphans(self) -> Iterator[str]:
        orphans = orphans_of(self._folder, self._commits)
        if orphans:
            yield f"{len(orphans):,} files that belong to nothing, such as {orphans[0]}; `md3 runs gc` removes them"

    def _export_findings(self) -> Iterator[str]:
        exported = read_exported(self._folder)
        if exported is None:
            yield "the records are not exported yet; the same command does it"
            return
        store, name = records_of(self._folder)
        records = printable(f"{store.uri}/{name}")
        try:
            with store.open(name) as file:
                if _digest(file) == exported.sha256:
                    return
                file.seek(0)
                yield f"{records} is not what was exported{_named(_damaged_in(file))}"
        except FileNotFoundError:
            yield f"{records} is gone; the same command exports it again"


def _where(data: bytes, rows: Sequence[PlannedRow]) -> str:
    """Which lines of a part are no records of its shard, to be put behind a finding."""
    return _named((number, number) for number in sort_part(data, rows)[1])


def _damaged_in(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last line, from 1, of what is no record."""
    return ((lines.first, lines.last) for lines in journal_lines(file) if isinstance(lines, DamagedLines))


def _named(places: Iterable[tuple[int, int]]) -> str:
    """Name the first few places, to be put behind a finding."""
    found = list(islice(places, _MOST_NAMED + 1))
    if not found:
        return ": its lines are whole, but values in them were changed, added or taken away"
    numbers = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in found[:_MOST_NAMED])
    return f": no whole record in line {numbers}{' and more' if len(found) > _MOST_NAMED else ''}"


def _ids_in(data: bytes) -> list[str] | None:
    """The ids of records in their order; None where something else is among them."""
    try:
        return [json.loads(line)["id"] for line in data.splitlines()]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _difference(planned: Sequence[str], found: Sequence[str] | None) -> str:
    """How the records of a shard are not those that were planned."""
    if found is None:
        return "has lines that are no records"
    missing, extra = Counter(planned) - Counter(found), Counter(found) - Counter(planned)
    num_twice = sum((extra & Counter(planned)).values())
    facts = {"missing": missing.total(), "there twice": num_twice, "of another run": extra.total() - num_twice}
    told = ", ".join(f"{count:,} {what}" for what, count in facts.items() if count)
    return f"does not have each request once: {told}" if told else "does not have its requests in order"


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def orphans_of(folder: RunFolder, commits: Mapping[int, Commit]) -> list[str]:
    """Parts that no marker names, and what attempts at committed shards left."""
    named = {commit.part for commit in commits.values()}
    parts = [f"{PARTS}/{name}" for name in folder.store.names(PARTS)]
    left = [f"{WIP}/{name}" for name in folder.wip.names(WIP) if shard_of(name) in commits]
    return [part for part in parts if part not in named] + left


YOUNGEST_S = 3600.0  # a younger part may be about to be committed


class Collected(NamedTuple):
    """What was removed, by name; `reopened` are shards that are to be done again."""

    removed: list[str]
    reopened: list[int]


def collect(folder: RunFolder, *, older_than_s: float = YOUNGEST_S, with_damaged: bool = False) -> Collected:
    """Remove what belongs to nothing and was last written `older_than_s` ago.

    `with_damaged`: also take the markers of parts away that are missing, damaged or not of this plan, so that their
    shards are done again.

    Raises:
        OutputError: the folder cannot be changed.
    """
    commits = dict(CommitLog(folder).refresh())
    reopened = []
    if with_damaged:
        verification = Verification(folder)
        for shard, commit in sorted(commits.items()):
            if any(verification.shard_findings(shard, commit)):
                folder.store.remove(commit_name(shard))
                reopened.append(shard)
    for shard in reopened:
        del commits[shard]
    if reopened:
        folder.store.remove(EXPORTED)
    removed = []
    for name in orphans_of(folder, commits):
        store = folder.wip if name.startswith("wip/") else folder.store
        modified_at = store.modified_at(name)
        if modified_at is not None and time.time() - modified_at >= older_than_s:
            store.remove(name)
            removed.append(name)
    return Collected(removed, reopened)


RECENT_S = 600.0  # what the rate is reckoned from


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What the markers say; `num_started` are shards that have journals and no marker.

    `rate` is rows a second over the last ten minutes that anything was committed in, 0 where that is not known.
    """

    uri: str
    num_shards: int
    num_done: int
    num_started: int
    num_rows: int
    num_rows_done: int
    num_ok: int
    error_types: dict[str, int]
    hosts: dict[str, int]
    rate: float
    last_commit_s: float | None
    is_exported: bool

    @property
    def is_done(self) -> bool:
        return self.num_done == self.num_shards

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "run": self.uri,
            "shards": self.num_shards,
            "shards_done": self.num_done,
            "shards_started": self.num_started,
            "rows": self.num_rows,
            "rows_done": self.num_rows_done,
            "ok": self.num_ok,
            "failed": sum(self.error_types.values()),
            "error_types": self.error_types,
            "hosts": self.hosts,
            "rows_per_second": round(self.rate, 3),
            "seconds_since_commit": self.last_commit_s,
            "exported": self.is_exported,
        }

    def lines(self) -> list[str]:
        """For people."""
        share = self.num_rows_done / self.num_rows if self.num_rows else 1.0
        failed = ", ".join(f"{kind} {count:,}" for kind, count in self.error_types.items())
        counts = f"{self.num_ok:,} ok" + (f", {sum(self.error_types.values()):,} failed ({failed})" if failed else "")
        lines = [
            f"{printable(self.uri)}",
            f"{self.num_rows_done:,} of {self.num_rows:,} images in {self.num_done:,} of {self.num_shards:,} shards "
            f"({share:.1%}), {self.num_started:,} more begun",
            f"requests: {counts}",
        ]
        if self.last_commit_s is not None:
            lines.append(f"last shard {clock(self.last_commit_s)} ago{self._speed()}")
        if self.hosts:
            lines.append("shards by host: " + ", ".join(f"{printable(host)} {n:,}" for host, n in self.hosts.items()))
        if self.is_done:
            lines.append("exported" if self.is_exported else "done; the same command exports it")
        return lines

    def _speed(self) -> str:
        if not self.rate:
            return ""
        left_s = (self.num_rows - self.num_rows_done) / self.rate
        return f", {self.rate:.1f} img/s" + (f", {clock(left_s)} left" if not self.is_done else "")


def status_of(folder: RunFolder, plan: Plan) -> RunStatus:
    """How far the run of `plan` is."""
    commits = CommitLog(folder, plan.shards).refresh()
    errors = Counter[str]()
    for commit in commits.values():
        errors.update(commit.error_types)
    started = {shard_of(name) for name in folder.wip.names(WIP)} - {None, *commits}
    last = max((commit.ended for commit in commits.values()), default=None)
    recent = [commit for commit in commits.values() if last is not None and commit.ended > last - RECENT_S]
    begun = min((commit.ended - commit.seconds for commit in recent), default=0.0)
    span_s = last - begun if last is not None else 0.0
    return RunStatus(
        uri=folder.uri,
        num_shards=plan.shards,
        num_done=len(commits),
        num_started=len(started),
        num_rows=plan.rows,
        num_rows_done=sum(commit.rows for commit in commits.values()),
        num_ok=sum(commit.ok for commit in commits.values()),
        error_types=dict(sorted(errors.items())),
        hosts=dict(Counter(commit.host for commit in commits.values()).most_common()),
        rate=sum(commit.rows for commit in recent) / span_s if span_s > 0 else 0.0,
        last_commit_s=None if last is None else max(0.0, round(time.time() - last, 1)),
        is_exported=folder.store.read(EXPORTED) is not None,
    )
