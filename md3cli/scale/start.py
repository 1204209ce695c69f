"""How a start finds or makes its plan: what stands in OUTPUT is gone on with, taken over, or refused.

In a start over, what stood in OUTPUT stays until the first new record, and comes back where there is none: the former
run folder is renamed, so that the next start finds it even after a kill. In a bucket nothing can be renamed; there only
a records file that was exported stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from md3cli.config import RunConfig
from md3cli.console import RunConsole
from md3cli.errors import InputError, OutputMismatchError
from md3cli.exporters.files import remove_leftovers
from md3cli.files import translate_errors
from md3cli.finished.run_json import read_facts
from md3cli.records import OK_TAIL, SourceRow
from md3cli.refine.labels import Labels
from md3cli.run.adding import Held
from md3cli.run.asked import differences, is_grown, requests_in
from md3cli.run.journal_scan import first_record
from md3cli.run.model_handle import Model
from md3cli.run.order import WAITING_SUFFIX
from md3cli.run.output import OutputPlan
from md3cli.run.run_info import RUN_SCHEMA, RunDocument, check_first_record, identity_of, note_grown
from md3cli.scale.added import RowsDifferError, added_rows, fingerprint_of, whole_rows
from md3cli.scale.adopt import adopt, error_in
from md3cli.scale.attempts import attempt_files, keep_lines, read_history
from md3cli.scale.bucket import Deliveries
from md3cli.scale.children import Families
from md3cli.scale.folder import (
    EXPORTED,
    WIP,
    RunFolder,
    discard,
    former_of,
    is_unfinished,
    open_run_folder,
    remove_run,
    run_folder_of,
    take_place,
)
from md3cli.scale.make_plan import PLANNER, PlannerMark, PlanOvertakenError, make_plan, put_plan, wait_for_plan
from md3cli.scale.markers import Commit, CommitLog, RunOptions, read_run_options, remove_commit
from md3cli.scale.plan import Plan, check_config, plan_config, read_plan, with_requests
from md3cli.scale.store import LocalStore
from md3cli.source.emptiness import check_found
from md3cli.source.source import Source

# Where the plan of an INPUT that has grown is made; what stands there is thrown away by any start.
_NEXT_SUFFIX = "-next"


class Start:
    """The first steps of one start, by a process that holds OUTPUT's lock (ranks share it)."""

    def __init__(
        self,
        config: RunConfig,
        console: RunConsole,
        source: Source,
        outputs: OutputPlan,
        folder: RunFolder,
        model: Model,
    ) -> None:
        assert outputs.files is not None
        self.config, self.console, self.outputs, self.files = config, console, outputs, outputs.files
        self.folder, self.model, self._source = folder, model, source
        self.deliveries = Deliveries(config.output, outputs.files, folder)
        self.run_options = RunOptions(config.model, config.decode, config.refinement, config.everything)
        self.is_alone = config.scale.world_size == 1
        self.num_adopted = 0
        self._may_add = config.output.add

    @cached_property
    def _wanted(self) -> dict[str, Any]:
        return plan_config(self.config, self.model.identity, self._source.root)

    def check_records(self) -> None:
        """Refuse a records file that is not this run's, where neither run.json nor a plan says so.

        Raises:
            OutputMismatchError: it is another run's, or none of md3's.
        """
        journal = self.files.journal
        if self.files.run_info.exists() or read_plan(self.folder) is not None or not self.deliveries.has(journal):
            return
        self.deliveries.fetch(journal)
        with open(journal, "rb") as file:
            record = first_record(file)
        if record is not None:
            is_filled = self.config.source.columns.fills_prompts  # then a record's prompt is none of the command's
            check_first_record(record, () if is_filled else self.config.requests, self.model.identity)

    def begin_document(self, root: str) -> RunDocument:
        """Begin run.json beside OUTPUT; `root` is the folder that names of pictures are relative to.

        Raises:
            OutputMismatchError: OUTPUT is another run's; names the differences.
        """
        is_over = self.config.output.overwrite
        earlier = {} if is_over else read_facts(self.files.run_info, RUN_SCHEMA)
        if earlier and requests_in(earlier["identity"]) == self.config.requests:
            self._may_add = True  # where the plan lacks some of them, --add has begun with them
        document = RunDocument.begin(
            self.files.run_info,
            identity=identity_of(
                self.config.requests,
                self.model.identity,
                root,
                self.config.identity_of_rows(),
                self.config.defaults,
            ),
            arguments=self.config.argv,
            root=root,
            is_resume=not is_over,
            shown=self.deliveries.address_of(self.files.run_info),
            is_held=is_over,
            may_add=self.config.output.add,
            may_ask_then=self._source.may_ask_then,
            is_planned=self._is_planned,
            is_shared=True,
            refinement=self.config.refinement,
        )
        document.note_added()  # a plan of it comes now
        return document

    def _families(self, plan: Plan) -> Families:
        return Families.of(plan, self.run_options)

    def _asks_others(self, plan: Plan, commits: Mapping[int, Commit]) -> set[int]:
        """Return the committed shards of which an earlier start asked about other objects than this one does."""
        digest = self._families(plan).digest
        return {shard for shard, commit in commits.items() if commit.families not in ("", digest)}

    @property
    def _is_planned(self) -> bool:
        """Whether the plan that is gone on with asks just what this start does: then run.json says nothing better."""
        plan = read_plan(self.folder)
        if plan is None or plan.asked != self.config.requests:
            return False
        return self._is_unfinished or not self.is_alone  # ranks go by plans alone

    @property
    def _is_unfinished(self) -> bool:
        return is_unfinished(self.folder, has_records=self.deliveries.has(self.files.journal))

    def plan(self) -> Plan:
        """Return the plan to go on with, made or added to now where that is needed.

        Raises:
            OutputMismatchError: there is an unfinished one of another run; names the differences.
            Md3Error: INPUT cannot be read, or OUTPUT not be written.
        """
        found = read_plan(self.folder)
        if found is None:
            return self._first_plan()
        if self.is_alone and not self._is_unfinished:
            return self._plan_after(found)
        if self._is_added_to(found):
            try:
                return self._added(found, iter(self._source))
            except RowsDifferError as difference:
                raise OutputMismatchError(
                    f"INPUT is not what it was when the plan was made: its row {difference.number:,} is another one. "
                    "Finish with the earlier command first; then --add takes in what is new there, too"
                ) from None
        self._check(found)
        return found

    def _check(self, plan: Plan, wanted: Mapping[str, Any] | None = None) -> None:
        """Refuse to go on with another plan than is `wanted`, which is this start's unless another one is given."""
        check_config(plan, wanted or self._wanted, argv=self.config.argv, output=self.config.output.shown)

    def _first_plan(self) -> Plan:
        def make() -> Plan:
            discard(open_run_folder(self.folder.uri + _NEXT_SUFFIX))
            made = self._made_in(self.folder)
            if not self.config.output.overwrite:
                self._adopt(self.folder, made)
            return made

        self._put(0, make)
        plan = read_plan(self.folder)
        assert plan is not None
        self._check(plan)
        return plan

    def _put(self, number: int, make: Callable[[], Plan]) -> Plan:
        """Put a plan of a number that `make` makes, or return another rank's."""
        rank = self.config.scale.rank
        if self._is_for_others():
            found = wait_for_plan(self.folder, rank, self.console.say, number=number)
            if found is not None:
                return found
        with PlannerMark(self.folder, rank):
            try:
                return put_plan(self.folder, make(), number)
            except PlanOvertakenError as overtaken:
                return overtaken.plan

    def _is_for_others(self) -> bool:
        """Return whether another rank seems to make the plan, or should."""
        scale = self.config.scale
        return scale.rank > 0 or (not self.is_alone and self.folder.store.read(PLANNER) is not None)

    def _is_added_to(self, plan: Plan) -> bool:
        """Return whether this start asks what `plan` does and more, as --add does or has begun to.

        Raises:
            OutputMismatchError: something else differs as well.
        """
        if not (self._may_add and is_grown(plan.config["identity"], self._wanted["identity"])):
            return False
        self._check(plan, with_requests(self._wanted, plan.asked))
        return True

    def _added(self, plan: Plan, rows: Iterator[SourceRow]) -> Plan:
        """Return `plan` with what is new added to it; `rows` are INPUT's now, each with all that is asked of it.

        Raises:
            RowsDifferError: they are not the plan's rows.
            OutputMismatchError: another rank has added something else.
        """
        new = self.config.requests[len(plan.asked) :]

        def make_added() -> Plan:
            made = make_plan(
                self.folder,
                added_rows(rows, whole_rows(self.folder, plan), new),
                new,
                self.model.identity,
                with_requests(self._wanted, new),
                shard_size=plan.shard_size,
                skipped=self._source.skipped,
                before=plan,
            )
            if not self.is_alone:  # else it is noted already
                note_grown(self.files.run_info, self.config.requests)
                self.deliveries.deliver(self.files.run_info)
            return made

        self._put(len(plan.each), make_added)
        grown = read_plan(self.folder)
        assert grown is not None
        self._check(grown)
        return grown

    def _made_in(self, folder: RunFolder) -> Plan:
        """Make a plan of INPUT as it is now; it is not put yet.

        Raises:
            InputError: INPUT cannot be read, or there is nothing to annotate in it and that is not allowed.
        """
        plan = make_plan(
            folder,
            iter(self._source),
            self.config.requests,
            self.model.identity,
            self._wanted,
            shard_size=self.config.scale.shard_size,
            skipped=self._source.skipped,
        )
        if not plan.rows:
            check_found(self._source, self.config.source, is_allowed=self.config.allow_empty)
        return plan

    def _adopt(self, folder: RunFolder, plan: Plan) -> None:
        """Copy the records that stand in OUTPUT to the shards of `plan`."""
        self.deliveries.fetch(self.files.journal)
        with_failed = not self.config.output.retry_failed
        self.num_adopted = adopt(
            folder,
            plan,
            self.files.journal,
            self._families(plan),
            with_failed=with_failed,
            warn=self.console.warn,
            readable_of=self._readable_of,
        )

    def _readable_of(self, lines: frozenset[int]) -> Container[int]:
        """Return which of these lines of a manifest can be read now; reads INPUT once more, for few runs need it."""
        self._source.watched_lines = lines
        for _ in self._source:
            pass
        return self._source.readable_lines

    def _plan_after(self, finished: Plan) -> Plan:
        """Return the finished plan, added to where --add asks; a new one with all records where INPUT has changed."""
        following = open_run_folder(self.folder.uri + _NEXT_SUFFIX)
        discard(following)
        plan = self._made_in(following)
        found = self._if_same(finished, following, plan)
        if found is not None:
            discard(following)
            return found
        self._adopt(following, plan)
        put_plan(following, plan)
        take_place(following, self.folder)
        return plan

    def _if_same(self, finished: Plan, following: RunFolder, plan: Plan) -> Plan | None:
        """Return the finished plan, with what is new added, if `plan`, made in `following` now, has the same rows."""
        if not differences(finished.config, plan.config):
            is_same = fingerprint_of(self.folder, finished) == plan.fingerprint
            commits = CommitLog(self.folder, finished.shards).refresh()
            return finished if is_same and not self._asks_others(finished, commits) else None
        if differences(finished.config, with_requests(plan.config, finished.asked)) or not self._is_added_to(finished):
            return None
        with contextlib.suppress(RowsDifferError):
            return self._added(finished, whole_rows(following, plan))
        return None

    def reopen(self, plan: Plan) -> None:
        """Have shards of `plan` done again that something is to be asked of; what they have stays.

        These are those of which an earlier start asked about other objects, and those with failed requests where
        --retry-failed asks.

        Raises:
            OutputMismatchError: they are, and this start is one of many ranks.
        """
        commits = CommitLog(self.folder, plan.shards).refresh()
        others = self._asks_others(plan, commits)
        if others and not self.is_alone:
            raise OutputMismatchError(
                f"of {len(others):,} finished shards other objects were asked about (--min-score, --nms, names); run "
                "this command once without --world-size, which asks what is new, or choose as before"
            )
        for shard in others:
            commit = commits[shard]
            self.folder.store.remove(EXPORTED)
            keep_lines(self.folder, shard, (self.folder.store.read(commit.part) or b"").splitlines(keepends=True))
            remove_commit(self.folder, shard, commit)
        if self.config.output.retry_failed:
            self._reopen_failed(plan)

    def _reopen_failed(self, plan: Plan) -> None:
        """Have failed requests done again; a shard that has any is no longer committed.

        The old export keeps the failed records until it is replaced.
        """
        folder, commits = self.folder, CommitLog(self.folder, plan.shards).refresh()
        if len(commits) == plan.shards and not any(commit.errors for commit in commits.values()):
            return
        folder.store.remove(EXPORTED)
        for shard in range(plan.shards):
            commit = commits.get(shard)
            if commit is not None and commit.errors:
                lines = (folder.store.read(commit.part) or b"").splitlines(keepends=True)
                keep_lines(folder, shard, [line for line in lines if error_in(line) is None])
                remove_commit(folder, shard, commit)
            elif commit is None and (names := attempt_files(folder.wip, shard)):
                records = read_history(folder, shard).records.values()
                keep_lines(folder, shard, [line for line in records if line.endswith(OK_TAIL)])
                for name in names:
                    folder.wip.remove(f"{WIP}/{name}")


