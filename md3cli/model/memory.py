"""How much memory there is, and whether an error means there was too little."""

from __future__ import annotations

import contextlib
import sys
import warnings

import torch

from md3cli.model.config import HEAD_DIM, ModelConfig

MAX_BATCH = {"cpu": 32, "cuda": 128, "mps": 32}
SMALL_SLOT_BYTES = 8 << 20  # of a slot; a smaller model's step is spent on calling operators
MAX_BATCH_OF_SMALL = 64
KV_SHARE = 0.5  # of the free memory goes to slots; the rest is activations and room


def is_out_of_memory(error: BaseException) -> bool:
    """True for an allocation that failed on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "can't allocate memory" in text or "out of memory" in text


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated on a device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 * 2**30  # no way to ask (macOS, Windows): a small machine


def slot_bytes(config: ModelConfig, num_positions: int, dtype: torch.dtype) -> int:
    """Keys and values of one slot."""
    return 2 * config.text.n_layers * config.text.n_heads * HEAD_DIM * num_positions * dtype.itemsize


def fitting_slots(config: ModelConfig, dtype: torch.dtype, device: torch.device, max_context: int) -> int:
    """Sequences in flight whose keys and values fit beside the model.

    Slots are reckoned at the picture's prefix and 512 positions more (or the whole context).
    """
    positions = min(max_context, config.prefix_len + 512)
    return max(1, int(free_bytes(device) * KV_SHARE) // slot_bytes(config, positions, dtype))


def choose_batch_size(
    asked: int | None, config: ModelConfig, dtype: torch.dtype, device: torch.device, max_context: int
) -> int:
    """As asked, or a power of two up to `MAX_BATCH`; never more than fit, which is said where it was asked for."""
    fitting = fitting_slots(config, dtype, device, max_context)
    if asked is not None:
        if asked > fitting:
            warnings.warn(f"--batch-size {asked}: memory holds {fitting}; that many are used", stacklevel=2)
        return min(asked, fitting)
    is_small = slot_bytes(config, config.prefix_len + 512, dtype) < SMALL_SLOT_BYTES
    limit = max(MAX_BATCH.get(device.type, MAX_BATCH["cpu"]), MAX_BATCH_OF_SMALL if is_small else 0)
    return 1 << (min(fitting, limit).bit_length() - 1)


def peak_rss() -> int:
    """Most memory this process ever held (since the last reset, where the system can), in bytes."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Start counting the peak anew, where the system can (Linux)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
