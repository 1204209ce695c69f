"""Finding what a run has left behind: a mark in its environment, which all that it starts inherits."""

from __future__ import annotations

import contextlib
from pathlib import Path

MARK = "CHAOS_RUN"  # the variable's name


def marked_processes(mark: str) -> list[int]:
    """Running processes that carry `mark`: a run and everything it started."""
    wanted, found = f"{MARK}={mark}\0".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_zombie = (folder / "stat").read_bytes().rpartition(b")")[2].split()[0] in b"ZX"
            if not is_zombie and wanted in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found
