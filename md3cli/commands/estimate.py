"""`md3 estimate`: what a run would take, from a sample of it."""

from __future__ import annotations

from typing import Annotated

import typer

from md3cli.commands.options import AnnotateOptions, OneInput, expand_options
from md3cli.commands.run import TaskSpecs, requests_to_run

app = typer.Typer(add_completion=False)


@app.command()
@expand_options
def estimate(
    input: OneInput,
    task: TaskSpecs = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, also on a terminal.")] = False,
    *,
    options: AnnotateOptions,
) -> None:
    """What `md3 run` with the same words would take: time, tokens, disk, money; from a sample, nothing is written.

    Examples:

        md3 estimate photos/ --task caption:long --price-per-gpu-hour 2.50

        md3 estimate requests.csv --price-per-1000 5 --json
    """
    requests = requests_to_run(input, task, options)
    options.run("run", [input], requests, estimate=options.estimate_options(is_json=as_json))
