"""`md3 run`: several tasks in one pass, or a manifest of mixed requests."""

from __future__ import annotations

from typing import Annotated

import typer

from md3cli.commands.options import AnnotateOptions, OneInput, expand_options
from md3cli.commands.parse import TaskSpec, checked, may_carry_rows, parse_task, starting
from md3cli.errors import UsageError
from md3cli.records import Request, Task, printable

app = typer.Typer(add_completion=False)
PROMPTED = (Task.QUERY, Task.DETECT, Task.POINT, Task.SEGMENT)

TaskSpecs = Annotated[
    list[list[TaskSpec]] | None,
    typer.Option(
        "--task",
        metavar="SPEC",
        parser=checked(parse_task),
        autocompletion=starting("caption:short", "caption:normal", "caption:long", *(f"{t}:" for t in PROMPTED)),
        help="caption:long, detect:car,person, point:nose, query:Is it raining?, segment:dog; may be repeated.",
    ),
]


@app.command()
@expand_options
def run(
    input: OneInput,
    task: TaskSpecs = None,
    *,
    options: AnnotateOptions,
) -> None:
    """Several tasks in one pass, each image encoded once; or a manifest whose rows carry their own.

    Examples:

        md3 run photos/ --task caption:long --task detect:car,person -o out/

        md3 run requests.csv -o answers.jsonl
    """
    options.run("run", [input], requests_to_run(input, task, options))


def requests_to_run(input: str, specs: TaskSpecs, options: AnnotateOptions) -> list[Request]:
    """Return what is asked of every image of `input`, in the order typed.

    Raises:
        UsageError: nothing, and `input` cannot say it either.
    """
    requests = [_request(spec, options) for parts in specs or () for spec in parts]
    if not requests and not may_carry_rows(input):
        raise UsageError(f"nothing to do for {printable(input)}; say what with --task, like --task caption:long")
    return requests


def _request(spec: TaskSpec, options: AnnotateOptions) -> Request:
    if spec.task is Task.CAPTION:
        return options.request(Task.CAPTION, length=spec.argument or "normal")
    return options.request(spec.task, spec.argument)
