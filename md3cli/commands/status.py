"""`md3 status`, `md3 verify` and `md3 runs`: look at a run that is there, and clear away what it needs no more."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from md3cli.commands.help import App
from md3cli.console import say
from md3cli.errors import InputError, OutputError
from md3cli.records import printable

if TYPE_CHECKING:
    from md3cli.run.status import Standing
    from md3cli.scale.folder import RunFolder
    from md3cli.scale.inspect import RunStatus

app = App()
runs = App(help="Run folders of many processes: remove what they need no more.", no_args_is_help=True)
app.add_typer(runs, name="runs")

ScaledRun = Annotated[
    str, typer.Argument(metavar="RUN", help="The folder or file after -o of a run of many processes.")
]
AnyRun = Annotated[str, typer.Argument(metavar="RUN", help="What stood after -o: a file, a folder or an address.")]


@app.command("status")
def show_status(
    run: AnyRun,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines of text.")] = False,
) -> None:
    """How far a run is, of one process or many, and how to go on; also while it runs elsewhere.

    Examples:
        md3 status run/
        md3 status run/ --json
    """
    found = _status_of(run)
    say(json.dumps(found.to_json()) if as_json else "\n".join(found.lines()))


def _status_of(run: str) -> RunStatus | Standing:
    """Return how a run stands; at the second look, where a start has put another one in its place meanwhile."""
    with contextlib.suppress(InputError, OutputError):
        return _status_at_once(run)
    return _status_at_once(run)


def _status_at_once(run: str) -> RunStatus | Standing:
    from md3cli.remote.address import is_address
    from md3cli.scale.folder import find_run_folder

    try:
        folder = find_run_folder(run)
    except InputError:
        if is_address(run):
            raise
        from md3cli.run.status import standing_of

        return standing_of(run)
    from md3cli.scale.inspect import status_of
    from md3cli.scale.plan import read_plan

    plan = read_plan(folder)
    if plan is None:
        raise InputError(f"the run at {printable(run)} was taken away meanwhile; ask again")
    return status_of(folder, plan, run)


@app.command("verify")
def verify(run: AnyRun) -> None:
    """Check that a run has each request exactly once, its lines whole and as it left them; status 1 where not.

    Examples:
        md3 verify run/
    """
    from md3cli.remote.address import is_address
    from md3cli.scale.folder import find_run_folder

    try:
        folder = find_run_folder(run)
    except InputError:
        if is_address(run):
            raise
        _verify_one(run)
    else:
        _verify_many(folder)


def _verify_one(run: str) -> None:
    """Verify the records of one process."""
    from md3cli.finished.run_json import find_records
    from md3cli.run.journal_scan import RecordsVerification

    verification = RecordsVerification(find_records(Path(run)))
    _tell(verification.findings())
    typer.echo(f"ok: {verification.num_records:,} records, each request exactly once")
    typer.echo(f"sha256 of the records: {verification.digest()}")


def _verify_many(folder: RunFolder) -> None:
    from md3cli.scale.inspect import FolderVerification

    verification = FolderVerification(folder)
    _tell(verification.findings())
    typer.echo(
        f"ok: {verification.num_records:,} records of {verification.num_rows:,} images in {verification.num_shards:,} "
        "shards, each request exactly once"
    )
    typer.echo(f"sha256 of the records: {verification.digest}")


def _tell(findings: Iterable[str]) -> None:
    """Print what is wrong; raises Exit where anything is."""
    num_findings = 0
    for finding in findings:
        num_findings += 1
        typer.echo(printable(finding))
    if num_findings:
        raise typer.Exit(1)


@runs.command("gc")
def collect_garbage(
    run: ScaledRun,
    older_than: Annotated[
        float, typer.Option("--older-than", metavar="SECONDS", min=0, help="Leave what was written in so many seconds.")
    ] = 3600.0,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Also have shards done again whose records are missing or damaged.")
    ] = False,
) -> None:
    """Remove parts that no marker names, and journals of finished shards.

    Examples:
        md3 runs gc run/
    """
    from md3cli.scale.folder import find_run_folder
    from md3cli.scale.inspect import collect

    collected = collect(find_run_folder(run), older_than_s=older_than, with_damaged=damaged)
    typer.echo(f"{len(collected.removed):,} files removed, {len(collected.reopened):,} shards to be done again")
