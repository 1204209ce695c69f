"""What an engine takes of its machine: memory, planned and measured, CPU threads, and copies that nothing waits for.

Also says whether an error means there was too little memory. Knows the network's sizes, and nothing of generations,
slots or pictures.

A copy between a CUDA device and ordinary memory makes the host wait until the device has done all it was told before. A
copy from or to pinned memory is put in line like a kernel, and the host goes on. torch keeps pinned memory for its next
user and knows which copies still read it, so a pinned tensor may be dropped as soon as its copy is in line. On every
other device these functions copy plainly.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from md3cli.errors import ConfigError
from md3cli.model.network.config import HEAD_DIM, ModelConfig
from md3cli.system import most_memory_used

MAX_BATCH = {"cpu": 32, "cuda": 128, "mps": 32}
SMALL_SLOT_BYTES = 8 << 20  # of a slot; a smaller model's step is spent on calling operators
MAX_BATCH_OF_SMALL = 64
KV_SHARE = 0.5  # of the free memory goes to slots; the rest is activations and room

# What a CUDA device holds beside the weights: counted from the passes at the real model's sizes, not yet measured.
WORKSPACE_BYTES = 600_000_000  # the pool of CUDA graphs, workspaces of cuBLAS
REMEMBERED_BYTES = 256 << 20  # embeddings of pictures that may come again (`encoder.MEMORY_BYTES`)
VISION_WIDTHS = 12.5  # widths of the encoder alive for each patch of a micro-batch: 21 MB a crop in 16 bits
PREFILL_WIDTHS = 29.3  # widths of the decoder alive for each token of a prefill pass: 120 kB in 16 bits
SLOT_POSITIONS = 1536  # a picture's prefix, a prompt and nearly every answer; longer ones are the engine's business
SLOT_SHARE = 0.9  # of what is left; the rest is pictures on their way (7 MB a slot: crops, embeddings) and fragments
# Of parts in a block, in elements. A kernel is compiled once more for a pointer that is no multiple of 16 bytes.
ALIGNMENT = 16
# Errors of the CUDA libraries, which torch passes on as RuntimeError: their own allocations failed (cuDNN 8, 9).
LIBRARIES_OUT_OF_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)


class PassSizes(NamedTuple):
    """Crops of a vision micro-batch and pictures of a prefill pass, taken where at least `least_slots` fit beside."""

    crops: int
    pictures: int
    least_slots: int


# Large passes read the experts' weights once for many pictures; they serve an engine of many slots only.
LARGE_PASSES = PassSizes(36, 16, least_slots=16)
SMALL_PASSES = (PassSizes(9, 1, least_slots=4), PassSizes(3, 1, least_slots=1), PassSizes(1, 1, least_slots=1))


@contextlib.contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Let operations use this many threads inside; None changes nothing."""
    before = torch.get_num_threads()
    if number is None or number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How much is done at once: generations in flight, crops of a vision micro-batch, tokens of a prefill pass.

    None leaves a size to its part of the engine, which knows a usual one for each kind of device.
    """

    slots: int
    max_crops: int | None = None
    prefill_tokens: int | None = None


class Sizes(NamedTuple):
    """The sizes of an engine that can be made smaller when memory runs out."""

    batch_size: int
    prefill_tokens: int
    max_crops: int

    def fewer(self, planned: Sizes) -> Sizes | None:
        """Return half the batch, which makes room for passes as `planned`; None where one generation is all of it."""
        return planned._replace(batch_size=self.batch_size // 2) if self.batch_size > 1 else None

    def smaller(self, planned: Sizes, prefix_len: int, device_type: str) -> Sizes | None:
        """Return what to try next after running out of memory; None where nothing is left to give up.

        The passes of a GPU are large, and halving them costs little: they go down to one picture's prefix and one
        crop before the batch is halved. Elsewhere first the batch is halved, then the vision micro-batch.
        """
        if device_type == "cuda":
            tokens = min(self.prefill_tokens, max(prefix_len, self.prefill_tokens // 2))
            halved = Sizes(self.batch_size, tokens, max(1, self.max_crops // 2))
            return halved if halved != self else self.fewer(planned)
        if self.batch_size > 1:
            return self._replace(batch_size=self.batch_size // 2)
        return self._replace(max_crops=self.max_crops // 2) if self.max_crops > 1 else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an allocation that failed, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return any(sign in text for sign in ("can't allocate memory", "out of memory", *LIBRARIES_OUT_OF_MEMORY))


def shortage(error: BaseException) -> str:
    """Return what an error says of a failed allocation, without the paragraph on torch's settings behind it."""
    text = str(error) or type(error).__name__
    return ". ".join(text.splitlines()[0].split(". ")[:2]).removesuffix(".")


