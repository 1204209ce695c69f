"""The first child: what this machine is, whether the check can run on it, and which kernels there are."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from md3cli.model.kernels.availability import kernel_fault, triton_version

from .child import Run
from .kernels import kernel_names

LEAST_TORCH = (2, 11)
LEAST_FREE_GB = {"mini": 1.0, "mid": 6.0, "full": 23.0}  # full: 18.5 of weights, slots and activations
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def measure(run: Run) -> None:
    """Names and versions; `problem` where the check makes no sense here, in one line that says what to do."""
    run.note("torch", torch.__version__)
    run.note("python", platform.python_version())
    run.note("triton", triton_version())
    problem = too_old()
    if problem is None and run.is_cuda:
        problem = kernel_fault(run.device) or too_small(run)
    if problem is not None:
        run.note("problem", problem)
        return
    run.note("card", card_name(run.device))
    if run.is_cuda:
        run.note("free_bytes", torch.cuda.mem_get_info(run.device)[0])
        run.note("cuda", torch.version.cuda)
        run.note("capability", "sm_{}{}".format(*torch.cuda.get_device_capability(run.device)))
        run.note("driver", driver())
    note_kernels(run)


def note_kernels(run: Run) -> None:
    """The names of the kernels; why there are none, where there should be some."""
    if not triton_version():  # a GPU's `kernel_fault` has said so
        run.note("kernels", [])
        return
    try:
        run.note("kernels", kernel_names(run))
    except Exception as error:  # noqa: BLE001  a Triton that does not work costs its part, not the check
        run.note("kernels_problem", f"{type(error).__name__}: {str(error).splitlines()[0]}")


def too_old() -> str | None:
    """Torch's version, where it is below what md3 needs."""
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found >= LEAST_TORCH:
        return None
    return f"torch {torch.__version__} is too old; install torch>={LEAST_TORCH[0]}.{LEAST_TORCH[1]}"


def too_small(run: Run) -> str | None:
    """That the card has not the memory for the network, and which it has it for."""
    free_gb = torch.cuda.mem_get_info(run.device)[0] / 1e9
    if free_gb >= LEAST_FREE_GB[run.config_name]:
        return None
    smaller = "mid" if free_gb > LEAST_FREE_GB["mid"] else "mini"
    return f"{free_gb:.1f} GB are free on the card, too few for --config {run.config_name}; use --config {smaller}"


def card_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine())


def driver() -> str:
    """The driver's version, where it says so (Linux)."""
    try:
        return DRIVER_FILE.read_text(encoding="ascii").splitlines()[0]
    except (OSError, IndexError):
        return "unknown"