def planned_in(config: RunConfig, outputs: OutputPlan) -> Held | None:
    """Return what an unfinished plan in OUTPUT's run folder asks, and have run.json on this machine; None without one.

    A finished one says nothing where run.json does, for one process may have added to the records since.

    Raises:
        OutputError: the folder holds no plan of this version, or cannot be read.
    """
    folder = run_folder_of(outputs, config)
    assert folder is not None
    files = outputs.files
    assert files is not None
    deliveries = Deliveries(config.output, files, folder)
    deliveries.fetch(files.run_info)
    former = former_of(folder)
    if former is not None and former.is_dir() and config.scale.world_size == 1:  # it comes back
        folder = open_run_folder(str(former))
    plan = read_plan(folder)
    is_over = not is_unfinished(folder, has_records=deliveries.has(files.journal))
    if plan is None or (is_over and files.run_info.is_file()):
        return None
    labels = Labels()
    with contextlib.suppress(InputError):  # nobody has begun with it yet
        labels = read_run_options(folder).refinement.labels
    return Held(plan.asked, plan.then, plan.config["identity"], labels)


class FormerRun:
    """The run that --overwrite replaces, kept until there are new records; for the process that holds OUTPUT's lock."""

    def __init__(self, start: Start) -> None:
        self._start, self._folder, self._aside = start, start.folder, former_of(start.folder)
        self._is_waiting = False

    def set_aside(self) -> None:
        """Make room for a new run folder.

        Raises:
            OutputError: nothing can be renamed there.
        """
        self.put_back()
        self._is_waiting = True
        if self._aside is None or not isinstance(self._folder.store, LocalStore):
            discard(self._folder)
        elif self._folder.store.root.is_dir():
            self._rename(self._folder.store.root, self._aside)
        else:  # an empty folder says as well that the new one is not to stay yet
            self._aside.mkdir(parents=True)

    def put_back(self) -> None:
        """Remove the new folder and move the former run back to its place, unless it has given way."""
        if self._is_waiting or (self._aside is not None and self._aside.is_dir()):
            self._is_waiting = False
            remove_run(self._folder)
            if self._aside is not None and isinstance(self._folder.store, LocalStore) and self._aside.is_dir():
                self._rename(self._aside, self._folder.store.root)
                with contextlib.suppress(OSError):  # not empty: there was a run folder
                    self._folder.store.root.rmdir()

    def give_way(self, document: RunDocument | None) -> None:
        """Remove the former run, now that there are new records; `document` is the new run.json."""
        if not self._is_waiting:
            return
        self._is_waiting = False
        files, deliveries = self._start.files, self._start.deliveries
        if self._aside is not None:  # first, by one rename: from here on the new run folder counts
            going = open_run_folder(self._folder.uri + _NEXT_SUFFIX)
            remove_run(going)
            assert isinstance(going.store, LocalStore)
            self._rename(self._aside, going.store.root)
            remove_run(going)
        remove_leftovers(files.run_info, [each.path for each in self._start.outputs.documents])
        if document is not None:
            document.release()
            deliveries.deliver(files.run_info)
        for path in (files.journal, files.journal.with_name(files.journal.name + WAITING_SUFFIX)):
            deliveries.remove(path)

    def _rename(self, source: Path, target: Path) -> None:
        with translate_errors(target):
            source.rename(target)
