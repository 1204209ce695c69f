"""`.md3`: the list of what md3 wrote into a folder that it made itself. Only what stands on it is ever removed.

The first line is JSON (`schema`, `format`, `version`); each further line is a path, relative to the folder, with
`/`. A path that a line cannot hold as it is (line breaks, bytes that are no UTF-8) is a JSON string. The file may
come from a stranger: absolute paths, `..` and paths through links are not believed. Lines are read and written one
at a time, so a list of any length takes no memory; only `listed_in` keeps 21 bytes a path.

Whether a folder is md3's to replace: what its list of files, `.md3`, does not name is somebody's work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from md3cli import __version__
from md3cli.errors import UsageError
from md3cli.finished.digest import DIGEST_BYTES, DigestSet
from md3cli.records import is_printable, printable
from md3cli.system import open_at_once

MARKER = ".md3"
SCHEMA = "md3-files/1"
RUN = "run"  # the format of a run folder
_ASIDE = f"{MARKER}.tmp-"  # what becomes the list
_LINE_LIMIT = 1 << 16  # characters; no file system has longer paths
_TRAINERS_SUFFIX = ".cache"  # `labels.cache`, `labels/train.cache`: trainers leave these in data sets


def write_marker(folder: Path, format: str, paths: Iterator[str]) -> None:
    """Write the list of `paths` into `folder`.

    Raises:
        OSError: it cannot be written.
    """
    aside = folder / f"{_ASIDE}{secrets.randbelow(10**12)}"
    with aside.open("x", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps({"schema": SCHEMA, "format": format, "version": __version__}) + "\n")
        file.writelines(f"{_as_line(path)}\n" for path in paths)
    os.replace(aside, folder / MARKER)


def has_marker(folder: Path | str) -> bool:
    """Return whether `folder` has a file `.md3` that md3 wrote, as far as its first line says."""
    return marker_format(folder) is not None


def marker_format(folder: Path | str) -> str | None:
    """Return what md3 made `folder` as: a format, or `run`; None where it has no list of ours."""
    with contextlib.suppress(OSError, ValueError, RecursionError), _opened(folder) as file:
        head = json.loads(file.readline(_LINE_LIMIT))
        if isinstance(head, dict) and head.get("schema") == SCHEMA:
            return str(head.get("format"))
    return None


def written_paths(folder: Path | str) -> Iterator[str]:
    """Yield the paths on the list of `folder` that stay inside it; nothing where there is no list of ours."""
    if not has_marker(folder):
        return
    with contextlib.suppress(OSError, ValueError), _opened(folder) as file:
        file.readline(_LINE_LIMIT)
        while line := file.readline(_LINE_LIMIT):
            path = _as_path(line.rstrip("\n"))
            if path is not None:
                yield path


def files_below(folder: Path | str, relative: str = "") -> Iterator[str]:
    """Yield the paths of all files below `folder`, relative to it, one after the other; links are not entered."""
    with os.scandir(os.path.join(folder, relative)) as entries:
        for entry in entries:
            path = f"{relative}/{entry.name}" if relative else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(folder, path)
            elif path != MARKER and not path.startswith(_ASIDE):
                yield path


def foreign_file(folder: Path) -> str | None:
    """Return a file below `folder` that its list does not name, if any; a trainer's cache is nobody's work."""
    is_listed = listed_in(folder)
    found = (path for path in files_below(folder) if not path.endswith(_TRAINERS_SUFFIX))
    return next((path for path in found if not is_listed(path)), None)


def listed_in(folder: Path) -> Callable[[str], bool]:
    """Return what says whether a path, relative to `folder` and with `/`, is on its list; 21 bytes a listed path."""
    listed = DigestSet()
    for path in written_paths(folder):
        listed.add(_digest(path))
    return lambda path: _digest(path) in listed


def remove_written(folder: Path) -> None:
    """Remove the files on the list of `folder`, the list, and the folders that are empty then; all else stays."""
    for path in written_paths(folder):
        if not _leads_through_link(folder, path):
            with contextlib.suppress(OSError):
                os.unlink(folder / path)
    if has_marker(folder):
        with contextlib.suppress(OSError):
            os.unlink(folder / MARKER)
    for top, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # not empty: something else is in it
            os.rmdir(top)


def _opened(folder: Path | str) -> IO[str]:
    fd = open_at_once(os.path.join(folder, MARKER), follows_links=False)
    return open(fd, encoding="utf-8", newline="\n")


def _digest(path: str) -> bytes:
    return hashlib.sha256(os.fsencode(path)).digest()[:DIGEST_BYTES]


def _as_line(path: str) -> str:
    is_plain = not path.startswith('"') and all(map(is_printable, path))
    return path if is_plain else json.dumps(path)


def _as_path(line: str) -> str | None:
    """The path that a line means; None where it is none, or leads out of the folder."""
    try:
        path = json.loads(line) if line.startswith('"') else line
        os.fsencode(path)
    except (ValueError, TypeError, RecursionError):
        return None
    parts = path.replace("\\", "/").split("/") if os.name == "nt" else path.split("/")
    is_inside = all(part not in ("", ".", "..") for part in parts) and "\0" not in path
    return path if is_inside and not os.path.isabs(path) and not os.path.splitdrive(path)[0] else None


def _leads_through_link(folder: Path, path: str) -> bool:
    above = folder
    for part in path.split("/")[:-1]:
        above = above / part
        if above.is_symlink():
            return True
    return False


def check_not_foreign(folder: Path) -> None:
    """Refuse a folder that is there and holds what md3 did not write.

    Raises:
        UsageError: it has no list of md3's files, or something that is not on it.
    """
    if not has_marker(folder):
        raise UsageError(
            f"{printable(str(folder))} was not made by md3 (or before it kept lists of its files, .md3), so it is not "
            "replaced; name another -o, or delete the folder yourself"
        )
    if marker_format(folder) == RUN:
        raise UsageError(f"{printable(str(folder))} is a run folder with its records; name another -o")
    foreign = foreign_file(folder)
    if foreign is not None:
        raise UsageError(
            f"{printable(str(folder / foreign))} was not written by md3; move it away yourself, or name another -o"
        )
