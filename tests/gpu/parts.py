"""Which parts there are, in their order, and how long each may take."""

from __future__ import annotations

from dataclasses import dataclass

GROUPED = "grouped_mm"  # torch's own product of experts, timed beside ours
TILES = "tiles"  # our products with other tiles
STEP_MS = "step_ms"  # what `stages` notes of bf16, by rows: what the steps of other weights are compared with


@dataclass(frozen=True)
class Part:
    """One part: `measure(run)` of `module` in a process of its own, or in one for each kernel (`is_by_kernel`).

    With less than `least_s` seconds of the budget left a process is not started; after `most_s` it is killed
    and has failed; after `most_all_s` the part's other kernels are left out. Seconds are those on a GPU;
    those that end in `cpu_s` are a CPU's. Without `runs_kernels` nothing need be compiled for it. `at_once` is how
    many processes of kernels may share the device: several, where nothing is timed. `also` are what a part
    by kernel measures behind the kernels. An extra part is run where `--only` names it.
    """

    name: str
    module: str
    least_s: float
    most_s: float
    least_cpu_s: float = 4.0
    most_cpu_s: float = 180.0
    is_by_kernel: bool = False
    most_all_s: float = 120.0
    most_all_cpu_s: float = 300.0
    runs_kernels: bool = True
    at_once: int = 1
    also: tuple[str, ...] = ()
    needs_cuda: bool = False
    is_extra: bool = False

    def least(self, device: str) -> float:
        return self.least_s if device == "cuda" else self.least_cpu_s

    def most(self, device: str) -> float:
        return self.most_s if device == "cuda" else self.most_cpu_s

    def most_all(self, device: str) -> float:
        return self.most_all_s if device == "cuda" else self.most_all_cpu_s


FACTS = Part("facts", "gpu.facts", 5, 60)
WARM_UP = Part("warm_up", "gpu.warm_up", 15, 60)
# Kernels that are wrong are replaced in all that follows, so they come first. Then what the goals speak of, by weight:
# when a budget ends early, what is missing is worth least. How fast each kernel is, is known from earlier runs.
PARTS = (
    Part("limits", "gpu.limits", 8, 40, runs_kernels=False),
    Part("kernels", "gpu.kernels", 8, 40, is_by_kernel=True, most_all_s=60, at_once=12),
    Part("stages", "gpu.stages", 12, 60),
    Part("engine", "gpu.workloads", 15, 90),
    Part("lowbits", "gpu.lowbits", 15, 100),
    Part("files", "gpu.files", 20, 80),
    Part("sameness", "gpu.sameness", 12, 60),
    Part("resizing", "gpu.resizing", 8, 40),
    Part("golden", "gpu.golden", 12, 80),
    Part("commands", "gpu.commands", 20, 90),
    Part("speeds", "gpu.speeds", 6, 40, is_by_kernel=True, also=(GROUPED,), needs_cuda=True),
    Part(TILES, "gpu.tile_sweep", 30, 240, needs_cuda=True, is_extra=True),
)
