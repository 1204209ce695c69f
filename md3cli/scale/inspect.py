"""A look at a run folder: what is damaged in it, whether it is what it claims, what nothing needs, how far the run is.

Damage costs what it hits only. A damaged line of a journal or a part is copied to the run folder's `damaged/` and done
again. Of a part whose digest is wrong though every line is whole, nothing tells which line was changed: all of its
shard is done again. Memory is a shard. This file knows nothing of processes: all of it works while a run goes on
elsewhere, on any machine that sees the folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BufferedReader
from itertools import islice
from typing import Any, NamedTuple, cast

from md3cli.console.progress import clock
from md3cli.files import lock_holder
from md3cli.finished.record_shape import read_record
from md3cli.records import OK_TAIL, printable
from md3cli.run.journal_scan import journal_lines
from md3cli.run.log import DamagedLines
from md3cli.run.run_info import RunCounts
from md3cli.run.status import Standing, State
from md3cli.scale.attempts import (
    Place,
    attempt_files,
    damage_of,
    keep_damaged_lines,
    keep_lines,
    read_history,
)
from md3cli.scale.children import Families, families_of, is_line_of
from md3cli.scale.folder import (
    DAMAGED,
    EXPORTED,
    PARTS,
    WIP,
    RunFolder,
    commit_name,
    host_name,
    is_unfinished,
    lock_path,
    plan_names,
    records_of,
    shard_of,
)
from md3cli.scale.make_plan import Fingerprint
from md3cli.scale.markers import (
    Commit,
    CommitLog,
    OpenStart,
    counts_of,
    last_command,
    open_starts,
    read_commit,
    read_exported,
    read_part,
    remove_commit,
)
from md3cli.scale.plan import Plan, PlannedRow, PlanReader
from md3cli.scale.shard_runner import history_of
from md3cli.scale.store import LocalStore
from md3cli.system import is_alive

_MOST_TOLD = 5
_MOST_NAMED = 20  # damaged lines of a file
YOUNGEST_S = 3600.0  # a younger part may be about to be committed
RECENT_S = 600.0  # before the last commit: what the rate is reckoned from


def damaged_journals(folder: RunFolder, plan: Plan, commits: Mapping[int, Commit]) -> Iterator[str]:
    """Copy the damaged lines of attempts at open shards, and yield in words which they are; of many only the first.

    Raises:
        OutputError: the copies cannot be written.
    """
    reader, families, words = PlanReader(folder, plan), families_of(folder, plan), []
    for shard in range(plan.shards):
        if shard not in commits and attempt_files(folder.wip, shard):
            words += damage_of(folder, shard, history_of(folder, shard, reader.shard(shard), families).damaged)
    yield from _bounded(words, "journals")


def reopen_damaged(folder: RunFolder, plan: Plan, commits: dict[int, Commit]) -> Iterator[str]:
    """Have the shards of damaged or missing parts done again, taken out of `commits`; yield what became of each.

    Raises:
        OutputError: the folder cannot be changed.
    """
    reader, families, words = PlanReader(folder, plan), families_of(folder, plan), []
    for shard, commit in sorted(commits.items()):
        data, is_sound = read_part(folder, commit)
        if not is_sound:
            words += _reopen(folder, shard, commit, data, reader.shard(shard), families)
            del commits[shard]
    yield from _bounded(words, "parts")


def _reopen(
    folder: RunFolder, shard: int, commit: Commit, data: bytes | None, rows: Sequence[PlannedRow], families: Families
) -> list[str]:
    if read_commit(folder, shard) != commit:  # somebody was faster
        return []
    good, damaged = sort_part(data or b"", rows, families)
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
    remove_commit(folder, shard, commit)
    return words


def sort_part(data: bytes, rows: Sequence[PlannedRow], families: Families) -> tuple[list[bytes], dict[int, bytes]]:
    """Separate the records of a part from its damaged lines.

    Returns:
        The records of the requests of `rows` and of their children, one of each; and all other lines by number, from 1.
    """
    planned = {one.record_id: one for one in families.asked(rows, _lines_in(data))}
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


def _lines_in(data: bytes) -> dict[str, bytes]:
    """Return the whole records of a part by id, the first of each."""
    found: dict[str, bytes] = {}
    for line in io.BytesIO(data):
        if (record := read_record(line)) is not None and line.endswith(b"\n"):
            found.setdefault(record["id"], line)
    return found


def _shown(folder: RunFolder, commit: Commit) -> str:
    return f"{printable(folder.uri)}/{commit.part}"


def _bounded(words: Sequence[str], what: str) -> Iterator[str]:
    yield from words[:_MOST_TOLD]
    if len(words) > _MOST_TOLD:
        yield f"{len(words) - _MOST_TOLD:,} more {what} were damaged, and are repaired in the same way"


class FolderVerification:
    """Finds out whether a run folder has each request once, every part as its marker says, and nothing astray.

    `num_shards` and `num_rows` are the plan's, `num_records` is of the committed shards. `digest` is the SHA-256 of the
    exported records, once `findings` have found them to be what was exported.
    """

    def __init__(self, folder: RunFolder) -> None:
        """Raises InputError, OutputError: it has no readable plan."""
        self._folder = folder
        self._reader = PlanReader(folder)
        self._families = families_of(folder, self._reader.plan)
        self._commits = CommitLog(folder).refresh()
        self.num_shards, self.num_rows = self._reader.plan.shards, self._reader.plan.rows
        self.digest = ""
        self.num_records = sum(commit.num_records for commit in self._commits.values())

    def findings(self) -> Iterator[str]:
        """Yield what is wrong, in words; nothing where all is as it should be."""
        yield from self._plan_findings()
        if num_open := sum(shard not in self._commits for shard in range(self.num_shards)):
            yield f"{num_open:,} of {self.num_shards:,} shards are not done; the same command goes on"
        for shard, commit in sorted(self._commits.items()):
            yield from (f"shard {shard}: {finding}" for finding in self.shard_findings(shard, commit))
        yield from self._family_findings()
        if orphans := orphans_of(self._folder, self._commits):
            yield f"{len(orphans):,} files that belong to nothing, such as {orphans[0]}; `md3 runs gc` removes them"
        if not num_open:
            yield from self._export_findings()

    def _plan_findings(self) -> Iterator[str]:
        for number, plan in enumerate(self._reader.plan.each):
            shards = range(number * plan.shards, (number + 1) * plan.shards)
            yield from self._findings_of(plan, shards, plan_names(number).manifest.rpartition("/")[2])

    def _findings_of(self, plan: Plan, shards: range, manifest: str) -> Iterator[str]:
        """Yield in what the rows of one of the plans are not those that `manifest` should have."""
        fingerprint, num_rows = Fingerprint(), 0
        for shard in shards:
            if columns := list(self._reader.columns(shard)):
                fingerprint.note(columns)
                num_rows += len(columns)
        if num_rows != self.num_rows:
            yield f"{manifest} has {num_rows:,} rows, the plan says {self.num_rows:,}"
        if fingerprint.hexdigest() != plan.fingerprint:
            yield f"the rows of {manifest} are not those of the plan"

    def shard_findings(self, shard: int, commit: Commit) -> Iterator[str]:
        """Yield what is wrong with the records of one shard."""
        if not 0 <= shard < self.num_shards:
            yield "the plan has no such shard"
            return
        data, is_sound = read_part(self._folder, commit)
        if data is None:
            yield f"{commit.part} is missing"
            return
        if not is_sound or len(data) != commit.bytes:
            damaged = sort_part(data, self._reader.shard(shard), self._families)[1]
            where = _named((number, number) for number in damaged)
            yield f"{commit.part} is not what its marker says{where}"
            return
        planned, found = self._planned(shard, commit, data), _ids_in(data)
        if found != planned:
            yield f"{commit.part} {_difference(planned, found)}"
        elif (len(found), sum(commit.error_types.values())) != (commit.num_records, commit.errors):
            yield "its marker's counts are wrong"

    def _planned(self, shard: int, commit: Commit, data: bytes) -> list[str]:
        """Return the ids that a shard's part should have, in order."""
        rows = self._reader.shard(shard)
        if not self._families.have_parents(rows):
            return [record_id for row in rows for record_id in row.ids]
        lines = _lines_in(data)
        if commit.families == self._families.digest:
            return self._families.known_ids(rows, lines)
        return [record_id for row in rows for record_id in self._families.ids_of(row, lines)]

    def _family_findings(self) -> Iterator[str]:
        others = [
            shard for shard, commit in self._commits.items() if commit.families not in ("", self._families.digest)
        ]
        if others:
            yield (
                f"of {len(others):,} shards other objects were asked about than the latest command names (--min-score, "
                "--nms, names); the same command, in one process, asks what is new"
            )

    def _export_findings(self) -> Iterator[str]:
        is_open = is_unfinished(self._folder, has_records=True)  # first, for an export may be noted meanwhile
        exported = read_exported(self._folder)
        if exported is None or is_open:
            yield "the records are not exported yet; the same command does it"
            return
        store, name = records_of(self._folder)
        records = printable(f"{store.uri}/{name}")
        try:
            with store.open(name) as file:
                if hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest() == exported.sha256:
                    self.digest = exported.sha256
                    return
                file.seek(0)
                damaged = (lines for lines in journal_lines(file) if isinstance(lines, DamagedLines))
                where = _named((lines.first, lines.last) for lines in damaged)
                yield f"{records} is not what was exported{where}"
        except FileNotFoundError:
            yield f"{records} is gone; the same command exports it again"


