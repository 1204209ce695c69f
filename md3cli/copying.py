"""A file's copy at no cost where the file system can share its blocks (a reflink); else byte by byte."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)


def copy_file(source: Path | str, target: Path, *, is_linked: bool = False) -> None:
    """Make `target`, which must not be there or be empty, a copy of what `source` leads to.

    `is_linked` makes it the same file (a hard link): who writes to one writes to both. Where the file system
    cannot, it is a copy all the same.

    Raises:
        OSError: it cannot be read or written.
    """
    source = os.path.realpath(source)
    if is_linked and _linked(source, target):
        return
    with open(source, "rb") as there, open(target, "wb") as here:
        if not _cloned(there.fileno(), here.fileno()):
            shutil.copyfileobj(there, here, 1 << 20)


def _linked(source: str, target: Path) -> bool:
    aside = target.with_name(f".{os.getpid()}.link")
    try:
        os.link(source, aside)
        os.replace(aside, target)
    except OSError:  # another file system, or one without hard links
        aside.unlink(missing_ok=True)
        return False
    return True


def _cloned(source: int, target: int) -> bool:
    """Whether the file system let both share their blocks: Btrfs, XFS, bcachefs, ZFS on Linux."""
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True
