"""What a CUDA device tells about itself: its memory, and how long it was busy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes of a CUDA device."""

    gpu_peak_bytes: int  # the most that tensors took at a time, weights included
    gpu_reserved_bytes: int  # the most that torch took from the driver to hold them
    gpu_outside_bytes: int  # not torch's: the context, libraries, other programs


def reset_gpu_peak(device: torch.device) -> None:
    """Let `gpu_memory` forget the most that was taken so far."""
    torch.cuda.reset_peak_memory_stats(device)


def gpu_memory(device: torch.device) -> GpuMemory:
    """Return the device's memory since `reset_gpu_peak`."""
    free, total = torch.cuda.mem_get_info(device)
    return GpuMemory(
        torch.cuda.max_memory_allocated(device),
        torch.cuda.max_memory_reserved(device),
        total - free - torch.cuda.memory_reserved(device),
    )


def busy_seconds(run: Callable[[], object]) -> float | None:
    """Return the seconds in which a CUDA device computed or copied while `run` ran; None where nothing was seen.

    The profiler makes `run` itself slower, but hardly what it sees of the device.
    """
    # Where steps were captured as graphs a profiler that lets go of the device and comes back may crash (CUDA 12).
    os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    with profile(
        activities=[ProfilerActivity.CUDA], acc_events=True
    ) as profiler:  # torch 2.11 warns without acc_events
        run()
    return covered(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    )


def covered(spans_us: Iterable[tuple[float, float]]) -> float | None:
    """Return the seconds that spans in microseconds cover together, overlaps once; None without spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans_us):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6 if total else None
