"""Numbers on their way to the device and tensors on their way back, without the host waiting for either.

A copy between a CUDA device and ordinary memory makes the host wait until the device has done all it
was told before. A copy from or to pinned memory is put in line like a kernel, and the host goes on.
torch keeps pinned memory for its next user and knows which copies still read it, so a pinned tensor
may be dropped as soon as its copy is in line. On every other device these functions copy plainly.

Knows nothing of generations, slots or pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Of parts in a block, in elements. A kernel is compiled once more for a pointer that is no multiple of 16 bytes.
ALIGNMENT = 16


def send(
    device: torch.device, ints: Sequence[Sequence[int]], reals: Sequence[Sequence[float]] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """Copy lists of numbers to `device`: all `ints` in one int64 block, all `reals` in one float32 block.

    Returns the lists, in order, as tensors [length of the list]: views of the two blocks on the device.
    """
    return _send(device, ints, torch.int64), _send(device, reals, torch.float32)


def _send(device: torch.device, parts: Sequence[Sequence[float]], dtype: torch.dtype) -> list[Tensor]:
    flat: list[float] = []
    starts = []
    for part in parts:
        starts.append(len(flat))
        flat += part
        flat += [0] * (-len(flat) % ALIGNMENT)
    if not flat:
        return [torch.empty(0, dtype=dtype, device=device) for _ in parts]
    staged = staging((len(flat),), dtype, device)
    staged.copy_(torch.tensor(flat, dtype=dtype))
    block = send_staged(staged, device)
    return [block[start : start + len(part)] for start, part in zip(starts, parts, strict=True)]


def staging(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an unfilled tensor on the host, for `send_staged` to copy to `device`: pinned where that is CUDA."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")


def send_staged(staged: Tensor, device: torch.device) -> Tensor:
    """Copy a filled tensor of `staging` to `device`; the host must not write to it again."""
    # Only CUDA: torch's copies to Apple's GPU do not keep a source alive that the caller drops.
    return staged.to(device, non_blocking=device.type == "cuda")


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy any tensor to `device`."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return send_staged(staging(tensor.shape, tensor.dtype, device).copy_(tensor), device)


def start_download(tensor: Tensor) -> Tensor:
    """Begin to copy a tensor to the host; read the result only after a later `milestone` of its device is reached.

    A tensor that is not on CUDA comes back as it is.
    """
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def milestone(device: torch.device) -> Callable[[], None] | None:
    """Return a function that waits until `device` has done everything it was told before this call.

    None: it has done so already, as a device other than CUDA.
    """
    if device.type != "cuda":
        return None
    wait: Callable[[], None] = torch.cuda.current_stream(device).record_event().synchronize
    return wait
