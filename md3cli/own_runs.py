"""Whether a run.json was written by this user's own md3, or only says so.

A run folder may come from a stranger, and its run.json names the folder that the pictures are in. What
that opens, or writes, is the user's own disk; so a run seals the root with a key that never leaves the
user's cache folder, and a root without its seal is only a claim. Knows nothing of what a claim may do.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

from md3cli.settings import user_cache_dir

KEY_NAME = "own-runs.key"
_KEY_BYTES = 32


def seal_of(root: str) -> str | None:
    """Return the seal for a root; None where this user's key can be neither read nor made (no home to write to)."""
    key = _key(may_make=True)
    return None if key is None else _digest(key, root)


def is_own(root: str, seal: object) -> bool:
    """Return whether `seal` is this user's for `root`."""
    key = _key(may_make=False)
    if key is None or not isinstance(seal, str):
        return False
    return hmac.compare_digest(_digest(key, root).encode(), seal.encode("utf-8", "surrogatepass"))


def _digest(key: bytes, root: str) -> str:
    return hmac.new(key, root.encode("utf-8", "surrogatepass"), "sha256").hexdigest()


def _key(*, may_make: bool) -> bytes | None:
    try:
        path = user_cache_dir() / KEY_NAME
        if may_make and not path.exists():
            _make(path)
        key = path.read_bytes()
    except (OSError, RuntimeError):  # the latter: no home folder at all
        return None
    return key if len(key) == _KEY_BYTES else None


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:  # another run was faster
        return
    with open(descriptor, "wb") as file:
        file.write(secrets.token_bytes(_KEY_BYTES))
