"""`md3 status`: how far a run of many processes is, from its markers alone."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from md3cli.console import say

app = typer.Typer(add_completion=False)

Run = Annotated[str, typer.Argument(metavar="RUN", help="The folder or file after -o of a run of many processes.")]


@app.command(epilog="Example: md3 status run/")
def status(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines of text.")] = False,
) -> None:
    """How far a run of many processes is; also while it runs elsewhere."""
    from md3cli.scale.folder import find_run_folder
    from md3cli.scale.inspect import status_of
    from md3cli.scale.plan import read_plan

    folder = find_run_folder(run)
    plan = read_plan(folder)
    assert plan is not None  # that is how it was found
    found = status_of(folder, plan)
    say(json.dumps(found.to_json()) if as_json else "\n".join(found.lines()))
