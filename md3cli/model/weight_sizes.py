"""How large a checkpoint's weights become in memory, and whether a CUDA device holds them. From headers only."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from operator import itemgetter

import torch

from md3cli.errors import ConfigError
from md3cli.model.checkpoint_plan import CheckpointPlan
from md3cli.model.low_bit_loading import NONE, STORED, has_low_bits, low_bit_of
from md3cli.model.memory import least_room
from md3cli.model.name_tables import INT4_GROUP, Slot
from md3cli.model.quantised import LowBit

_SCALE_BYTES = 4  # scales and zero points are float32


def weight_bytes(plan: CheckpointPlan, quant: str, dtype: torch.dtype) -> int:
    """Bytes of all weights as `--quant` holds them, the plain ones in `dtype`; in float32 all are plain."""
    return sum(_slot_bytes(slot, quant, dtype) for slot in plan.slots)


def _slot_bytes(slot: Slot, quant: str, dtype: torch.dtype) -> int:
    count = prod(slot.shape)
    match low_bit_of(slot, quant) if dtype is not torch.float32 else None:
        case None:
            return count * dtype.itemsize
        case LowBit.INT4:
            return count // 2 + count // INT4_GROUP * 2 * _SCALE_BYTES
        case LowBit.INT8 | LowBit.FP8:
            return count + count // slot.shape[-1] * _SCALE_BYTES


def check_weights_fit(
    plan: CheckpointPlan,
    name: str,
    *,
    quant: str,
    dtype: torch.dtype,
    max_context: int,
    device: torch.device,
    free: int,
) -> None:
    """Nothing where the weights and one picture's work fit into `free` bytes of `device`.

    Args:
        name: the model, as the user calls it.
        quant: as `--quant`.

    Raises:
        ConfigError: they do not fit; names what is needed, what is free and the largest form that fits.
    """

    def fits(size: int, kind: torch.dtype) -> bool:
        return size + least_room(plan.config, kind, max_context) <= free

    needed = weight_bytes(plan, quant, dtype)
    if fits(needed, dtype):
        return
    fitting = [(size, flags) for flags, size, kind in _other_forms(plan, quant, dtype) if fits(size, kind)]
    advice = "use a card with more memory"
    if fitting:
        size, flags = max(fitting, key=itemgetter(0))  # of equals the first
        advice = f"use {flags} ({size / 1e9:.1f} GB)"
    room = least_room(plan.config, dtype, max_context)
    raise ConfigError(
        f"{name} {_form(plan, quant, dtype)} takes {needed / 1e9:.1f} GB and {room / 1e9:.1f} GB to work in, "
        f"and {device} has {free / 1e9:.1f} GB free: {advice}, or --device cpu"
    )


def _form(plan: CheckpointPlan, quant: str, dtype: torch.dtype) -> str:
    if dtype is torch.float32 or not has_low_bits(plan, quant):
        return f"in {8 * dtype.itemsize} bits"
    return "as stored" if quant == STORED else f"in {quant}"


def _other_forms(plan: CheckpointPlan, quant: str, dtype: torch.dtype) -> Iterator[tuple[str, int, torch.dtype]]:
    """What else can be asked for: (the options that say it, bytes of the weights, dtype of the activations)."""
    half = torch.bfloat16 if dtype is torch.float32 else dtype
    shorter = "--dtype auto" if dtype is torch.float32 else ""
    for other in dict.fromkeys((quant, STORED, NONE, LowBit.INT8, LowBit.INT4)):
        flags = " ".join(filter(None, (shorter, f"--quant {other}" if other != quant else "")))
        if flags:
            yield flags, weight_bytes(plan, other, half), half
