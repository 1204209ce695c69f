"""`md3 bench`: this machine's throughput by stage, beside its limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from md3cli.errors import UsageError
from md3cli.records import printable
from md3cli.signals import check_stdout

app = typer.Typer(add_completion=False)


class BenchConfig(StrEnum):
    """Sizes of random models."""

    MINI = "mini"
    MID = "mid"
    FULL = "full"


class BenchWorkload(StrEnum):
    """What is run; how much of it depends on the device.

    A query of 3 tokens about each photo; one of 15 tokens of reasoning and 15 of answer; captions (of 32 tokens
    for one-tile pictures, on CUDA of 150 for photos); 5 detections in each of 16 photos; queries about JPEG files.
    """

    QUERY = "query"
    REASONING = "reasoning"
    CAPTIONS = "captions"
    PHOTOS = "photos"
    FILES = "files"


@app.command(
    epilog="Example: md3 bench --config mid --baseline --json",
)
def bench(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Weights to measure with; without it random ones are used.")
    ] = None,
    config: Annotated[
        BenchConfig,
        typer.Option(
            help="Size of the random model: mini = 15 MB, for tests; mid = real vision tower, 6 text layers; "
            "full = the real size."
        ),
    ] = BenchConfig.MID,
    workload: Annotated[
        BenchWorkload | None,
        typer.Option(help="What the engine is given to do; default: captions, on CUDA all but photos."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or fp16.")] = "bf16",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences in flight; default: 16, on CUDA 1, 8, 64 and 128 in turn.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: torch's choice, 1 for a small model.")
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Run the plain one-at-a-time path beside it.")] = False,
    baseline_images: Annotated[
        int | None, typer.Option(min=1, help="Run the baseline on so many pictures and scale up.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare-quant", help="The model in full, 8 and 4 bits: size, memory, speed, quality.")
    ] = False,
    against: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="With --compare-quant: a checkpoint to compare as well.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(metavar="INPUT", help="With --compare-quant: pictures to compare decisions on.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights and pictures.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """This machine's throughput by stage, beside what a bare matrix product and a bare read reach here.

    Queries have 3 tokens, reasoning 15 and its answer 15, captions 32 (150 on
    CUDA); files are JPEGs, decoded while the engine runs. On CUDA memory is
    the GPU's, not the process's.
    """
    check_stdout()
    if compare:
        _compare_quant(model, against or (), images, device=device, dtype=dtype, threads=threads, as_json=as_json)
        return
    if against or images:
        raise UsageError("--against and --images are for --compare-quant; add it, or leave them out")
    from md3cli.bench.bench import model_source, run_bench
    from md3cli.run.feed import num_auto_workers

    result = run_bench(
        model_source(model, config.value, device=device, dtype=dtype, threads=threads, seed=seed),
        workload=workload.value if workload is not None else None,
        batch_size=batch_size,
        has_baseline=baseline,
        num_workers=num_auto_workers(),
        baseline_images=baseline_images,
        seed=seed,
    ).as_dict()
    if as_json:
        typer.echo(json.dumps(result))
        return
    _show(result)


def _compare_quant(
    model: str | None,
    against: Sequence[str],
    images: str | None,
    *,
    device: str,
    dtype: str,
    threads: int | None,
    as_json: bool,
) -> None:
    from md3cli.bench import compare

    if model is None:
        raise UsageError("--compare-quant needs weights; name them with -m (-m tiny is always there)")
    result = compare.compare_quant(model, against, images, device=device, dtype=dtype, threads=threads)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        compare.show(result)


def _show(result: dict[str, Any]) -> None:
    """The numbers as tables on stdout."""
    from rich.console import Console
    from rich.text import Text

    limits = result["limits"]
    copy = f", a bare copy {limits['copy_gbytes']:,.0f} GB/s read and written" if "copy_gbytes" in limits else ""
    console = Console()
    console.print(
        Text(
            f"{printable(str(result['device']))}: a bare matrix product reaches {limits['gemm_gflops']:,.0f} GFLOP/s, "
            f"a bare read {limits['read_gbytes']:.1f} GB/s{copy}"
        )
    )
    console.print(_stage_table(result["stages"], digits=5 if "runs" in result else 3))
    if "runs" in result:
        console.print(_run_table(result["runs"]))
        console.print(Text("\n".join(_gpu_lines(result))))
    else:
        console.print(Text("\n".join(_host_lines(result))))


def _stage_table(stages: Mapping[str, Mapping[str, float]], *, digits: int) -> Any:
    from rich.table import Table

    table = Table("stage", "seconds", "per second", "rate", "of the limit", box=None, header_style="bold")
    for name, stage in stages.items():
        amount = next(f"{stage[key]:,.1f} {key.split('_')[0]}" for key in stage if key.endswith("_per_second"))
        rate = f"{stage['gflops']:,.0f} GFLOP/s" if "gflops" in stage else f"{stage['gbytes']:,.1f} GB/s"
        table.add_row(name, f"{stage['seconds']:.{digits}f}", amount, rate, f"{stage['share']:.0%}")
    return table


def _run_table(runs: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("workload", box=None, header_style="bold")
    for heading in ("batch", "requests/s", "seconds", "GPU memory", "GPU busy"):
        table.add_column(heading, justify="right")
    for run in runs:
        busy = run["gpu_busy_share"]
        table.add_row(
            run["workload"],
            str(run["batch_size"]),
            f"{run['requests_per_second']:.2f}",
            f"{run['seconds']:.2f}",
            f"{run['gpu_peak_bytes'] / 1e9:.2f} GB",
            f"{busy:.0%}" if busy is not None else "not seen",
        )
    return table


def _gpu_lines(result: Mapping[str, Any]) -> list[str]:
    """What the tables leave open: memory that tensors do not take, what did not fit, the plain path."""
    lines = []
    if runs := result["runs"]:
        held, outside = (max(run[key] for run in runs) / 1e9 for key in ("gpu_reserved_bytes", "gpu_outside_bytes"))
        lines.append(
            f"GPU memory: the most that tensors took, {runs[0]['weights_bytes'] / 1e9:.2f} GB of weights among them; "
            f"torch held up to {held:.2f} GB for them, and {outside:.2f} GB were not torch's"
        )
    lines += [f"did not fit: {note}" for note in result["notes"]]
    for name, plain in result.get("baseline", {}).items():
        lines.append(f"plain path, {name}: {plain['requests_per_second']:.2f} requests/s")
    return lines


def _host_lines(result: Mapping[str, Any]) -> list[str]:
    """Engine, memory of the process, and what it is compared with."""
    engine, memory = result["engine"], result["memory"]
    lines = [
        f"engine: {engine['seconds']:.1f} s, {engine['requests_per_second']:.2f} requests/s; a forward pass was "
        f"running {engine['forward_share']:.0%} of the time",
        f"memory: peak {memory['peak_rss_bytes'] / 1e9:.2f} GB = weights {memory['weights_bytes'] / 1e9:.2f} "
        f"+ keys and values {memory['kv_bytes'] / 1e9:.2f} + activations {memory['activation_bytes'] / 1e9:.2f}, "
        f"and {memory['ratio'] - 1:.0%} more",
    ]
    seconds = result["cached"]["seconds"]
    lines.append(f"again, encodings cached: {seconds:.1f} s, {engine['seconds'] / seconds:.1f} times as fast")
    if "files" in result:
        files = result["files"]
        lines.append(
            f"from files: {files['seconds']:.1f} s, {files['pictures_per_second']:.2f} pictures/s through "
            f"{files['decode_workers']:.0f} decode workers, {files['share']:.0%} of the engine's rate above"
        )
    if "baseline" in result:
        seconds = result["baseline"]["seconds"]
        lines.append(f"plain path: {seconds:.1f} s, {seconds / engine['seconds']:.1f} times the engine's")
    return lines
