"""A folder of small checksummed files under a size limit: encodings, and compiled code.

Any number of processes may read and write one folder at once without locks: a file appears whole, by a rename, and
equal keys hold equal content, so it does not matter who wins. A checksum covers key and content: a file without the
right one (damaged, or copied or renamed to another key) is removed and counts as absent. The least recently read files
go first when the folder is over its limit. Our own, because the libraries for this pickle. Knows nothing of tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from md3cli.errors import OutputError

MAGIC = b"md3cache2\n"
DIGEST_BYTES = 32
HEADER_BYTES = len(MAGIC) + DIGEST_BYTES
SUFFIX = ".enc"
ENCODINGS, COMPILED = "encodings", "compiled"  # the folders of the cache
PRUNE_TO = 0.9  # of the limit, so that pruning is rare
TEMPORARY_AGE_S = 3600.0  # an unfinished file older than this belongs to no living writer


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What a cache folder holds."""

    path: Path
    num_files: int
    num_bytes: int


class FileCache:
    """Bytes by key (hex digits) in a folder of `root`; at most `limit_bytes` of them, about.

    Raises:
        OutputError: the folder cannot be made, belongs to someone else, or others may write to it.
    """

    def __init__(self, root: Path, limit_bytes: int, *, folder: str = ENCODINGS) -> None:
        self.root = root / folder
        self.limit_bytes = limit_bytes
        self._num_bytes: int | None = None  # known after the first look; other processes may change it
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_owner()
        except OSError as error:
            raise OutputError(f"cache folder {self.root}: {error.strerror}; use --cache-dir or --no-cache") from error

    def _check_owner(self) -> None:
        if not hasattr(os, "getuid"):
            return
        facts = self.root.stat()
        if facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OutputError(
                f"cache folder {self.root} is not yours alone (others could plant answers in it); "
                "make it yours (chown, chmod 700), or use --cache-dir or --no-cache"
            )

    def get(self, key: str) -> bytes | None:
        """Return the bytes of `key`; None where they are absent, damaged or another key's."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                header, payload = file.read(HEADER_BYTES), file.read()
        except OSError:
            return None
        if header != _header(key, payload):
            self._remove(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return payload

    def put(self, key: str, payload: bytes) -> None:
        """Keep `payload` under `key`.

        Raises:
            OSError: the file could not be written; nothing is left behind.
        """
        path = self._path(key)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_header(key, payload))
                file.write(payload)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        if self._num_bytes is not None:
            self._num_bytes += HEADER_BYTES + len(payload)
        if self._num_bytes is None or self._num_bytes > self.limit_bytes:
            self.prune(self.limit_bytes)

    def info(self) -> CacheInfo:
        """Count the files and bytes of the folder."""
        sizes = [facts.st_size for _, facts in self._files()]
        return CacheInfo(self.root, len(sizes), sum(sizes))

    def prune(self, limit_bytes: int) -> CacheInfo:
        """Remove the least recently read files until the rest is well under the limit; say what was removed."""
        files = sorted(self._files(), key=lambda entry: entry[1].st_mtime_ns)
        total = sum(facts.st_size for _, facts in files)
        num_removed = num_removed_bytes = 0
        for path, facts in files:
            if total <= limit_bytes or total - num_removed_bytes <= limit_bytes * PRUNE_TO:
                break
            self._remove(path)
            num_removed += 1
            num_removed_bytes += facts.st_size
        self._num_bytes = total - num_removed_bytes
        return CacheInfo(self.root, num_removed, num_removed_bytes)

    def clear(self) -> CacheInfo:
        """Remove all files of the cache; say what was removed."""
        return self.prune(-1)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield finished files; remove unfinished ones that no living process can be writing."""
        with os.scandir(self.root) as entries:
            folders = [e.path for e in entries if e.is_dir(follow_symlinks=False) and len(e.name) == 2]
        for folder in folders:
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        facts = entry.stat(follow_symlinks=False)
                        if entry.name.endswith(SUFFIX):
                            yield Path(entry.path), facts
                        elif entry.name.startswith(".tmp-") and time.time() - facts.st_mtime > TEMPORARY_AGE_S:
                            os.unlink(entry.path)

    def _path(self, key: str) -> Path:
        assert key.isalnum(), key
        return self.root / key[:2] / f"{key}{SUFFIX}"

    @staticmethod
    def _remove(path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()


def _header(key: str, payload: bytes) -> bytes:
    digest = hashlib.blake2b(f"{key}\n".encode(), digest_size=DIGEST_BYTES)
    digest.update(payload)
    return MAGIC + digest.digest()
