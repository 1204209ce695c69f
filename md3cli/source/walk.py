"""Which files an INPUT means: what a name says by itself, patterns and filters, and the walk through a folder.

Names and patterns are pure: paths are relative, with `/`, and names that are not UTF-8 carry surrogate escapes, as
`os.fsdecode` makes them. The walk is lazy: at any time it holds the names of one folder a level, so that a tree of any
size is walked in bounded memory. Knows nothing of pictures but their suffixes, and opens none.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

STDIN = "-"
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".heic", ".heif"]
)  # by name only: what a file really is, its content decides when it is opened
MANIFEST_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".parquet", ".txt"})
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
SPREADSHEETS = frozenset({".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".numbers"})
_DIGITS = re.compile(r"[0-9]+")
OWN_FILES = "of md3's own files"  # in `Walk.skipped`
OWN_NAMES = frozenset(
    {"yolo", "voc", "hf", "overlay", "labelme", "cvat", "crops", "redacted", "records.parquet"}
)  # of a run folder, those that hold pictures or are taken for something that does
_RUN_HEAD_BYTES = 200  # `schema` is the first key

TAR, PARQUET, JSON = ".tar", ".parquet", ".json"
SHARDS = {  # what holds pictures, and is left out of a folder that has pictures, or shards named here before
    TAR: "tars beside pictures (give 'FOLDER/*.tar' to read them)",
    PARQUET: "Parquet files beside pictures or tars (give 'FOLDER/*.parquet' to read them)",
}


class Kind(Enum):
    """What an INPUT is; a file that is none of the others is a picture, whatever its name."""

    FILE, FOLDER, GLOB, MANIFEST, STDIN, TAR, COCO = range(7)


def suffix_of(name: str) -> str:
    """Return what a name ends with from its last dot on, in lower case; a name without a dot has none of ours."""
    return name[name.rfind(".") :].lower()


def has_image_suffix(name: str) -> bool:
    """Return whether a file of this name is taken for a picture in a folder."""
    return suffix_of(name) in IMAGE_SUFFIXES


def natural_sorted(names: list[str]) -> list[str]:
    """Return names with `img2` before `img10`, upper and lower case alike; equal ones go by their characters."""

    def key(name: str) -> str:  # each number is preceded by its length
        return _DIGITS.sub(lambda match: f"{len(match[0].lstrip('0')):03d}{match[0].lstrip('0')}", name.casefold())

    return sorted(sorted(names), key=key)


def is_glob(text: str) -> bool:
    return any(char in text for char in "*?[")


def _component_regex(part: str) -> str:
    """Return the regular expression of one path component with `*`, `?`, `[abc]` and `[!abc]`."""
    out, i = [], 0
    while i < len(part):
        close = part.find("]", i + 2) if part[i] == "[" else -1
        if part[i] == "*":
            out.append("[^/]*")
        elif part[i] == "?":
            out.append("[^/]")
        elif close > 0:
            inside = re.sub(r"([\\\[&~|^])", r"\\\1", part[i + 1 : close].removeprefix("!"))
            out.append(f"(?!/)[{'^' if part[i + 1] == '!' else ''}{inside}]")
            i = close
        else:
            out.append(re.escape(part[i]))
        i += 1
    return "".join(out)


def _path_regex(parts: tuple[str, ...]) -> re.Pattern[str]:
    """Compile a pattern of whole relative paths; a `**` among the parts stands for any number of folders."""
    out = [".*" if part == "**" else _component_regex(part) for part in parts[-1:]]
    for part in reversed(parts[:-1]):
        out.append("(?:[^/]+/)*" if part == "**" else f"{_component_regex(part)}/")
    try:
        return re.compile("".join(reversed(out)), re.DOTALL)
    except re.error:  # a turned range such as [z-a]: matches nothing, as in a shell
        return re.compile(r"(?!)")


@dataclass(frozen=True, slots=True)
class Glob:
    """A pattern over paths relative to `base`, its leading components without `*?[`.

    The components before the first `**`, `fixed`, match a single folder level each.
    """

    base: str
    parts: tuple[str, ...]
    regex: re.Pattern[str]
    fixed: tuple[re.Pattern[str], ...]

    @classmethod
    def parse(cls, text: str) -> Glob:
        """Split a pattern as typed (`photos/**/*.jpg`) into its base (`photos`) and the rest."""
        components = text.split("/")
        first = next(i for i, part in enumerate(components) if is_glob(part))
        parts = tuple(part for part in components[first:] if part not in ("", "."))
        base = "/".join(components[:first]) or ("/" if first else "")
        num_fixed = parts.index("**") if "**" in parts else len(parts)
        return cls(base, parts, _path_regex(parts), tuple(_path_regex((part,)) for part in parts[:num_fixed]))

    @property
    def names_suffix(self) -> bool:
        """Return whether the last component says which files are meant (`*.dat`), so that no suffix list applies."""
        return "." in self.parts[-1]

    def matches(self, path: str) -> bool:
        return self.regex.fullmatch(path) is not None

    def may_enter(self, folder: str) -> bool:
        """Return whether files under `folder` can match."""
        names = folder.split("/")
        if len(names) >= len(self.parts) == len(self.fixed):
            return False
        return all(part.fullmatch(name) for part, name in zip(self.fixed, names, strict=False))

    def wants_hidden(self, path: str) -> bool:
        """Return whether the pattern names the last component of `path`, a hidden one, with its dot."""
        depth = path.count("/")
        part = self.parts[depth] if depth < len(self.fixed) else self.parts[-1]
        return part.startswith(".")


@dataclass(frozen=True, slots=True)
class PathFilter:
    """`--include` and `--exclude`: a pattern without `/` is about a name, one with `/` about the whole path.

    A file stays when no exclude pattern matches it or a folder above it. Where there are include patterns, one of them
    must match it, too.
    """

    include: tuple[re.Pattern[str], ...]
    exclude: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, include: tuple[str, ...], exclude: tuple[str, ...]) -> PathFilter:
        return cls(tuple(map(_filter_regex, include)), tuple(map(_filter_regex, exclude)))

    def excludes(self, path: str) -> bool:
        """Return whether an exclude pattern matches this very path (a file or a folder)."""
        return any(pattern.fullmatch(path) for pattern in self.exclude)

    def keeps(self, path: str) -> bool:
        return self.opens(path) and (not self.include or any(pattern.fullmatch(path) for pattern in self.include))

    def opens(self, path: str) -> bool:
        """Return whether no exclude pattern matches a path or a folder above it: pictures in a shard may match."""
        if not self.exclude:
            return True
        places = [match.start() for match in re.finditer("/", path)]
        return not any(self.excludes(path[:place]) for place in [*places, len(path)])


def _filter_regex(pattern: str) -> re.Pattern[str]:
    parts = tuple(part for part in pattern.split("/") if part not in ("", "."))
    if not parts:
        return re.compile(r"(?!)")
    return _path_regex(parts if "/" in pattern.strip("/") else ("**", *parts))


# -- the walk --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Walk:
    """How to walk; `skipped` counts the entries that were left out, by reason.

    What md3 wrote itself is left out: each file whose path, links followed, is in `own_files`, and all below a folder
    that has a file `.md3`, or that is a format's folder beside a run.json of md3; without a glob tables of runs, too.
    The folder that is walked is never left out.

    Without a glob, `takes` is asked when a shard is met: whether those of its suffix are taken as pictures are.
    """

    recursive: bool = True
    follow_links: bool = False
    filter: PathFilter = field(default_factory=lambda: PathFilter((), ()))
    skipped: Counter[str] = field(default_factory=Counter)
    own_files: frozenset[str] = frozenset()
    takes: Callable[[str], bool] = lambda suffix: False

    def files(self, root: str, glob: Glob | None = None) -> Iterator[str]:
        """Yield paths under `root` in natural order, folder by folder: what `glob` matches, else pictures by suffix.

        An empty folder that is named like a picture is among them, because somebody meant a file.
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
                is_document = glob is None and (
                    (level.is_run and entry.name in OWN_NAMES) or self.is_document(f"{root}/{path}")
                )
                if level.is_own or is_document or self._is_own_path(f"{root}/{path}"):
                    self.skipped[OWN_FILES] += 1
                else:
                    yield path
            elif self._may_enter(path, entry, glob):
                is_linked = level.is_linked or entry.is_link
                if not self.follow_links or self._is_new(f"{root}/{path}", seen, is_linked):
                    folder = f"{root}/{path}"
                    is_document = level.is_run and entry.name in OWN_NAMES
                    is_own = level.is_own or self.is_own(folder) or is_document or self._is_own_path(folder)
                    entries = iter(self.entries(folder))
                    levels.append(_Level(path, entries, is_linked, is_own, self.is_run_folder(folder)))

    def _is_wanted(self, path: str, glob: Glob | None) -> bool:
        if glob is not None and not glob.matches(path):
            return False
        suffix = suffix_of(path)
        is_shard = suffix in SHARDS
        is_named = glob.names_suffix if glob is not None else is_shard and self.takes(suffix)
        if suffix not in IMAGE_SUFFIXES and not is_named:
            self.skipped[SHARDS.get(suffix, "other suffix")] += 1
            return False
        if not (self.filter.opens(path) if is_shard else self.filter.keeps(path)):
            self.skipped["excluded"] += 1
            return False
        return True

    def _may_enter(self, path: str, entry: FolderEntry, glob: Glob | None) -> bool:
        if glob is not None and not glob.may_enter(path):
            return False
        reason = "directory links" if entry.is_link and not self.follow_links else ""
        reason = "sub-folders" if glob is None and not self.recursive else reason
        reason = "excluded" if self.filter.excludes(path) else reason
        if reason:
            self.skipped[reason] += 1
        return not reason

    def _is_new(self, folder: str, seen: set[tuple[int, int]], is_linked: bool) -> bool:
        """Return whether to enter: what links lead to is entered once, what stands in the tree itself always."""
        identity = _identity(folder)
        if is_linked and identity in seen:
            self.skipped["directory links"] += 1
            return False
        seen.add(identity)
        return True

    def entries(self, path: str) -> Iterable[FolderEntry]:
        """Yield the entries of a folder in natural order; a folder that cannot be read is counted, and has none."""
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
            yield FolderEntry(name, name in folders, folders.get(name, False))

    def _is_own_path(self, path: str) -> bool:
        return bool(self.own_files) and os.path.realpath(path) in self.own_files

    def is_own(self, folder: str) -> bool:
        """Return whether md3 made a folder, as a file `.md3` in it says, whatever the file holds."""
        return os.path.lexists(f"{folder}/.md3")

    def is_run_folder(self, folder: str) -> bool:
        """Return whether a folder has a run.json of md3."""
        return _is_run_json(f"{folder}/run.json")

    def is_document(self, path: str) -> bool:
        """Return whether a file is the table that `-o NAME.parquet` wrote, as the run.json beside it says."""
        return suffix_of(path) == PARQUET and _is_run_json(f"{path}.run.json")

    def is_meant_as_file(self, root: str, path: str, entry: FolderEntry) -> bool:
        """Return whether a folder is named like a picture and is empty."""
        if entry.is_link or not has_image_suffix(entry.name):
            return False
        try:
            with os.scandir(f"{root}/{path}") as entries:
                return next(entries, None) is None
        except OSError:
            return False


class FolderEntry(NamedTuple):
    """What stands in a folder; `is_link` counts for folders only."""

    name: str
    is_folder: bool
    is_link: bool


class _Level(NamedTuple):
    folder: str
    entries: Iterator[FolderEntry]
    is_linked: bool
    is_own: bool
    is_run: bool


def _is_run_json(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return b'"md3-run/' in file.read(_RUN_HEAD_BYTES)
    except OSError:
        return False


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
