"""The files of an export: outputs that appear whole or not at all, and what an earlier run left there.

A single file goes the way of `md3cli.files`. A folder is built aside and renamed; its many files are not synced one by
one, because they can be made again from the records after a power cut. What stands in OUT goes only with `overwrite`,
and a folder only if its list of files, `.md3`, names all that is in it. A run that starts over in its run folder
takes away the documents that md3 made of the former records; left there they would pass for its own.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from md3cli.errors import ExportError, UsageError
from md3cli.exporters import RUN_FOLDER_NAMES
from md3cli.files import STAGED, atomic_publish, remove_folder, temp_beside, translate_errors
from md3cli.finished.guards import (
    RUN,
    TRAINERS_SUFFIX,
    check_not_foreign,
    files_below,
    has_marker,
    is_of_older_run,
    listed_in,
    marker_format,
    remove_written,
    write_marker,
    written_paths,
)
from md3cli.finished.run_json import RUN_INFO_NAME
from md3cli.records import printable
from md3cli.source.walk import IMAGE_SUFFIXES
from md3cli.system import exchange

REPORT_NAME = "report.html"
REPORT_PAGES_NAME = "report_pages"
_MOST_LISTED = 1000  # files in a run folder; a longer list is not ours

_FORMATS: Mapping[str, str] = {**RUN_FOLDER_NAMES, "html": REPORT_NAME}
_SUFFIXES: Mapping[str, frozenset[str]] = {  # of the files in a format's folder
    "yolo": IMAGE_SUFFIXES | {".txt", ".yaml", ".cache"},
    "voc": IMAGE_SUFFIXES | {".xml", ".txt"},
    "labelstudio": frozenset({".json", ".xml"}),
    "hf": IMAGE_SUFFIXES | {".jsonl"},
    "overlay": IMAGE_SUFFIXES,
    "txt": frozenset({".txt"}),
}


def remove_leftovers(run_info: Path, kept: Collection[Path]) -> None:
    """Remove the documents of the former run, but for `kept`: those are replaced when they are made.

    Does nothing where `run_info` is not there, or is no run folder's. Of a format's folder go the files on its list;
    a file goes where the run folder's list names it, or run.json says that a start was asked for it. What cannot be
    removed stays, and a format's folder that is a link is not entered.
    """
    if run_info.name != RUN_INFO_NAME or not run_info.is_file():
        return
    folder = run_info.parent
    listed = set(islice(written_paths(folder), _MOST_LISTED)) if marker_format(folder) == RUN else set()
    adopt_older(run_info, [(format, folder / name) for format, name in _FORMATS.items()])
    for format, name in _FORMATS.items():
        path = folder / name
        if path in kept or path.is_symlink():
            continue
        if path.is_dir():
            remove_written(path)
        elif name in listed or is_of_older_run(run_info, format):
            with contextlib.suppress(OSError):
                path.unlink()
    if folder / REPORT_NAME not in kept:
        remove_written(folder / REPORT_PAGES_NAME)


def adopt_older(run_info: Path, documents: Iterable[tuple[str, Path]]) -> None:
    """Give a list of its files to each format's folder that an earlier start made before there were lists.

    Only one that run.json says was asked for, and that holds nothing but the kinds of files its format has.
    """
    for format, path in documents:
        suffixes = _SUFFIXES.get(format)
        is_unlisted = path.is_dir() and not path.is_symlink() and not has_marker(path)
        is_older = is_unlisted and is_of_older_run(run_info, format)
        if suffixes is None or not is_older:
            continue
        if all(os.path.splitext(name)[1].lower() in suffixes for name in files_below(path)):
            with contextlib.suppress(OSError):
                write_marker(path, format, files_below(path))


# The name is taken, or the file system cannot hold it: the next candidate may do.
_NAME_TROUBLE = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not overwrite:
        raise UsageError(f"{printable(str(out))} exists already; add --overwrite to replace it, or name another -o")


@contextmanager
def replaced_file(out: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Open a binary file that becomes `out` when the block ends well.

    Raises:
        UsageError: `out` exists and may not be replaced, or is a folder.
        OutputError: disk full, no permission.
    """
    if out.is_dir():
        raise UsageError(f"{printable(str(out))} is a folder; name a file for this format")
    if out.exists():
        _refuse_existing(out, overwrite)
    is_new = not out.parent.exists()
    with translate_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_publish(out) as aside, aside.open("wb") as file:
            yield file
    finally:
        if is_new and not out.exists():
            with suppress(OSError):  # not empty: somebody else's files are there
                out.parent.rmdir()


def write_new(path: str, content: bytes | memoryview) -> None:
    """Write a small file that is not there yet.

    Raises:
        OSError: it is there, or cannot be written.
    """
    _fill(_opened_new(path), content)


def _opened_new(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)


def _fill(file: int, content: bytes | memoryview) -> None:
    try:
        while content:
            content = content[os.write(file, content) :]
    finally:
        os.close(file)


_MOST_MADE = 1000  # folders that are kept in mind