def _named(places: Iterable[tuple[int, int]]) -> str:
    """Return the first few places in words, to be put behind a finding."""
    found = list(islice(places, _MOST_NAMED + 1))
    if not found:
        return ": its lines are whole, but values in them were changed, added or taken away"
    numbers = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in found[:_MOST_NAMED])
    return f": no whole record in line {numbers}{' and more' if len(found) > _MOST_NAMED else ''}"


def _ids_in(data: bytes) -> list[str] | None:
    """Return the ids of records in their order; None where something else is among them."""
    try:
        return [json.loads(line)["id"] for line in data.splitlines()]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _difference(planned: Sequence[str], found: Sequence[str] | None) -> str:
    """Return in words how the records of a shard differ from those that were planned."""
    if found is None:
        return "has lines that are no records"
    missing, extra = Counter(planned) - Counter(found), Counter(found) - Counter(planned)
    num_twice = sum((extra & Counter(planned)).values())
    facts = {"missing": missing.total(), "there twice": num_twice, "of another run": extra.total() - num_twice}
    told = ", ".join(f"{count:,} {what}" for what, count in facts.items() if count)
    return f"does not have each request once: {told}" if told else "does not have its requests in order"


def orphans_of(folder: RunFolder, commits: Mapping[int, Commit]) -> list[str]:
    """Return the parts that no marker names, and what attempts at committed shards left."""
    named = {commit.part for commit in commits.values()}
    parts = [f"{PARTS}/{name}" for name in folder.store.names(PARTS)]
    left = [f"{WIP}/{name}" for name in folder.wip.names(WIP) if shard_of(name) in commits]
    return [part for part in parts if part not in named] + left


