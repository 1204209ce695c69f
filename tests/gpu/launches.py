"""How many kernels and copies a pass asks of the device, as torch's profiler sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Launches:
    """Kernels, and copies between host and device; on a CPU `kernels` are the operators that were called."""

    kernels: int
    to_device: int = 0
    to_host: int = 0


@torch.inference_mode()
def count_launches(run: Callable[[], object], device: torch.device) -> Launches | None:
    """Run once to warm up and once under the profiler; None where that sees nothing (it may need permission)."""
    run()
    if device.type != "cuda":
        with profile(activities=[ProfilerActivity.CPU]) as found:
            run()
        return Launches(sum(event.cpu_parent is None for event in found.events()))
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize(device)
    return launches_in(
        event.name for event in found.events() if event.device_type.name == "CUDA" and not event.is_user_annotation
    )


def launches_in(names: Iterable[str]) -> Launches | None:
    """Counts by the names of what the device did: `Memcpy HtoD (Pinned -> Device)` is a copy, most are kernels."""
    done = list(names)
    if not done:
        return None
    copies = [name for name in done if name.startswith(("Memcpy", "Memset"))]
    return Launches(
        kernels=len(done) - len(copies),
        to_device=sum("HtoD" in name for name in copies),
        to_host=sum("DtoH" in name for name in copies),
    )
