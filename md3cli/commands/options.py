"""The options that all annotating commands share, each declared once beside the parser of its value.

`AnnotateOptions` holds the typed values and makes a `RunConfig` of them. What a text may mean is parse.py's business.
Apart from words.py, where what is asked of an image stands, because sixty options would hide it.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from md3cli.commands.parse import (
    ANY_FAILURE,
    AUTO,
    CACHE_SIZE,
    FORMATS,
    MAX_FILE_SIZE,
    MAX_PIXELS,
    PAD,
    above_zero,
    checked,
    may_carry_rows,
    number_or_auto,
    parse_bytes,
    parse_count,
    parse_devices,
    parse_fail_on,
    parse_folder,
    parse_format,
    parse_pad,
    parse_pair,
    parse_shard,
    starting,
)
from md3cli.commands.shared import LabelsFile, MinScore, Nms, tell_notes
from md3cli.config import (
    DEFAULT_MODEL,
    ColumnOptions,
    DecodeOptions,
    EstimateOptions,
    Everything,
    FailOn,
    ModelOptions,
    OutputOptions,
    RunConfig,
    ScaleOptions,
    SourceSpec,
)
from md3cli.errors import UsageError
from md3cli.finished.guards import check_none_is_read
from md3cli.records import Request, Task, Tiles, printable
from md3cli.refine.labels import Labels, lines_of, read_labels, read_text
from md3cli.refine.refinement import FOUND_BY_TASK, Refinement
from md3cli.remote.address import checked_output_address, is_address, named_hosts, path_of, shown_argument
from md3cli.source.requests import SEED_LIMIT, TEMPERATURE_LIMIT, TOKENS_LIMIT

Part = TypeVar("Part", SourceSpec, ModelOptions, DecodeOptions, ScaleOptions)

_output = functools.partial(typer.Option, rich_help_panel="Output")
_input = functools.partial(typer.Option, rich_help_panel="Input")
_prompts = functools.partial(typer.Option, rich_help_panel="Prompts and columns")
_estimate = functools.partial(typer.Option, rich_help_panel="Estimate")
_model = functools.partial(typer.Option, rich_help_panel="Model")
_answers = functools.partial(typer.Option, rich_help_panel="Answers")
_limits = functools.partial(typer.Option, rich_help_panel="Limits")
_scale = functools.partial(typer.Option, rich_help_panel="Many processes")
_display = functools.partial(typer.Option, rich_help_panel="Display")

MODEL_NAMES = ("moondream3", "moondream3.1", "tiny")
# Fields that an estimate takes, since they may stand in the line of the run, and has no use for.
NOT_ESTIMATED = frozenset(
    {"output", "format", "resume", "retry_failed", "fail_on", "dry_run", "estimate", "cache_dir", "workers_per_device"}
    | {"worker_rank", "engine", "ray_address", "shard_size", "verbose", "no_progress", "no_color", "add"}
    | {"min_score", "nms"}
)


@dataclass(frozen=True, kw_only=True)
class AnnotateOptions:
    """The options of model, answers, OUTPUT, processes and display, and what narrows and guards INPUT.

    Where no name is given, an option has its field's: `fail_on` is `--fail-on`, `cache` is `--cache/--no-cache`.
    """

    output: Annotated[
        str | None,
        _output(
            "--output",
            "-o",
            metavar="OUTPUT",
            help="File, whose suffix says the format, or folder, or s3://, gs://; without it a table or JSON Lines.",
        ),
    ] = None
    format: Annotated[
        list[str] | None,
        _output(
            "--format",
            "-f",
            metavar="FORMAT",
            parser=checked(parse_format),
            autocompletion=starting(*FORMATS),
            help=f"{' '.join(FORMATS)}; several: a run folder.",
        ),
    ] = None
    resume: Annotated[
        bool, _output("--resume/--overwrite", help="Go on with what stands in OUTPUT, or start over.")
    ] = True
    retry_failed: Annotated[bool, _output("--retry-failed", help="Do the failed records of OUTPUT again.")] = False
    add: Annotated[bool, _output("--add", help="Ask what is new, and keep what OUTPUT has.")] = False
    fail_on: Annotated[
        FailOn,
        _output(
            metavar="none|any|N%", parser=checked(parse_fail_on), help="When failed records make the exit status 3."
        ),
    ] = ANY_FAILURE

    labels: LabelsFile = None
    min_score: MinScore = None
    nms: Nms = None
    pad: Annotated[
        float,
        _answers(
            "--pad",
            metavar="SHARE",
            parser=checked(parse_pad),
            help="Room around a region (--then, --regions), of its own width and height: 10% or 0.1.",
        ),
    ] = PAD

    prompts: Annotated[
        Path | None,
        _prompts("--prompts", metavar="FILE", help="Also ask what a file lists, one a line; for `md3 run` SPECs."),
    ] = None
    template: Annotated[
        bool, _prompts("--template", help="Fill {column}, {stem}, {name} and {folder} in prompts from the row.")
    ] = False
    map_columns: Annotated[
        list[tuple[str, str]] | None,
        _prompts(
            "--map",
            metavar="COLUMN=NAME",
            parser=checked(parse_pair),
            help="Take a manifest's column NAME for COLUMN: prompt=question.",
        ),
    ] = None
    const: Annotated[
        list[tuple[str, str]] | None,
        _prompts(
            "--const",
            metavar="COLUMN=VALUE",
            parser=checked(parse_pair),
            help="Set a column for rows that leave it empty.",
        ),
    ] = None

    recursive: Annotated[bool, _input(help="Look into sub-folders.")] = True
    include: Annotated[list[str] | None, _input(metavar="GLOB", help="Only images whose name matches.")] = None
    exclude: Annotated[list[str] | None, _input(metavar="GLOB", help="No images whose name matches.")] = None
    limit: Annotated[int | None, _input(metavar="N", min=0, help="Stop after N images.")] = None
    shard: Annotated[
        tuple[int, int] | None,
        _input(metavar="I/N", parser=checked(parse_shard), help="Only part I of N, by a hash of the image's name."),
    ] = None
    root: Annotated[
        str | None, _input(metavar="DIR|URL", help="Where a manifest's paths start, and what they may not leave.")
    ] = None
    remote: Annotated[bool, _input("--remote", help="Fetch the URLs inside a manifest.")] = False
    regions: Annotated[
        bool, _input("--regions", help="Ask about each box of a COCO file; {label} in a prompt is its category.")
    ] = False
    follow_links: Annotated[bool, _input("--follow-links", help="Look into linked folders.")] = False
    allow_empty: Annotated[bool, _input("--allow-empty", help="An INPUT without images is no error.")] = False
    dry_run: Annotated[
        bool, _input("--dry-run", "-n", help="Count images, requests, crops and bad files; no model.")
    ] = False

    estimate: Annotated[
        bool, _estimate("--estimate", help="With --dry-run: also run a sample, and tell time, tokens, disk and money.")
    ] = False
    estimate_sample: Annotated[int, _estimate(metavar="N", min=1, help="Images to run of each number of crops.")] = 16
    estimate_open: Annotated[
        int,
        _estimate(
            metavar="N",
            min=1,
            max=1_000_000,
            help="Images to open to learn their sizes, drawn evenly; the others are taken to be like them.",
        ),
    ] = 2000
    price_per_gpu_hour: Annotated[
        float | None, _estimate(metavar="X", min=0, help="What an hour of one device costs.")
    ] = None
    price_per_1000: Annotated[
        float | None, _estimate(metavar="X", min=0, help="What 1,000 images cost elsewhere, to compare with.")
    ] = None

    model: Annotated[
        str,
        _model(
            "--model",
            "-m",
            metavar="MODEL",
            autocompletion=starting(*MODEL_NAMES),
            help="moondream3, moondream3.1, tiny, a Hugging Face repo id, or a local folder or file.",
        ),
    ] = DEFAULT_MODEL
    revision: Annotated[str | None, _model(metavar="REV", help="Branch, tag or commit of a Hugging Face repo.")] = None
    tokenizer: Annotated[
        str | None, _model(metavar="FILE|DIR", help="Another tokenizer.json, or the folder or repo id it is in.")
    ] = None
    adapter: Annotated[str | None, _model(metavar="DIR", help="Folder of a LoRA adapter.")] = None
    device: Annotated[str, _model(metavar="DEVICE", help="auto, cpu, cuda, cuda:1 or mps.")] = "auto"
    dtype: Annotated[
        Literal["auto", "bf16", "fp32", "fp16"],
        _model(metavar="TYPE", help="bf16, fp32, fp16, or auto: bf16, or fp32 where the device is slow at bf16."),
    ] = "auto"
    quant: Annotated[
        Literal["stored", "none", "int8", "int4"],
        _model(metavar="BITS", help="Of the weights: none, int8, int4, or stored: as the checkpoint has them."),
    ] = "stored"
    quant_vision: Annotated[
        Literal["none", "int8", "fp8"],
        _model(
            metavar="BITS",
            help="Of the vision encoder: none, int8 on a CPU, fp8 on a GPU from H100, L40S, RTX 40 on.",
        ),
    ] = "none"
    batch_size: Annotated[
        int | None,
        _model(metavar="N|auto", parser=checked(number_or_auto), help="Sequences in flight; auto fits memory."),
    ] = AUTO
    compile: Annotated[bool | None, _model(help="Compile a CPU's steps, if that is faster.")] = None
    max_context: Annotated[
        int | None,
        _model(
            metavar="N", min=1, max=32768, help="Tokens a sequence may have, up to 32768; by default as the model says."
        ),
    ] = None
    cache: Annotated[bool, _model(help="Keep image encodings on disk.")] = True
    cache_dir: Annotated[
        Path | None,
        _model(metavar="DIR", parser=checked(parse_folder), help="Where; by default the user's cache folder."),
    ] = None
    cache_size: Annotated[int, _model(metavar="SIZE", parser=checked(parse_bytes), help="How much.")] = CACHE_SIZE
    offline: Annotated[bool, _model("--offline", help="No network at all.")] = False

    temperature: Annotated[
        float, _answers(metavar="T", min=0, max=TEMPERATURE_LIMIT, help="0 is greedy: a rerun gives the same.")
    ] = 0.0
    top_p: Annotated[
        float, _answers(metavar="P", max=1, callback=above_zero, help="Share of the probability to draw from.")
    ] = 0.9
    max_tokens: Annotated[int, _answers(metavar="N", min=1, max=TOKENS_LIMIT - 1, help="Longest answer.")] = 768
    seed: Annotated[int, _answers(metavar="N", min=0, max=SEED_LIMIT - 1, help="Of the draws.")] = 0

    max_pixels: Annotated[
        int,
        _limits(metavar="N", parser=checked(parse_count), help="Larger pictures are refused.", show_default="268M"),
    ] = MAX_PIXELS
    max_file_size: Annotated[
        int, _limits(metavar="SIZE", parser=checked(parse_bytes), help="Larger files are refused.")
    ] = MAX_FILE_SIZE
    fetch_timeout: Annotated[
        float, _limits(metavar="SECONDS", min=0.001, help="Longest time of one try to fetch a picture.")
    ] = 30.0
    decode_timeout: Annotated[
        float, _limits(metavar="SECONDS", min=0.001, help="Longest time to open one picture.")
    ] = 20.0
    workers: Annotated[
        int | None, _limits(metavar="N|auto", parser=checked(number_or_auto), help="Pictures opened at a time.")
    ] = AUTO
    background: Annotated[
        str,
        _limits(
            metavar="COLOUR", help="What transparent pictures are laid on; none drops alpha, as the original does."
        ),
    ] = "none"

    # Any of these makes a run folder in (or beside) OUTPUT.
    devices: Annotated[
        tuple[str, ...] | None,
        _scale(
            metavar="DEVICE,...",
            parser=checked(parse_devices),
            help="A model process on each of these devices: cuda:0,cuda:1.",
        ),
    ] = None
    workers_per_device: Annotated[
        int | None, _scale(metavar="N", min=1, help="So many model processes on each device.")
    ] = None
    worker_rank: Annotated[
        int, _scale(metavar="R", min=0, help="Which of the processes that share OUTPUT this is, from 0.")
    ] = 0
    world_size: Annotated[
        int, _scale(metavar="N", min=1, help="How many processes, on any machines, share OUTPUT.")
    ] = 1
    engine: Annotated[
        Literal["local", "ray"] | None,
        _scale(help="Who runs the shards: this machine, or a Ray cluster.", show_default=False),
    ] = None
    ray_address: Annotated[
        str | None, _scale(metavar="ADDRESS", help="The cluster: auto, or an address; else one is started here.")
    ] = None
    shard_size: Annotated[
        int | None, _scale(metavar="N", min=1, help="Images a shard; by default 64 to 1,024 by their number.")
    ] = None

    quiet: Annotated[bool, _display("--quiet", help="Errors only.")] = False
    verbose: Annotated[bool, _display("--verbose", "-v", help="More: every failed image, stage times.")] = False
    no_progress: Annotated[bool, _display("--no-progress", help="No progress bar.")] = False
    no_color: Annotated[bool, _display("--no-color", help="No colours; so does NO_COLOR=1.")] = False
    debug: Annotated[bool, _display("--debug", help="Show where an error comes from.")] = False

    typed: frozenset[str] = frozenset()  # names of the fields that stood in the command line

    def request(self, task: Task, prompt: str | None = None, **settings: Any) -> Request:
        """Return a request of this task with the settings that all tasks share."""
        shared = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
        return Request(task=task, prompt=prompt, **(shared | settings))

    def listed_labels(self) -> Labels:
        """Return the labels of `--labels`; none without it."""
        return Labels() if self.labels is None else read_labels(self.labels)

    def listed_prompts(self) -> list[str]:
        """Return the lines of `--prompts`; none without it.

        Raises:
            UsageError: it cannot be read in full, or lists nothing.
        """
        if self.prompts is None:
            return []
        if lines := lines_of(read_text(self.prompts, "--prompts")):
            return lines
        raise UsageError(f"--prompts {printable(str(self.prompts))} has no prompt; write one a line")

    def look_for(self, task: Task, prompts: Sequence[str], labels: Labels, **settings: Any) -> list[Request]:
        """Return a request for each prompt, with the most objects that its label allows."""
        most = {prompt: label.max_objects for prompt, label in labels.by_prompt.items() if label.max_objects}
        limits = [{"max_objects": most[p]} if p in most and task is not Task.SEGMENT else {} for p in prompts]
        return [self.request(task, p, **settings | limit) for p, limit in zip(prompts, limits, strict=True)]

    def estimate_options(self, *, is_json: bool = False) -> EstimateOptions:
        """Return how to estimate, whether or not `--estimate` asks for it."""
        return EstimateOptions(
            num_opened=self.estimate_open,
            sample_per_bucket=self.estimate_sample,
            price_per_gpu_hour=self.price_per_gpu_hour,
            price_per_1000=self.price_per_1000,
            is_json=is_json,
        )

    def config(
        self,
        command: str,
        inputs: Sequence[str],
        requests: Sequence[Request],
        estimate: EstimateOptions | None = None,
        labels: Labels | None = None,
        reasoning: bool = True,
        then: Sequence[Request] = (),
        tiles: Tiles | None = None,
        everything: Everything | None = None,
    ) -> RunConfig:
        """Return a run that asks `requests` of every image of `inputs`, or an estimate of that run.

        `labels` names what is asked and what the rows of a manifest ask; None: as `--labels` says. `reasoning` is for
        rows that bring their questions where there are no `requests`, `tiles` for rows that bring what to find. `then`
        is asked about each object; `everything` is what is done with lists.

        Raises:
            UsageError: OUTPUT is no name or address that could be written to.
        """
        if "pad" in self.typed and not (then or self.regions or any(map(self.may_rows_ask, inputs))):
            raise UsageError(
                "--pad is the room around a region, and nothing is asked about regions; --then and --regions do that"
            )
        return RunConfig(
            command=command,
            source=self._filled(
                SourceSpec,
                inputs=tuple(inputs),
                include=tuple(self.include or ()),
                exclude=tuple(self.exclude or ()),
                own_files=frozenset(),
                columns=ColumnOptions(
                    tuple(self.map_columns or ()),
                    tuple(self.const or ()),
                    self.template,
                    self.pad if self.regions else None,
                ),
            ),
            requests=tuple(requests),
            defaults=self.request(Task.QUERY, reasoning=reasoning, tiles=tiles),
            model=self._filled(ModelOptions),
            decode=self._filled(
                DecodeOptions,
                timeout_s=self.decode_timeout,
                fetch_timeout_s=self.fetch_timeout,
                named_hosts=named_hosts([*inputs, self.root or ""]),
                may_fetch_private=self.remote,
                root=self.root if self.root and is_address(self.root) else "",
            ),
            output=self._output_options(is_estimate=estimate is not None),
            fail_on=self.fail_on,
            scale=self._filled(ScaleOptions, devices=self.devices or (), rank=self.worker_rank),
            allow_empty=self.allow_empty,
            is_dry_run=self.dry_run,
            estimate=estimate or (self.estimate_options() if self.estimate else None),
            then=tuple(then),
            pad=self.pad,
            refinement=self._refinement(
                command, inputs, requests if everything is None else [everything.template], labels
            ),
            everything=everything,
            hides_unsure="min_score" in self.typed,
            argv=("md3", *map(shown_argument, sys.argv[1:])),
        )

    def may_rows_ask(self, input: str) -> bool:
        """Return whether rows of INPUT can say what to ask; --map makes what stands beside pictures in tars say it."""
        return may_carry_rows(input) or any(column in ("task", "prompt") for column, _ in self.map_columns or ())

    def _refinement(
        self, command: str, inputs: Sequence[str], requests: Sequence[Request], labels: Labels | None
    ) -> Refinement:
        """Return what was chosen to be shown of what is found; refuse a choice about nothing."""
        is_open = self.add or any(
            map(self.may_rows_ask, inputs)
        )  # what is there already, or rows bring their own tasks
        tasks = {request.task for request in requests}
        needed = {"labels": FOUND_BY_TASK.keys(), "min_score": FOUND_BY_TASK.keys(), "nms": {Task.DETECT}}
        typed = next((name for name, of in needed.items() if name in self.typed and tasks.isdisjoint(of)), None)
        if typed is not None and not is_open:
            may_find = not tasks.isdisjoint(FOUND_BY_TASK)
            what = "boxes of detect" if may_find else "what detect, point and segment find"
            raise UsageError(
                f"--{typed.replace('_', '-')} is about {what}, and md3 {command} asks for none; leave it out"
            )
        labels = self.listed_labels() if labels is None else labels
        labels = labels.as_templates() if self.template or self.regions else labels
        return Refinement(labels, self.min_score, self.nms, has_file=self.labels is not None)

    def _filled(self, kind: type[Part], **given: Any) -> Part:
        """Make a part of the run's config from what is given and, for its other fields, the options of their names."""
        names = {field.name for field in fields(kind)} - given.keys()
        return kind(**{name: getattr(self, name) for name in names}, **given)

    def _output_options(self, *, is_estimate: bool) -> OutputOptions:
        if self.output == "":  # such as -o "$OUT" without an OUT
            raise UsageError("OUTPUT is empty; name a file or folder after -o, or leave -o out")
        if self.output is not None:
            check_none_is_read([Path(self.output)], [path for path in (self.labels, self.prompts) if path is not None])
        elif not (is_estimate or self.quiet) and (about := self.typed & {"resume", "retry_failed"}):
            option = "--retry-failed" if "retry_failed" in about else "--resume" if self.resume else "--overwrite"
            tell_notes([f"{option} changes nothing: it is about what stands in OUTPUT, and no -o names one"])
        typed = self.output
        address = checked_output_address(typed) if typed is not None and is_address(typed) else None
        path = typed if address is None else address.rpartition("/")[2]
        is_bucket = address is not None and not path_of(address).strip("/")
        return OutputOptions(
            path=None if path is None else Path(path),
            address=address,
            is_folder=typed is not None and (is_bucket or typed.endswith(("/", os.sep))),
            formats=tuple(self.format or ()),
            overwrite=not self.resume,
            retry_failed=self.retry_failed,
            add=self.add,
        )
