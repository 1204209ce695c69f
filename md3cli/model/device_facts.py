"""What this machine offers a model: for `md3 doctor`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from md3cli.model.gpu.availability import kernel_fault, triton_version
from md3cli.model.load import choose_device, choose_dtype
from md3cli.model.memory import free_bytes

LARGE_MODEL_BYTES = 18 * 10**9  # the real one in 16 bits


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """`dtype` is what `auto` means on this device for the real model; `free_bytes` is the device's memory.

    `triton` is its version, empty where it is not installed or not used; `kernel_fault` what keeps the CUDA kernels
    from running on the device, in words.
    """

    torch_version: str
    device: str
    name: str
    dtype: str
    num_threads: int
    free_bytes: int
    triton: str = ""
    kernel_fault: str | None = None


def device_facts(device: str = "auto") -> DeviceFacts:
    """The facts about `device`.

    Raises:
        ConfigError: no such device here.
    """
    chosen = choose_device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type
    dtype = str(choose_dtype("auto", chosen, LARGE_MODEL_BYTES)).removeprefix("torch.")
    facts = DeviceFacts(torch.__version__, str(chosen), name, dtype, torch.get_num_threads(), free_bytes(chosen))
    if chosen.type == "cuda":
        facts = replace(facts, triton=triton_version(), kernel_fault=kernel_fault(chosen))
    return facts