class Collected(NamedTuple):
    """Names of files that were removed, and shards that are to be done again."""

    removed: list[str]
    reopened: list[int]


def collect(
    folder: RunFolder,
    *,
    older_than_s: float = YOUNGEST_S,
    with_damaged: bool = False,
    shards: Container[int] | None = None,
) -> Collected:
    """Remove what belongs to nothing and was last written `older_than_s` ago; `shards`: of these alone.

    `with_damaged`: also take the markers of parts away that are missing, damaged or not of this plan, so that their
    shards are done again.

    Raises:
        OutputError: the folder cannot be changed.
    """
    commits = dict(CommitLog(folder).refresh())
    reopened: list[int] = []
    if with_damaged:
        verification = FolderVerification(folder)
        damaged = (shard for shard, commit in commits.items() if any(verification.shard_findings(shard, commit)))
        reopened = sorted(damaged)
    for shard in reopened:
        folder.store.remove(commit_name(shard))
        del commits[shard]
    if reopened:
        folder.store.remove(EXPORTED)
    removed = []
    for name in orphans_of(folder, commits):
        if shards is not None and shard_of(name.rpartition("/")[2]) not in shards:
            continue
        store = folder.wip if name.startswith("wip/") else folder.store
        modified_at = store.modified_at(name)
        if modified_at is not None and time.time() - modified_at >= older_than_s:
            store.remove(name)
            removed.append(name)
    return Collected(removed, reopened)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """How far a run of many processes is, as its markers and journals say.

    `standing` is what every run has; the other fields are keys of --json beside its own. A row to which more was added
    is done in parts. `shards_started` have journals and no marker. `rows_per_second` is that of the last ten minutes in
    which anything was committed, 0 where it is not known.
    """

    standing: Standing
    run: str
    shards: int
    shards_done: int
    shards_started: int
    rows: int
    rows_done: int
    hosts: Mapping[str, int]
    rows_per_second: float
    seconds_since_commit: float | None
    exported: bool

    @property
    def is_done(self) -> bool:
        return self.shards_done == self.shards

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints: the keys of every run, and those of many processes."""
        own = asdict(self) | {"rows_per_second": round(self.rows_per_second, 3)}
        del own["standing"]
        return self.standing.to_json() | own

    def lines(self) -> list[str]:
        """Return the status for people."""
        share = self.rows_done / self.rows if self.rows else 1.0
        first, *others = self.standing.lines()
        lines = [
            first,
            f"{self.rows_done:,} of {self.rows:,} images in {self.shards_done:,} of {self.shards:,} shards "
            f"({share:.1%}), {self.shards_started:,} more begun",
        ]
        if self.seconds_since_commit is not None:
            lines.append(f"last shard {clock(self.seconds_since_commit)} ago{self._speed()}")
        if self.hosts:
            lines.append("shards by host: " + ", ".join(f"{printable(host)} {n:,}" for host, n in self.hosts.items()))
        if self.is_done and not self.exported:
            lines.append("all shards are done; the same command exports their records")
        return [*lines[:1], *others[:1], *lines[1:], *others[1:]]

    def _speed(self) -> str:
        if not self.rows_per_second:
            return ""
        left_s = (self.rows - self.rows_done) / self.rows_per_second
        return f", {self.rows_per_second:.1f} img/s" + (f", {clock(left_s)} left" if not self.is_done else "")


def status_of(folder: RunFolder, plan: Plan, typed: str) -> RunStatus:
    """Return how far the run of `plan` is, whose OUTPUT a user names as `typed`."""
    holder, starts = _at_work(folder)  # first, for a run that ends meanwhile has put all its markers then
    commits = CommitLog(folder, plan.shards).refresh()
    in_work = {shard_of(name) for name in folder.wip.names(WIP)} - commits.keys()
    started = [shard for shard in in_work if shard is not None]
    is_exported = not is_unfinished(folder, has_records=True)
    last = max((commit.ended for commit in commits.values()), default=None)
    recent = [commit for commit in commits.values() if last is not None and commit.ended > last - RECENT_S]
    begun = min((commit.ended - commit.seconds for commit in recent), default=0.0)
    span_s = last - begun if last is not None else 0.0
    return RunStatus(
        run=folder.uri,
        shards=plan.shards,
        shards_done=len(commits),
        shards_started=len(started),
        rows=plan.rows,
        rows_done=sum(commit.rows for commit in commits.values()) // len(plan.each),
        hosts=dict(Counter(commit.host for commit in commits.values()).most_common()),
        rows_per_second=sum(commit.rows for commit in recent) / len(plan.each) / span_s if span_s > 0 else 0.0,
        seconds_since_commit=None if last is None else max(0.0, round(time.time() - last, 1)),
        exported=is_exported,
        standing=_standing_of(
            folder, plan, typed, commits, started, is_exported, lambda last: holder or _open_start(starts, last)
        ),
    )


def _standing_of(
    folder: RunFolder,
    plan: Plan,
    typed: str,
    commits: Mapping[int, Commit],
    started: Sequence[int],
    is_exported: bool,
    holder_at: Callable[[float], str],
) -> Standing:
    counts = counts_of(commits)
    errors, ok, last = (
        Counter(counts.errors),
        counts.ok,
        max((commit.ended for commit in commits.values()), default=0.0),
    )
    children = sum(commit.children for commit in commits.values())
    reader, families = PlanReader(folder, plan), families_of(folder, plan)
    for shard in started:
        records = read_history(folder, shard).records
        under_way = records.values()
        rows = reader.shard(shard) if 0 <= shard < plan.shards else []
        if families.have_parents(rows):
            children += len(families.known_ids(rows, records)) - sum(len(row.ids) for row in rows)
        failed = Counter(str(json.loads(line)["error"]["type"]) for line in under_way if not line.endswith(OK_TAIL))
        errors, ok = errors + failed, ok + len(under_way) - failed.total()
        files = (folder.wip.modified_at(f"{WIP}/{name}") for name in attempt_files(folder.wip, shard))
        last = max([last, *filter(None, files)])
    holder = holder_at(last)
    is_over = is_exported and len(commits) == plan.shards
    state = State.RUNNING if holder else State.FINISHED if is_over else State.STOPPED
    return Standing(
        run=typed,
        requests=plan.requests + children,
        children=children,
        counts=RunCounts(ok, errors.total(), dict(sorted(errors.items()))),
        state=state,
        seconds_since_record=max(0.0, time.time() - last) if last and started else None,  # else the last shard's
        holder=holder,
        command=last_command(folder),
    )


def _at_work(folder: RunFolder) -> tuple[str, Sequence[OpenStart]]:
    """Return who holds OUTPUT's lock, and in a bucket, which has none, the starts that have not noted their end."""
    holder = lock_holder(lock_path(folder)) or ""
    return holder, [] if holder or isinstance(folder.store, LocalStore) else open_starts(folder)


def _open_start(starts: Sequence[OpenStart], last: float) -> str:
    """Return which start seems to go on; `last` is when the last record came, in seconds since 1970.

    One on another machine counts for as long as it may be expected to give signs of life.
    """
    for start in starts:
        is_here = start.host == host_name()
        if is_alive(start.pid) if is_here else time.time() - max(start.started, last) < RECENT_S:
            return f"process {start.pid} on {printable(start.host)}"
    return ""
