"""A disk with little room, for tests of what happens when it is full: a tmpfs, which root may mount."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def has_small_disks() -> bool:
    """Whether this process may mount."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder]
        try:
            is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False
        if is_mounted:
            subprocess.run(["umount", folder], check=True)
        return is_mounted


@contextlib.contextmanager
def small_disk(folder: Path, more_kib: int) -> Iterator[None]:
    """`folder` on a disk with room for `more_kib` more than it holds; afterwards a plain folder again."""
    size_kib = sum(path.stat().st_size // 1024 + 8 for path in folder.iterdir()) + more_kib
    aside = folder.with_name(folder.name + "-aside")
    folder.rename(aside)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", folder], check=True)
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        yield
        shutil.rmtree(aside)
        shutil.copytree(folder, aside)
    finally:
        subprocess.run(["umount", folder], check=True)
    folder.rmdir()
    aside.rename(folder)
