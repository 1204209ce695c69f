"""How a run ends, in one process or in many: its exit status, its summary, and the commands that a user may want next.

Knows counts, records and the command line, and nothing of where the records lie or how they came there.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from md3cli.config import RunConfig
from md3cli.console import RunConsole
from md3cli.console.summary import Failure, Summary
from md3cli.records import OK_TAIL, RETRYABLE
from md3cli.run.asked import with_option
from md3cli.run.output import OutputPlan
from md3cli.run.run_info import RunCounts
from md3cli.source.emptiness import empty_words
from md3cli.source.source import HAVE_LABELS

STATUS_FAILED_RECORDS = 3
MOST_FAILURES_NAMED = 5


class NamedFailures:
    """Collects the first `MOST_FAILURES_NAMED` different failures of the records it is shown."""

    def __init__(self) -> None:
        self.found: list[Failure] = []

    @property
    def is_full(self) -> bool:
        return len(self.found) >= MOST_FAILURES_NAMED

    def note(self, record: Mapping[str, Any]) -> None:
        """Take `record` in, where it failed; several requests of one picture that fail alike are one failure."""
        if self.is_full or not record["error"]:
            return
        name = record["image"] if record["image"] is not None else record["prompt"] or "-"
        failure = Failure(str(name), str(record["error"]["type"]), str(record["error"]["message"]))
        if failure not in self.found:
            self.found.append(failure)

    def note_lines(self, lines: Iterable[bytes]) -> None:
        """Take in the records of a records file, as far as it takes; lines that are no records are passed over."""
        for line in lines:
            if self.is_full:
                return
            if not line.endswith(OK_TAIL):
                try:
                    self.note(json.loads(line))
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue


def exit_status(config: RunConfig, counts: RunCounts) -> int:
    """Return 0, or 3 where more of all requests failed than --fail-on allows."""
    is_bad = config.fail_on.is_met(counts.failed, counts.ok + counts.failed)
    return STATUS_FAILED_RECORDS if is_bad else 0


def summarize(
    config: RunConfig, console: RunConsole, summary: Summary, plan: OutputPlan, counts: RunCounts, *, is_empty: bool
) -> None:
    """Print the summary, with the commands that a user may want next.

    Args:
        counts: requests by outcome in all of OUTPUT.
        is_empty: INPUT held nothing to ask about.
    """
    if plan.files is not None and plan.stdout is None:
        summary.next_command = _next_command(config, plan, counts)
        if config.output.address is None:  # grep reads no bucket
            summary.failures_command = _command_for_all(plan.files.journal)
    if is_empty and summary.skipped.get(HAVE_LABELS):
        console.say("nothing to ask: all that is asked has labels")
    elif is_empty:
        console.warn(empty_words(config.source))
    console.summarize(summary)


def _next_command(config: RunConfig, plan: OutputPlan, counts: RunCounts) -> str | None:
    assert plan.files is not None
    is_worth_a_retry = any(counts.errors.get(kind) for kind in RETRYABLE)
    if is_worth_a_retry and config.scale.world_size == 1:  # ranks refuse --retry-failed
        return shlex.join(with_option(_resuming(config), "--retry-failed"))
    if plan.documents or config.output.address is not None:
        return None
    return shlex.join(["md3", "report", str(plan.files.journal), "-o", "report.html"])


def tell_how_to_resume(config: RunConfig, console: RunConsole, reason: str, num_new: int, where: str) -> None:
    """Say that the signal `reason` stopped the run, that `where` has the new records, and which command goes on."""
    console.say(f"stopped by {reason}: {num_new:,} new records are in {where}")
    console.say(f"resume with: {shlex.join(_resuming(config))}", style="cyan")


def _resuming(config: RunConfig) -> list[str]:
    """Return the command that goes on where this one stopped."""
    return [argument for argument in config.argv if argument != "--overwrite"]


def _command_for_all(records: Path) -> str:
    """Return the command that prints every failed record of a records file of ours, whose last key is `error`."""
    if os.name == "nt":
        return f'findstr /v /e /l /c:"\\"error\\":null}}" "{records}"'
    return shlex.join(["grep", "-v", '"error":null}$', str(records)])
