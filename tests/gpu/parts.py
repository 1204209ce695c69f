"""Which parts there are, in their order, and how long each may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part: `measure(run)` of `module` in a process of its own, or in one for each kernel (`is_by_kernel`).

    With less than `least_s` seconds of the budget left a process is not started; after `most_s` it is killed
    and has failed; after `most_all_s` the part's other kernels are left out. Seconds are those on a GPU;
    `least_cpu_s` and `most_cpu_s` are a CPU's. Without `runs_kernels` nothing need be compiled for it.
    """

    name: str
    module: str
    least_s: float
    most_s: float
    least_cpu_s: float = 4.0
    most_cpu_s: float = 180.0
    is_by_kernel: bool = False
    most_all_s: float = 120.0
    runs_kernels: bool = True

    def least(self, device: str) -> float:
        return self.least_s if device == "cuda" else self.least_cpu_s

    def most(self, device: str) -> float:
        return self.most_s if device == "cuda" else self.most_cpu_s


FACTS = Part("facts", "gpu.facts", 5, 60)
WARM_UP = Part("warm_up", "gpu.warm_up", 15, 60)
PARTS = (
    Part("limits", "gpu.limits", 8, 40, runs_kernels=False),
    Part("golden", "gpu.golden", 15, 100),
    Part("kernels", "gpu.kernels", 8, 40, is_by_kernel=True),
    Part("resizing", "gpu.resizing", 12, 40),
    Part("stages", "gpu.stages", 15, 90),
    Part("engine", "gpu.workloads", 20, 100),
    Part("lowbits", "gpu.lowbits", 20, 100),
    Part("files", "gpu.files", 20, 80),
)
