"""How far a run is, from its markers alone: works while it runs elsewhere, on any machine that sees the folder."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from md3cli.progress import clock
from md3cli.records import printable
from md3cli.scale.commits import CommitLog
from md3cli.scale.layout import EXPORTED, WIP, RunFolder, shard_of
from md3cli.scale.plan import Plan

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
