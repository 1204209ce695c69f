"""The options that all annotating commands share, declared once.

`AnnotateOptions` is a dataclass whose fields carry their command line declaration (annotating.py
makes the parser see them) and which turns the typed values into a `RunConfig`.

The options that spread a run over processes, devices and machines; a group of `AnnotateOptions`.

The options of an estimate: of `md3 estimate`, and of `--estimate` on the annotating commands.

How an annotating command gets its shared options, and how it runs.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from md3cli import config
from md3cli.commands.parse import (
    above_zero,
    checked,
    number_or_auto,
    one_of,
    parse_bytes,
    parse_count,
    parse_fail_on,
    parse_folder,
    parse_shard,
    parse_spatial_ref,
    starting,
)
from md3cli.config import EstimateOptions, RunConfig, ScaleOptions
from md3cli.errors import UsageError
from md3cli.records import Request, Task
from md3cli.remote.address import checked_output_address, is_address, named_hosts, path_of, shown_argument
from md3cli.source.requests import SEED_LIMIT, TEMPERATURE_LIMIT, TOKENS_LIMIT
from md3cli.source.source import SourceSpec

_scale = functools.partial(typer.Option, rich_help_panel="Many processes")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def parse_devices(text: str) -> tuple[str, ...]:
    """`cuda:0,cuda:1` as two devices.

    Raises:
        ValueError: one is no device, or stands there twice.
    """
    devices = tuple(part.strip() for part in text.split(","))
    for device in devices:
        if not _DEVICE.fullmatch(device):
            raise ValueError(
                f"{device!r} is no device; name some of cuda:0, cuda:1, ..., cpu, mps, with commas between"
            )
    if len(set(devices)) < len(devices):
        raise ValueError("a device stands there twice; --workers-per-device says how many processes each gets")
    return devices


@dataclass(frozen=True, kw_only=True)
class ScaleFlags:
    """Where and by how many processes a run is done. Any of them makes a run folder in (or beside) OUTPUT."""

    devices: Annotated[
        str | None,
        _scale(
            "--devices",
            metavar="DEVICE,...",
            callback=checked(parse_devices),
            help="A model process on each of these devices: cuda:0,cuda:1.",
        ),
    ] = None
    workers_per_device: Annotated[
        int | None, _scale("--workers-per-device", metavar="N", min=1, help="So many model processes on each device.")
    ] = None
    worker_rank: Annotated[
        int,
        _scale("--worker-rank", metavar="R", min=0, help="Which of the processes that share OUTPUT this is, from 0."),
    ] = 0
    world_size: Annotated[
        int, _scale("--world-size", metavar="N", min=1, help="How many processes, on any machines, share OUTPUT.")
    ] = 1
    engine: Annotated[
        Literal["local", "ray"] | None,
        _scale("--engine", help="Who runs the shards: this machine, or a Ray cluster.", show_default=False),
    ] = None
    ray_address: Annotated[
        str | None,
        _scale("--ray-address", metavar="ADDRESS", help="The cluster: auto, or an address; else one is started here."),
    ] = None
    shard_size: Annotated[
        int | None,
        _scale("--shard-size", metavar="N", min=1, help="Images a shard; by default 64 to 1,024 by their number."),
    ] = None

    def scale_options(self) -> ScaleOptions:
        """What the options say as one value."""
        return ScaleOptions(
            devices=() if self.devices is None else parse_devices(self.devices),
            workers_per_device=self.workers_per_device,
            rank=self.worker_rank,
            world_size=self.world_size,
            engine=self.engine,
            shard_size=self.shard_size,
            ray_address=self.ray_address,
        )


ONE_PROCESS = ScaleFlags()


_estimate = functools.partial(typer.Option, rich_help_panel="Estimate")


@dataclass(frozen=True, kw_only=True)
class EstimateChoices:
    """Whether to estimate, from how much, at which prices."""

    estimate: Annotated[
        bool,
        _estimate("--estimate", help="With --dry-run: also run a sample, and tell time, tokens, disk and money."),
    ] = False
    estimate_sample: Annotated[
        int, _estimate("--estimate-sample", metavar="N", min=1, help="Images to run of each number of crops.")
    ] = 16
    estimate_open: Annotated[
        int,
        _estimate(
            "--estimate-open",
            metavar="N",
            min=1,
            max=1_000_000,
            help="Images to open to learn their sizes, drawn evenly; the others are taken to be like them.",
        ),
    ] = 2000
    price_per_gpu_hour: Annotated[
        float | None, _estimate("--price-per-gpu-hour", metavar="X", min=0, help="What an hour of one device costs.")
    ] = None
    price_per_1000: Annotated[
        float | None,
        _estimate("--price-per-1000", metavar="X", min=0, help="What 1,000 images cost elsewhere, to compare with."),
    ] = None

    def chosen(self, *, is_json: bool = False) -> EstimateOptions | None:
        """As a value; None where no estimate is asked for."""
        if not self.estimate:
            return None
        return EstimateOptions(
            num_opened=self.estimate_open,
            sample_per_bucket=self.estimate_sample,
            price_per_gpu_hour=self.price_per_gpu_hour,
            price_per_1000=self.price_per_1000,
            is_json=is_json,
        )


NO_ESTIMATE = EstimateChoices()


_output = functools.partial(typer.Option, rich_help_panel="Output")
_input = functools.partial(typer.Option, rich_help_panel="Input")
_model = functools.partial(typer.Option, rich_help_panel="Model")
_answers = functools.partial(typer.Option, rich_help_panel="Answers")
_limits = functools.partial(typer.Option, rich_help_panel="Limits")
_display = functools.partial(typer.Option, rich_help_panel="Display")

FORMATS = ("jsonl", "coco", "parquet", "csv", "yolo", "voc", "labelstudio", "hf", "overlay", "txt", "html")
MODEL_NAMES = ("moondream3", "moondream3.1", "tiny")

OneInput = Annotated[
    str, typer.Argument(metavar="INPUT", help="Image, folder, quoted glob, manifest, tar, URL, or - for stdin.")
]
Objects = Annotated[list[str], typer.Argument(metavar="OBJECT", help="What to look for.")]
MaxObjects = Annotated[
    int, typer.Option("--max-objects", min=1, max=TOKENS_LIMIT - 1, help="Stop after so many in one image.")
]


SpatialRefs = Annotated[
    list[str] | None,
    typer.Option(
        "--spatial-ref",
        metavar="X,Y|X0,Y0,X1,Y1",
        callback=checked(parse_spatial_ref),
        help="A place in the image the prompt is about, 0-1; may be repeated.",
    ),
]


def spatial_refs(texts: Sequence[str] | None) -> tuple[tuple[float, ...], ...]:
    """The values of `--spatial-ref`."""
    return tuple(parse_spatial_ref(text) for text in texts or ())


@dataclass(frozen=True, kw_only=True)
class AnnotateOptions:
    """The options of model, answers, OUTPUT and display, and what narrows and guards INPUT."""

    output: Annotated[
        str | None,
        _output(
            "--output", "-o", help="File or folder to write, also s3:// or gs://; without it a table or JSON Lines."
        ),
    ] = None
    format: Annotated[
        list[str] | None,
        _output(
            "--format",
            "-f",
            callback=checked(one_of(*FORMATS)),
            autocompletion=starting(*FORMATS),
            help="Format of OUTPUT where its suffix does not say; several make a run folder.",
        ),
    ] = None
    resume: Annotated[
        bool, _output("--resume/--overwrite", help="Go on with what stands in OUTPUT, or start over.")
    ] = True
    retry_failed: Annotated[bool, _output("--retry-failed", help="Do the failed records of OUTPUT again.")] = False
    fail_on: Annotated[
        str,
        _output(
            "--fail-on",
            metavar="none|any|N%",
            callback=checked(parse_fail_on),
            help="When failed records make the exit status 3.",
        ),
    ] = "any"

    recursive: Annotated[bool, _input("--recursive/--no-recursive", help="Look into sub-folders.")] = True
    include: Annotated[
        list[str] | None, _input("--include", metavar="GLOB", help="Only images whose name matches.")
    ] = None
    exclude: Annotated[list[str] | None, _input("--exclude", metavar="GLOB", help="No images whose name matches.")] = (
        None
    )
    limit: Annotated[int | None, _input("--limit", metavar="N", min=0, help="Stop after N images.")] = None
    shard: Annotated[
        str | None,
        _input(
            "--shard",
            metavar="I/N",
            callback=checked(parse_shard),
            help="Only part I of N, by a hash of the image's name.",
        ),
    ] = None
    root: Annotated[
        str | None,
        _input("--root", metavar="DIR|URL", help="Where a manifest's paths start, and what they may not leave."),
    ] = None
    remote: Annotated[bool, _input("--remote", help="Fetch the URLs inside a manifest.")] = False
    follow_links: Annotated[bool, _input("--follow-links", help="Look into linked folders.")] = False
    allow_empty: Annotated[bool, _input("--allow-empty", help="An INPUT without images is no error.")] = False
    dry_run: Annotated[
        bool, _input("--dry-run", "-n", help="Count images, requests, crops and bad files; no model.")
    ] = False
    estimating: EstimateChoices = NO_ESTIMATE

    model: Annotated[
        str,
        _model(
            "--model",
            "-m",
            autocompletion=starting(*MODEL_NAMES),
            help="moondream3, moondream3.1, tiny, a Hugging Face repo id, or a local folder or file.",
        ),
    ] = config.DEFAULT_MODEL
    revision: Annotated[str | None, _model("--revision", help="Revision of the repo.")] = None
    tokenizer: Annotated[str | None, _model("--tokenizer", help="Folder or file of another tokenizer.")] = None
    adapter: Annotated[str | None, _model("--adapter", help="Folder of a LoRA adapter.")] = None
    device: Annotated[str, _model("--device", help="auto, cpu, cuda, cuda:1 or mps.")] = "auto"
    dtype: Annotated[
        Literal["auto", "bf16", "fp32", "fp16"],
        _model("--dtype", help="auto: bf16, or fp32 where the device is slow at bf16."),
    ] = "auto"
    quant: Annotated[
        Literal["stored", "none", "int8", "int4"],
        _model("--quant", help="Bits of the weights; stored: as the checkpoint has them."),
    ] = "stored"
    quant_vision: Annotated[
        Literal["none", "int8"], _model("--quant-vision", help="Bits of the vision encoder's products; int8: CPU only.")
    ] = "none"
    batch_size: Annotated[
        str,
        _model(
            "--batch-size",
            metavar="N|auto",
            callback=checked(number_or_auto),
            help="Sequences in flight; auto fits memory.",
        ),
    ] = "auto"
    compile: Annotated[
        bool | None, _model("--compile/--no-compile", help="Compiled steps; by default where they pay.")
    ] = None
    max_context: Annotated[
        int | None,
        _model(
            "--max-context",
            metavar="N",
            min=1,
            max=32768,
            help="Tokens a sequence may have; by default the model's own.",
        ),
    ] = None
    cache: Annotated[bool, _model("--cache/--no-cache", help="Keep image encodings on disk.")] = True
    cache_dir: Annotated[
        str | None,
        _model(
            "--cache-dir",
            metavar="DIR",
            callback=checked(parse_folder),
            help="Where; by default the user's cache folder.",
        ),
    ] = None
    cache_size: Annotated[
        str, _model("--cache-size", metavar="SIZE", callback=checked(parse_bytes), help="How much.")
    ] = "20 GB"
    offline: Annotated[bool, _model("--offline", help="No network at all.")] = False

    temperature: Annotated[
        float, _answers("--temperature", min=0, max=TEMPERATURE_LIMIT, help="0 is greedy: a rerun gives the same.")
    ] = 0.0
    top_p: Annotated[
        float, _answers("--top-p", max=1, callback=above_zero, help="Share of the probability to draw from.")
    ] = 0.9
    max_tokens: Annotated[int, _answers("--max-tokens", min=1, max=TOKENS_LIMIT - 1, help="Longest answer.")] = 768
    seed: Annotated[int, _answers("--seed", min=0, max=SEED_LIMIT - 1, help="Of the draws.")] = 0

    max_pixels: Annotated[
        str,
        _limits(
            "--max-pixels",
            metavar="N",
            callback=checked(parse_count),
            help="Larger pictures are refused; 268M.",
            show_default=False,
        ),
    ] = str(2**28)
    max_file_size: Annotated[
        str,
        _limits("--max-file-size", metavar="SIZE", callback=checked(parse_bytes), help="Larger files are refused."),
    ] = "1G"
    fetch_timeout: Annotated[
        float,
        _limits("--fetch-timeout", metavar="SECONDS", min=0.001, help="Longest time of one try to fetch a picture."),
    ] = 30.0
    decode_timeout: Annotated[
        float, _limits("--decode-timeout", metavar="SECONDS", min=0.001, help="Longest time to open one picture.")
    ] = 20.0
    workers: Annotated[
        str, _limits("--workers", metavar="N|auto", callback=checked(number_or_auto), help="Pictures opened at a time.")
    ] = "auto"
    background: Annotated[
        str,
        _limits(
            "--background",
            metavar="COLOUR",
            help="Colour to lay transparent pictures on; none drops alpha, as the original does.",
        ),
    ] = "none"

    scale: ScaleFlags = ONE_PROCESS

    quiet: Annotated[bool, _display("--quiet", help="Errors only.")] = False
    verbose: Annotated[bool, _display("--verbose", "-v", help="More: every failed image, stage times.")] = False
    no_progress: Annotated[bool, _display("--no-progress", help="No progress bar.")] = False
    no_color: Annotated[bool, _display("--no-color", help="No colours; so does NO_COLOR=1.")] = False
    debug: Annotated[bool, _display("--debug", help="Show where an error comes from.")] = False

    def request(self, task: Task, prompt: str | None = None, **settings: Any) -> Request:
        """A request of this task with the settings that all tasks share."""
        shared = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
        return Request(task=task, prompt=prompt, **(shared | settings))

    def run_config(self, command: str, inputs: Sequence[str], requests: Sequence[Request]) -> config.RunConfig:
        """What the options say as one value; sizes and shares parsed."""
        return config.RunConfig(
            command=command,
            source=SourceSpec(
                inputs=tuple(inputs),
                recursive=self.recursive,
                include=tuple(self.include or ()),
                exclude=tuple(self.exclude or ()),
                limit=self.limit,
                shard=None if self.shard is None else parse_shard(self.shard),
                root=self.root,
                remote=self.remote,
                offline=self.offline,
                follow_links=self.follow_links,
            ),
            requests=tuple(requests),
            defaults=self.request(Task.QUERY),
            model=self._model_options(),
            decode=config.DecodeOptions(
                max_pixels=parse_count(self.max_pixels),
                max_file_size=parse_bytes(self.max_file_size),
                timeout_s=self.decode_timeout,
                fetch_timeout_s=self.fetch_timeout,
                named_hosts=named_hosts([*inputs, self.root or ""]),
                may_fetch_private=self.remote,
                root=self.root if self.root and is_address(self.root) else "",
                workers=number_or_auto(self.workers),
            ),
            output=self._output_options(),
            fail_on=parse_fail_on(self.fail_on),
            scale=self.scale.scale_options(),
            allow_empty=self.allow_empty,
            is_dry_run=self.dry_run,
            estimate=self.estimating.chosen(),
            argv=("md3", *map(shown_argument, sys.argv[1:])),
        )

    def _output_options(self) -> config.OutputOptions:
        if self.output == "":  # such as -o "$OUT" without an OUT
            raise UsageError("OUTPUT is empty; name a file or folder after -o, or leave -o out")
        typed = self.output
        address = checked_output_address(typed) if typed is not None and is_address(typed) else None
        path = typed if address is None else address.rpartition("/")[2]
        is_bucket = address is not None and not path_of(address).strip("/")
        return config.OutputOptions(
            path=None if path is None else Path(path),
            address=address,
            is_folder=typed is not None and (is_bucket or typed.endswith(("/", os.sep))),
            formats=tuple(self.format or ()),
            overwrite=not self.resume,
            retry_failed=self.retry_failed,
        )

    def _model_options(self) -> config.ModelOptions:
        return config.ModelOptions(
            model=self.model,
            revision=self.revision,
            tokenizer=self.tokenizer,
            adapter=self.adapter,
            device=self.device,
            dtype=self.dtype,
            quant=self.quant,
            quant_vision=self.quant_vision,
            batch_size=number_or_auto(self.batch_size),
            compile=self.compile,
            cache=self.cache,
            cache_dir=None if self.cache_dir is None else parse_folder(self.cache_dir),
            cache_size=parse_bytes(self.cache_size),
            max_context=self.max_context,
            offline=self.offline,
            background=self.background,
        )


T = TypeVar("T")


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let the parser see the fields of `AnnotateOptions` in place of the parameter `options`.

    A field that is itself a group of options (a dataclass) stands for its own fields.
    """
    hints = get_type_hints(command, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [
        parameter.replace(annotation=hints[name], kind=keyword)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "options"
    ]
    shared = list(_parameters(AnnotateOptions))

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        command(options=_collect(AnnotateOptions, values), **values)

    wrapper.__signature__ = inspect.Signature(own + shared)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in own + shared}
    del wrapper.__wrapped__
    return wrapper


