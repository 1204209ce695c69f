"""Whether a run folder is what it claims: each request exactly once, every part as its marker says, nothing astray.

Reads all of it once; memory is a shard.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import IO

from md3cli.journal_scan import DamagedLines, journal_lines
from md3cli.records import printable
from md3cli.scale.choosing import records_of
from md3cli.scale.commits import Commit, CommitLog
from md3cli.scale.export import read_exported
from md3cli.scale.layout import PARTS, WIP, RunFolder, shard_of
from md3cli.scale.mending import sort_part
from md3cli.scale.plan import PlannedRow, PlanReader
from md3cli.scale.planning import Fingerprint

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
