"""The commands that ask something of every image, from `md3 caption` to `md3 run`, and `md3 estimate` of the same.

A command reads its own words and returns what the run is to do; `annotating` adds the shared options and runs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from md3cli.commands.asking import (
    narrowed,
    run_of_everything,
    run_of_objects,
    run_of_tasks,
    tiles_of,
    what_says_objects,
)
from md3cli.commands.help import App
from md3cli.commands.options import NOT_ESTIMATED, AnnotateOptions
from md3cli.commands.parse import checked, parse_choices, parse_query, starting
from md3cli.commands.shared import spread
from md3cli.commands.words import (
    GroundTruth,
    MaxObjects,
    MissingOnly,
    Objects,
    OneInput,
    Overlap,
    Reasoning,
    RunWords,
    SpatialRefs,
    Tile,
)
from md3cli.config import RunConfig
from md3cli.errors import UsageError
from md3cli.records import Task
from md3cli.refine.everything import MOST_NAMES
from md3cli.source.specs import TaskSpec, parse_listing

app = App()
DEFAULT_LISTING = TaskSpec(Task.QUERY, "List the objects in the image, separated by commas.")


def annotating(command: Callable[..., RunConfig], *, hidden: frozenset[str] = frozenset()) -> Callable[..., None]:
    """Make a command of a function from words, RunWords and AnnotateOptions to a run, which the command then does.

    Options that are `hidden` can be typed, change nothing and are not in the command's help.
    """

    @functools.wraps(command)
    def wrapper(*, options: AnnotateOptions, **values: Any) -> None:
        """Run what the command returns for its options; end the program where the status is not 0."""
        from md3cli.console import RunConsole
        from md3cli.pipeline import run

        config = command(options=options, **values)
        console = RunConsole(
            is_quiet=options.quiet,
            is_verbose=options.verbose,
            has_progress=not options.no_progress,
            has_color=not options.no_color,
        )
        if status := run(config, console):
            raise typer.Exit(status)  # 3: too many records failed

    return spread(AnnotateOptions, RunWords, hidden=hidden)(wrapper)


@app.command()
@annotating
def caption(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="Images, folders, globs, manifests, COCO files, tars, URLs, or -."),
    ],
    length: Annotated[Literal["short", "normal", "long"], typer.Option("--length", help="How much to say.")] = "normal",
    *,
    options: AnnotateOptions,
) -> RunConfig:
    """Describe every image.

    Examples:
        md3 caption photo.jpg
        md3 caption photos/ --length long -o captions.jsonl
        find . -name '*.png' | md3 caption - > captions.jsonl
    """
    if options.prompts is not None:
        raise UsageError("captions take no prompts, so --prompts is of no use here; md3 query asks questions")
    return options.config("caption", inputs, [options.request(Task.CAPTION, length=length)])


@app.command()
@annotating
def query(
    positional: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT] [QUESTION...]", help="What to look at, and what to ask; -q alone asks without a picture."
        ),
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option("--question", "-q", metavar="QUESTION", help="A question; may be repeated.")
    ] = None,
    reasoning: Reasoning = True,
    choices: Annotated[
        tuple[str, ...] | None,
        typer.Option(
            "--choices",
            metavar="A,B,...",
            parser=checked(parse_choices),
            help="The only answers allowed; each gets a score.",
        ),
    ] = None,
    spatial_ref: SpatialRefs = None,
    *,
    options: AnnotateOptions,
) -> RunConfig:
    """Ask questions of every image, or of the model alone.

    Examples:
        md3 query photo.jpg "How many people are there?"
        md3 query photos/ -q "Is it raining?" -q "Is it night?" --no-reasoning -o answers.csv
        md3 query photos/ -q "Is it raining?" --choices yes,no,unsure -o answers.csv
    """
    asked = parse_query(positional or [], question or [], options.listed_prompts(), options.may_rows_ask)
    questions = asked.questions or (None,)  # the rows of a manifest bring their own
    settings = {"reasoning": reasoning, "spatial_refs": tuple(spatial_ref or ()), "choices": choices or ()}
    requests = [options.request(Task.QUERY, text, **settings) for text in questions]
    return options.config("query", [] if asked.input is None else [asked.input], requests)


@app.command(shows=["--labels", "--min-score"])
@annotating
def detect(
    input: OneInput,
    objects: Objects = None,
    max_objects: MaxObjects = 150,
    tile: Tile = None,
    overlap: Overlap = None,
    missing_only: MissingOnly = False,
    gt: GroundTruth = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="First list what is there, then find each name of the list.")
    ] = False,
    listing: Annotated[
        TaskSpec | None,
        typer.Option(
            "--list",
            metavar="SPEC",
            parser=checked(parse_listing),
            autocompletion=starting("caption:short", "caption:normal", "caption:long", "query:"),
            help="What lists it: query:PROMPT (by default), or caption:LENGTH.",
        ),
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option("--vocabulary", metavar="FILE", help="Find only names that stand in a file, one a line."),
    ] = None,
    max_names: Annotated[
        int | None,
        typer.Option(
            "--max-names", metavar="N", min=1, max=1000, help=f"Find so many names of a list. [default: {MOST_NAMES}]"
        ),
    ] = None,
    *,
    options: AnnotateOptions,
) -> RunConfig:
    """Find objects and draw boxes around them.

    Examples:
        md3 detect photos/ car person -o boxes.jsonl
        md3 detect 'photos/**/*.jpg' "red car" -o coco.json
        md3 detect examples/scenes "red circle" star --model tiny
    """
    settings = {"max_objects": max_objects, "tiles": tiles_of(tile, overlap, options)}
    if everything and ("everything" in options.typed or not what_says_objects(objects or (), options)):
        if missing_only or "gt" in options.typed:
            raise UsageError("--missing-only is about OBJECTs; leave it and --gt out, or --everything")
        return run_of_everything(
            input, objects or (), listing or DEFAULT_LISTING, vocabulary, max_names or MOST_NAMES, options, **settings
        )
    for option, name in (("--list", "listing"), ("--vocabulary", "vocabulary"), ("--max-names", "max_names")):
        if name in options.typed:
            raise UsageError(f"{option} is about --everything; add that, or leave {option} out")
    config = run_of_objects(Task.DETECT, input, objects, options, **settings)
    return narrowed(config, gt, options, is_asked=missing_only)


@app.command(shows=["--labels", "--min-score"])
@annotating
def point(
    input: OneInput,
    objects: Objects = None,
    max_objects: MaxObjects = 150,
    spatial_ref: SpatialRefs = None,
    tile: Tile = None,
    overlap: Overlap = None,
    missing_only: MissingOnly = False,
    gt: GroundTruth = None,
    *,
    options: AnnotateOptions,
) -> RunConfig:
    """Point at objects.

    Examples:
        md3 point photo.jpg nose
        md3 point photos/ person -o people.csv
        md3 point photo.jpg "coat button" --spatial-ref 0.1,0.2,0.5,0.9
    """
    tiles = tiles_of(tile, overlap, options)
    if tiles is not None and spatial_ref:
        if "tile" in options.typed:
            raise UsageError("--spatial-ref names a place in the whole picture, and no tile has it; leave --tile out")
        tiles = None
    settings = {"max_objects": max_objects, "spatial_refs": tuple(spatial_ref or ()), "tiles": tiles}
    config = run_of_objects(Task.POINT, input, objects, options, **settings)
    return narrowed(config, gt, options, is_asked=missing_only)


@app.command(shows=["--labels", "--min-score"])
@annotating
def segment(
    input: OneInput,
    objects: Objects = None,
    spatial_ref: SpatialRefs = None,
    missing_only: MissingOnly = False,
    gt: GroundTruth = None,
    *,
    options: AnnotateOptions,
) -> RunConfig:
    """Outline an object.

    Examples:
        md3 segment photo.jpg dog
        md3 segment photos/ dog -o dogs.json
        md3 segment photos/ dog -f coco -f overlay -o dogs/
    """
    config = run_of_objects(Task.SEGMENT, input, objects, options, spatial_refs=tuple(spatial_ref or ()))
    return narrowed(config, gt, options, is_asked=missing_only)


@app.command()
@annotating
def run(
    input: OneInput,
    *,
    words: RunWords,
    options: AnnotateOptions,
) -> RunConfig:
    """Several tasks in one pass, each image encoded once; or a manifest whose rows carry their own.

    Examples:
        md3 run photos/ --task caption:long --task detect:car,person --task "query:Is it raining?" -o out/
        md3 run photos/ --task detect:car --then "query:What colour is the {label}?" -o out/
        md3 run requests.csv -o answers.jsonl
    """
    return run_of_tasks(input, words, options)


@app.command()
@functools.partial(annotating, hidden=NOT_ESTIMATED)
def estimate(
    input: OneInput,
    *,
    words: RunWords,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, also on a terminal.")] = False,
    options: AnnotateOptions,
) -> RunConfig:
    """What `md3 run` with the same words would take: time, tokens, disk, money; from a sample.

    Nothing is written: options of the run that say where and how (such as -o) may stay in the line and change nothing.

    Examples:
        md3 estimate photos/ --task caption:long --price-per-gpu-hour 2.50
        md3 estimate photos/ --task detect:car --devices cuda:0,cuda:1
        md3 estimate requests.csv --price-per-1000 5 --json
    """
    return run_of_tasks(input, words, options, options.estimate_options(is_json=as_json))
