"""The pictures of a tar with what stands beside them: `000.json`, `000.txt` and `000.cls` belong to `000.jpg`.

The layout is WebDataset's: a key is a name up to the first dot of its last part, and the members of one key stand
together, in any order. So one key is held at a time, and a tar of any size is read in bounded memory. A sidecar that
stands elsewhere belongs to no picture that could be known; it is counted. One that cannot be read costs itself: the
picture is annotated all the same, and its columns say what was wrong.

Knows nothing of requests, and decodes no picture.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from tarfile import TarInfo
from types import MappingProxyType
from typing import IO, Any, NamedTuple

from md3cli.errors import RowError
from md3cli.records import printable
from md3cli.source.manifest import ROW_LIMIT_BYTES, TOO_LONG, json_value
from md3cli.source.tar import tar_members
from md3cli.source.walk import has_image_suffix

ERRORS = "sidecar_errors"  # the column that says what could not be read
MOST_OF_A_KEY = 1000  # pictures that are held until their sidecars have come
STRAY, DAMAGED, DOUBLE = "sidecars without their picture beside them", "damaged sidecars", "sidecars that come twice"
_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,18}\s*", re.ASCII)
NOTHING: Mapping[str, Any] = MappingProxyType({})


class TarPicture(NamedTuple):
    """A picture inside a tar: its name there, where its bytes are, and the columns of its sidecars."""

    name: str
    offset: int
    size: int
    columns: Mapping[str, Any]


@dataclass(slots=True)
class _Group:
    """The members of one key so far; a sidecar is its bytes, or what is wrong with it."""

    key: str
    pictures: list[tuple[str, int, int]] = field(default_factory=list)
    sidecars: dict[str, bytes | str] = field(default_factory=dict)
    has_picture: bool = False  # it may have been left out, or be gone already
    is_late: bool = False  # pictures are gone that a sidecar to come would belong to


def tar_pictures(
    file: IO[bytes], name: str, why_not: Callable[[TarInfo, str], str], skipped: Counter[str]
) -> Iterator[TarPicture]:
    """Yield the pictures of a tar, which messages call `name`, in their order.

    `why_not` says of a member, and of its name, why it is left out; empty where it is a picture to take. What is left
    out is counted in `skipped`, with hidden members, which are never taken.

    Raises:
        InputError: on the first step, when it is no plain tar.
        RowError: `decode`, the tar is damaged behind the pictures that came so far.
    """
    group = _Group("")
    try:
        for member in tar_members(file, name):
            if member.isdir():
                continue
            path = member.name.removeprefix("./")
            key, extension = _key_of(path)
            if not key:  # Macs put a hidden `._000.jpg` before each file
                skipped["hidden"] += 1
                continue
            if key != group.key:
                yield from _flushed(group, skipped)
                group = _Group(key)
            if extension in _READERS and member.isreg() and not member.issparse():
                _take_sidecar(group, extension, file, member, skipped)
                continue
            group.has_picture = group.has_picture or has_image_suffix(path)
            if reason := why_not(member, path):
                skipped[reason] += 1
                continue
            if len(group.pictures) == MOST_OF_A_KEY:
                yield from _flushed(group, skipped)
                group.is_late = True
            group.pictures.append((path, member.offset_data, member.size))
    except RowError:
        yield from _flushed(group, skipped)
        raise
    yield from _flushed(group, skipped)


def _key_of(path: str) -> tuple[str, str]:
    """Return a member's key, and its extension in lower case; no key of what is hidden."""
    folder, slash, base = path.rpartition("/")
    stem, _, extension = base.partition(".")
    is_hidden = any(part.startswith(".") for part in path.split("/"))
    return ("" if is_hidden else f"{folder}{slash}{stem}"), extension.lower()


def _take_sidecar(group: _Group, kind: str, file: IO[bytes], member: TarInfo, skipped: Counter[str]) -> None:
    if kind in group.sidecars or group.is_late:
        skipped[DOUBLE if kind in group.sidecars else STRAY] += 1
    elif member.size > ROW_LIMIT_BYTES:
        group.sidecars[kind] = TOO_LONG
    else:
        try:
            file.seek(member.offset_data)
            data = file.read(member.size)
        except OSError as error:  # the next header will tell how far it goes
            group.sidecars[kind] = error.strerror or str(error)
            return
        group.sidecars[kind] = data if len(data) == member.size else "cut short"


def _flushed(group: _Group, skipped: Counter[str]) -> Iterator[TarPicture]:
    """Yield the pictures of a key, each with all its sidecars; forget them."""
    if group.sidecars and not group.has_picture:
        skipped[STRAY] += len(group.sidecars)
    if not group.pictures:
        return
    columns, num_damaged = sidecar_columns(group.sidecars) if group.sidecars else (NOTHING, 0)
    if num_damaged:
        skipped[DAMAGED] += num_damaged
    yield from (TarPicture(*picture, columns) for picture in group.pictures)
    group.pictures = []


def sidecar_columns(sidecars: Mapping[str, bytes | str]) -> tuple[dict[str, Any], int]:
    """Return what sidecars (`json`, `txt`, `cls`) hold, by column, and how many of them cannot be read.

    An object of JSON brings its keys; any other value, or an object with a key that another column has, is the column
    `json`. NaN and infinities are null. What cannot be read is told in the column ERRORS, by sidecar.
    """
    values, problems = dict[str, Any](), dict[str, str]()
    for kind in (kind for kind in _READERS if kind in sidecars):
        content = sidecars[kind]
        try:
            if isinstance(content, str):
                raise ValueError(content)
            values[kind] = _READERS[kind](content)
        except UnicodeDecodeError:
            problems[kind] = "not valid UTF-8"
        except ValueError as error:
            problems[kind] = printable(str(error))
    values |= {ERRORS: problems} if problems else {}
    fields = values.get("json")
    if isinstance(fields, dict) and fields.keys().isdisjoint(values.keys() - {"json"}):
        del values["json"]
        return fields | values, len(problems)
    return values, len(problems)


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")


def _class(data: bytes) -> int | str:
    """Return a class as its number, as WebDataset does; a name stays a text."""
    text = _text(data)
    return int(text) if _WHOLE.fullmatch(text) else text


_READERS: Mapping[str, Callable[[bytes], Any]] = {"json": json_value, "txt": _text, "cls": _class}
