"""A checkpoint judged by its headers: layout, sizes, and the recipe of every tensor. No torch.

Everything that can be wrong with a checkpoint is found here, before anything is allocated:
`plan_checkpoint` compares the names, dtypes and shapes of the files with the table that follows
from the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from md3cli.errors import CheckpointError
from md3cli.model.config import ModelConfig
from md3cli.model.formats import Format, detect_format, normalise_config
from md3cli.model.name_tables import INT4_GROUP, Slot, has_region_ln, is_ignorable, slots
from md3cli.model.tensor_table import expected_tensors
from md3cli.model.weight_files import WeightFiles, find_weight_files, read_json

_NAMED_IN_ERRORS = 5
_NAME_LIMIT_CHARS = 160  # a file may call its tensors anything


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """How a checkpoint becomes a model: every canonical tensor is in `slots`, every file entry accounted for."""

    files: WeightFiles
    layout: Format
    config: ModelConfig
    has_region_ln: bool
    slots: tuple[Slot, ...]


def read_config(files: WeightFiles) -> ModelConfig:
    """The configuration beside the weights; the real model's where there is none, as the original does.

    Raises:
        CheckpointError: damaged, or sizes outside what any model has.
    """
    if files.config_file is None:
        return ModelConfig()
    return ModelConfig.from_sections(normalise_config(read_json(files.config_file)))


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
    plan = CheckpointPlan(
        files=files,
        layout=layout,
        config=config,
        has_region_ln=has_ln,
        slots=tuple(slots(expected_tensors(config, has_region_ln=has_ln), layout, files.entries.keys())),
    )
    _check(plan, path)
    return plan


def _check(plan: CheckpointPlan, path: Path) -> None:
    entries = plan.files.entries
    needed = {part.name: part for slot in plan.slots for part in slot.parts}
    missing = [name for name in needed if name not in entries]
    extra = [name for name in entries if name not in needed and not is_ignorable(name)]
    misshapen: list[str] = []
    mistyped: list[str] = []
    for name, part in needed.items():
        entry = entries.get(name)
        if entry is None:
            continue
        if entry.shape != part.shape:
            misshapen.append(f"{name} is {list(entry.shape)}, expected {list(part.shape)}")
        elif entry.dtype not in part.dtypes:
            mistyped.append(f"{name} is {entry.dtype}, expected {' or '.join(sorted(part.dtypes))}")
    faults = [
        _fault("missing", missing),
        _fault("not known", extra),
        _fault("of another shape", misshapen),
        _fault("of another dtype", mistyped),
    ]
    if any(faults):
        assumed = "" if plan.files.config_file else " (no config.json beside it: the real model's sizes were assumed)"
        raise CheckpointError(
            f"{path}: format {plan.layout}, but its tensors do not make the model of its config.json{assumed}: "
            + "; ".join(filter(None, faults))
        )


def _fault(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMED_IN_ERRORS} more" if len(names) > _NAMED_IN_ERRORS else ""
    return f"{len(names)} {kind}: {', '.join(name[:_NAME_LIMIT_CHARS] for name in names[:_NAMED_IN_ERRORS])}{more}"
