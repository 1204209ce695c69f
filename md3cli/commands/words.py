"""The words of the commands that ask something of every image: each declared once, beside the parser of its value.

Apart from options.py, which has the options that all of them share.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from md3cli.commands.parse import checked, parse_overlap, parse_spatial_ref, parse_tile, starting
from md3cli.records import Task
from md3cli.source.requests import TOKENS_LIMIT
from md3cli.source.specs import TaskSpec, parse_task, parse_then

PROMPTED = (Task.QUERY, Task.DETECT, Task.POINT, Task.SEGMENT)

OneInput = Annotated[
    str, typer.Argument(metavar="INPUT", help="Image, folder, quoted glob, manifest, COCO file, tar, URL, or -.")
]
Objects = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="OBJECT", help="What to look for, or NAME=PROMPT; with --labels or --prompts none is needed."
    ),
]
MaxObjects = Annotated[
    int,
    typer.Option("--max-objects", metavar="N", min=1, max=TOKENS_LIMIT - 1, help="Stop after so many in one image."),
]
Reasoning = Annotated[bool, typer.Option("--reasoning/--no-reasoning", help="Think first, or be fast.")]
SpatialRefs = Annotated[
    list[tuple[float, ...]] | None,
    typer.Option(
        "--spatial-ref",
        metavar="X,Y|X0,Y0,X1,Y1",
        parser=checked(parse_spatial_ref),
        help="A place in the image the prompt is about, 0-1; may be repeated.",
    ),
]
MissingOnly = Annotated[
    bool,
    typer.Option(
        "--missing-only",
        rich_help_panel="Input",
        help="Ask only about pictures and classes that --gt has no labels of.",
    ),
]
GroundTruth = Annotated[
    Path | None,
    typer.Option(
        "--gt", rich_help_panel="Input", metavar="FILE", help="For --missing-only: COCO, YOLO, labelme, or a table."
    ),
]
Tile = Annotated[
    int | str | None,
    typer.Option(
        "--tile",
        metavar="N|auto",
        parser=checked(parse_tile),
        help="Look also at squares of N pixels at full resolution; auto: as large as the model sees unshrunk.",
    ),
]
Overlap = Annotated[
    float | None,
    typer.Option(
        "--overlap",
        metavar="X",
        parser=checked(parse_overlap),
        help="What neighbours share, of a tile's side; 0.2 where it is left out.",
    ),
]
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
ThenSpecs = Annotated[
    list[list[TaskSpec]] | None,
    typer.Option(
        "--then",
        metavar="SPEC",
        parser=checked(parse_then),
        help="Ask this about each object that detect and segment find, {label} in the prompt; may be repeated.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class RunWords:
    """What `md3 run` is asked, and `md3 estimate` of the same."""

    task: TaskSpecs = None
    then: ThenSpecs = None
    reasoning: Reasoning = True
    tile: Tile = None
    overlap: Overlap = None
    typed: frozenset[str] = frozenset()  # names of the fields that stood in the command line
