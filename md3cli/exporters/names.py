"""The name of an image -> names of the files made for it, inside the output and never equal.

A record's image name is not to be trusted: it may be a URL, absolute, climb with `..`, or be too
long once a suffix is added. Pure functions; `publishing.StagedFolder.create` takes the first
candidate that is free.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

NAME_LIMIT_BYTES = 255  # of one path component on every common file system
_PATH_LIMIT_BYTES = 2048  # leaves room for OUT itself below the usual 4096
_DEPTH_LIMIT = 64  # folders are made by recursion, here and in those who read


# What Windows refuses in a name or reads as a drive, a stream or a folder, and control characters.
_ODD = {ord(char): "_" for char in '<>:"|?*\\'} | dict.fromkeys([*range(32), 127], "_")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]) *(\.|$)", re.IGNORECASE)


def relative_name(image: str) -> PurePosixPath:
    """`image` as a path below a folder: no scheme, no root, no `.` and `..`; never empty; portable on Windows."""
    _, _, after_scheme = image.partition("://")
    parts = [part.replace("\0", "_") for part in (after_scheme or image).split("/") if part not in ("", ".", "..")]
    name = PurePosixPath(*parts) if parts else PurePosixPath("image")
    return portable(name) if os.name == "nt" else name


def portable(name: PurePosixPath) -> PurePosixPath:
    """`name` as every common file system takes it: odd characters, ends and reserved names replaced."""
    return PurePosixPath(*map(_portable_part, name.parts))


def _portable_part(part: str) -> str:
    plain = part.translate(_ODD)
    bare = plain.rstrip(". ")  # Windows drops these
    plain = bare + "_" * (len(plain) - len(bare))
    return f"_{plain}" if _RESERVED.match(plain) else plain


def candidates(image: str, suffix: str, *, keep_suffix: bool = False) -> Iterator[PurePosixPath]:
    """Names for a file about `image`, best first: `a/photo.txt`, `a/photo.jpg.txt`, then with a digest.

    With `keep_suffix` the image's own suffix always stays: `a/photo.jpg.txt`. The digest is of
    the whole name, so the last candidates belong to this image alone.
    """
    relative = relative_name(image)
    digest = hashlib.sha256(image.encode("utf-8", "surrogateescape")).hexdigest()
    stem = relative.name.removesuffix(relative.suffix) if relative.suffix else relative.name
    if len(str(relative).encode()) <= _PATH_LIMIT_BYTES and len(relative.parts) <= _DEPTH_LIMIT:
        if not keep_suffix:
            yield relative.with_name(shortened(stem, suffix, digest))
        yield relative.with_name(shortened(relative.name, suffix, digest))
        yield relative.with_name(shortened(f"{shortened(stem, '', digest, 200)}~{digest[:16]}", suffix, digest))
    yield PurePosixPath(f"{digest}{suffix}")


def shortened(stem: str, suffix: str, digest: str, limit_bytes: int = NAME_LIMIT_BYTES) -> str:
    """`stem + suffix`, or where that is too long the stem's beginning, a digest and the suffix."""
    encoded = stem.encode("utf-8", "surrogateescape")
    if len(encoded) + len(suffix.encode()) <= limit_bytes:
        return stem + suffix
    tail = f"~{digest[:16]}{suffix}"
    return encoded[: limit_bytes - len(tail.encode())].decode("utf-8", "ignore") + tail
