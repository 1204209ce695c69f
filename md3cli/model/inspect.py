"""What a checkpoint holds and would load as, by its headers, and whether its files are whole, by their digests.

`inspect_checkpoint` and `verify_checkpoint` judge as loading does: what they describe loads. `md3 models` alone asks.
The file is apart from `weights/plan.py` because it asks the tokenizer and the prompts, which stand above. No torch.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from md3cli.errors import CheckpointError
from md3cli.model.engine.prompts import Tokenizer, templates_of
from md3cli.model.network.config import ModelConfig
from md3cli.model.weights.files import CHECKSUMS_NAME, checkpoint_revision, read_checksums
from md3cli.model.weights.hub import shown_name, terms_of
from md3cli.model.weights.names import Format, Part, Recipe, Slot, part_of
from md3cli.model.weights.plan import CheckpointPlan, plan_checkpoint

_SHA256 = re.compile(r"[0-9a-f]{64}")
_READ_BYTES = 1 << 23


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A weight file; `known_from` says where the digest to compare with came from, None where there was none."""

    name: str
    num_bytes: int
    sha256: str
    known_from: str | None


@dataclass(frozen=True, slots=True)
class WholeCheckpoint:
    """A checkpoint that is whole: what would load, and the digests of its files."""

    plan: CheckpointPlan
    files: tuple[FileDigest, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain types, for `md3 models verify --json`."""
        files = [
            {"file": file.name, "bytes": file.num_bytes, "sha256": file.sha256, "compared_with": file.known_from}
            for file in self.files
        ]
        return {"format": str(self.plan.layout), "tensors": len(self.plan.files.entries), "files": files}


def verify_checkpoint(path: Path, *, progress: Callable[[int], None] = lambda num_bytes: None) -> WholeCheckpoint:
    """Judge headers and the tokenizer as loading does, then read every weight file once.

    Raises:
        CheckpointError: it would not load, or files are not what their digests say; the message names all of them.
    """
    plan = plan_checkpoint(path)
    if plan.files.tokenizer_file is not None:
        Tokenizer.load(plan.files.tokenizer_file, plan.config)
    checksums = read_checksums(plan.files.folder)
    files, faults = [], []
    for file in plan.files.files:
        sha256 = _sha256(file, progress)
        wanted, known_from = _known_digest(file, checksums.get(file.name))
        if wanted is not None and wanted != sha256:
            faults.append(f"{file.name} has the SHA-256 {sha256}, {known_from} says {wanted}")
        files.append(FileDigest(file.name, file.stat().st_size, sha256, known_from))
    if faults:
        raise CheckpointError(f"{path} is damaged or was changed: {'; '.join(faults)}; fetch or write it again")
    return WholeCheckpoint(plan, tuple(files))


def _known_digest(file: Path, listed: str | None) -> tuple[str | None, str | None]:
    if listed is not None:
        return listed, CHECKSUMS_NAME
    blob = file.resolve().name  # the hub's cache names a file after its digest, and links to it
    return (blob, "the hub") if file.is_symlink() and _SHA256.fullmatch(blob) else (None, None)


def _sha256(file: Path, progress: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while content := stream.read(_READ_BYTES):
                digest.update(content)
                progress(len(content))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from error
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class PartSize:
    """One part of the network: parameters as loaded, and bytes as stored.

    `formats` has the bytes by kind, largest first: int4, int8 and fp8 with their scales, plain weights by dtype.
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
        """Return the summary in plain types, for `md3 models info --json`."""
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
    plan = plan_checkpoint(Path(path))
    templates = templates_of(plan.config, shown_name(name or str(path)))
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
        skills=tuple(sorted(skill for skill, given in templates.items() if given is not None)),
        terms=terms_of(name or str(path)),
    )


def _stored_as(slot: Slot, plan: CheckpointPlan) -> str:
    if slot.recipe.is_low_bit:
        return slot.recipe.name.lower()
    return plan.files.entries[slot.parts[0].name].dtype.lower()


def _stored_bytes(slot: Slot, plan: CheckpointPlan) -> int:
    size = sum(plan.files.entries[part.name].num_bytes for part in slot.parts)
    return size // 2 if slot.recipe in (Recipe.FIRST_HALF, Recipe.SECOND_HALF) else size  # two share a fused tensor
