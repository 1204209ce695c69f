"""What the words of a command ask: requests, how what they find is called, what is asked next; together a run.

The words themselves are in words.py, the options that all commands share in options.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from md3cli.commands.options import AnnotateOptions
from md3cli.commands.parse import check_objects
from md3cli.commands.words import RunWords, ThenSpecs
from md3cli.config import EstimateOptions, Everything, RunConfig
from md3cli.errors import UsageError
from md3cli.records import TILED_TASKS, Request, Task, Tiles, printable
from md3cli.refine.everything import read_vocabulary
from md3cli.refine.labels import Label, Labels, labels_with, prompts_of
from md3cli.refine.refinement import FOUND_BY_TASK
from md3cli.remote.address import is_address
from md3cli.source.specs import TaskSpec, are_followed, label_template, parse_task, template_of
from md3cli.source.walk import STDIN


def tiles_of(tile: int | str | None, overlap: float | None, options: AnnotateOptions) -> Tiles | None:
    """Return how pictures are looked at in tiles; None where they are not.

    Raises:
        UsageError: an overlap was typed, and there are no tiles; one of the settings waits for tiles.
    """
    if tile is not None:
        return Tiles(tile) if overlap is None else Tiles(tile, overlap)
    if "overlap" in options.typed:
        raise UsageError("--overlap is about tiles, and there are none; add --tile N or --tile auto, or leave it out")
    return None


def run_of_objects(
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


def narrowed(config: RunConfig, gt: Path | None, options: AnnotateOptions, *, is_asked: bool) -> RunConfig:
    """Return the run narrowed to what `gt` has no labels for, where that is asked.

    Raises:
        UsageError: only one of the two options is there; a `gt` of the settings may be for md3 eval.
    """
    if is_asked and gt is None:
        raise UsageError("--missing-only needs the labels that are there; give --gt FILE: COCO, YOLO or labelme")
    if not is_asked and "gt" in options.typed:
        raise UsageError("--gt is for --missing-only here; md3 eval and md3 audit compare records with it")
    return replace(config, missing_only=gt if is_asked else None)


def run_of_everything(
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
    if options.regions:
        raise UsageError("--everything looks at whole pictures; leave out --regions")
    if said := what_says_objects(objects, options):
        raise UsageError(
            f"--everything finds out what to look for; leave out {said}, or name what may be in --vocabulary"
        )
    options = replace(options, labels=None, prompts=None)  # the settings' own say nothing of what pictures tell
    names = None if vocabulary is None else read_vocabulary(vocabulary)
    is_caption = listing.task is Task.CAPTION
    how = {"length": listing.argument or "normal"} if is_caption else {"reasoning": False}
    request = options.request(listing.task, None if is_caption else listing.argument, **how)
    template = options.request(Task.DETECT, **settings)
    labels = Labels(tuple(Label(name=name, prompts=(name,)) for name in names or ()))
    everything = Everything(request, template, names, most_names, options.may_rows_ask(input))
    return options.config("detect", [input], [request], labels=labels, everything=everything)


def what_says_objects(objects: Sequence[str], options: AnnotateOptions) -> str:
    """Return which of the typed words says what to look for; empty where none does."""
    return "OBJECTs" if objects else next((f"--{name}" for name in ("labels", "prompts") if name in options.typed), "")


def run_of_tasks(
    input: str, words: RunWords, options: AnnotateOptions, estimate: EstimateOptions | None = None
) -> RunConfig:
    """Return a run that asks several tasks of every image of `input`, and `then` of each object; or an estimate of it.

    Where rows may bring questions, all requests have the command's `reasoning`: a row takes settings from the first.

    Raises:
        UsageError: nothing is asked, and `input` cannot say it either; or a word is about what is not asked.
    """
    tiles = tiles_of(words.tile, words.overlap, options)
    flat = [spec for parts in (*(words.task or ()), *_listed_specs(options)) for spec in parts]
    listed = options.listed_labels()
    labels = labels_with((spec.argument for spec in flat if spec.task in FOUND_BY_TASK and spec.argument), listed)
    requests = [request for spec in flat for request in _requests_of(spec, options, listed, labels)]
    has_rows = options.may_rows_ask(input)
    requests = [replace(r, reasoning=words.reasoning) if has_rows or r.task is Task.QUERY else r for r in requests]
    requests = [replace(r, tiles=tiles) if r.task in TILED_TASKS else r for r in requests]
    if "tile" in options.typed and not has_rows and all(r.tiles is None for r in requests):
        raise UsageError("--tile is about what detect and point find, and neither is asked for; leave it out")
    # With --add OUTPUT may have what finds the objects; a `then` of the settings waits for a command that finds some.
    may_add = _may_add(options) and "then" in options.typed and not (options.dry_run or estimate)
    if not (requests or has_rows or may_add):
        raise UsageError(f"nothing to do for {printable(input)}; say what with --task, like --task caption:long")
    may_be_followed = are_followed(requests) or has_rows or may_add
    then = _asked_then(words.then, options, reasoning=words.reasoning) if may_be_followed else []
    if not then and "then" in options.typed:
        raise UsageError(
            "--then asks about each object that detect and segment find, and none of them is asked; "
            "add --task detect:OBJECT"
        )
    if then:
        labels = _with_names_then(labels, words.then, are_templates=options.template)
    return options.config("run", [input], requests, estimate, labels, words.reasoning, then, tiles)


def _may_add(options: AnnotateOptions) -> bool:
    """Return whether `--add` is given, and OUTPUT may be there."""
    output = options.output
    return options.add and output is not None and (is_address(output) or os.path.lexists(output))


def _asked_then(specs: ThenSpecs, options: AnnotateOptions, *, reasoning: bool) -> list[Request]:
    """Return what is asked about each object that is found, `{label}` in the prompts.

    Raises:
        UsageError: the same is asked twice, or a listed prompt has another placeholder.
    """
    flat = [spec for parts in specs or () for spec in parts]
    listed = options.listed_labels()
    asked = [TaskSpec(spec.task, prompt) for spec in flat for prompt in _prompts_then(spec, listed)]
    if len(set(asked)) < len(asked):
        raise UsageError("two --then ask the same; leave one out")
    base = options.request(Task.QUERY, reasoning=reasoning)
    return [template_of(spec, base) for spec in asked]


def _prompts_then(spec: TaskSpec, listed: Labels) -> Sequence[str | None]:
    """Return the prompts of a SPEC about objects: those of an OBJECT without its name, or of a listed name."""
    if spec.argument is None or spec.task not in FOUND_BY_TASK:
        return (spec.argument,)
    prompts = prompts_of([spec.argument], listed)
    for prompt in prompts:
        try:
            label_template(prompt)
        except ValueError as error:
            raise UsageError(f"--then {spec.task}: {error}") from error
    return prompts


def _with_names_then(labels: Labels, specs: ThenSpecs, *, are_templates: bool) -> Labels:
    """Return `labels`, and behind them the names that `--then` gives.

    `are_templates`: all prompts become templates later; else those do that stand in `--then`.

    Raises:
        UsageError: a prompt has two names.
    """
    flat = [spec for parts in specs or () for spec in parts if spec.task in FOUND_BY_TASK]
    objects = [spec.argument for spec in flat if spec.argument is not None]
    labels_with(objects, labels, "--task or --labels")
    named = labels_with([text for text in objects if "=" in text], Labels())
    return labels.followed_by(named if are_templates else named.as_templates())


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
