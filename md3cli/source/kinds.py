"""What an INPUT is, by its name and what stands on the disk, and whether it can be entered at all."""

from __future__ import annotations

import contextlib
import os
import re
from enum import Enum
from typing import NamedTuple

from md3cli.errors import InputError, RowError
from md3cli.records import printable
from md3cli.remote.address import is_address, shown
from md3cli.remote.hosts import require_extra
from md3cli.source.manifest import MANIFEST_SUFFIXES, manifest_rows, open_regular
from md3cli.source.tar import tar_members
from md3cli.source.walk import Glob, is_glob

STDIN = "-"
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
SPREADSHEETS = frozenset({".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".numbers"})
_BRACES = re.compile(r"\{[^{}]*(?:\.\.|,)[^{}]*\}")  # {00000..00009}, {a,b}


class Kind(Enum):
    """What an INPUT is; a file that is none of the others is a picture, whatever its name."""

    FILE, FOLDER, GLOB, MANIFEST, STDIN, TAR = range(6)


class Input(NamedTuple):
    """One INPUT of the command line."""

    typed: str
    kind: Kind
    prefix: str  # what the names of its pictures start with


def kind_of(typed: str, is_alone: bool) -> Kind:
    """What `typed` is. A name that exists is never taken for a pattern.

    Raises:
        InputError: it does not exist (one among several is a picture that is not there), or is compressed.
        MissingExtraError: it is an address, and what fetches it is not installed.
    """
    if typed == STDIN:
        return Kind.STDIN
    if is_address(typed):
        return _kind_of_address(typed, is_alone)
    suffix = os.path.splitext(typed)[1].lower()
    if os.path.isdir(typed):
        return Kind.FOLDER
    if not os.path.lexists(typed):
        if is_glob(typed):
            return Kind.GLOB
        if _BRACES.search(typed):
            raise InputError(
                f"there is no {printable(typed)}; braces are the shell's: leave the quotes out, or give a pattern: "
                f"'{printable(_BRACES.sub('*', typed))}'"
            )
        if is_alone or suffix in MANIFEST_SUFFIXES:
            raise InputError(f"there is no {printable(typed)}; check the path (a pattern is quoted: 'photos/**/*.jpg')")
        return Kind.FILE
    if typed.lower().endswith(ARCHIVES):
        raise InputError(f"{printable(typed)} is compressed; unpack it, or make it a plain .tar")
    if suffix in SPREADSHEETS:
        raise InputError(
            f"{printable(typed)} is a spreadsheet; save it as CSV UTF-8 with a column 'image', and give that"
        )
    if suffix == ".tar":
        return Kind.TAR
    return Kind.MANIFEST if suffix in MANIFEST_SUFFIXES else Kind.FILE


def _kind_of_address(typed: str, is_alone: bool) -> Kind:
    require_extra(typed)
    from md3cli.source.remote_inputs import kind_of_address

    return kind_of_address(typed, is_alone)


def check_readable(given: Input, is_alone: bool) -> None:
    """Take the first step into INPUT now, before anything slow such as a model is loaded.

    Raises:
        InputError: there is no such step.
    """
    if given.kind is Kind.MANIFEST:
        next(manifest_rows(given.typed), None)
    elif given.kind is Kind.TAR and is_alone:
        with open_regular(given.typed) as file, contextlib.suppress(RowError):
            next(tar_members(file, shown(given.typed)), None)
    elif given.kind in (Kind.FOLDER, Kind.GLOB):
        folder = given.typed if given.kind is Kind.FOLDER else Glob.parse(given.typed).base or "."
        if is_address(folder):
            _check_remote_folder(folder)
            return
        try:
            os.scandir(folder).close()
        except OSError as error:
            raise InputError(f"cannot read the folder {printable(folder)}: {error.strerror}") from error


def _check_remote_folder(folder: str) -> None:
    from md3cli.source.remote_inputs import check_folder

    check_folder(folder)