def release(device: torch.device) -> None:
    """Give back what a CUDA device holds for nobody: a model that was dropped, what loading took for a while."""
    if device.type == "cuda":
        gc.collect()  # parts of a model refer to themselves: its weights stay until cycles are looked for
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Return the memory that can be allocated on a device now, in bytes."""
    if device.type == "cuda":
        release(device)
        free, _ = torch.cuda.mem_get_info(device)  # makes the context, 0.5 GB, where there is none yet
        return int(free)
    if device.type == "mps":
        return max(0, int(torch.mps.recommended_max_memory()) - int(torch.mps.current_allocated_memory()))
    available = _proc_bytes("meminfo", "MemAvailable")
    return available if available is not None else 4 * 2**30  # no way to ask (macOS, Windows): a small machine


def _proc_bytes(file: str, name: str) -> int | None:
    """Read a number of a file under /proc; None where the system has none."""
    try:
        with open(f"/proc/{file}", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def slot_bytes(config: ModelConfig, num_positions: int, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of one slot."""
    return 2 * config.text.n_layers * config.text.n_heads * HEAD_DIM * num_positions * dtype.itemsize


def plan_memory(
    asked: int | None, config: ModelConfig, dtype: torch.dtype, device: torch.device, max_context: int
) -> MemoryPlan:
    """Plan what fits on `device` beside the model that is there: `asked` slots, or fewer with a warning."""
    if device.type == "cuda":
        plan = plan_cuda(free_bytes(device), config, dtype, max_context, asked=asked)
    else:
        plan = MemoryPlan(_slots_by_share(asked, config, dtype, device, max_context))
    if asked is not None and asked > plan.slots:
        warnings.warn(f"--batch-size {asked}: memory holds {plan.slots}; that many are used", stacklevel=2)
    return plan


def _slots_by_share(
    asked: int | None, config: ModelConfig, dtype: torch.dtype, device: torch.device, max_context: int
) -> int:
    """Return the slots of a CPU or Apple's GPU: as asked, or a power of two up to `MAX_BATCH`; never more than fit."""
    usual = config.prefix_len + 512  # positions of a slot
    fitting = int(free_bytes(device) * KV_SHARE) // slot_bytes(config, min(max_context, usual), dtype)
    fitting = max(1, fitting)
    if asked is not None:
        return min(asked, fitting)
    is_small = slot_bytes(config, usual, dtype) < SMALL_SLOT_BYTES
    limit = max(MAX_BATCH.get(device.type, MAX_BATCH["cpu"]), MAX_BATCH_OF_SMALL if is_small else 0)
    return 1 << (min(fitting, limit).bit_length() - 1)


def plan_cuda(
    free: int, config: ModelConfig, dtype: torch.dtype, max_context: int, *, asked: int | None = None
) -> MemoryPlan:
    """Plan for a CUDA device with `free` bytes beside the weights and the context.

    First comes what passes need, then as many slots as the rest holds, up to `asked`.

    Raises:
        ConfigError: not even one slot, one crop and one picture fit.
    """
    limit = MAX_BATCH["cuda"] if asked is None else asked
    slot = _cuda_slot_bytes(config, dtype, max_context)
    for sizes in (LARGE_PASSES, *SMALL_PASSES) if limit >= LARGE_PASSES.least_slots else SMALL_PASSES:
        fitting = int((free - pass_bytes(config, sizes, dtype)) * SLOT_SHARE) // slot
        if fitting >= sizes.least_slots:
            return MemoryPlan(min(fitting, limit), sizes.crops, sizes.pictures * config.prefix_len)
    raise ConfigError(
        f"{free / 1e9:.1f} GB of GPU memory are free beside the model and one picture at a time takes "
        f"{least_room(config, dtype, max_context) / 1e9:.1f} GB: use --quant int4, a smaller --max-context, or a card "
        "with more memory"
    )


def pass_bytes(config: ModelConfig, sizes: PassSizes, dtype: torch.dtype) -> int:
    """Return the bytes a CUDA device holds besides weights and slots while passes of these sizes run."""
    values = sizes.crops * config.vision.num_patches * config.vision.enc_dim * VISION_WIDTHS
    values += sizes.pictures * config.prefix_len * config.text.dim * PREFILL_WIDTHS
    return WORKSPACE_BYTES + REMEMBERED_BYTES + int(values * dtype.itemsize)


def least_room(config: ModelConfig, dtype: torch.dtype, max_context: int) -> int:
    """Return the bytes a CUDA device needs beside the weights to answer anything: one slot, one crop, one picture."""
    slot = _cuda_slot_bytes(config, dtype, max_context)
    return pass_bytes(config, SMALL_PASSES[-1], dtype) + int(slot / SLOT_SHARE)


def _cuda_slot_bytes(config: ModelConfig, dtype: torch.dtype, max_context: int) -> int:
    return slot_bytes(config, min(max_context, SLOT_POSITIONS), dtype)


def peak_rss() -> int:
    """Return the most memory this process ever held (since the last reset, where the system can), in bytes."""
    peak = _proc_bytes("self/status", "VmHWM")
    return peak if peak is not None else most_memory_used()


def reset_peak_rss() -> None:
    """Start counting the peak anew, where the system can (Linux)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


# -- copies ----------------------------------------------------------------------------------------


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

    Return None for a device other than CUDA, which has done it all already.
    """
    if device.type != "cuda":
        return None
    wait: Callable[[], None] = torch.cuda.current_stream(device).record_event().synchronize
    return wait
