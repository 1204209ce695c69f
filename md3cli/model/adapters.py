"""LoRA adapters merged into a loaded network: the vendor's layout and folders that peft saved.

Both are read from safetensors, without peft, as low-rank changes of canonical weights, and added to
them in float32 before any kernel takes the weights over; afterwards the network computes as if it had
been trained so.
Sources: Moondream 3 specification, section 16; peft's LoRA layout (`lora_A`, `lora_B`, alpha / r; a stack
of expert matrices keeps its factors interleaved).

Shape suffixes: X experts, R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from md3cli.errors import CheckpointError
from md3cli.model.config import ModelConfig
from md3cli.model.moondream import Moondream3
from md3cli.model.tensor_table import Shape, expected_tensors

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_VENDOR_TEXT = re.compile(r"(?:^|.*\.)(dense|moe)\.(\d+)\.(up|down)_(a|b)(?:\.weight)?")
_VENDOR_VISION = re.compile(r"(?:^|.*\.)vision_lora\.proj_fc2\.(up|down)(?:\.weight)?")
_PEFT_FACTOR = re.compile(r"(?:base_model\.)?(?:model\.)*((?:text|vision|region)\..+)\.lora_([AB])\.weight")
_PLAIN_NAME = re.compile(r"\^?[\w.]+")
# What a peft adapter may ask for beyond W + alpha / r · B · A, and what saying no to it looks like.
_PEFT_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
}
_NAMED_IN_ERRORS = 5


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of one weight: `scale · up · down`; of experts one for each, stacked."""

    weight: str  # canonical name
    up: Tensor  # [out, R] or [X, out, R]
    down: Tensor  # [R, in] or [X, R, in]
    scale: float


def merge_adapter(model: Moondream3, path: Path) -> None:
    """Add the adapter at `path` (a folder or a .safetensors file) to the weights of `model`.

    Raises:
        CheckpointError: no adapter there, one that is not understood, or of another model.
    """
    for change in read_adapter(path, model.config):
        parameter = model.get_parameter(change.weight)
        # A new tensor: the old one may be mapped from the checkpoint's file.
        parameter.data = merged(parameter.data, change)


def merged(weight: Tensor, change: LowRank) -> Tensor:
    """The changed weight, computed in float32 matrix by matrix, in the dtype it had."""
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    stacks = (t if t.dim() == 3 else t[None] for t in (weight, change.up, change.down, result))
    for old, up, down, new in zip(*stacks, strict=True):
        delta = change.scale * (up.to(old.device, torch.float32) @ down.to(old.device, torch.float32))
        new.copy_(old.float() + delta)
    return result


def read_adapter(path: Path, config: ModelConfig) -> list[LowRank]:
    """The changes an adapter makes to a network of this configuration.

    Raises:
        CheckpointError: as for `merge_adapter`.
    """
    file, settings = _find(path.expanduser())
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
    changes = _read_vendor(file, tensors, config) if settings is None else _read_peft(file, tensors, settings, config)
    if not changes:
        raise CheckpointError(f"{file} holds no adapter")
    shapes = expected_tensors(config, has_region_ln=True)
    for change in changes:
        _check(file, change, shapes)
    return changes


def _find(path: Path) -> tuple[Path, Mapping[str, Any] | None]:
    """The file of the weights, and peft's settings where peft wrote it."""
    if path.suffix in (".pt", ".pth", ".bin"):
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is opened, so it is refused; save its "
            "lora_state_dict with safetensors.torch.save_file and name that file"
        )
    if path.is_file():
        return path, None
    if not path.is_dir():
        raise CheckpointError(f"adapter {path}: no such folder or .safetensors file")
    if (path / PEFT_CONFIG).is_file():
        try:
            settings = json.loads((path / PEFT_CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path / PEFT_CONFIG} cannot be read: {error}") from error
        return path / PEFT_WEIGHTS, settings
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:_NAMED_IN_ERRORS]) or "none"
        raise CheckpointError(
            f"{path}: an adapter is {PEFT_CONFIG} and {PEFT_WEIGHTS}, or one .safetensors; found {found}"
        )
    return files[0], None


