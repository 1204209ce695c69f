"""What an INPUT can be, and what a name alone says: its suffix, its place in natural order, the patterns it matches.

Pure: knows nothing of disks and buckets. Paths are relative, with `/`; names that are not UTF-8 carry surrogate
escapes, as `os.fsdecode` makes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

STDIN = "-"
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".heic", ".heif"]
)  # by name only: what a file really is, its content decides when it is opened
MANIFEST_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".parquet", ".txt"})
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
SPREADSHEETS = frozenset({".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".numbers"})
_DIGITS = re.compile(r"[0-9]+")


class Kind(Enum):
    """What an INPUT is; a file that is none of the others is a picture, whatever its name."""

    FILE, FOLDER, GLOB, MANIFEST, STDIN, TAR = range(6)


def has_image_suffix(name: str) -> bool:
    """Return whether a file of this name is taken for a picture in a folder."""
    return name[name.rfind(".") :].lower() in IMAGE_SUFFIXES


def natural_sorted(names: list[str]) -> list[str]:
    """Sort `img2` before `img10`, upper and lower case alike; names that differ in nothing else by their characters."""

    def key(name: str) -> str:  # each number is preceded by its length
        return _DIGITS.sub(lambda match: f"{len(match[0].lstrip('0')):03d}{match[0].lstrip('0')}", name.casefold())

    return sorted(sorted(names), key=key)


def is_glob(text: str) -> bool:
    return any(char in text for char in "*?[")


def _component_regex(part: str) -> str:
    """A regular expression for one path component with `*`, `?`, `[abc]` and `[!abc]`."""
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
    """Matches whole relative paths; a `**` among the parts stands for any number of folders."""
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

    A file stays when no exclude pattern matches it or a folder above it, and, where there are
    include patterns, one of them matches it.
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
        if self.exclude:
            places = [match.start() for match in re.finditer("/", path)]
            if any(self.excludes(path[:place]) for place in [*places, len(path)]):
                return False
        return not self.include or any(pattern.fullmatch(path) for pattern in self.include)


def _filter_regex(pattern: str) -> re.Pattern[str]:
    parts = tuple(part for part in pattern.split("/") if part not in ("", "."))
    if not parts:
        return re.compile(r"(?!)")
    return _path_regex(parts if "/" in pattern.strip("/") else ("**", *parts))
