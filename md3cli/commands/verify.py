"""`md3 verify`: whether a run of many processes has each request exactly once, and nothing is damaged."""

from __future__ import annotations

import typer

from md3cli.commands.status import Run
from md3cli.records import printable

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: md3 verify run/")
def verify(run: Run) -> None:
    """Check that a run has each request exactly once, and its files are whole; status 1 where not."""
    from md3cli.scale.layout import find_run_folder
    from md3cli.scale.verify import Verification

    verification = Verification(find_run_folder(run))
    num_findings = 0
    for finding in verification.findings():
        num_findings += 1
        typer.echo(printable(finding))
    if num_findings:
        raise typer.Exit(1)
    typer.echo(
        f"ok: {verification.num_records:,} records of {verification.num_rows:,} images in {verification.num_shards:,} "
        "shards, each request exactly once"
    )
