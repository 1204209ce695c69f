"""Size and SHA-256 that the records file had when its run was finished, as run.json keeps them under `records`.

A change inside a value leaves a whole record, and only these tell. A start that goes on appends: what was
there when the run was finished before is still the beginning of the file.

Record ids as 16 bytes each, and a set of them that stays small at ten million.

Knows nothing of records or files.
"""

from __future__ import annotations

import binascii
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIGEST_BYTES = 16


def digest_of(record_id: str | bytes) -> bytes:
    """16 bytes that stand for a record's id: its 32 hex digits, else a hash of it."""
    try:
        digest = binascii.unhexlify(record_id)
    except (binascii.Error, ValueError):
        digest = b""
    if len(digest) == DIGEST_BYTES:
        return digest
    text = record_id if isinstance(record_id, bytes) else record_id.encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).digest()[:DIGEST_BYTES]


class DigestSet:
    """A set of 16-byte digests that are evenly spread, in 21 bytes each.

    65,536 byte strings, chosen by the first two bytes and searched by `bytes.find`: ten million
    digests take 203 MB and 2 us a look-up (2026-11-21; a Python `set` of `bytes` takes over 1 GB).
    """

    __slots__ = ("_buckets", "_size")

    def __init__(self) -> None:
        self._buckets: list[bytearray | None] = [None] * 65536
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, digest: bytes) -> bool:
        bucket = self._buckets[digest[0] << 8 | digest[1]]
        return bucket is not None and _find(bucket, digest) >= 0

    def add(self, digest: bytes) -> bool:
        """Add it; False when it was there."""
        index = digest[0] << 8 | digest[1]
        bucket = self._buckets[index]
        if bucket is None:
            self._buckets[index] = bytearray(digest)
        elif _find(bucket, digest) < 0:
            bucket += digest
        else:
            return False
        self._size += 1
        return True


def _find(bucket: bytearray, digest: bytes) -> int:
    place = bucket.find(digest)
    while place > 0 and place % DIGEST_BYTES:  # across two neighbours: not a member
        place = bucket.find(digest, place + 1)
    return place


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
