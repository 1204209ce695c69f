"""`md3 doctor`: what works here, and what to do about the rest."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def doctor(
    ctx: typer.Context,
    device: Annotated[
        str, typer.Option("--device", help="The device to look at: auto, cpu, cuda, cuda:1, mps.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of text.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours; so does NO_COLOR=1.")] = False,
) -> None:
    """What works here, and what to do about the rest; status 1 where a run could not work.

    Examples:

        md3 doctor

        md3 doctor --device cuda --json
    """
    from md3cli.console import show_finding
    from md3cli.diagnosis import Health, diagnose

    is_well = True
    for finding in diagnose(device, settings_error=ctx.obj):
        is_well &= finding.health is not Health.BAD
        if as_json:
            sys.stdout.write(json.dumps(finding.as_json(), ensure_ascii=False) + "\n")
        else:
            show_finding(finding.name, finding.health, finding.text, finding.advice, has_color=not no_color)
    if not is_well:
        raise typer.Exit(1)
