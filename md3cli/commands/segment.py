"""`md3 segment`: outline an object."""

from __future__ import annotations

import typer

from md3cli.commands.options import AnnotateOptions, Objects, OneInput, SpatialRefs, expand_options
from md3cli.commands.parse import check_objects
from md3cli.records import Task

app = typer.Typer(add_completion=False)


@app.command()
@expand_options
def segment(
    input: OneInput,
    objects: Objects,
    spatial_ref: SpatialRefs = None,
    *,
    options: AnnotateOptions,
) -> None:
    """Outline an object.

    Examples:

        md3 segment photo.jpg dog

        md3 segment photos/ dog -f coco -f overlay -o dogs/
    """
    check_objects(objects)
    requests = [options.request(Task.SEGMENT, name, spatial_refs=tuple(spatial_ref or ())) for name in objects]
    options.run("segment", [input], requests)
