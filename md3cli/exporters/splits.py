"""Sets of a collection for training: which one a picture belongs to. Pure; the same in all formats.

A picture's set follows from a hash of its name alone (or of its folder, or of a column's value), so it stays when
pictures come or go, whatever their order, the format and the machine. Source: product contract, section 9.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from md3cli.errors import UsageError
from md3cli.records import printable

FOLDER = "folder"
_HASH_BYTES = 8
ONE_SET = "all pictures are in one set; md3 export --split train=0.8,val=0.2 makes two"


@dataclass(frozen=True, slots=True)
class Splits:
    """Names of sets with their shares, which add up to 1; `by`: what keeps pictures together, `folder` or a column."""

    shares: tuple[tuple[str, float], ...]
    by: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The sets, as typed."""
        return tuple(name for name, _ in self.shares)

    def of(self, image: str, metas: Iterable[Mapping[str, Any]]) -> str:
        """Return the set of a picture, from its name and the `meta` of its records."""
        key = self.key_of(image, metas)
        text = f"name:{image}" if key is None else f"group:{key}"
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:_HASH_BYTES]
        place, end = int.from_bytes(digest) / 2 ** (8 * _HASH_BYTES), 0.0
        for name, share in self.shares:
            end += share
            if place < end:
                return name
        return self._last

    def key_of(self, image: str, metas: Iterable[Mapping[str, Any]]) -> str | None:
        """Return what a picture shares with those it stays together with; None where nothing keeps it."""
        if self.by is None:
            return None
        if self.by == FOLDER:
            return image.rpartition("/")[0]
        values = (meta.get(self.by) for meta in metas)
        value = next((value for value in values if value not in (None, "")), None)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # pandas writes a whole number as 160.0
        return None if value is None else str(value)

    @property
    def _last(self) -> str:
        return next(name for name, share in reversed(self.shares) if share > 0)


@dataclass
class Sets:
    """The sets of one export, counted. Without `splits` there is one, which has no name (`""`)."""

    splits: Splits | None

    def __post_init__(self) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(self.names, 0))
        self._num_keyless = 0
        self._has_keys = False

    @property
    def names(self) -> tuple[str, ...]:
        """The sets, as typed; `("",)` where there is one."""
        return ("",) if self.splits is None else self.splits.names

    def place(self, image: str, records: Iterable[Mapping[str, Any]]) -> str:
        """Return the set of a picture without counting it: it may be missing. Call `add` once it is written."""
        if self.splits is None:
            return ""
        metas = _metas(records)
        self._has_keys = self._has_keys or self.splits.key_of(image, metas) is not None
        return self.splits.of(image, metas)

    def add(self, image: str, records: Iterable[Mapping[str, Any]]) -> str:
        """Count a picture in, and return its set."""
        name = self.place(image, records)
        self.counts[name] += 1
        if self.splits is not None and self.splits.by is not None:
            self._num_keyless += self.splits.key_of(image, _metas(records)) is None
        return name

    def folders(self, called: Mapping[str, str], program: str) -> dict[str, str]:
        """Return the folder of each set, where `program` has names of its own for some, `called`.

        Raises:
            UsageError: two sets would share one.
        """
        folders = {name: called.get(name, name) for name in self.names}
        for name, folder in folders.items():
            others = [other for other in folders if other != name and folders[other].casefold() == folder.casefold()]
            if others:
                raise UsageError(f"{name} and {others[0]} are one set for {program}; name it once in --split")
        return folders

    def notes(self) -> Iterator[str]:
        """Yield how many pictures each set has, or that there is one set, and what could not be kept together.

        Raises:
            UsageError: no picture has the column that keeps pictures together.
        """
        if self.splits is None:
            yield from one_set_notes(self.counts.total())
            return
        column = printable(str(self.splits.by))
        if self._num_keyless and not self._has_keys:
            raise UsageError(f"no picture has a column {column} in its meta, so --split-by cannot keep any together")
        yield "sets: " + ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        empty = [name for name, share in self.splits.shares if share > 0 and not self.counts[name]]
        if empty and self.counts.total():
            yield f"no picture fell to {' and '.join(empty)}, at which trainers stop; there are few, or few groups"
        if self._num_keyless:
            yield f"{self._num_keyless:,} pictures have no {column!r} to keep them together; each stands alone"


def one_set_notes(num_pictures: int) -> Iterator[str]:
    """Yield that all pictures are in one set, where there are several to part."""
    if num_pictures > 1:
        yield ONE_SET


def _metas(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [record.get("meta") or {} for record in records]
