"""Part `limits`: what this card can do at all; the other parts say what share of it they reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from md3cli.model.engine.machine import free_bytes

from .child import Run
from .timing import median_ms

LAUNCHES = 1000


@dataclass(frozen=True)
class Limits:
    """A bf16 product's rate in FLOP/s, and a copy's in bytes/s, read and written bytes both counted."""

    product: float
    copy: float


def limits_of(run: Run) -> Limits:
    """The card's limits: those the parent knows, else measured now."""
    known = run.known
    if "product_rate" in known and "copy_rate" in known:
        return Limits(known["product_rate"], known["copy_rate"])
    return Limits(product_rate(run), copy_rate(run))


def measure(run: Run) -> None:
    """The limits that bind products, steps and launches, and the memory there is."""
    side, copied, limits = product_side(run), copy_bytes(run), Limits(product_rate(run), copy_rate(run))
    run.figure(f"product, {side} x {side} x {side}, bf16", limits.product / 1e12, "TFLOP/s")
    run.figure(f"copy in memory, {copied >> 20} MiB, read and written", limits.copy / 1e12, "TB/s")
    run.note("product_rate", limits.product)  # for the parts that come later
    run.note("copy_rate", limits.copy)
    run.figure("memory free at the start", free_bytes(run.device) / 1e9, "GB")
    if run.is_cuda:
        run.figure("memory of the card", torch.cuda.mem_get_info(run.device)[1] / 1e9, "GB")
        run.figure("copy from the host, pinned, 1024 MiB", pinned_rate(run) / 1e9, "GB/s")
        run.figure("smallest kernel, replayed in a graph", graph_launch_us(run), "us")
    run.figure("smallest operation, launched by torch", eager_launch_us(run), "us")


def product_side(run: Run) -> int:
    return 8192 if run.is_cuda else 512


def copy_bytes(run: Run) -> int:
    """8 GB on a card that has room for two of them."""
    if not run.is_cuda:
        return 1 << 25
    return 1 << 33 if free_bytes(run.device) > 20 << 30 else 1 << 30


def product_rate(run: Run) -> float:
    """FLOP/s of a square bf16 product on random data: zeros would draw less power and run faster."""
    side = product_side(run)
    a, b = (torch.randn(side, side, device=run.device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    ms = median_ms(lambda: torch.mm(a, b, out=out), run.device, repeats=20 if run.is_cuda else 3)
    return 2e3 * side**3 / ms


def copy_rate(run: Run) -> float:
    """Bytes/s that a copy on the device reads and writes."""
    source = torch.ones(copy_bytes(run), dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / median_ms(lambda: target.copy_(source), run.device, repeats=10 if run.is_cuda else 3)


def pinned_rate(run: Run) -> float:
    """Bytes/s from pinned memory of the host to the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=run.device)
    return 1e3 * source.nbytes / median_ms(lambda: target.copy_(source, non_blocking=True), run.device, repeats=5)


def graph_launch_us(run: Run) -> float:
    """Time of one of the smallest kernels in a replayed graph."""
    one = torch.zeros(1, device=run.device)
    one.add_(1)  # loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            one.add_(1)
    return 1e3 * median_ms(graph.replay, run.device, repeats=20) / LAUNCHES


def eager_launch_us(run: Run) -> float:
    """Time of the smallest operation when torch launches it one by one: what a step of small kernels is made of."""
    one = torch.zeros(1, device=run.device)

    def launch_all() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    return 1e3 * median_ms(launch_all, run.device, repeats=5) / LAUNCHES
