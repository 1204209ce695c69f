"""`md3 bench`: this machine's throughput by stage, beside its limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from md3cli.errors import UsageError
from md3cli.records import printable

app = typer.Typer(add_completion=False)


class BenchConfig(StrEnum):
    """Sizes of random models."""

    MID = "mid"
    FULL = "full"


class BenchWorkload(StrEnum):
    """What is run: captions of 8 one-tile pictures, or 5 detections in each of 16 photos."""

    CAPTIONS = "captions"
    PHOTOS = "photos"


@app.command(
    epilog="Example: md3 bench --config mid --baseline --json",
)
def bench(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Weights to measure with; without it random ones are used.")
    ] = None,
    config: Annotated[
        BenchConfig,
        typer.Option(help="Size of the random model: mid = real vision tower, 6 text layers; full = the real size."),
    ] = BenchConfig.MID,
    workload: Annotated[BenchWorkload, typer.Option(help="What the engine is given to do.")] = BenchWorkload.CAPTIONS,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or fp16.")] = "bf16",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in flight.")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Run the plain one-at-a-time path beside it.")] = False,
    baseline_images: Annotated[
        int | None, typer.Option(min=1, help="Run the baseline on so many pictures and scale up.")
    ] = None,
    compare_quant: Annotated[
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
    """This machine's throughput by stage, beside what a bare matrix product and a bare read reach here."""
    if compare_quant:
        _compare_quant(model, against or (), images, device=device, dtype=dtype, threads=threads, as_json=as_json)
        return
    if against or images:
        raise UsageError("--against and --images are for --compare-quant; add it, or leave them out")
    from md3cli.model.bench import WORKLOADS, model_maker, run_bench

    result = run_bench(
        model_maker(model, config.value, device=device, dtype=dtype, threads=threads, seed=seed),
        workload=WORKLOADS[workload.value],
        batch_size=batch_size,
        has_baseline=baseline,
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
    from md3cli.commands import compare_quant

    if model is None:
        raise UsageError("--compare-quant needs weights; name them with -m (-m tiny is always there)")
    result = compare_quant.compare_quant(model, against, images, device=device, dtype=dtype, threads=threads)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        compare_quant.show(result)


def _show(result: dict[str, Any]) -> None:
    """The numbers as tables on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    limits, memory = result["limits"], result["memory"]
    console = Console()
    console.print(
        Text(
            f"{printable(str(result['device']))}: a bare matrix product reaches {limits['gemm_gflops']:,.0f} GFLOP/s, "
            f"a bare read {limits['read_gbytes']:.1f} GB/s"
        )
    )
    table = Table("stage", "seconds", "per second", "rate", "of the limit", box=None, header_style="bold")
    for name, stage in result["stages"].items():
        amount = next(f"{stage[key]:,.1f} {key.split('_')[0]}" for key in stage if key.endswith("_per_second"))
        rate = f"{stage['gflops']:,.0f} GFLOP/s" if "gflops" in stage else f"{stage['gbytes']:.1f} GB/s"
        table.add_row(name, f"{stage['seconds']:.3f}", amount, rate, f"{stage['share']:.0%}")
    console.print(table)
    engine = result["engine"]
    lines = [
        f"engine: {engine['seconds']:.1f} s, {engine['requests_per_second']:.2f} requests/s; a forward pass was "
        f"running {engine['forward_share']:.0%} of the time",
        f"memory: peak {memory['peak_rss_bytes'] / 1e9:.2f} GB = weights {memory['weights_bytes'] / 1e9:.2f} "
        f"+ keys and values {memory['kv_bytes'] / 1e9:.2f} + activations {memory['activation_bytes'] / 1e9:.2f}, "
        f"and {memory['ratio'] - 1:.0%} more",
    ]
    seconds = result["cached"]["seconds"]
    lines.append(f"again, encodings cached: {seconds:.1f} s, {engine['seconds'] / seconds:.1f} times as fast")
    if "baseline" in result:
        seconds = result["baseline"]["seconds"]
        lines.append(f"plain path: {seconds:.1f} s, {seconds / engine['seconds']:.1f} times the engine's")
    console.print(Text("\n".join(lines)))
