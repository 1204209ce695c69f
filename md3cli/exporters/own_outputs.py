"""Whether a folder is md3's to replace: what its list of files, `.md3`, does not name is somebody's work."""

from __future__ import annotations

from pathlib import Path

from md3cli.errors import UsageError
from md3cli.marker import RUN, foreign_file, has_marker, marker_format
from md3cli.records import printable


def check_not_foreign(folder: Path) -> None:
    """Refuse a folder that is there and holds what md3 did not write.

    Raises:
        UsageError: it has no list of md3's files, or something that is not on it.
    """
    if not has_marker(folder):
        raise UsageError(
            f"{printable(str(folder))} was not made by md3 (or before it kept lists of its files, .md3), so it is not "
            "replaced; name another -o, or delete the folder yourself"
        )
    if marker_format(folder) == RUN:
        raise UsageError(f"{printable(str(folder))} is a run folder with its records; name another -o")
    foreign = foreign_file(folder)
    if foreign is not None:
        raise UsageError(
            f"{printable(str(folder / foreign))} was not written by md3; move it away yourself, or name another -o"
        )
