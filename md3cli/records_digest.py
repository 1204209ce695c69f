"""Size and SHA-256 that the records file had when its run was finished, as run.json keeps them under `records`.

A change inside a value leaves a whole record, and only these tell. A start that goes on appends: what was
there when the run was finished before is still the beginning of the file.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 20
_FINISHED = (0, 3)


@dataclass(frozen=True, slots=True)
class RecordsDigest:
    """What a finished run left; `bytes` is the size of its records file."""

    bytes: int
    sha256: str


def digest_of_file(path: Path, limit: int | None = None) -> RecordsDigest:
    """Read a records file, or its first `limit` bytes.

    Raises:
        OSError: it cannot be read.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES if limit is None else min(_BLOCK_BYTES, limit - num_bytes)):
            digest.update(block)
            num_bytes += len(block)
    return RecordsDigest(num_bytes, digest.hexdigest())


def kept_digest(document: dict[str, Any]) -> RecordsDigest | None:
    """Return what run.json says; None where it says nothing, or nothing sensible."""
    kept = document.get("records")
    if not isinstance(kept, dict):
        return None
    size, sha256 = kept.get("bytes"), kept.get("sha256")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63:
        return None
    if not isinstance(sha256, str) or re.fullmatch("[0-9a-f]{64}", sha256) is None:
        return None
    return RecordsDigest(size, sha256)


def is_finished(document: dict[str, Any]) -> bool:
    """Return whether the last start that run.json tells of came to the end of its work."""
    starts = document.get("starts")
    last = starts[-1] if isinstance(starts, list) and starts else None
    status = last.get("exit_status") if isinstance(last, dict) else None
    return isinstance(status, int) and status in _FINISHED


def change_since(document: dict[str, Any], records: Path) -> str | None:
    """Return in words how a records file is not what its finished run left; None where nothing is known of a change.

    Raises:
        OSError: it cannot be read.
    """
    kept = kept_digest(document)
    if kept is None:
        return None
    size = os.stat(records).st_size
    if size < kept.bytes or (size > kept.bytes and is_finished(document)):
        return f"it had {kept.bytes:,} bytes when the run was finished and has {size:,}"
    if digest_of_file(records, kept.bytes) != kept:
        return "its bytes are not those of when the run was finished"
    return None