def _check(file: Path, change: LowRank, shapes: Mapping[str, Shape]) -> None:
    shape = shapes.get(change.weight)
    if shape is None or len(shape) < 2:
        raise CheckpointError(f"{file} changes {change.weight}, which this model does not have as a matrix")
    up, down = tuple(change.up.shape), tuple(change.down.shape)
    rank = up[-1]
    if up != (*shape[:-1], rank) or down != (*shape[:-2], rank, shape[-1]):
        raise CheckpointError(
            f"{file}: {change.weight} is {list(shape)} here, the adapter's factors are {list(up)} and {list(down)}; "
            "it was made for another model"
        )


def _unknown(file: Path, names: list[str]) -> CheckpointError:
    listed = ", ".join(names[:_NAMED_IN_ERRORS])
    more = f" and {len(names) - _NAMED_IN_ERRORS} more" if len(names) > _NAMED_IN_ERRORS else ""
    return CheckpointError(f"{file}: these tensors are not understood as an adapter of Moondream 3: {listed}{more}")


def _pair(file: Path, weight: str, factors: Mapping[str, Tensor], down: str, up: str) -> tuple[Tensor, Tensor]:
    if factors.keys() != {down, up}:
        raise CheckpointError(f"{file}: of the two factors for {weight} one is missing")
    return factors[down], factors[up]


# -- the vendor's layout ----------------------------------------------------------------------------


def _read_vendor(file: Path, tensors: Mapping[str, Tensor], config: ModelConfig) -> list[LowRank]:
    """Keys end in `dense.{i}.{up_a,…}` or `moe.{j}.{…}`, j counting from the first sparse layer; no scaling."""
    factors: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    first_sparse = config.text.moe.start_layer if config.text.moe is not None else config.text.n_layers
    for name, tensor in tensors.items():
        if text := _VENDOR_TEXT.fullmatch(name):
            kind, number, side, factor = text.groups()
            layer = int(number) + (first_sparse if kind == "moe" else 0)
            weight = f"text.blocks.{layer}.mlp.{'fc1' if side == 'up' else 'fc2'}.weight"
            factors.setdefault(weight, {})[factor] = tensor
        elif vision := _VENDOR_VISION.fullmatch(name):
            factor = "a" if vision[1] == "down" else "b"
            factors.setdefault("vision.proj_mlp.fc2.weight", {})[factor] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise _unknown(file, unknown)
    changes = []
    for weight, found in factors.items():
        down, up = _pair(file, weight, found, "a", "b")
        changes.append(LowRank(weight, up, down, 1.0))
    return changes


# -- peft's layout ----------------------------------------------------------------------------------


def _read_peft(
    file: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], config: ModelConfig
) -> list[LowRank]:
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: an adapter of type {settings.get('peft_type')}; only LORA can be merged")
    asked = [key for key, harmless in _PEFT_UNSUPPORTED.items() if settings.get(key) not in harmless]
    if asked:
        raise CheckpointError(
            f"{file}: {', '.join(asked)} in {PEFT_CONFIG} goes beyond plain LoRA, which is all md3 merges"
        )
    factors: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        match = _PEFT_FACTOR.fullmatch(name.replace(".base_layer", ""))
        if match is None:
            unknown.append(name)
        else:
            factors.setdefault(match[1], {})[match[2]] = tensor
    if unknown:
        raise _unknown(file, unknown)
    odd = [name for name in settings.get("alpha_pattern") or {} if not _PLAIN_NAME.fullmatch(name)]
    if odd:
        raise CheckpointError(f"{file}: alpha_pattern {odd[0][:80]!r} is no name of a module")
    shapes = expected_tensors(config, has_region_ln=True)
    changes = []
    for module, found in factors.items():
        weight = f"{module}.weight"
        down, up = _pair(file, weight, found, "A", "B")
        shape = shapes.get(weight, ())
        if len(shape) == 3 and len(down) % shape[0] == 0:
            down, up = _unstack(down, up, shape[0])
        changes.append(LowRank(weight, up, down, _peft_scale(settings, module, down.shape[-2])))
    return changes


def _unstack(down: Tensor, up: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """peft's factors of a stack, [X · R, in] and [out, R · X], as [X, R, in] and [X, out, R]."""
    return down.view(num_experts, -1, down.shape[-1]), up.view(up.shape[0], -1, num_experts).permute(2, 0, 1)


def _peft_scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / √r with `use_rslora`; alpha may be set apart for some modules."""
    own = [
        alpha
        for name, alpha in (settings.get("alpha_pattern") or {}).items()
        if f".model.{module}".endswith(f".{name.removeprefix('^')}")
    ]
    alpha = float(own[0] if own else settings.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
