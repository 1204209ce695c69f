"""The end of a start: the export once every shard is committed, and what is told and noted either way.

The export copies the parts, one behind the other, into one file in input order; records of what was added go behind
those of their rows. A part holds the very lines of a single
process's journal, so the export is the same bytes however the run went. Apart from run.py, because it knows nothing of
drivers and signals.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from md3cli.console.progress import clock as duration
from md3cli.console.summary import Failure, Summary
from md3cli.errors import DamagedPartError, OutputHeldError
from md3cli.files import OutputLock, atomic_publish, translate_errors
from md3cli.finished.run_json import RecordsDigest
from md3cli.records import OK_TAIL, printable
from md3cli.run.finish import NamedFailures, exit_status, summarize, tell_how_to_resume
from md3cli.run.order import WAITING_SUFFIX
from md3cli.run.output import publish, remove_temps, say_once, words_of_others
from md3cli.run.run_info import RunDocument, Timeline
from md3cli.scale.added import merged
from md3cli.scale.attempts import Teller
from md3cli.scale.children import Families
from md3cli.scale.folder import ERRORS, KEPT, RunFolder, attempts_prefix, is_unfinished, num_plans_exported
from md3cli.scale.inspect import collect
from md3cli.scale.markers import Commit, Exported, StartNote, counts_of, note_exported, read_exported, read_part
from md3cli.scale.plan import Plan, PlanReader, read_one_plan
from md3cli.scale.start import Start
from md3cli.scale.store import LocalStore

STOPPED = 128  # exit statuses from here on are of signals
EXPORT_WAIT_S, EXPORT_POLL_S = 60.0, 1.0  # for another rank's export; and longer by what a slow one takes:
SLOW_EXPORT_BYTES_S = 5e6  # a second
_EXPORT_LOCK = "export.lock"


class Finish:
    """Ends one start. `document` is run.json beside OUTPUT; None for a rank: the one that exports writes it."""

    def __init__(self, start: Start, plan: Plan, document: RunDocument | None, commits: Mapping[int, Commit]) -> None:
        """`commits` grows while the run goes on; what is in it now is from before this start."""
        self._start, self._plan, self._document, self._commits = start, plan, document, commits
        self._config, self._console, self._folder = start.config, start.console, start.folder
        self._families = Families.of(plan, start.run_options)
        self._started_at = time.monotonic()
        self._before = dict(commits)
        self._num_under_way = 0
        self._lock: OutputLock | None = None  # of an export
        self._timeline = Timeline(document.timeline if document is not None else ())
        scale = start.config.scale
        self._note = StartNote(self._folder, {"rank": scale.rank, "world_size": scale.world_size})

    def forget(self, shards: Iterable[int]) -> None:
        """Count shards that are done again as done by this start."""
        self._before = {shard: commit for shard, commit in self._before.items() if shard not in set(shards)}

    def note_progress(self, num_under_way: int, *, is_last: bool = False) -> None:
        """Note a point of the timeline; `num_under_way` requests are finished in shards that are not committed."""
        self._num_under_way = num_under_way
        elapsed_s = time.monotonic() - self._started_at
        self._timeline.note(elapsed_s, self._num_new() + num_under_way, is_last=is_last)

    def _num_new(self) -> int:
        return sum(commit.num_records for shard, commit in self._commits.items() if shard not in self._before)

    def export(self) -> int:
        """Make OUTPUT's files of the committed records, and return the exit status; `note` ends the export.

        Raises:
            DamagedPartError: a part is not what its marker says; nothing was changed.
            OutputError, ExportError: a file cannot be made; the records are in the run folder.
        """
        if self._may_export():
            self._export()
        else:
            self._console.say("another rank exports the records")
        return exit_status(self._config, counts_of(self._commits))

    def _export(self) -> None:
        files, deliveries = self._start.files, self._start.deliveries
        journal = files.journal
        if self._start.is_alone or self._lock is not None:  # else another rank may be writing just now
            remove_temps(self._start.outputs, is_shared=not self._start.is_alone)
        has_records = deliveries.has(journal)
        has_more = has_records and num_plans_exported(self._folder) > len(self._plan.each)  # of those who add
        if not has_more and is_unfinished(self._folder, has_records=has_records):
            exported = export_parts(self._folder, self._plan, self._families, self._commits, journal)
            deliveries.deliver(journal)
            note_exported(self._folder, exported)
            # What a kill between a commit and its end has left; of shards that others add just now nothing.
            collect(self._folder, older_than_s=0.0, shards=self._commits)
            journal.with_name(journal.name + WAITING_SUFFIX).unlink(missing_ok=True)  # of a single process, taken over
        if self._document is None and read_one_plan(self._folder, len(self._plan.each)) is None:
            self._document = self._start.begin_document(self._plan.root)
        if self._document is None:
            self._console.say("other ranks add to this run, and write run.json")
        else:
            if (noted := read_exported(self._folder)) is not None:
                self._document.note_records(RecordsDigest(noted.bytes, noted.sha256))
            self._document.finish(counts_of(self._commits), {}, None, self._timeline.points)
            deliveries.deliver(files.run_info)
        notes: list[tuple[str, str]] = []
        for document in self._start.outputs.documents:
            deliveries.fetch(journal)
            found = publish(document, journal, self._config, self._plan.root, self._console)
            notes += [(document.format, note) for note in found]
            deliveries.deliver(document.path)
        say_once(notes, self._console)
        if self._config.output.add and self._num_new() and (words := words_of_others(self._start.outputs)):
            self._console.warn(words)

    def _may_export(self) -> bool:
        """Return whether this process is the one to export; on this machine it then holds a lock until `note` is done.

        So run.json, which both write, has one writer at a time.
        """
        if self._start.is_alone or self._lock is not None:
            return True
        teller = Teller(self._console.say, first_after_s=0.0)
        while (found := self._try_lock()) is False:
            if len(self._plan.each) == 1 or not is_unfinished(self._folder, has_records=True):
                return False
            teller.tell("waiting for another rank's export, which may lack what was added")
            time.sleep(EXPORT_POLL_S)
        return found is True or self._is_first() or not self._is_exported_soon()

    def _try_lock(self) -> bool | None:
        """Return whether this process holds the lock of the export now; None where there are no locks."""
        if not isinstance(self._folder.store, LocalStore):
            return None
        try:
            lock = OutputLock.acquire(self._folder.store.path(_EXPORT_LOCK), self._start.files.journal)
        except OutputHeldError:
            return False
        if not lock.is_held:
            lock.release()
            return None
        self._lock = lock
        return True

    def _is_first(self) -> bool:
        # Without locks rank 0 exports, and in a bucket whoever committed last, too: both deliver the same bytes.
        last = max(self._commits.values(), key=lambda commit: commit.ended, default=None)
        is_last = last is not None and last.attempt.startswith(attempts_prefix())
        return self._config.scale.rank == 0 or (is_last and not isinstance(self._folder.store, LocalStore))

    def _is_exported_soon(self) -> bool:
        """Wait for the export of another rank, and return whether it came."""
        patience_s = EXPORT_WAIT_S + sum(commit.bytes for commit in self._commits.values()) / SLOW_EXPORT_BYTES_S
        teller = Teller(self._console.say)
        while is_unfinished(self._folder, has_records=True):
            teller.tell(f"waiting for another rank's export, at most {duration(patience_s)}")
            if teller.waited_s > patience_s:
                return False
            time.sleep(EXPORT_POLL_S)
        return True

    def note(self, status: int) -> None:
        """Note how this start ended, in run.json and in the run folder; then another rank may export."""
        try:
            self.note_progress(self._num_under_way if status >= STOPPED else 0, is_last=True)
            counts = counts_of(self._commits)
            self._note.end(status, {"records": self._num_new(), "ok": counts.ok, "failed": counts.failed})
            if self._document is not None:
                self._document.finish(counts, {}, status, self._timeline.points)
                self._start.deliveries.deliver(self._start.files.run_info)
        finally:
            if self._lock is not None:
                self._lock.release()

    def summarize(self) -> None:
        """Print the summary: what this start has done, and what earlier ones had."""
        new = [commit for shard, commit in self._commits.items() if shard not in self._before]
        before = [commit for shard, commit in self._commits.items() if shard in self._before]
        summary = Summary(
            num_images=self._num_new_images(),
            num_ok=sum(commit.new_ok for commit in new),
            failed=dict(sum((commit.new_errors for commit in new), Counter[str]())),
            num_done_before=sum(commit.num_records for commit in before) + sum(commit.reused for commit in new),
            num_failed_before=sum(commit.errors for commit in before)
            + sum(sum(commit.reused_errors.values()) for commit in new),
            prompt_tokens=sum(commit.prompt_tokens for commit in new),
            output_tokens=sum(commit.output_tokens for commit in new),
            answering_s=time.monotonic() - self._started_at,
            skipped=self._plan.skipped,
            failures=self._named_failures(),
            outputs=self._start.deliveries.written(self._start.outputs),
        )
        counts, outputs = counts_of(self._commits), self._start.outputs
        summarize(self._config, self._console, summary, outputs, counts, is_empty=not self._plan.rows)

    def _num_new_images(self) -> int:
        """Count the images that something was asked of now; one that more was added to is one image."""
        images: dict[int, int] = {}
        for shard, commit in self._commits.items():
            if shard not in self._before:
                place = shard % self._plan.shards_of_rows
                images[place] = max(images.get(place, 0), commit.images - commit.reused_images)
        return sum(images.values())

    def _named_failures(self) -> list[Failure]:
        """Return some of this start's failures, then of earlier ones."""
        named = NamedFailures()
        for shard in sorted(self._commits, key=lambda shard: (shard in self._before, shard)):
            if self._commits[shard].errors and not named.is_full:
                named.note_lines((self._folder.store.read(self._commits[shard].part) or b"").splitlines(keepends=True))
        return named.found

    def tell_how_to_resume(self, reason: str) -> None:
        """Say that the signal `reason` stopped the run, what it has, and which command goes on."""
        num_new = self._num_new() + self._num_under_way
        tell_how_to_resume(self._config, self._console, reason, num_new, self._folder.uri)


