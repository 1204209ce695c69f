"""Part `kernels`: each own kernel against its twin in float64, at real sizes.

The cases are those of tests/gpu/triton_cases.py. Outputs lie in memory that was filled with NaN (integers:
their largest value), so that a value nobody wrote is seen. One process for each kernel and, on a card, form
of weight, several at a time: the first that reads beyond its tensors takes no other with it. On a CPU, Triton's
interpreter runs a few rows; more of them are the interpreter's tests' business.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch

from .child import Run

MOST_INTERPRETED_ROWS = 8


def kernel_names(run: Run) -> list[str]:
    """One argument for each child of this part: a kernel, and its form of weight where it has several."""
    return list(dict.fromkeys(kernel_of(run, case) for case in all_cases(run)))


def all_cases(run: Run) -> list[Any]:
    """The `KernelCase`s for this device."""
    from gpu import triton_cases  # imports triton, which a CPU may be without

    found = list(triton_cases.cases(run.config, run.device))
    return found if run.is_cuda else [case for case in found if case.rows <= MOST_INTERPRETED_ROWS]


def kernel_of(run: Run, case: Any) -> str:
    """`up_gate int4` of the case `up_gate int4 bfloat16, 64 rows`; in the interpreter `up_gate`, for fewer starts."""
    return str(case.name).partition(f" {case.dtype}")[0] if run.is_cuda else str(case.kernel)


def measure(run: Run) -> None:
    """All cases of the kernel that the argument names."""
    for case in cases_of(run):
        with run.if_it_fits(case.name):
            check_case(run, case)


def cases_of(run: Run) -> list[Any]:
    """The cases of the kernel that the argument names."""
    return [case for case in all_cases(run) if kernel_of(run, case) == run.argument]


@torch.inference_mode()
def check_case(run: Run, case: Any) -> None:
    """One case on fresh random inputs; further from the twin than the case allows is a failure."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    prepared = case.make()
    with poisoned():
        found = prepared.run()
    error = worst_error(found, prepared.expected())
    run.figure(f"{case.name}: error", error, "relative", dtype=case.dtype)
    if not error <= case.tolerance:
        run.fail(f"{case.name}: relative error {error:.3g}, allowed {case.tolerance:g}")


class poisoned:
    """New tensors are filled with NaN, or the largest integer, until the end of the block.

    Torch's deterministic mode does that (`torch.utils.deterministic.fill_uninitialized_memory`, on by default).
    """

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(False)


def worst_error(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """The largest relative error of any output; infinite where one is not finite or of another shape."""
    return max(errors_of(found, expected))


def errors_of(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> Iterator[float]:
    for one, wanted in zip(found, expected, strict=True):
        if one.shape != wanted.shape:
            yield float("inf")
            continue
        exact = wanted.double()
        difference = (one.to(exact.device).double() - exact).norm() / exact.norm().clamp_min(1e-30)
        yield float(difference) if bool(difference.isfinite()) else float("inf")
