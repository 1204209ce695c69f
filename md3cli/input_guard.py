"""What a command must never write over: what it reads, and pictures.

Refused before anything is loaded, under whatever name the file is given (links, hard ones too, other spellings), and
with --overwrite as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from md3cli.errors import UsageError
from md3cli.finished_run import run_info_paths
from md3cli.records import printable
from md3cli.remote.address import is_address
from md3cli.walk import Glob, has_image_suffix, is_glob

# First bytes of the picture formats that md3 reads.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM")


def check_not_input(outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Refuse to write to a file that is read, or that is a picture; --overwrite does not help.

    Args:
        outputs: every file that is written; those that are not there are harmless.
        inputs: what is read: paths, globs, and `-` for stdin; folders and addresses are passed over.

    Raises:
        UsageError: one is an input or a picture, under whatever name.
    """
    there = [output for output in outputs if output.is_file()]
    check_none_is_read(there, inputs)
    for output in there:
        if has_image_suffix(os.path.realpath(output)) or _begins_like_picture(output):
            raise UsageError(f"{printable(str(output))} is a picture, so nothing is written to it; name another -o")


def check_none_is_read(outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Refuse to write to a file that is read, as `check_not_input`; pictures may be replaced."""
    read = [path for path in map(str, inputs) if not is_address(path)]
    for output in outputs:
        if output.is_file() and any(_is_same(output, path) for path in read):
            shown = printable(str(output))
            raise UsageError(f"{shown} is an input of this command, so nothing is written to it; name another -o")


def files_of_run(records: Path) -> list[Path]:
    """Return a records file and where its run.json may stand: what is read of a finished run."""
    return [records, *run_info_paths(records)]


def files_in(paths: Iterable[str | None]) -> Iterator[str]:
    """Yield the paths that are files, and the files right inside those that are folders (of a model, an adapter)."""
    for path in paths:
        if path is None or is_address(path):
            continue
        if os.path.isdir(path):
            yield from (entry.path for entry in os.scandir(path) if entry.is_file())
        elif os.path.isfile(path):
            yield path


def head_of(path: Path, num_bytes: int) -> bytes:
    """Return the first bytes of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(num_bytes)
    except OSError:
        return b""


def _is_same(output: Path, path: str) -> bool:
    try:
        if path == "-":  # `md3 run - <list.csv -o list.csv`
            return os.path.samestat(os.fstat(0), output.stat())
        if is_glob(path) and not os.path.exists(path):
            return _is_matched(output, path)
        return os.path.isfile(path) and os.path.samefile(output, path)
    except (OSError, ValueError):
        return False


def _is_matched(output: Path, text: str) -> bool:
    """Whether a glob names a file."""
    glob = Glob.parse(text)
    relative = os.path.relpath(os.path.realpath(output), os.path.realpath(glob.base or "."))
    return not relative.startswith("..") and glob.matches(relative) and glob.names_suffix


def _begins_like_picture(path: Path) -> bool:
    head = head_of(path, 12)
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:] == b"WEBP") or head[4:8] == b"ftyp"
