"""A checkpoint judged by its headers: layout, sizes, and the recipe of every tensor.

Everything that can be wrong with a checkpoint is found here, before anything is allocated: names, dtypes and
shapes of its files are compared with the table that follows from the configuration. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md3cli.errors import CheckpointError
from md3cli.model.network.config import ModelConfig
from md3cli.model.weights.files import TensorEntry, WeightFiles, find_weight_files, listing, read_json
from md3cli.model.weights.formats import FORMAT_NAMES, INT8_SCALE, Format, detect_format, normalise_config
from md3cli.model.weights.names import (
    INT4_GROUP,
    Slot,
    StoredTensor,
    expected_tensors,
    has_region_ln,
    is_ignorable,
    slots,
)

_NAME_LIMIT_CHARS = 160  # a file may call its tensors anything
QUANT_METHOD = "md3"  # of `quantization_config`; the other words there are those of compressed-tensors
INT8_WEIGHTS: Mapping[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """How a checkpoint becomes a model: every canonical tensor is in `slots`, every file entry accounted for."""

    files: WeightFiles
    layout: Format
    config: ModelConfig
    has_region_ln: bool
    slots: tuple[Slot, ...]


def read_config(files: WeightFiles) -> ModelConfig:
    """Return the configuration beside the weights; the real model's where there is none, as the original does.

    Raises:
        CheckpointError: damaged, or sizes outside what any model has.
    """
    if files.config_file is None:
        return ModelConfig()
    document = read_json(files.config_file)
    _check_quantization(document, files.config_file)
    return ModelConfig.from_sections(normalise_config(document))


def _check_quantization(document: Mapping[str, Any], file: Path) -> None:
    """Refuse what a config says about codes but int8 by row: int4 and fp8 are told by the tensors' names."""
    inner = document.get("config")
    for place in (document, inner if isinstance(inner, dict) else {}):
        scheme = place.get("quantization_config")
        if scheme is None:
            continue
        method = scheme.get("quant_method") if isinstance(scheme, dict) else scheme
        groups = scheme.get("config_groups") if isinstance(scheme, dict) else None
        if method != QUANT_METHOD or not isinstance(groups, dict):
            raise CheckpointError(
                f"{file}: quantization_config of {str(method)[:40]!r} is not read; "
                f"formats that are understood: {FORMAT_NAMES}"
            )
        for name, group in groups.items():
            weights = group.get("weights") if isinstance(group, dict) else None
            if not isinstance(weights, dict) or any(weights.get(key) != INT8_WEIGHTS[key] for key in INT8_WEIGHTS):
                raise CheckpointError(
                    f"{file}: quantization_config stores {str(name)[:40]} as {str(weights)[:160]}; "
                    f"only {dict(INT8_WEIGHTS)} is understood"
                )


def plan_checkpoint(path: Path) -> CheckpointPlan:
    """Judge the checkpoint at `path` (a folder or a .safetensors file) by its headers.

    Raises:
        CheckpointError: it cannot be loaded; one message that names the tensors at fault.
    """
    files = find_weight_files(path)
    layout = detect_format(files.entries.keys(), str(path))
    config = read_config(files)
    if layout is Format.INT4 and config.text.group_size not in (None, INT4_GROUP):
        raise CheckpointError(
            f"{path}: 4-bit weights in groups of {config.text.group_size}; only groups of {INT4_GROUP} are understood"
        )
    has_ln = has_region_ln(files.entries.keys())
    recipes = tuple(slots(expected_tensors(config, has_region_ln=has_ln), layout, files.entries.keys()))
    plan = CheckpointPlan(files, layout, config, has_ln, recipes)
    _check(plan, path)
    return plan


def _check(plan: CheckpointPlan, path: Path) -> None:
    entries = plan.files.entries
    needed = {part.name: part for slot in plan.slots for part in slot.parts}
    missing = [name for name in needed if name not in entries]
    extra = [name for name in entries if name not in needed and not is_ignorable(name)]
    found = [(entries[name], part) for name, part in needed.items() if name in entries]
    misshapen = [_shape_fault(entry, part) for entry, part in found if entry.shape != part.shape]
    mistyped = [
        _dtype_fault(entry, part)
        for entry, part in found
        if entry.shape == part.shape and entry.dtype not in part.dtypes
    ]
    faults = [
        _fault("missing", missing),
        _fault("not known", extra),
        _fault("of another shape", misshapen),
        _fault("of another dtype", mistyped),
    ]
    if any(faults):
        assumed = "" if plan.files.config_file else " (no config.json beside it: the real model's sizes were assumed)"
        raise CheckpointError(
            f"{path}: format {plan.layout} (of {FORMAT_NAMES}), but its tensors do not make the model of its "
            f"config.json{assumed}: " + "; ".join(filter(None, faults))
        )


def _shape_fault(entry: TensorEntry, part: StoredTensor) -> str:
    text = f"{part.name} is {list(entry.shape)}, expected {list(part.shape)}"
    if part.name.endswith(".packed") and len(entry.shape) == 2 and entry.shape[1] != INT4_GROUP:
        text += f" (groups of {entry.shape[1]}; only groups of {INT4_GROUP} are understood)"
    return text


def _dtype_fault(entry: TensorEntry, part: StoredTensor) -> str:
    text = f"{part.name} is {entry.dtype}, expected {' or '.join(sorted(part.dtypes))}"
    if entry.dtype == "I8":
        text += f" (its scales, {part.name}{INT8_SCALE}, are missing)"
    return text


def _fault(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind}: {listing([name[:_NAME_LIMIT_CHARS] for name in names])}" if names else ""
