"""The other ways in which a list may spell the name of a file that is there.

Lists come from Windows, with `\\` between folders; from Macs, whose file names are decomposed where those of a list are
composed; from editors that quote a path or leave a blank behind it. The name as written always comes first.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator

_QUOTES = ('"', "'")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\[^\\]")  # C:\ or \\server


def existing_path(folder: str, name: str) -> str:
    """Return the path of `name` below `folder` (empty: the working folder), in the spelling under which it is there.

    As written, where it is there under none.
    """
    path = in_folder(folder, name)
    if is_plain(name) or os.path.lexists(path):
        return path
    for other in _spellings(name):
        found = _normalised(in_folder(folder, other))
        if found is not None:
            return found
    return path


def in_folder(folder: str, name: str) -> str:
    """`name` below `folder`; an absolute one as it is."""
    return name if name.startswith("/") or not folder else f"{folder}/{name}"


def is_plain(name: str) -> bool:
    """Return whether a name can be spelled in one way only, as nearly all are: no file is looked for then."""
    return name.isascii() and "\\" not in name and name[:1] not in ("~", *_QUOTES) and name.strip() == name


def is_of_windows(name: str) -> bool:
    """Return whether a name starts with a drive or a server of Windows, on a machine that has none."""
    return os.name != "nt" and _DRIVE.match(name.strip().strip("".join(_QUOTES))) is not None


def _spellings(name: str) -> Iterator[str]:
    """Other spellings of a name, the most likely first."""
    bare = name.strip()
    if len(bare) > 2 and bare[0] == bare[-1] and bare[0] in _QUOTES:
        bare = bare[1:-1]
    for spelled in (name, bare):
        yield spelled
        if "\\" in spelled:
            yield spelled.replace("\\", "/")
    if bare.startswith("~/"):
        yield os.path.expanduser(bare)


def _normalised(path: str) -> str | None:
    """`path` with each part composed or decomposed as it is on the disk; None where there is no such file."""
    if os.path.lexists(path):
        return path
    if path.isascii():
        return None
    found = ""
    for part in re.split("(/)", path):
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        there = next((form for form in forms if part in ("", "/") or os.path.lexists(found + form)), None)
        if there is None:
            return None
        found += there
    return found
