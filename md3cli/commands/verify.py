"""`md3 verify`: whether a run has each request exactly once, and nothing is damaged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from md3cli.errors import InputError
from md3cli.records import printable

if TYPE_CHECKING:
    from md3cli.scale.folder import RunFolder

app = typer.Typer(add_completion=False)

Run = Annotated[str, typer.Argument(metavar="RUN", help="What stood after -o: a file, a folder or an address.")]


@app.command(epilog="Example: md3 verify run/")
def verify(run: Run) -> None:
    """Check that a run has each request exactly once, its lines whole and as it left them; status 1 where not."""
    from md3cli.remote.address import is_address
    from md3cli.scale.folder import find_run_folder

    try:
        folder = find_run_folder(run)
    except InputError as error:
        if is_address(run):
            raise
        _verify_one(run, error)
    else:
        _verify_many(folder)


def _verify_one(run: str, missing: InputError) -> None:
    """Verify the records of one process; raises `missing` where there are none either."""
    from md3cli.finished.run_json import find_records
    from md3cli.run.journal_scan import RecordsVerification

    try:
        records = find_records(Path(run))
    except InputError:
        raise missing from None
    verification = RecordsVerification(records)
    _tell(verification.findings())
    typer.echo(f"ok: {verification.num_records:,} records, each request exactly once")


def _verify_many(folder: RunFolder) -> None:
    from md3cli.scale.inspect import Verification

    verification = Verification(folder)
    _tell(verification.findings())
    typer.echo(
        f"ok: {verification.num_records:,} records of {verification.num_rows:,} images in {verification.num_shards:,} "
        "shards, each request exactly once"
    )


def _tell(findings: Iterable[str]) -> None:
    """Print what is wrong; raises Exit where anything is."""
    num_findings = 0
    for finding in findings:
        num_findings += 1
        typer.echo(printable(finding))
    if num_findings:
        raise typer.Exit(1)
