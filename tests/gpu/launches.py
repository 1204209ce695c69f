"""How many kernels and copies a pass asks of the device, as torch's profiler sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Launches:
    """Kernels, and copies between host and device; on a CPU `kernels` are the operators that were called."""

    kernels: int
    to_device: int = 0
    to_host: int = 0


@torch.inference_mode()
def count_launches(run: Callable[[], object], device: torch.device) -> Launches:
    """Run once to warm up, once under the profiler."""
    run()
    if device.type != "cuda":
        with profile(activities=[ProfilerActivity.CPU]) as found:
            run()
        return Launches(sum(event.cpu_parent is None for event in found.events()))
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize(device)
    names = [event.name for event in found.events() if event.device_type == DeviceType.CUDA]
    copies = [name for name in names if name.startswith(("Memcpy", "Memset"))]
    return Launches(
        kernels=len(names) - len(copies),
        to_device=sum("HtoD" in name for name in copies),
        to_host=sum("DtoH" in name for name in copies),
    )
