"""`md3 bench`: this machine's throughput by stage, beside its limits."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from md3cli.commands.help import App
from md3cli.commands.shared import is_typed
from md3cli.console import print_table, print_wrapped, size_words
from md3cli.errors import UsageError
from md3cli.records import printable
from md3cli.signals import check_stdout

app = App()

Work = StrEnum("Work", ["query", "reasoning", "captions", "files", "detect", "point", "segment", "photos", "all"])
COMPARED_STAGES = {"vision": "a photo", "prefill": "a picture", "decode": "a token", "decode_16": "16 tokens"}


@app.command()
def bench(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Weights to measure with; without it random ones are used."
        ),
    ] = None,
    config: Annotated[
        Literal["mini", "mid", "full"],
        typer.Option(
            help="Size of the random model: mini = 15 MB, for tests; mid = real vision tower, 6 text layers; "
            "full = the real size."
        ),
    ] = "mid",
    workload: Annotated[
        list[Work] | None,
        typer.Option(
            metavar="WORK",
            help="query, reasoning, captions, files, detect, point, segment, photos or all, once or more; default: "
            "captions, on CUDA the first four.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="bf16, fp32 or fp16.")] = "bf16",
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Sequences in flight; default: 16, on CUDA 1, 8, 64 and 128 in turn."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads; default: torch's choice, 1 for a small model.")
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Run the plain one-at-a-time path beside it.")] = False,
    baseline_images: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Run the baseline on so many pictures and scale up.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare-quant", help="The model in full, 8 and 4 bits: size, memory, seconds, points lost."),
    ] = False,
    against: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="With --compare-quant: a checkpoint to compare as well.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(metavar="INPUT", help="With --compare-quant: pictures to compare decisions on.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random weights and pictures.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """This machine's throughput by stage, beside what a bare matrix product and a bare read reach here.

    Queries have 3 tokens, reasoning 15 and its answer 15, captions 32 and
    segments 64 (150 on CUDA), detect and point 8 objects, photos 2 for each
    of 5 names; files are JPEGs, decoded while the engine runs. A coordinate
    or a size is a token. On CUDA memory is the GPU's, not the process's.

    Examples:
        md3 bench --model tiny
        md3 bench --workload detect --workload segment --baseline
        md3 bench --model tiny --compare-quant
    """
    check_stdout()
    if model is not None:
        _refuse_typed(ctx, ("config",), "is the size of random weights, and --model names others; give one of them")
    if not baseline:
        _refuse_typed(ctx, ("baseline_images",), "is for --baseline; add it, or leave this out")
    if compare:
        unused = ("workload", "batch_size", "baseline", "baseline_images", "seed")
        _refuse_typed(ctx, unused, "changes nothing of --compare-quant; leave it out")
        _compare(model, config, against or (), images, as_json, device=device, dtype=dtype, threads=threads)
        return
    if against or images:
        raise UsageError("--against and --images are for --compare-quant; add it, or leave them out")
    from md3cli.bench.bench import model_source, run_bench
    from md3cli.run.feed import num_auto_workers

    source = model_source(model, config, device=device, dtype=dtype, threads=threads, seed=seed)
    names = dict.fromkeys(workload or ())
    result = run_bench(
        source,
        workloads=[str(name) for name in (Work if Work.all in names else names) if name is not Work.all],
        batch_size=batch_size,
        has_baseline=baseline,
        num_workers=num_auto_workers(),
        baseline_images=baseline_images,
        seed=seed,
    ).as_dict()
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(result)


def _refuse_typed(ctx: typer.Context, names: Sequence[str], reason: str) -> None:
    """Refuse an option that would do nothing; one that a settings file has for other commands may stay there."""
    for name in names:
        if is_typed(ctx, name):
            raise UsageError(f"--{name.replace('_', '-')} {reason}")


def _compare(
    model: str | None, config: str, against: Sequence[str], images: str | None, as_json: bool, **place: Any
) -> None:
    from md3cli.bench.compare import compare_quant

    found = compare_quant(model, config, against, images, **place)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _show_compared(found)


def _show(result: Mapping[str, Any]) -> None:
    limits = result["limits"]
    copy = f", a bare copy {limits['copy_gbytes']:,.0f} GB/s read and written" if "copy_gbytes" in limits else ""
    print_wrapped(
        f"{printable(str(result['device']))}: a bare matrix product reaches {limits['gemm_gflops']:,.0f} GFLOP/s, "
        f"a bare read {limits['read_gbytes']:.1f} GB/s{copy}"
    )
    columns = ("stage", "seconds", "per second", "rate", "of the limit")
    is_gpu = "notes" in result
    print_table(columns, _stage_rows(result["stages"], digits=5 if is_gpu else 3), right=(), is_ruled=False)
    more = ("GPU memory", "GPU busy") if is_gpu else ("memory", "cached", "plain path")
    columns = ("batch", "requests/s", "images/s", "tokens/s", *more)
    rows = map(_gpu_row if is_gpu else _host_row, result["runs"])
    print_table(("workload", *columns), rows, right=columns, is_ruled=False)
    print_wrapped("\n".join(_gpu_lines(result) if is_gpu else _host_lines(result)))


def _stage_rows(stages: Mapping[str, Mapping[str, float]], *, digits: int) -> Iterator[tuple[str, ...]]:
    for name, stage in stages.items():
        amount = next(f"{stage[key]:,.1f} {key.split('_')[0]}" for key in stage if key.endswith("_per_second"))
        rate = f"{stage['gflops']:,.0f} GFLOP/s" if "gflops" in stage else f"{stage['gbytes']:,.1f} GB/s"
        yield name, f"{stage['seconds']:.{digits}f}", amount, rate, f"{stage['share']:.0%}"


def _rates(run: Mapping[str, Any]) -> tuple[str, ...]:
    rates = (run[f"{what}_per_second"] for what in ("requests", "images", "tokens"))
    return (run["workload"], str(run["batch_size"]), *(f"{rate:.2f}" for rate in rates))


def _gpu_row(run: Mapping[str, Any]) -> tuple[str, ...]:
    busy = run["gpu_busy_share"]
    return (
        *_rates(run),
        f"{run['gpu_peak_bytes'] / 1e9:.2f} GB",
        f"{busy:.0%}" if busy is not None else "not seen",
    )


def _host_row(run: Mapping[str, Any]) -> tuple[str, ...]:
    """Return rates and memory, how many times as fast it is with encodings cached, and as the plain path."""
    return (
        *_rates(run),
        f"{run['memory']['peak_rss_bytes'] / 1e9:.2f} GB",
        f"{run['engine']['seconds'] / run['cached']['seconds']:.1f}x",
        f"{run['baseline_ratio']:.1f}x" if "baseline_ratio" in run else "not run",
    )


def _gpu_lines(result: Mapping[str, Any]) -> list[str]:
    """Return what the tables leave open: memory that tensors do not take, what did not fit, the plain path."""
    lines = []
    if runs := result["runs"]:
        held, outside = (max(run[key] for run in runs) / 1e9 for key in ("gpu_reserved_bytes", "gpu_outside_bytes"))
        lines.append(
            f"GPU memory: the most that tensors took, {runs[0]['weights_bytes'] / 1e9:.2f} GB of weights among them; "
            f"torch held up to {held:.2f} GB for them, and {outside:.2f} GB were not torch's"
        )
    lines += [f"did not fit: {note}" for note in result["notes"]]
    for name, plain in result.get("baseline", {}).items():
        rate = plain["requests_per_second"]
        best = max((run["requests_per_second"] for run in runs if run["workload"] == name), default=None)
        compared = f"; the engine's best is {best / rate:.1f} times that" if best is not None else ""
        lines.append(f"plain path, {name}: {rate:.2f} requests/s{compared}")
    return lines


def _host_lines(result: Mapping[str, Any]) -> list[str]:
    """Return what the tables leave open of each workload; of a single one more."""
    if len(result["runs"]) > 1:
        return [f"{run['workload']}: {_files_line(run)}" for run in result["runs"] if "files" in run]
    engine, memory = result["engine"], result["memory"]
    parts = [memory[f"{part}_bytes"] / 1e9 for part in ("weights", "kv", "activation")]
    peak = memory["peak_rss_bytes"] / 1e9
    lines = [
        f"engine: {engine['seconds']:.1f} s, {engine['requests_per_second']:.2f} requests/s; a forward pass was "
        f"running {engine['forward_share']:.0%} of the time",
        f"memory: peak {peak:.2f} GB = weights {parts[0]:.2f} + keys and values {parts[1]:.2f} "
        f"+ activations {parts[2]:.2f} + the rest {peak - sum(parts):.2f}",
    ]
    seconds = result["cached"]["seconds"]
    lines.append(f"again, encodings cached: {seconds:.1f} s, {engine['seconds'] / seconds:.1f} times as fast")
    if "files" in result:
        lines.append(f"from files: {_files_line(result)}")
    if "baseline" in result:
        seconds = result["baseline"]["seconds"]
        lines.append(f"plain path: {seconds:.1f} s, {seconds / engine['seconds']:.1f} times the engine's")
    return lines


def _files_line(run: Mapping[str, Any]) -> str:
    files = run["files"]
    return (
        f"{files['seconds']:.1f} s, {files['pictures_per_second']:.2f} pictures/s through "
        f"{files['decode_workers']:.0f} decode workers, {files['share']:.0%} of the engine's rate above"
    )


def _show_compared(found: Mapping[str, Any]) -> None:
    """Print what each variant takes and saves, then what its answers lose, then its time by stage."""
    variants = {_variant_name(name, one): one for name, one in found["variants"].items()}
    full = next(iter(variants.values()))
    columns = ("model size", str(full["memory"]), "s/query", *_judged(full))
    print_table(("configuration", *columns), _saving_rows(variants), right=columns, is_ruled=False)
    for some in _side_by_side(list(variants)):
        beside = [variants[name] for name in some]
        if rows := list(_test_rows(beside)):
            print_table(("test", *some), rows, right=some, is_ruled=False)
        print_table(("stage", *some), _stage_times(beside), right=some, is_ruled=False)
    for note in found["notes"]:
        typer.echo(printable(note), err=True)
    if "quality" not in full:
        typer.echo("quality is measured on the embedded model's scenes: -m tiny", err=True)
    elif importlib.util.find_spec("faster_coco_eval") is None:
        typer.echo("boxes and points were not scored: pip install 'md3cli[eval]'", err=True)


def _variant_name(name: str, found: Mapping[str, Any]) -> str:
    return {"none": "full", "vision": f"{found['vision_bits']} vision"}.get(name, Path(name).name)


def _side_by_side(names: Sequence[str]) -> Iterator[list[str]]:
    """Yield the names of at most three columns, the first of all in each: what 80 characters hold."""
    for first in range(1, max(len(names), 2), 2):
        yield [names[0], *names[first : first + 2]]


def _judged(found: Mapping[str, Any]) -> list[str]:
    known = {"points lost": "points_lost" in found, "same decisions": found["agreement"] is not None}
    return [name for name, is_known in known.items() if is_known][:1]


def _saving_rows(variants: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for number, (name, one) in enumerate(variants.items()):
        lost = {"points lost": "{points_lost:.2f}", "same decisions": "{agreement:.1%}"}
        judged = [lost[what].format_map(one) for what in _judged(one)]
        sizes = size_words(one["size_bytes"]), f"{one['memory_bytes'] / 2**20:,.0f} MiB"
        yield name if number else f"{name}, {one['dtype']}", *sizes, f"{one['seconds_per_query']:.3f}", *judged
        if number:
            saved = (round(share, 2) + 0.0 for share in one["saved"].values())  # + 0.0: no -0 %
            yield "  reduction", *(f"{share:.0%}" for share in saved), *["" for _ in judged]


def _test_rows(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the seconds and the score of each test; a test of two scores took its time once."""
    full, timed = found[0], set()
    for name in full.get("quality", {}):
        test = next(test for test in full["tests"] if name.startswith(test))
        seconds = ["" if test in timed else f"{one['tests'][test]['seconds']:.1f} s  " for one in found]
        timed.add(test)
        yield name, *(f"{s}{one['quality'][name]:6.1%}" for s, one in zip(seconds, found, strict=True))
    if "points_lost" in full:
        yield "points lost, mean", *(f"{one['points_lost']:.2f}" for one in found)
    if full["agreement"] is not None:
        yield f"same of {full['decisions']:,} decisions", *(f"{one['agreement']:.1%}" for one in found)


def _stage_times(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for stage, unit in COMPARED_STAGES.items():
        full = found[0]["stages"][stage]["seconds"]
        times = [one["stages"][stage]["seconds"] for one in found]
        yield (
            f"{stage.removesuffix('_16')}, {unit}",
            *(f"{seconds * 1000:,.1f} ms {full / seconds:.1f}x" for seconds in times),
        )
