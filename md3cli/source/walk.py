"""Walking a folder: natural order, links, hidden files, md3's own files. Knows nothing of pictures but their suffixes.

Lazy: at any time the names of one folder a level are held, so that a tree of any size is walked in bounded memory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from md3cli.source.kinds import Glob, PathFilter, has_image_suffix, natural_sorted

OWN_FILES = "of md3's own files"  # in `Walk.skipped`
OWN_FOLDER_NAMES = frozenset({"yolo", "hf", "overlay"})  # of a run folder, those that hold pictures
_RUN_HEAD_BYTES = 200  # `schema` is the first key

_NAMED_ONLY = {  # what holds pictures, and is read where a pattern or its name says so: how skipped ones are called
    ".tar": "tars (give 'FOLDER/*.tar' to read them)",
    ".parquet": "Parquet files (give 'FOLDER/*.parquet' to read them)",
}


@dataclass(slots=True)
class Walk:
    """How to walk, and in `skipped` how many entries were left out, by reason.

    What md3 wrote itself is left out: what has a path, links followed, in `own_files`, and all below a folder
    that has a file `.md3` or is a format's folder beside a run.json of md3; but never the folder walked itself.
    """

    recursive: bool = True
    follow_links: bool = False
    filter: PathFilter = field(default_factory=lambda: PathFilter((), ()))
    skipped: Counter[str] = field(default_factory=Counter)
    own_files: frozenset[str] = frozenset()

    def files(self, root: str, glob: Glob | None = None) -> Iterator[str]:
        """Paths under `root`, in natural order folder by folder: those that `glob` matches, else pictures by suffix.

        An empty folder named like a picture is among them: somebody meant a file.
        """
        seen = {_identity(root)}
        levels = [_Level("", iter(self.entries(root)), False, False, self.is_run_folder(root))]
        while levels:
            level = levels[-1]
            entry = next(level.entries, None)
            if entry is None:
                levels.pop()
                continue
            path = f"{level.folder}/{entry.name}" if level.folder else entry.name
            if entry.name.startswith(".") and not (glob and glob.wants_hidden(path)):
                self.skipped["hidden"] += 1
            elif not entry.is_folder or self.is_meant_as_file(root, path, entry):
                if not self._is_wanted(path, glob):
                    continue
                if level.is_own or self._is_own_path(f"{root}/{path}"):
                    self.skipped[OWN_FILES] += 1
                else:
                    yield path
            elif self._may_enter(path, entry, glob):
                is_linked = level.is_linked or entry.is_link
                if not self.follow_links or self._is_new(f"{root}/{path}", seen, is_linked):
                    folder = f"{root}/{path}"
                    is_document = level.is_run and entry.name in OWN_FOLDER_NAMES
                    is_own = level.is_own or self.is_own(folder) or is_document or self._is_own_path(folder)
                    entries = iter(self.entries(folder))
                    levels.append(_Level(path, entries, is_linked, is_own, self.is_run_folder(folder)))

    def _is_wanted(self, path: str, glob: Glob | None) -> bool:
        if glob is not None and not glob.matches(path):
            return False
        if not has_image_suffix(path) and not (glob is not None and glob.names_suffix):
            suffix = os.path.splitext(path)[1].lower()
            self.skipped[_NAMED_ONLY.get(suffix, "other suffix")] += 1
            return False
        if not self.filter.keeps(path):
            self.skipped["excluded"] += 1
            return False
        return True

    def _may_enter(self, path: str, entry: Entry, glob: Glob | None) -> bool:
        if glob is not None and not glob.may_enter(path):
            return False
        reason = "directory links" if entry.is_link and not self.follow_links else ""
        reason = "sub-folders" if glob is None and not self.recursive else reason
        reason = "excluded" if self.filter.excludes(path) else reason
        if reason:
            self.skipped[reason] += 1
        return not reason

    def _is_new(self, folder: str, seen: set[tuple[int, int]], is_linked: bool) -> bool:
        """Whether to enter: what links lead to once, what stands in the tree itself always."""
        identity = _identity(folder)
        if is_linked and identity in seen:
            self.skipped["directory links"] += 1
            return False
        seen.add(identity)
        return True

    def entries(self, path: str) -> Iterable[Entry]:
        """The entries of a folder in natural order; none, and counted, where it cannot be read."""
        folders: dict[str, bool] = {}
        try:
            with os.scandir(path) as entries:
                names = []
                for entry in entries:
                    names.append(entry.name)
                    if _is_folder(entry):
                        folders[entry.name] = entry.is_symlink()
        except OSError:
            self.skipped["unreadable folders"] += 1
            return
        for name in natural_sorted(names):
            yield Entry(name, name in folders, folders.get(name, False))

    def _is_own_path(self, path: str) -> bool:
        return bool(self.own_files) and os.path.realpath(path) in self.own_files

    def is_own(self, folder: str) -> bool:
        """Return whether md3 made a folder, as a file `.md3` in it says, whatever the file holds."""
        return os.path.lexists(f"{folder}/.md3")

    def is_run_folder(self, folder: str) -> bool:
        """Return whether a folder has a run.json of md3."""
        try:
            with open(f"{folder}/run.json", "rb") as file:
                return b'"md3-run/' in file.read(_RUN_HEAD_BYTES)
        except OSError:
            return False

    def is_meant_as_file(self, root: str, path: str, entry: Entry) -> bool:
        """Whether a folder is named like a picture and is empty."""
        if entry.is_link or not has_image_suffix(entry.name):
            return False
        try:
            with os.scandir(f"{root}/{path}") as entries:
                return next(entries, None) is None
        except OSError:
            return False


class Entry(NamedTuple):
    """What stands in a folder; `is_link` counts for folders only."""

    name: str
    is_folder: bool
    is_link: bool


class _Level(NamedTuple):
    folder: str
    entries: Iterator[Entry]
    is_linked: bool
    is_own: bool
    is_run: bool


def _identity(folder: str) -> tuple[int, int]:
    try:
        found = os.stat(folder)
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: a file, as far as it goes
        return False
