"""LoRA adapters merged into a loaded network: the vendor's layout and folders that peft saved.

Both are read from safetensors, without peft, as low-rank changes of canonical weights, and added to
them in float32 before any kernel takes the weights over; afterwards the network computes as if it had
been trained so.
Sources: Moondream 3 specification, section 16; peft's LoRA layout (`lora_A`, `lora_B`, alpha / r; a stack
of expert matrices keeps its factors interleaved).

Shape suffixes: X experts, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from md3cli.errors import CheckpointError
from md3cli.model.adapter_settings import PEFT_CONFIG, PEFT_WEIGHTS, PeftSettings
from md3cli.model.config import ModelConfig
from md3cli.model.misfits import local_path
from md3cli.model.moondream import Moondream3
from md3cli.model.safetensors_header import read_header
from md3cli.model.tensor_table import Shape, expected_tensors
from md3cli.model.weight_files import PICKLE_SUFFIXES

_VENDOR_TEXT = re.compile(r"(?:^|.*\.)(dense|moe)\.([0-9]{1,4})\.(up|down)_(a|b)(?:\.weight)?")
_VENDOR_VISION = re.compile(r"(?:^|.*\.)vision_lora\.proj_fc2\.(up|down)(?:\.weight)?")
_PEFT_FACTOR = re.compile(r"(?:base_model\.)?(?:model\.)*((?:text|vision|region)\..+)\.lora_([AB])\.weight")
_DTYPES = ("BF16", "F16", "F32", "F64")
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
    """The changed weight, computed in float32 matrix by matrix, in the dtype it had.

    Raises:
        CheckpointError: the sum is too large for the dtype.
    """
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    stacks = (t if t.dim() == 3 else t[None] for t in (weight, change.up, change.down, result))
    for old, up, down, new in zip(*stacks, strict=True):
        delta = change.scale * (up.to(old.device, torch.float32) @ down.to(old.device, torch.float32))
        new.copy_(old.float() + delta)
    if not result.isfinite().all():
        name = str(weight.dtype).removeprefix("torch.")
        raise CheckpointError(f"{change.weight} with the adapter is not finite in {name}; its factors are too large")
    return result


def read_adapter(path: Path, config: ModelConfig) -> list[LowRank]:
    """The changes an adapter makes to a network of this configuration.

    Raises:
        CheckpointError: as for `merge_adapter`.
    """
    file, settings = _find(path)
    tensors = _read_tensors(file)
    changes = _read_vendor(file, tensors, config) if settings is None else _read_peft(file, tensors, settings, config)
    if not changes:
        raise CheckpointError(f"{file} holds no adapter")
    shapes = expected_tensors(config, has_region_ln=True)
    for change in changes:
        _check(file, change, shapes)
    return changes


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """The factors in a file, whose header was judged first: real numbers, all finite."""
    for entry in read_header(file):
        if entry.dtype not in _DTYPES or not 2 <= len(entry.shape) <= 3 or 0 in entry.shape:
            raise CheckpointError(
                f"{file}: {entry.stored_name[:120]} is {entry.dtype} {list(entry.shape)}, expected a matrix (or one "
                f"for each expert) of {', '.join(_DTYPES)}"
            )
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{file}: {name[:120]} holds NaN or infinity; the training went wrong, or the file")
    return tensors


def _find(path: Path) -> tuple[Path, PeftSettings | None]:
    """The file of the weights, and peft's settings where peft wrote it."""
    if path.suffix in PICKLE_SUFFIXES and not path.is_dir():
        raise CheckpointError(_pickle_message(path))
    found_path = local_path(str(path))
    if found_path is None or not (found_path.is_file() or found_path.is_dir()):
        raise CheckpointError(f"adapter {str(path)[:200]}: no such folder or .safetensors file")
    path = found_path
    if path.is_file():
        if path.name not in (PEFT_CONFIG, PEFT_WEIGHTS) or not (path.parent / PEFT_CONFIG).is_file():
            return path, None
        path = path.parent
    if (path / PEFT_CONFIG).is_file():
        file, pickle = path / PEFT_WEIGHTS, path / f"{Path(PEFT_WEIGHTS).stem}.bin"
        if pickle.is_file() and not file.exists():
            raise CheckpointError(_pickle_message(pickle))
        return file, PeftSettings.read(path / PEFT_CONFIG)
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:_NAMED_IN_ERRORS]) or "none"
        raise CheckpointError(
            f"{path}: an adapter is {PEFT_CONFIG} and {PEFT_WEIGHTS}, or one .safetensors; found {found}"
        )
    return files[0], None


def _pickle_message(file: Path) -> str:
    return (
        f"{file} is a pickle, which can run code when it is opened, so it is refused; save its "
        "lora_state_dict with safetensors.torch.save_file and name that file"
    )


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
    listed = ", ".join(name[:120] for name in names[:_NAMED_IN_ERRORS])
    more = f" and {len(names) - _NAMED_IN_ERRORS} more" if len(names) > _NAMED_IN_ERRORS else ""
    lacks_config = not (file.parent / PEFT_CONFIG).exists() and any(map(_PEFT_FACTOR.fullmatch, names))
    advice = f"; they are peft's, whose {PEFT_CONFIG} must lie beside the file" if lacks_config else ""
    return CheckpointError(
        f"{file}: these tensors are not understood as an adapter of Moondream 3: {listed}{more}{advice}"
    )


def _put(file: Path, factors: dict[str, dict[str, Tensor]], weight: str, factor: str, tensor: Tensor) -> None:
    """Keep a factor of a weight's change; a file that has it under two names is refused."""
    if factor in factors.setdefault(weight, {}):
        raise CheckpointError(f"{file}: two changes of {weight} under different names; md3 merges one")
    factors[weight][factor] = tensor


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
            _put(file, factors, weight, factor, tensor)
        elif vision := _VENDOR_VISION.fullmatch(name):
            factor = "a" if vision[1] == "down" else "b"
            _put(file, factors, "vision.proj_mlp.fc2.weight", factor, tensor)
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


def _read_peft(file: Path, tensors: Mapping[str, Tensor], settings: PeftSettings, config: ModelConfig) -> list[LowRank]:
    factors: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        match = _PEFT_FACTOR.fullmatch(name.replace(".base_layer", ""))
        if match is None:
            unknown.append(name)
        else:
            _put(file, factors, match[1], match[2], tensor)
    if unknown:
        raise _unknown(file, unknown)
    shapes = expected_tensors(config, has_region_ln=True)
    changes = []
    for module, found in factors.items():
        weight = f"{module}.weight"
        down, up = _pair(file, weight, found, "A", "B")
        shape = shapes.get(weight, ())
        if len(shape) == 3 and down.dim() == up.dim() == 2 and len(down) % shape[0] == up.shape[1] % shape[0] == 0:
            down, up = _unstack(down, up, shape[0])
        changes.append(LowRank(weight, up, down, settings.scale(f"model.{module}", down.shape[-2])))
    return changes


def _unstack(down: Tensor, up: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """peft's factors of a stack, [X · R, in] and [out, R · X], as [X, R, in] and [X, out, R]."""
    return down.view(num_experts, -1, down.shape[-1]), up.view(up.shape[0], -1, num_experts).permute(2, 0, 1)
