"""How a start finds or makes its plan: what stands in OUTPUT is gone on with, taken over, or refused."""

from __future__ import annotations

from collections.abc import Callable

from md3cli.config import RunConfig
from md3cli.empty_input import check_found
from md3cli.journal_scan import first_record
from md3cli.records import RunIdentity
from md3cli.run_info import OutputPaths, check_first_record
from md3cli.scale.adoption import adopt, reopen_failed
from md3cli.scale.bucket import Deliveries
from md3cli.scale.choosing import discard, is_unfinished, take_place
from md3cli.scale.commits import Commit, CommitLog
from md3cli.scale.layout import EXPORTED, RunFolder, open_run_folder
from md3cli.scale.plan import Plan, check_config, plan_config, read_plan
from md3cli.scale.planner import PLANNER, PlannerMark, wait_for_plan
from md3cli.scale.planning import PlanOvertakenError, make_plan, put_plan
from md3cli.source import Source

NEXT_SUFFIX = "-next"  # where the plan of an INPUT that has grown is made


class Beginning:
    """The first steps of one start, by a process that holds OUTPUT's lock (ranks share it)."""

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        files: OutputPaths,
        deliveries: Deliveries,
        source: Source,
        identity: RunIdentity,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        """`say` tells the user what is waited for, `warn` what is damaged."""
        self._folder, self._config, self._files, self._deliveries = folder, config, files, deliveries
        self._source, self._identity, self._say, self._warn = source, identity, say, warn
        self._wanted = plan_config(config, identity, source.root)
        self.num_adopted = 0

    def check_records(self) -> None:
        """Refuse a records file that is not this run's, where neither run.json nor a plan says so.

        Raises:
            OutputMismatchError: it is another run's, or none of md3's.
        """
        journal = self._files.journal
        if self._files.run_info.exists() or read_plan(self._folder) is not None or not self._deliveries.has(journal):
            return
        self._deliveries.fetch(journal)
        with open(journal, "rb") as file:
            record = first_record(file)
        if record is not None:
            check_first_record(record, self._config.requests, self._identity)

    def plan(self) -> Plan:
        """The plan to go on with, made now where there is none.

        Raises:
            OutputMismatchError: there is an unfinished one of another run; names the differences.
            Md3Error: INPUT cannot be read, or OUTPUT not be written.
        """
        found = read_plan(self._folder)
        if found is None:
            return self._first_plan()
        is_alone = self._config.scale.world_size == 1
        if is_alone and not is_unfinished(self._folder, has_records=self._deliveries.has(self._files.journal)):
            return self._plan_after(found)
        check_config(found, self._wanted)
        return found

    def _first_plan(self) -> Plan:
        rank = self._config.scale.rank
        if self._is_for_others() and (found := wait_for_plan(self._folder, rank, self._say)) is not None:
            check_config(found, self._wanted)
            return found
        discard(open_run_folder(self._folder.uri + NEXT_SUFFIX))
        with PlannerMark(self._folder, rank):
            try:
                made = self._made_in(self._folder)
            except PlanOvertakenError as overtaken:
                plan = overtaken.plan
            else:
                if not self._config.output.overwrite:
                    self._adopt(self._folder, made)
                plan = put_plan(self._folder, made)
        check_config(plan, self._wanted)
        return plan

    def _is_for_others(self) -> bool:
        """Whether another rank seems to make the plan, or is the one to; whoever is alone does not look."""
        scale = self._config.scale
        return scale.rank > 0 or (scale.world_size > 1 and self._folder.store.read(PLANNER) is not None)

    def _made_in(self, folder: RunFolder) -> Plan:
        """A plan of INPUT as it is now; not put yet.

        Raises:
            InputError: INPUT cannot be read, or there is nothing to annotate in it and that is not allowed.
        """
        plan = make_plan(
            folder,
            iter(self._source),
            self._config.requests,
            self._identity,
            self._wanted,
            shard_size=self._config.scale.shard_size,
            skipped=self._source.skipped,
        )
        if not plan.rows:
            check_found(self._source, self._config.source, is_allowed=self._config.allow_empty)
        return plan

    def _adopt(self, folder: RunFolder, plan: Plan) -> None:
        """Take the records that are there over."""
        self._deliveries.fetch(self._files.journal)
        with_failed = not self._config.output.retry_failed
        self.num_adopted = adopt(folder, plan, self._files.journal, with_failed=with_failed, warn=self._warn)

    def _plan_after(self, finished: Plan) -> Plan:
        """The finished plan, or one of what INPUT has become, which takes over the finished records."""
        following = open_run_folder(self._folder.uri + NEXT_SUFFIX)
        discard(following)
        plan = self._made_in(following)
        if (plan.fingerprint, plan.config_hash) == (finished.fingerprint, finished.config_hash):
            discard(following)
            return finished
        self._adopt(following, plan)
        put_plan(following, plan)
        take_place(following, self._folder)
        return plan

    def reopen(self, plan: Plan) -> None:
        """For --retry-failed."""
        commits: dict[int, Commit] = dict(CommitLog(self._folder, plan.shards).refresh())
        if any(commit.errors for commit in commits.values()) or len(commits) < plan.shards:
            self._folder.store.remove(EXPORTED)
            reopen_failed(self._folder, plan, commits)
