"""`md3 models`: which weights are here, fetch them, look into them, write them in other layouts and in fewer bits."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from md3cli.commands.help import App
from md3cli.console import moving_bar, print_table, say, size_words
from md3cli.images.crops import CropConfig, ImageLimits, PreparedImage
from md3cli.records import ImageItem, printable

if TYPE_CHECKING:
    from md3cli.model.inspect import CheckpointSummary
    from md3cli.model.quant.quantise import Importance

app = App(no_args_is_help=True, help="Weights: what is there, fetch, look into, fewer bits, other layouts.")

_SEGMENTS = (
    "masks are as the model draws them; published mask scores use a second network behind it, a refiner, that is not "
    "among these weights"
)
_SEGMENTS_NOT = "segment is refused: config.json has no template for it (moondream3.1 segments)"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Alias, repository id, folder or .safetensors file.")]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a repository.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Source = Annotated[str, typer.Argument(metavar="SRC", help="Alias, repository id, folder or .safetensors file.")]
Target = Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; must not exist yet.")]


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """The models that have a short name, and whether they are here.

    Examples:
        md3 models list
    """
    from md3cli.model.weights.hub import known_models

    models = known_models()
    if as_json:
        typer.echo(json.dumps([model.as_json() for model in models], indent=1))
        return
    rows = [
        (m.alias, m.source, "" if m.num_bytes is None else size_words(m.num_bytes), str(m.path or "not here"))
        for m in models
    ]
    _print(("name", "from", "size", "where"), rows)
    if any(model.path is None for model in models):
        typer.echo("Fetch one with: md3 models pull NAME", err=True)


@app.command()
def pull(model: Model, revision: Revision = None) -> None:
    """Fetch a model into the hub's cache, with its tokenizer; continues where an earlier try broke off.

    Examples:
        md3 models pull moondream3
    """
    from md3cli.model.weights import hub

    if model == hub.TINY:
        say(f"{model} is in this package, in {hub.model_path(model)}; there is nothing to fetch", err=True)
    else:
        repo = hub.required_repo(model)
        hub.plan_download(repo, revision).announce(functools.partial(say, err=True))
        hub.download(repo, revision)
    typer.echo(hub.resolve_model(model, revision=revision).identity)


@app.command()
def info(model: Model, revision: Revision = None, as_json: AsJson = False) -> None:
    """Format, sizes by part and what would load. Reads headers only; fetches nothing.

    Examples:
        md3 models info ./checkpoint
    """
    from md3cli.model.inspect import inspect_checkpoint
    from md3cli.model.weights.hub import present_path

    summary = inspect_checkpoint(present_path(model, revision), model)
    if as_json:
        typer.echo(json.dumps(summary.as_json(), indent=1))
        return
    for line in _summary_lines(summary):
        typer.echo(printable(line))
    rows = [
        (str(part.part), f"{part.num_parameters:,}", size_words(part.num_bytes), _by_format(part.formats))
        for part in summary.parts
    ]
    total = ("total", f"{summary.num_parameters:,}", size_words(summary.num_bytes), "")
    _print(("part", "parameters", "bytes", "stored as"), [*rows, total])


@app.command()
def convert(
    source: Source,
    target: Target,
    to: Annotated[Literal["original", "raw", "hf"], typer.Option("--to", help="The layout to write.")],
) -> None:
    """Write a checkpoint in another layout, tensor by tensor, and compare the copy with the source.

    Examples:
        md3 models convert ./checkpoint ./checkpoint-raw --to raw
    """
    from md3cli.model.weights.hub import present_path
    from md3cli.model.weights.names import Format
    from md3cli.model.weights.write import convert_checkpoint

    with moving_bar("writing") as advance:
        plan = convert_checkpoint(present_path(source), target, Format(to), progress=advance)
    typer.echo(
        f"{target}: {plan.layout}, {size_words(plan.files.num_bytes)} in {len(plan.files.files)} files, compared"
    )


@app.command()
def quantize(
    source: Source,
    target: Target,
    quant: Annotated[
        Literal["int8", "int4", "fp8"],
        typer.Option(help="int4: as existing readers have it; int8: by row; fp8: the experts alone."),
    ],
    vision: Annotated[
        Literal["none", "int8"],
        typer.Option(help="int8 halves the vision tower too; others than md3 do not read it then."),
    ] = "none",
    scales: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="Of int4: fp32 is what other readers expect, bf16 is 4 % smaller.")
    ] = "fp32",
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="INPUT", help="Pictures (or a manifest with questions) whose answers count most."),
    ] = None,
    calibrate_limit: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures of INPUT to look at.")] = 64,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where to calibrate: auto, cpu, cuda, mps.")] = "auto",
) -> None:
    """Write a checkpoint in 8 or 4 bits, tensor by tensor; a killed run is continued by the same command.

    The large matrices of the text decoder and the region heads become codes with searched scales;
    vision, routers, tau, norms, embedding and head stay as they are.

    Examples:
        md3 models quantize ./checkpoint ./checkpoint-int4 --quant int4 --calibrate photos/
    """
    from md3cli.model.engine.load import DTYPES
    from md3cli.model.quant.quantise import QuantiseSettings, quantise_checkpoint
    from md3cli.model.weights.codes import LowBit
    from md3cli.model.weights.hub import present_path, stored_tokenizer

    path = present_path(source)  # before anything slow
    settings = QuantiseSettings(
        LowBit(quant),
        has_int8_vision=vision == "int8",
        int4_scale_dtype=DTYPES[scales],
    )
    importance = None if calibrate is None else _calibrated(source, calibrate, calibrate_limit, device)
    with moving_bar("writing") as advance:
        plan = quantise_checkpoint(
            path,
            target,
            settings,
            importance=importance,
            tokenizer_file=stored_tokenizer(),
            progress=advance,
        )
    typer.echo(
        f"{target}: {plan.layout}, {size_words(plan.files.num_bytes)} in {len(plan.files.files)} files, read back"
    )


def _calibrated(model: str, pictures: str, limit: int, device: str) -> Importance:
    from md3cli.config import SourceSpec
    from md3cli.images.pool import PicturePool
    from md3cli.model.calibrate import REQUESTS, collect_importance
    from md3cli.model.engine.load import choose_device, choose_dtype
    from md3cli.model.weights.files import find_weight_files
    from md3cli.model.weights.hub import resolve_model
    from md3cli.source.source import open_source

    files = resolve_model(model, offline=True)
    place = choose_device(device)
    rows = open_source(SourceSpec((pictures,), limit=limit), REQUESTS)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(moving_bar("calibrating", unit=" pictures"))

        @functools.cache
        def pool(config: CropConfig) -> PicturePool:
            return stack.enter_context(PicturePool(1, config, ImageLimits()))

        def prepare(item: ImageItem, config: CropConfig) -> PreparedImage:
            picture = pool(config).submit(item).result()
            assert isinstance(picture, PreparedImage)  # this pool serves no engine that cuts
            return picture

        return collect_importance(
            files,
            rows,
            device=place,
            dtype=choose_dtype("auto", place, find_weight_files(files.path).num_bytes),
            progress=advance,
            prepare=prepare,
        )


@app.command()
def verify(model: Model, revision: Revision = None, as_json: AsJson = False) -> None:
    """Compare names and shapes with what the config asks for, and each file with its digest; reads every byte.

    Examples:
        md3 models verify ./checkpoint-int4
    """
    from md3cli.model.inspect import verify_checkpoint
    from md3cli.model.weights.hub import present_path

    with moving_bar("reading") as advance:
        found = verify_checkpoint(present_path(model, revision), progress=advance)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
        return
    rows = [
        (f.name, size_words(f.num_bytes), f"{f.sha256[:16]}…", f.known_from or "no digest known") for f in found.files
    ]
    _print(("file", "size", "SHA-256", "same as"), rows)
    typer.echo(f"{found.plan.layout}: {len(found.plan.files.entries)} tensors, names and shapes as the config asks for")


def _summary_lines(summary: CheckpointSummary) -> Iterable[str]:
    config = summary.config
    text, vision = config.text, config.vision
    moe = f", {text.moe.num_experts} experts from layer {text.moe.start_layer}" if text.moe else ""
    yield f"{summary.path}: {summary.layout}, revision {summary.revision}"
    yield f"  loads: {text.n_layers} text layers of width {text.dim}{moe}; {vision.enc_n_layers} vision layers"
    skills = ", ".join(summary.skills)
    yield f"  image prefix {config.prefix_len} positions, context {text.max_context}; skills: {skills}"
    has_ln, has_tokenizer = ("yes" if has else "no" for has in (summary.has_region_ln, summary.has_tokenizer))
    yield f"  region LayerNorm: {has_ln}; tokenizer: {has_tokenizer}"
    yield f"  {_SEGMENTS if 'segment' in summary.skills else _SEGMENTS_NOT}"
    yield f"  terms of use: {summary.terms}"
    yield "  stored as " + ", ".join(f"{dtype} {size_words(size)}" for dtype, size in summary.dtypes.items())


def _by_format(formats: Mapping[str, int]) -> str:
    """Return `int4`, or formats with their sizes where a part is stored in several ways."""
    if len(formats) == 1:
        return next(iter(formats))
    return ", ".join(f"{name} {size_words(size)}" for name, size in formats.items())


def _print(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print_table(columns, rows, right=("parameters", "bytes", "size"), is_ruled=True)