class StagedFolder:
    """A folder being built aside; it hands out names that nothing else has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: set[str] = set()  # folders that are there; some of them

    def create(self, candidates: Iterable[PurePosixPath]) -> tuple[BinaryIO, PurePosixPath]:
        """Create the first candidate that is free; return it open, with its name inside the folder.

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
        raise self._no_name_left()

    def write(self, candidates: Iterable[PurePosixPath], content: bytes, *, inside: str = "") -> PurePosixPath:
        """Write `content` to the first candidate that is free in the folder `inside`; return the candidate.

        As `create` for what is small: three calls of the system, and no file object.
        """
        top = f"{self.path}/{inside}/" if inside else f"{self.path}/"
        for relative in candidates:
            path = f"{top}{relative}"
            above = os.path.dirname(path)
            try:
                if above not in self._made:
                    os.makedirs(above, exist_ok=True)
                    if len(self._made) > _MOST_MADE:
                        self._made.clear()
                    self._made.add(above)
                file = _opened_new(path)
            except OSError as error:
                if error.errno not in _NAME_TROUBLE:
                    raise
                continue
            _fill(file, content)
            return relative
        raise self._no_name_left()

    def _no_name_left(self) -> ExportError:
        return ExportError(f"no file name is left for an image in {printable(str(self.path))}")


@contextmanager
def staged_folder(out: Path, *, overwrite: bool, format: str) -> Iterator[StagedFolder]:
    """Make a folder that becomes `out` when the block ends well; an empty `out` is as good as none.

    It gets a list of its files, `.md3`. An existing folder that holds anything which its list does not name is
    somebody's work and is not replaced even with `overwrite`; what trainers keep there (`labels.cache`) stays
    while its labels are the same.
    """
    out = Path(os.path.realpath(out))  # a link stays, and what it leads to is replaced
    check_replaceable(out, overwrite=overwrite)
    aside = temp_beside(out)
    with translate_errors(out):
        aside.mkdir(parents=True)
        try:
            yield StagedFolder(aside)
            write_marker(aside, format, files_below(aside))
            _swap(aside, out)
        finally:
            remove_folder(aside)


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
def merged_folder(out: Path, *, overwrite: bool, format: str) -> Iterator[StagedFolder]:
    """Make a folder whose files are added to `out` when the block ends well, beside what stands there.

    Where `out` is new or empty, or has a list of its files, they are on it. With `overwrite` a file of the same name
    is replaced only if it is on the list.

    Raises:
        UsageError: a file of the same name stands there and may not be replaced; nothing was added.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{printable(str(out))} is a file; this format writes a folder")
    is_new = not out.exists()
    has_list = is_new or next(out.iterdir(), None) is None or has_marker(out)
    with translate_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        aside = temp_beside(out / STAGED)
        try:
            aside.mkdir()
            yield StagedFolder(aside)
            is_listed = listed_in(out)
            for _, target in _moves(aside, out):
                if os.path.lexists(target):
                    _refuse_existing(target, overwrite)
                    if not is_listed(target.relative_to(out).as_posix()):
                        raise UsageError(
                            f"{printable(str(target))} was not written by md3; move it away, or name another -o"
                        )
                if not Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(out)):
                    raise UsageError(f"{printable(str(target.parent))} is a link that leads out of -o; name another -o")
            if has_list:
                write_marker(out, marker_format(out) or format, _added(out, aside))
            for source, target in _moves(aside, out):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
        finally:
            remove_folder(aside)
            if is_new:
                with suppress(OSError):  # not empty: the files are there
                    out.rmdir()


def _added(out: Path, aside: Path) -> Iterator[str]:
    """Yield what the list of `out` names, and then what is new on it."""
    yield from (path for path in written_paths(out) if not os.path.lexists(aside / path))
    yield from files_below(aside)


def _moves(aside: Path, out: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each file in the staged folder with its place in `out`."""
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
    for cache in [*_stale_caches(old, out)]:
        (old / cache).unlink(missing_ok=True)
    remove_written(old)
    if old.exists():  # a trainer's cache, or what came while the export was made
        _bring_back(old, out)


def _stale_caches(old: Path, new: Path) -> Iterator[str]:
    """Yield the caches in `old` of labels that are others in `new`: `labels.cache` is of the folder `labels`.

    Ultralytics up to 8.3, and all that share its loader, believe a cache whose labels have the same names and sizes.
    """
    for cache in files_below(old):
        labels = cache.removesuffix(TRAINERS_SUFFIX)
        if labels != cache and (old / labels).is_dir() and not _are_same(old / labels, new / labels):
            yield cache


def _are_same(old: Path, new: Path) -> bool:
    """Return whether two folders hold the same labels, which can be read; the caches of folders below are none."""
    num_old = 0
    try:
        for path in _labels_below(old):
            num_old += 1
            if not filecmp.cmp(old / path, new / path, shallow=False):
                return False
        return num_old == sum(1 for _ in _labels_below(new))
    except OSError:  # one is not there
        return False


def _labels_below(folder: Path) -> Iterator[str]:
    return (path for path in files_below(folder) if not path.endswith(TRAINERS_SUFFIX))


def _bring_back(old: Path, out: Path) -> None:
    for path in files_below(old):
        target = out / path
        if not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(old / path, target)
    remove_written(old)  # the folders that are empty now
