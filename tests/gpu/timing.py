"""Times on a device: medians, by events on CUDA and by the clock elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 1 << 29


@torch.inference_mode()
def median_ms(
    run: Callable[[], object], device: torch.device, repeats: int, between: Callable[[], object] | None = None
) -> float:
    """Median time of `run` in milliseconds, after two runs to warm up; `between` runs before each, untimed."""
    for _ in range(2 if repeats > 2 else 1):
        run()
    take = _events if device.type == "cuda" else _clock
    return statistics.median(take(run, repeats, between or (lambda: None)))


def repeats(device: torch.device) -> int:
    """How many times a pass is timed."""
    return 20 if device.type == "cuda" else 2


@torch.inference_mode()
def replayed_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of `run` replayed as a CUDA graph: what the device needs when nobody launches kernel by kernel.

    Raises:
        RuntimeError: something in `run` cannot be captured.
    """
    side = torch.cuda.Stream(device)  # captures want a stream of their own, and what is captured warmed up there
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_ms(graph.replay, device, repeats)


def _events(run: Callable[[], object], repeats: int, between: Callable[[], object]) -> list[float]:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for first, last in pairs:
        between()
        first.record()
        run()
        last.record()
    torch.cuda.synchronize()
    return [float(first.elapsed_time(last)) for first, last in pairs]


def _clock(run: Callable[[], object], repeats: int, between: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(repeats):
        between()
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return times


def flusher(device: torch.device) -> Callable[[], object] | None:
    """What to run before a kernel so that it finds nothing in the L2 cache and is timed alone; None off CUDA.

    Writing half a gigabyte pushes the inputs out (50 MB of L2 on an H100) and keeps the device busy (0.2 ms)
    while the host launches the kernel, so that the events around it do not see the host's own time.
    """
    if device.type != "cuda":
        return None
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).zero_
