"""What a checkpoint holds and what would load, from its headers alone. No torch.

`inspect_checkpoint` makes the same judgement as loading does: what it describes loads.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from md3cli.model.checkpoint_plan import CheckpointPlan, plan_checkpoint
from md3cli.model.config import ModelConfig
from md3cli.model.formats import Format
from md3cli.model.hub import shown_name, terms_of
from md3cli.model.name_tables import Recipe, Slot
from md3cli.model.prompts import templates_of
from md3cli.model.tensor_table import Part, part_of
from md3cli.model.weight_files import checkpoint_revision

_HALVES = (Recipe.FIRST_HALF, Recipe.SECOND_HALF)


@dataclass(frozen=True, slots=True)
class PartSize:
    """One part of the network: parameters as loaded, bytes as stored, also by how weights are stored.

    `formats` has int4, int8 and fp8 with their scales, and plain weights by dtype, largest first.
    """

    part: Part
    num_parameters: int
    num_bytes: int
    formats: dict[str, int]


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """A checkpoint that loads; `dtypes` holds stored bytes by dtype, in the safetensors spelling."""

    path: Path
    layout: Format
    revision: str
    num_files: int
    num_bytes: int
    parts: tuple[PartSize, ...]
    dtypes: dict[str, int]
    has_region_ln: bool
    has_tokenizer: bool
    config: ModelConfig
    skills: tuple[str, ...]
    terms: str  # of use, or where to read them

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.parts)

    def as_json(self) -> dict[str, Any]:
        """The summary in plain types, for `md3 models info --json`."""
        return {
            "path": str(self.path),
            "format": str(self.layout),
            "revision": self.revision,
            "files": self.num_files,
            "bytes": self.num_bytes,
            "parameters": self.num_parameters,
            "parts": {
                str(part.part): {
                    "parameters": part.num_parameters,
                    "bytes": part.num_bytes,
                    "formats": part.formats,
                }
                for part in self.parts
            },
            "dtypes": self.dtypes,
            "region_ln": self.has_region_ln,
            "tokenizer": self.has_tokenizer,
            "skills": list(self.skills),
            "license": self.terms,
            "max_context": self.config.text.max_context,
        }


def inspect_checkpoint(path: Path | str, name: str | None = None) -> CheckpointSummary:
    """Describe the checkpoint at `path`, a folder or a .safetensors file; `name` is what the user calls it.

    Raises:
        CheckpointError: it would not load; the message says why.
    """
    plan, shown = plan_checkpoint(Path(path)), shown_name(name or str(path))
    parameters: Counter[Part] = Counter()
    stored: defaultdict[Part, Counter[str]] = defaultdict(Counter)
    for slot in plan.slots:
        part = part_of(slot.name, slot.shape)
        parameters[part] += prod(slot.shape)
        stored[part][_stored_as(slot, plan)] += _stored_bytes(slot, plan)
    dtypes: Counter[str] = Counter()
    for entry in plan.files.entries.values():
        dtypes[entry.dtype] += entry.num_bytes
    return CheckpointSummary(
        path=Path(path),
        layout=plan.layout,
        revision=checkpoint_revision(plan.files),
        num_files=len(plan.files.files),
        num_bytes=plan.files.num_bytes,
        parts=tuple(
            PartSize(part, parameters[part], stored[part].total(), dict(stored[part].most_common())) for part in Part
        ),
        dtypes=dict(dtypes.most_common()),
        has_region_ln=plan.has_region_ln,
        has_tokenizer=plan.files.tokenizer_file is not None,
        config=plan.config,
        skills=tuple(sorted(skill for skill, given in templates_of(plan.config, shown).items() if given is not None)),
        terms=terms_of(name or str(path)),
    )


def _stored_as(slot: Slot, plan: CheckpointPlan) -> str:
    if slot.recipe.is_low_bit:
        return slot.recipe.name.lower()
    return plan.files.entries[slot.parts[0].name].dtype.lower()


def _stored_bytes(slot: Slot, plan: CheckpointPlan) -> int:
    size = sum(plan.files.entries[part.name].num_bytes for part in slot.parts)
    return size // 2 if slot.recipe in _HALVES else size  # two slots share a fused tensor
