"""`md3 query`: ask questions of every image, or of the model alone."""

from __future__ import annotations

from typing import Annotated

import typer

from md3cli.commands.options import AnnotateOptions, SpatialRefs, expand_options
from md3cli.commands.parse import checked, parse_choices, parse_query
from md3cli.records import Task

app = typer.Typer(add_completion=False)


@app.command()
@expand_options
def query(
    positional: Annotated[
        list[str] | None, typer.Argument(metavar="INPUT QUESTION", help="INPUT, then questions; or -q alone.")
    ] = None,
    question: Annotated[list[str] | None, typer.Option("--question", "-q", help="A question; may be repeated.")] = None,
    reasoning: Annotated[bool, typer.Option("--reasoning/--no-reasoning", help="Think first, or be fast.")] = True,
    choices: Annotated[
        tuple[str, ...] | None,
        typer.Option(
            "--choices",
            metavar="A,B,…",
            parser=checked(parse_choices),
            help="The only answers allowed; each gets a score.",
        ),
    ] = None,
    spatial_ref: SpatialRefs = None,
    *,
    options: AnnotateOptions,
) -> None:
    """Ask questions of every image, or of the model alone.

    Examples:

        md3 query photo.jpg "How many people are there?"

        md3 query photos/ -q "Is it raining?" -q "Is it night?" --no-reasoning -o answers.csv

        md3 query photos/ -q "Is it raining?" --choices yes,no,unsure -o answers.csv

        md3 query -q "What is an encoder?"
    """
    asked = parse_query(positional or [], question or [])
    questions = asked.questions or (None,)  # the rows of a manifest bring their own
    settings = {"reasoning": reasoning, "spatial_refs": tuple(spatial_ref or ()), "choices": choices or ()}
    requests = [options.request(Task.QUERY, text, **settings) for text in questions]
    options.run("query", [] if asked.input is None else [asked.input], requests)
