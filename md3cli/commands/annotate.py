"""The commands that ask something of every image, from `md3 caption` to `md3 run`, and `md3 estimate` of the same.

A command reads its own words and returns what the run is to do; `annotating` adds the shared options and runs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from md3cli.commands.help import App
from md3cli.commands.options import NOT_ESTIMATED, AnnotateOptions, annotating
from md3cli.commands.parse import (
    check_objects,
    checked,
    parse_choices,
    parse_overlap,
    parse_query,
    parse_spatial_ref,
    parse_tile,
    starting,
)
from md3cli.config import Everything, RunConfig
from md3cli.errors import UsageError
from md3cli.records import TILED_TASKS, Request, Task, Tiles, printable
from md3cli.refine.everything import MOST_NAMES, read_vocabulary
from md3cli.refine.labels import Label, Labels, labels_with, prompts_of
from md3cli.refine.refinement import FOUND_BY_TASK
from md3cli.source.requests import TOKENS_LIMIT
from md3cli.source.specs import TaskSpec, are_followed, parse_listing, parse_task, parse_then, template_of
from md3cli.source.walk import STDIN

app = App()
DEFAULT_LISTING = TaskSpec(Task.QUERY, "List the objects in the image, separated by commas.")
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
    settings = {"max_objects": max_objects, "tiles": _tiles(tile, overlap, options)}
    if everything:
        if missing_only or "gt" in options.typed:
            raise UsageError("--missing-only is about OBJECTs; leave it and --gt out, or --everything")
        return _run_of_everything(
            input, objects or (), listing or DEFAULT_LISTING, vocabulary, max_names or MOST_NAMES, options, **settings
        )
    for option, name in (("--list", "listing"), ("--vocabulary", "vocabulary"), ("--max-names", "max_names")):
        if name in options.typed:
            raise UsageError(f"{option} is about --everything; add that, or leave {option} out")
    config = _run_of_objects(Task.DETECT, input, objects, options, **settings)
    return _narrowed(config, gt, options, is_asked=missing_only)


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
    tiles = _tiles(tile, overlap, options)
    if tiles is not None and spatial_ref:
        if "tile" in options.typed:
            raise UsageError("--spatial-ref names a place in the whole picture, and no tile has it; leave --tile out")
        tiles = None
    settings = {"max_objects": max_objects, "spatial_refs": tuple(spatial_ref or ()), "tiles": tiles}
    config = _run_of_objects(Task.POINT, input, objects, options, **settings)
    return _narrowed(config, gt, options, is_asked=missing_only)


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
    config = _run_of_objects(Task.SEGMENT, input, objects, options, spatial_refs=tuple(spatial_ref or ()))
    return _narrowed(config, gt, options, is_asked=missing_only)


@app.command()
@annotating
def run(
    input: OneInput,
    task: TaskSpecs = None,
    then: ThenSpecs = None,
    reasoning: Reasoning = True,
    tile: Tile = None,
    overlap: Overlap = None,
    *,
    options: AnnotateOptions,
) -> RunConfig:
    """Several tasks in one pass, each image encoded once; or a manifest whose rows carry their own.

    Examples:
        md3 run photos/ --task caption:long --task detect:car,person --task "query:Is it raining?" -o out/
        md3 run photos/ --task detect:car --then "query:What colour is the {label}?" -o out/
        md3 run requests.csv -o answers.jsonl
    """
    tiles = _tiles(tile, overlap, options)
    requests, labels = _asked_of_run(input, task, options, reasoning, tiles)
    asked = _asked_then(input, then, requests, options, reasoning)
    return options.config("run", [input], requests, labels=labels, reasoning=reasoning, then=asked, tiles=tiles)


@app.command()
@partial(annotating, hidden=NOT_ESTIMATED)
def estimate(
    input: OneInput,
    task: TaskSpecs = None,
    then: ThenSpecs = None,
    reasoning: Reasoning = True,
    tile: Tile = None,
    overlap: Overlap = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, also on a terminal.")] = False,
    *,
    options: AnnotateOptions,
) -> RunConfig:
    """What `md3 run` with the same words would take: time, tokens, disk, money; from a sample.

    Nothing is written: options of the run that say where and how (such as -o) may stay in the line and change nothing.

    Examples:
        md3 estimate photos/ --task caption:long --price-per-gpu-hour 2.50
        md3 estimate photos/ --task detect:car --devices cuda:0,cuda:1
        md3 estimate requests.csv --price-per-1000 5 --json
    """
    estimate = options.estimate_options(is_json=as_json)
    tiles = _tiles(tile, overlap, options)
    requests, labels = _asked_of_run(input, task, options, reasoning, tiles)
    asked = _asked_then(input, then, requests, options, reasoning)
    return options.config("run", [input], requests, estimate, labels, reasoning, asked, tiles)


def _tiles(tile: int | str | None, overlap: float | None, options: AnnotateOptions) -> Tiles | None:
    """Return how pictures are looked at in tiles; None where they are not.

    Raises:
        UsageError: an overlap was typed, and there are no tiles; one of the settings waits for tiles.
    """
    if tile is not None:
        return Tiles(tile) if overlap is None else Tiles(tile, overlap)
    if "overlap" in options.typed:
        raise UsageError("--overlap is about tiles, and there are none; add --tile N or --tile auto, or leave it out")
    return None


def _run_of_objects(
    task: Task, input: str, objects: Sequence[str] | None, options: AnnotateOptions, **settings: Any
) -> RunConfig:
    """Return a run that looks for OBJECTs and those of `--prompts`, else for what `--labels` lists or rows bring.

    Raises:
        UsageError: none says anything, or an OBJECT is a file.
    """
    check_objects(objects or ())
    objects, listed = [*(objects or ()), *options.listed_prompts()], options.listed_labels()
    if not objects and not listed.labels:
        if input == STDIN or not options.may_rows_ask(input):
            raise UsageError(
                f"no OBJECT; say what to look for: md3 {task} {printable(input)} car, --prompts FILE or --labels FILE"
            )
        asked = [options.request(task, **settings)]
        return options.config(str(task), [input], asked, labels=listed, tiles=settings.get("tiles"))
    labels = labels_with(objects, listed)
    requests = options.look_for(task, prompts_of(objects, listed), labels, **settings)
    return options.config(str(task), [input], requests, labels=labels, tiles=settings.get("tiles"))


def _narrowed(config: RunConfig, gt: Path | None, options: AnnotateOptions, *, is_asked: bool) -> RunConfig:
    """Return the run narrowed to what `gt` has no labels for, where that is asked.

    Raises:
        UsageError: only one of the two options is there; a `gt` of the settings may be for md3 eval.
    """
    if is_asked and gt is None:
        raise UsageError("--missing-only needs the labels that are there; give --gt FILE: COCO, YOLO or labelme")
    if not is_asked and "gt" in options.typed:
        raise UsageError("--gt is for --missing-only here; md3 eval and md3 audit compare records with it")
    return replace(config, missing_only=gt if is_asked else None)


def _run_of_everything(
    input: str,
    objects: Sequence[str],
    listing: TaskSpec,
    vocabulary: Path | None,
    most_names: int,
    options: AnnotateOptions,
    **settings: Any,
) -> RunConfig:
    """Return a run that asks what is there, and then looks for what was named.

    Raises:
        UsageError: something says already what to look for, or the vocabulary cannot be read.
    """
    given = [("OBJECTs", objects), ("--labels", options.labels), ("--prompts", options.prompts)]
    if options.regions:
        raise UsageError("--everything looks at whole pictures; leave out --regions")
    if said := next((name for name, value in given if value), None):
        raise UsageError(
            f"--everything finds out what to look for; leave out {said}, or name what may be in --vocabulary"
        )
    names = None if vocabulary is None else read_vocabulary(vocabulary)
    is_caption = listing.task is Task.CAPTION
    how = {"length": listing.argument or "normal"} if is_caption else {"reasoning": False}
    request = options.request(listing.task, None if is_caption else listing.argument, **how)
    template = options.request(Task.DETECT, **settings)
    labels = Labels(tuple(Label(name=name, prompts=(name,)) for name in names or ()))
    everything = Everything(request, template, names, most_names, options.may_rows_ask(input))
    return options.config("detect", [input], [request], labels=labels, everything=everything)


def _asked_of_run(
    input: str, specs: TaskSpecs, options: AnnotateOptions, reasoning: bool, tiles: Tiles | None
) -> tuple[list[Request], Labels]:
    """Return what is asked of every image of `input`, in the order typed, and how what is found is called.

    Where rows may bring questions, all requests have `reasoning`, for a row takes its settings from the first.

    Raises:
        UsageError: nothing, and `input` cannot say it either.
    """
    flat = [spec for parts in (*(specs or ()), *_listed_specs(options)) for spec in parts]
    listed = options.listed_labels()
    labels = labels_with((spec.argument for spec in flat if spec.task in FOUND_BY_TASK and spec.argument), listed)
    requests = [request for spec in flat for request in _requests_of(spec, options, listed, labels)]
    has_rows = options.may_rows_ask(input)
    requests = [replace(r, reasoning=reasoning) if has_rows or r.task is Task.QUERY else r for r in requests]
    requests = [replace(r, tiles=tiles) if r.task in TILED_TASKS else r for r in requests]
    if "tile" in options.typed and not has_rows and all(r.tiles is None for r in requests):
        raise UsageError("--tile is about what detect and point find, and neither is asked for; leave it out")
    if not requests and not has_rows:
        raise UsageError(f"nothing to do for {printable(input)}; say what with --task, like --task caption:long")
    return requests, labels


def _asked_then(
    input: str, specs: ThenSpecs, requests: Sequence[Request], options: AnnotateOptions, reasoning: bool
) -> list[Request]:
    """Return what is asked about each object that is found, `{label}` in the prompts.

    Raises:
        UsageError: nothing finds objects with boxes, or the same is asked twice.
    """
    flat = [spec for parts in specs or () for spec in parts]
    if flat and not (are_followed(requests) or options.may_rows_ask(input)):
        if "then" not in options.typed:
            return []
        raise UsageError(
            "--then asks about each object that detect and segment find, and none of them is asked; "
            "add --task detect:OBJECT"
        )
    if len(set(flat)) < len(flat):
        raise UsageError("two --then ask the same; leave one out")
    base = options.request(Task.QUERY, reasoning=reasoning)
    return [template_of(spec, base) for spec in flat]


def _listed_specs(options: AnnotateOptions) -> Iterator[list[TaskSpec]]:
    """Read the lines of `--prompts`, each as a `--task` would be."""
    for line in options.listed_prompts():
        try:
            yield parse_task(line)
        except ValueError as error:
            raise UsageError(f"--prompts {printable(str(options.prompts))}: {error}") from error


def _requests_of(spec: TaskSpec, options: AnnotateOptions, listed: Labels, labels: Labels) -> list[Request]:
    if spec.task is Task.CAPTION:
        return [options.request(Task.CAPTION, length=spec.argument or "normal")]
    if spec.task is Task.QUERY:
        return [options.request(Task.QUERY, spec.argument)]
    objects = [] if spec.argument is None else [spec.argument]
    if not objects and not listed.labels:
        raise UsageError(f"an object is missing; write it like --task {spec.task}:car,person, or name --labels FILE")
    return options.look_for(spec.task, prompts_of(objects, listed), labels)
