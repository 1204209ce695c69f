"""`md3 point`: point at objects."""

from __future__ import annotations

import typer

from md3cli.commands.options import AnnotateOptions, MaxObjects, Objects, OneInput, SpatialRefs, expand_options
from md3cli.commands.parse import check_objects
from md3cli.records import Task

app = typer.Typer(add_completion=False)


@app.command()
@expand_options
def point(
    input: OneInput,
    objects: Objects,
    max_objects: MaxObjects = 150,
    spatial_ref: SpatialRefs = None,
    *,
    options: AnnotateOptions,
) -> None:
    """Point at objects.

    Examples:

        md3 point photo.jpg nose

        md3 point photos/ person -o people.csv
    """
    check_objects(objects)
    requests = [
        options.request(Task.POINT, name, max_objects=max_objects, spatial_refs=tuple(spatial_ref or ()))
        for name in objects
    ]
    options.run("point", [input], requests)