def export_parts(
    folder: RunFolder, plan: Plan, families: Families, commits: Mapping[int, Commit], out: Path
) -> Exported:
    """Write all records to `out`, whole or not at all, and the failed ones to errors.jsonl of the folder as well.

    Raises:
        OutputError: `out` cannot be written.
        DamagedPartError: a part is not what its marker says.
    """
    with (
        folder.store.put_file(ERRORS) as errors_path,
        atomic_publish(out) as temp,
        translate_errors(out),
        open(temp, "wb") as file,
        open(errors_path, "wb") as errors,
    ):
        return _copy(folder, _shards(folder, plan, families, commits), len(plan.each), file, errors)


def _copy(
    folder: RunFolder, shards: Iterator[tuple[bytes, bool]], num_plans: int, file: IO[bytes], errors: IO[bytes]
) -> Exported:
    digest, num_bytes, num_records = hashlib.sha256(), 0, 0
    kept = folder.store.read(KEPT) or b""
    for data, has_errors in itertools.chain([(kept, True)], shards):
        digest.update(data)
        file.write(data)
        num_bytes += len(data)
        num_records += data.count(b"\n")
        if has_errors:
            errors.writelines(line for line in data.splitlines(keepends=True) if not line.endswith(OK_TAIL))
    return Exported(num_records, num_bytes, digest.hexdigest(), num_plans)


def _shards(
    folder: RunFolder, plan: Plan, families: Families, commits: Mapping[int, Commit]
) -> Iterator[tuple[bytes, bool]]:
    """Yield the records of each shard of rows, with what was added to them, and whether any failed."""
    reader = PlanReader(folder, plan) if plan.parts else None
    for first in range(plan.shards_of_rows):
        shards = range(first, plan.shards, plan.shards_of_rows)
        parts = [_sound_part(folder, commits[shard]) for shard in shards]
        if reader is not None:
            counts = [families.counts_of(reader.shard(shard), part) for shard, part in zip(shards, parts, strict=True)]
            parts = [b"".join(merged(parts, counts))]
        yield parts[0], any(commits[shard].errors for shard in shards)


def _sound_part(folder: RunFolder, commit: Commit) -> bytes:
    data, is_sound = read_part(folder, commit)
    if data is None or not is_sound:
        what = "is missing" if data is None else "is damaged"
        raise DamagedPartError(
            f"{printable(folder.uri)}/{commit.part} {what}, again after its shard was done anew; check the disk, then "
            "start the same command again"
        )
    return data
