"""`md3 detect`: find objects and draw boxes around them."""

from __future__ import annotations

import typer

from md3cli.commands.options import AnnotateOptions, MaxObjects, Objects, OneInput, expand_options
from md3cli.commands.parse import check_objects
from md3cli.records import Task

app = typer.Typer(add_completion=False)


@app.command()
@expand_options
def detect(
    input: OneInput,
    objects: Objects,
    max_objects: MaxObjects = 150,
    *,
    options: AnnotateOptions,
) -> None:
    """Find objects and draw boxes around them.

    Examples:

        md3 detect photos/ car person -o boxes.jsonl

        md3 detect 'photos/**/*.jpg' "red car" -o coco.json
    """
    check_objects(objects)
    requests = [options.request(Task.DETECT, name, max_objects=max_objects) for name in objects]
    options.run("detect", [input], requests)
