"""Whether a checkpoint on this machine is whole: names and shapes from its headers, digests of its files. No torch.

Digests to compare with come from `SHA256SUMS` beside the weights (written with every checkpoint that
`md3` writes) or, for a repository from the hub, from the cache, which names each file after its digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md3cli.errors import CheckpointError
from md3cli.model.checkpoint_plan import CheckpointPlan, plan_checkpoint
from md3cli.model.partial_folder import read_checksums
from md3cli.model.prompts import Tokenizer
from md3cli.model.weight_files import CHECKSUMS_NAME

_SHA256 = re.compile(r"[0-9a-f]{64}")
_READ_BYTES = 1 << 23


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A weight file; `known_from` says where its digest was to be compared with, None where there is none."""

    name: str
    num_bytes: int
    sha256: str
    known_from: str | None


@dataclass(frozen=True, slots=True)
class Verification:
    """A checkpoint that is whole."""

    plan: CheckpointPlan
    files: tuple[FileDigest, ...]

    def as_json(self) -> dict[str, Any]:
        """In plain types, for `md3 models verify --json`."""
        files = [
            {"file": file.name, "bytes": file.num_bytes, "sha256": file.sha256, "compared_with": file.known_from}
            for file in self.files
        ]
        return {"format": str(self.plan.layout), "tensors": len(self.plan.files.entries), "files": files}


def verify_checkpoint(path: Path, *, progress: Callable[[int], None] = lambda num_bytes: None) -> Verification:
    """Judge headers and the tokenizer as loading does, then read every weight file once.

    Raises:
        CheckpointError: it would not load, or files are not what their digests say; all are named.
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
    return Verification(plan, tuple(files))


def _known_digest(file: Path, listed: str | None) -> tuple[str | None, str | None]:
    if listed is not None:
        return listed, CHECKSUMS_NAME
    blob = file.resolve().name
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
