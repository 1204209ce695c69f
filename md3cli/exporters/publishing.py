"""Outputs that appear whole or not at all: written aside, then renamed.

Knows files and folders, nothing of formats. A file goes the way of `md3cli.publish`. A folder is
built aside and renamed too; its many files are not synced one by one, because after a power cut it
can be made again from the records. What stands in OUT goes only with `overwrite`, and a folder only
if nothing is in it but what its own list of files, `.md3`, says md3 wrote.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from md3cli.errors import ExportError, UsageError
from md3cli.exporters.own_outputs import check_not_foreign
from md3cli.marker import files_below, has_marker, listed_in, marker_format, remove_written, write_marker, written_paths
from md3cli.publish import STAGED, atomic_publish, exchange, output_error, temp_beside
from md3cli.records import printable

# The name is taken, or the file system cannot hold it: the next candidate may do.
_NAME_TROUBLE = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not overwrite:
        raise UsageError(f"{printable(str(out))} exists already; add --overwrite to replace it, or name another -o")


@contextmanager
def translated(out: Path) -> Iterator[None]:
    """Turn what the file system refuses into OutputError."""
    try:
        yield
    except OSError as error:
        raise output_error(out, error) from error


@contextmanager
def replaced_file(out: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """A binary file that becomes `out` when the block ends well.

    Raises:
        UsageError: `out` exists and may not be replaced, or is a folder.
        OutputError: disk full, no permission.
    """
    if out.is_dir():
        raise UsageError(f"{printable(str(out))} is a folder; name a file for this format")
    if out.exists():
        _refuse_existing(out, overwrite)
    with translated(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_publish(out) as aside, aside.open("wb") as file:
        yield file


class StagedFolder:
    """A folder being built aside; it hands out names that nothing else has."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, candidates: Iterable[PurePosixPath]) -> tuple[BinaryIO, PurePosixPath]:
        """The first candidate that is free, created, and its name inside the folder.

        The file system is asked, so that names which only it takes for equal (case, Unicode
        form) are told apart as well, and no table of names grows in memory.
        """
        for relative in candidates:
            path = self.path / relative
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                return path.open("xb"), relative
            except OSError as error:
                if error.errno not in _NAME_TROUBLE:
                    raise
        raise ExportError(f"no file name is left for an image in {printable(str(self.path))}")


@contextmanager
def staged_folder(out: Path, *, overwrite: bool, format: str) -> Iterator[StagedFolder]:
    """A folder that becomes `out` when the block ends well; an empty `out` is as good as none.

    It gets a list of its files, `.md3`. An existing folder that holds anything which its list does not name is
    somebody's work and is not replaced even with `overwrite`; what trainers keep there (`labels.cache`) stays.
    """
    out = Path(os.path.realpath(out))  # a link stays, and what it leads to is replaced
    check_replaceable(out, overwrite=overwrite)
    aside = temp_beside(out)
    with translated(out):
        aside.mkdir(parents=True)
        try:
            yield StagedFolder(aside)
            write_marker(aside, format, files_below(aside))
            _swap(aside, out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Refuse an `out` that must not be replaced (see `staged_folder`)."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{printable(str(out))} is a file; this format writes a folder")
    if next(out.iterdir(), None) is None:
        return
    check_not_foreign(out)
    _refuse_existing(out, overwrite)


@contextmanager
def merged_folder(out: Path, *, overwrite: bool, format: str | None) -> Iterator[StagedFolder]:
    """A folder whose files are added to `out` when the block ends well, beside what stands there.

    Where `out` is new or empty, or has a list of its files, they are on it. With `overwrite` a file of the same name
    is replaced only if it is on the list. `format` None makes and asks no list: the user has said that files go
    beside others, and which may be replaced.

    Raises:
        UsageError: a file of the same name stands there and may not be replaced; nothing was added.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{printable(str(out))} is a file; this format writes a folder")
    is_new = not out.exists()
    has_list = format is not None and (is_new or next(out.iterdir(), None) is None or has_marker(out))
    with translated(out):
        out.mkdir(parents=True, exist_ok=True)
        aside = temp_beside(out / STAGED)
        try:
            aside.mkdir()
            yield StagedFolder(aside)
            is_listed = listed_in(out) if overwrite and format is not None else None
            for _, target in _moves(aside, out):
                if os.path.lexists(target):
                    _refuse_existing(target, overwrite)
                    if is_listed is not None and not is_listed(target.relative_to(out).as_posix()):
                        raise UsageError(
                            f"{printable(str(target))} was not written by md3; move it away, or name another -o"
                        )
                if not Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(out)):
                    raise UsageError(f"{printable(str(target.parent))} is a link that leads out of -o; name another -o")
            if format is not None and has_list:
                write_marker(out, marker_format(out) or format, _added(out, aside))
            for source, target in _moves(aside, out):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # not empty: the files are there
                    out.rmdir()


def _added(out: Path, aside: Path) -> Iterator[str]:
    """What the list of `out` names, and then what is new on it."""
    yield from (path for path in written_paths(out) if not os.path.lexists(aside / path))
    yield from files_below(aside)


def _moves(aside: Path, out: Path) -> Iterator[tuple[Path, Path]]:
    """(file in the staged folder, its place in `out`)."""
    for folder, _, names in os.walk(aside):
        for name in names:
            source = Path(folder, name)
            yield source, out / source.relative_to(aside)


def _swap(aside: Path, out: Path) -> None:
    """Put the folder `aside` in the place of `out`; of the old one go only the files on its list."""
    if not out.exists():
        os.rename(aside, out)
        return
    old = aside
    if not exchange(aside, out):
        old = temp_beside(out)
        os.rename(out, old)
        os.rename(aside, out)
    remove_written(old)
    if old.exists():  # a trainer's cache, or what came while the export was made
        _bring_back(old, out)


def _bring_back(old: Path, out: Path) -> None:
    for path in files_below(old):
        target = out / path
        if not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(old / path, target)
    remove_written(old)  # the folders that are empty now
