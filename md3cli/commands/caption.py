"""`md3 caption`: describe every image."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from md3cli.commands.options import AnnotateOptions, expand_options
from md3cli.records import Task

app = typer.Typer(add_completion=False)


@app.command()
@expand_options
def caption(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="Images, folders, globs, manifests, tars, URLs, or -.")
    ],
    length: Annotated[Literal["short", "normal", "long"], typer.Option("--length", help="How much to say.")] = "normal",
    *,
    options: AnnotateOptions,
) -> None:
    """Describe every image.

    Examples:

        md3 caption photo.jpg

        md3 caption photos/ --length long -o captions.jsonl

        find . -name '*.png' | md3 caption - > captions.jsonl
    """
    options.run("caption", inputs, [options.request(Task.CAPTION, length=length)])
