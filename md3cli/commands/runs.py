"""`md3 runs`: housekeeping in run folders."""

from __future__ import annotations

from typing import Annotated

import typer

from md3cli.commands.status import Run

app = typer.Typer(help="Run folders of many processes: remove what they need no more.", no_args_is_help=True)


@app.callback()
def runs() -> None:
    """Run folders of many processes: remove what they need no more."""


@app.command("gc")
def collect_garbage(
    run: Run,
    older_than: Annotated[
        float, typer.Option("--older-than", metavar="S", min=0, help="Leave what was written in the last S seconds.")
    ] = 3600.0,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Also have shards done again whose records are missing or damaged.")
    ] = False,
) -> None:
    """Remove parts that no marker names, and journals of finished shards.

    Example: md3 runs gc run/
    """
    from md3cli.scale.folder import find_run_folder
    from md3cli.scale.inspect import collect

    collected = collect(find_run_folder(run), older_than_s=older_than, with_damaged=damaged)
    typer.echo(f"{len(collected.removed):,} files removed, {len(collected.reopened):,} shards to be done again")
