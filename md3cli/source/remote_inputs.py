"""INPUT that is an address: what it is, whether it is there, and how it is opened and walked.

A remote folder is walked in the same order as one on a disk, with the same suffixes and patterns. Whoever types an
address names its host, so that the host may lie in a private network. Apart from the other files of this room, which
import it inside functions, because it needs the extra `remote`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import compress
from typing import IO

from md3cli.errors import ImageError, InputError
from md3cli.records import printable
from md3cli.remote.address import has_userinfo, host_of, is_web, path_of, shown, suffix_of
from md3cli.remote.hosts import FetchOptions, HostRules
from md3cli.remote.reader import Reader, explain, open_remote
from md3cli.source.walk import (
    ARCHIVES,
    IMAGE_SUFFIXES,
    JSON,
    MANIFEST_SUFFIXES,
    TAR,
    FolderEntry,
    Kind,
    PathFilter,
    Walk,
    is_glob,
    natural_sorted,
)

MOST_LOOKED_AT, LOOKS_AT_A_TIME = 1024, 32  # files of a pattern with braces: 2 s where a look takes 50 ms
MOST_LEVELS = 200  # of folders: a web server whose pages lead in a circle shows ever deeper ones


@dataclass(slots=True)
class RemoteWalk(Walk):
    """A walk below an address. A folder that cannot be listed ends it: silence would lose what is in there."""

    reader: Reader = field(kw_only=True)

    def entries(self, path: str) -> list[FolderEntry]:
        """Return the entries of a folder in natural order.

        Raises:
            InputError: it cannot be listed, which was tried several times, or lies deeper than anybody can mean.
        """
        if path_of(path).count("/") > MOST_LEVELS:
            raise InputError(
                f"{printable(shown(path))[:200]}... lies more than {MOST_LEVELS} folders deep; where they lead in a "
                "circle leave that one out with --exclude, or use --no-recursive"
            )
        try:
            found = self.reader.entries(path)
        except ImageError as error:
            raise InputError(f"cannot list {explain(path, error)}") from error
        kinds: dict[str, set[bool]] = {}
        for entry in found:
            kinds.setdefault(entry.name, set()).add(entry.is_folder)
        kinds.pop("", None)  # the object that stands for the folder itself, or one below `//`
        names = natural_sorted(list(kinds))
        return [FolderEntry(name, is_folder, False) for name in names for is_folder in sorted(kinds[name])]

    def is_own(self, folder: str) -> bool:
        return False  # md3 makes no exports in buckets

    def is_run_folder(self, folder: str) -> bool:
        return False

    def is_document(self, path: str) -> bool:
        return False

    def is_meant_as_file(self, root: str, path: str, entry: FolderEntry) -> bool:
        return False


def kind_of_address(typed: str, is_alone: bool) -> Kind:
    """Return what the address `typed` is: as its suffix says, else as a look there says.

    Raises:
        InputError: it is not there (one picture among several INPUTs is a record instead), or cannot be read.
    """
    if has_userinfo(typed) and not is_web(typed):
        raise InputError(f"{printable(shown(typed))}: credentials do not belong in an address; set them as AWS_* or so")
    if path_of(typed).lower().endswith(ARCHIVES):
        raise InputError(f"{printable(shown(typed))} is compressed; unpack it, or make it a plain .tar")
    if not host_of(typed) or is_glob(host_of(typed)):
        raise InputError(f"{printable(shown(typed))} names no host or bucket; a pattern cannot stand for one")
    if _is_pattern(typed):
        return Kind.GLOB
    suffix = suffix_of(typed)
    if typed.endswith("/"):
        return Kind.FOLDER
    if suffix == TAR:
        return Kind.TAR
    if suffix == JSON:
        return Kind.COCO
    if suffix in MANIFEST_SUFFIXES:
        return Kind.MANIFEST
    if suffix in IMAGE_SUFFIXES and not is_alone:
        return Kind.FILE
    return _kind_by_looking(typed, may_fail=suffix in IMAGE_SUFFIXES)


def not_there(addresses: Sequence[str]) -> list[str]:
    """Return which of the files at `addresses` are not there; of very many only the first and the last are looked at.

    Raises:
        InputError: one cannot be looked at.
    """

    def is_missing(address: str) -> bool:
        try:
            reader(address).facts(address)
        except ImageError as error:
            if error.type != "not_found":
                raise _unreadable(address, error) from error
            return True
        return False

    looked_at = [*addresses[: MOST_LOOKED_AT - 1], *addresses[MOST_LOOKED_AT - 1 :][-1:]]
    with ThreadPoolExecutor(LOOKS_AT_A_TIME) as threads:
        return list(compress(looked_at, threads.map(is_missing, looked_at)))


def _is_pattern(typed: str) -> bool:
    """Return whether `typed` holds `*`, `?` (in a URL it starts a query) or `[`, and nothing of this name is there."""
    if is_web(typed):
        return is_glob(typed.replace("?", "")) and "?" not in typed
    if not is_glob(path_of(typed)):
        return False
    try:
        reader(typed).facts(typed)
    except ImageError as error:
        if error.type == "not_found":
            return True
        raise _unreadable(typed, error) from error
    return False


def _kind_by_looking(typed: str, *, may_fail: bool) -> Kind:
    """Look at an address; `may_fail` where it is named like a picture, whose failure then belongs into its record."""
    try:
        return Kind.FOLDER if reader(typed).facts(typed).is_folder else Kind.FILE
    except ImageError as error:
        if may_fail and error.type != "not_found":
            return Kind.FILE
        raise _unreadable(typed, error) from error


def check_folder(folder: str) -> None:
    """Raise InputError where there is no folder, or none that can be listed."""
    where = folder.rstrip("/") + "/" if is_web(folder) else folder
    try:
        facts = reader(folder).facts(where)
    except ImageError as error:
        raise _unreadable(folder, error) from error
    if not facts.is_folder:
        page = "; a web folder must show a page with links to its files" if is_web(folder) else ""
        raise InputError(f"{printable(shown(folder))} is not a folder{page}")


def open_address(address: str) -> IO[bytes]:
    """Open the file at an address, to be read and sought in.

    Raises:
        InputError: it cannot be opened.
    """
    try:
        return open_remote(address, reader(address))
    except ImageError as error:
        raise _unreadable(address, error) from error


def walk_of(folder: str, filter: PathFilter, skipped: Counter[str], *, is_recursive: bool) -> Walk:
    """Return the walk through the folder at an address."""
    return RemoteWalk(is_recursive, False, filter, skipped, reader=reader(folder))


def reader(address: str) -> Reader:
    """Return the reader of an address that the user typed."""
    return _reader(host_of(address))


@cache
def _reader(host: str) -> Reader:
    return Reader(FetchOptions(rules=HostRules(named=frozenset({host}))))


def _unreadable(typed: str, error: ImageError) -> InputError:
    if error.type == "not_found":
        return InputError(f"there is no {printable(shown(typed))}; check the address")
    what = {"permission": "check the credentials in the environment"}.get(error.type, "check address and network")
    return InputError(f"cannot read {printable(shown(typed))}: {error}; {what}")
