"""Where files go that are gone when the program ends: the user's cache folder, else the system's temporary one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from md3cli.errors import OutputError
from md3cli.records import printable
from md3cli.settings import user_cache_dir


def scratch_folder() -> Path:
    """Return a folder that can be written to; the cache folder, which seldom is memory, comes first.

    Raises:
        OutputError: there is none.
    """
    folder = user_cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:  # no home folder, or a file in its place
        pass
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise OutputError(
            f"no folder for temporary files can be written, {printable(str(folder))} neither; "
            "set TMPDIR to one that can"
        ) from error
