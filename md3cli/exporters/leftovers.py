"""What a former run's records were turned into, taken away when a run starts over in the same run folder.

Left there it would pass for the new run's. Only what md3 makes goes: the names of its formats, in a
folder that holds a run.json of md3, and inside a format's folder the kinds of files it writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from md3cli.exporters import RUN_FOLDER_NAMES
from md3cli.exporters.pictures import PICTURE_SUFFIXES

RUN_INFO_NAME = "run.json"
REPORT_NAME = "report.html"
REPORT_PAGES_NAME = "report_pages"

_FOLDERS: Mapping[str, frozenset[str]] = {  # name -> suffixes of the files in it
    "yolo": PICTURE_SUFFIXES | {".txt", ".yaml"},
    "voc": frozenset({".xml"}),
    "labelstudio": frozenset({".json", ".xml"}),
    "hf": PICTURE_SUFFIXES | {".jsonl"},
    "overlay": PICTURE_SUFFIXES,
    "txt": frozenset({".txt"}),
    REPORT_PAGES_NAME: frozenset({".html"}),
}
_FILES = (*sorted(set(RUN_FOLDER_NAMES.values()) - _FOLDERS.keys()), REPORT_NAME)


def remove_leftovers(run_info: Path, kept: Collection[Path]) -> None:
    """Remove the documents of the former run, but for `kept`: those are replaced when they are made.

    Does nothing where `run_info` is not there, or is no run folder's. What cannot be removed stays; a
    format's folder that is a link is not entered.
    """
    if run_info.name != RUN_INFO_NAME or not run_info.is_file():
        return
    folder = run_info.parent
    for name in _FILES:
        if folder / name not in kept:
            with contextlib.suppress(OSError):
                (folder / name).unlink()
    for name, suffixes in _FOLDERS.items():
        if folder / name not in kept and not (folder / name).is_symlink():
            _remove_tree(folder / name, suffixes)


def _remove_tree(top: Path, suffixes: Collection[str]) -> None:
    """Remove the files of these suffixes, and the folders that are empty then."""
    for folder, _, names in os.walk(top, topdown=False):
        for name in names:
            if os.path.splitext(name)[1].lower() in suffixes:
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, name))
        with contextlib.suppress(OSError):  # not empty: something foreign is in it
            os.rmdir(folder)