def _parameters(group: type) -> Iterator[inspect.Parameter]:
    """The options of `group` as keyword parameters, those of groups inside it in their place."""
    declared = get_type_hints(group, include_extras=True)
    for field in fields(group):
        if is_dataclass(field.default):
            yield from _parameters(type(field.default))
        else:
            keyword = inspect.Parameter.KEYWORD_ONLY
            yield inspect.Parameter(field.name, keyword, default=field.default, annotation=declared[field.name])


def _collect(group: type[T], values: dict[str, Any]) -> T:
    """A `group` of what was typed, taken out of `values`."""
    taken = {}
    for field in fields(group):  # type: ignore[arg-type]
        inner = type(field.default) if is_dataclass(field.default) else None
        taken[field.name] = values.pop(field.name) if inner is None else _collect(inner, values)
    return group(**taken)


def annotate(run: RunConfig, options: AnnotateOptions) -> None:
    """Run it; ends the command with status 3 where too many records failed.

    Raises:
        Md3Error: the run could not be done.
        signals.Interrupted: it was stopped; what was reported is on disk.
    """
    from md3cli.console import RunConsole
    from md3cli.pipeline import run as run_pipeline

    display = RunConsole(
        is_quiet=options.quiet,
        is_verbose=options.verbose,
        has_progress=not options.no_progress,
        has_color=not options.no_color,
    )
    status = run_pipeline(run, display)
    if status:
        raise typer.Exit(status)
