"""Whether the kernels of this package can run here, and what to do where they cannot: one line each.

Only the loader of engines asks, and no card is needed to ask: Triton is not imported until a CUDA device is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import warnings

import torch

from md3cli.errors import ConfigError

LEAST_TRITON = (3, 4)  # torch 2.11 brings 3.6; 3.9 is the newest that was tried
LEAST_CAPABILITY = (7, 5)  # compute capability of a T4; Triton compiles for nothing older
WITHOUT_GPU = "or use --device cpu"


def require_kernels(device: torch.device) -> None:
    """Raise a ConfigError that says what to do where the kernels do not run on this CUDA device."""
    if (fault := kernel_fault(device)) is not None:
        raise ConfigError(f"{device}: {fault}")


def kernel_fault(device: torch.device) -> str | None:
    """Say what keeps the kernels from running on this CUDA device, and what to do; None where nothing does."""
    if (fault := cuda_fault()) is not None:
        return fault
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {found}, and {least} is needed; take a newer card, {WITHOUT_GPU}"
    return _triton_fault()


def cuda_fault() -> str | None:
    """Say why torch can use no CUDA device here, and what to do; None where it can use one."""
    if is_cuda_available():
        return None
    if sys.platform == "darwin":
        return "Macs have no CUDA; use --device mps"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch, {WITHOUT_GPU}"
    try:
        torch.cuda.init()
        reason = "torch finds no CUDA device"
    except (RuntimeError, AssertionError) as error:
        reason = str(error)
    if "too old" in reason:
        return (
            f"the NVIDIA driver is too old for torch {torch.__version__}; update the driver, install a torch "
            f"for an older CUDA, {WITHOUT_GPU}"
        )
    return f"{_first_sentence(reason)}; see what nvidia-smi says, {WITHOUT_GPU}"


def is_cuda_available() -> bool:
    """Ask torch without its warnings of several lines; `cuda_fault` says the same in one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def triton_version() -> str:
    """Return the version of the Triton that is installed; empty where none can be imported."""
    try:
        return str(importlib.import_module("triton").__version__)
    except (ImportError, OSError):  # a damaged installation fails in the loader of its library
        return ""


def _triton_fault() -> str | None:
    version = triton_version()
    if not version:
        if sys.platform == "win32":
            return f"the kernels need triton, which Windows does not have; run md3 in WSL 2, {WITHOUT_GPU}"
        if importlib.util.find_spec("triton") is None:
            return "the kernels need triton; pip install triton"
        return "triton cannot be imported; pip install --force-reinstall triton"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        return f"triton {version} is too old, the kernels need {least}; pip install --upgrade triton"
    return _launcher_fault()


def _launcher_fault() -> str | None:
    try:  # Triton compiles its launcher in C when it is first used, unless its cache holds one
        _ = importlib.import_module("triton").runtime.driver.active
    except (OSError, RuntimeError, AssertionError, ImportError, subprocess.CalledProcessError) as error:
        is_compiler = isinstance(error, subprocess.CalledProcessError)  # names a command of many lines
        reason = "its launcher does not compile" if is_compiler else _first_sentence(str(error))
        return f"triton cannot start ({reason}); install a C compiler and Python's headers: apt install gcc python3-dev"
    return None


def _first_sentence(text: str) -> str:
    return re.split(r"\.\s|\n|\.$", text.strip(), maxsplit=1)[0]
