"""How a kernel becomes an operator of torch, and how it is launched; all operators of the package are made here.

Both files of operators import it. It knows no kernel, and imports no triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

NAMESPACE = "md3"
LAUNCHES: dict[str, int] = {}  # kernels that an operator launches, by its name
# For compilers: the fake forms hold, and what the kernels are given must keep its layout.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_library = Library(NAMESPACE, "DEF")  # lives as long as the process: torch forgets the operators with it


def operator(schema: str, launches: int, fake: Callable[..., object]) -> Callable[[Callable[..., object]], None]:
    """Register the decorated function as the operator of `schema` on CUDA and on the CPU (the interpreter)."""
    name = schema.partition("(")[0]

    def register(implementation: Callable[..., object]) -> None:
        _library.define(schema, tags=_TAGS)
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        LAUNCHES[f"{NAMESPACE}::{name}"] = launches

    return register


def launch(
    kernel: Any, grid: tuple[int, ...], first: Tensor, *others: object, warps: int, stages: int = 3, **constants: float
) -> None:
    """Launch a kernel on the current stream of the device that its first argument is on.

    Products and sums are fused as in every release of Triton up to 3.9.
    """
    with torch.cuda.device_of(first):  # Triton asks for the current device; a process may have engines on two
        kernel[grid](first, *others, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
