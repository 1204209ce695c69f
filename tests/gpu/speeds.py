"""Part `speeds`: how long each own kernel takes at real sizes, and the share of the limit that binds it.

The cases are those of part `kernels`, which has compared them with their twins; here nothing else runs beside
them. On a card torch's grouped product and other tiles are timed behind the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .child import Run
from .kernels import cases_of
from .limits import Limits, limits_of
from .parts import GROUPED
from .timing import flusher, median_ms


def measure(run: Run) -> None:
    """All cases of the kernel that the argument names."""
    if run.argument == GROUPED:
        from .grouped import compare_with_grouped

        compare_with_grouped(run)
    else:
        limits, flush = limits_of(run), flusher(run.device)
        for case in cases_of(run):
            with run.if_it_fits(case.name):
                time_case(run, case, limits, flush)


@torch.inference_mode()
def time_case(run: Run, case: Any, limits: Limits, flush: Callable[[], object] | None) -> None:
    """Median of 20, and the share of the limit that binds the case."""
    prepared = case.make()
    ms = median_ms(prepared.launch or prepared.run, run.device, repeats=20, between=flush)
    floor_ms = 1e3 * max(prepared.flops / limits.product, prepared.bytes / limits.copy)
    run.figure(case.name, 1e3 * ms, "us", flops=prepared.flops, bytes=prepared.bytes)
    run.figure(f"{case.name}: share of the limit", floor_ms / ms, "share", flops=prepared.flops, bytes=prepared.bytes)
