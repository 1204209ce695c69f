"""What a former run's records were turned into, taken away when a run starts over in the same run folder.

Left there it would pass for the new run's. Only what md3 wrote goes: of a format's folder the files on its list
(`.md3`), and the single files that run.json says an earlier start was asked for.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from pathlib import Path

from md3cli.exporters import RUN_FOLDER_NAMES
from md3cli.exporters.pictures import PICTURE_SUFFIXES
from md3cli.marker import RUN, files_below, has_marker, marker_format, remove_written, write_marker, written_paths
from md3cli.output_guard import is_of_older_run

RUN_INFO_NAME = "run.json"
REPORT_NAME = "report.html"
REPORT_PAGES_NAME = "report_pages"
_MOST_LISTED = 1000  # files in a run folder; a longer list is not ours

_FORMATS: Mapping[str, str] = {**RUN_FOLDER_NAMES, "html": REPORT_NAME}
_SUFFIXES: Mapping[str, frozenset[str]] = {  # of the files in a format's folder
    "yolo": PICTURE_SUFFIXES | {".txt", ".yaml", ".cache"},
    "voc": frozenset({".xml"}),
    "labelstudio": frozenset({".json", ".xml"}),
    "hf": PICTURE_SUFFIXES | {".jsonl"},
    "overlay": PICTURE_SUFFIXES,
    "txt": frozenset({".txt"}),
}


def remove_leftovers(run_info: Path, kept: Collection[Path]) -> None:
    """Remove the documents of the former run, but for `kept`: those are replaced when they are made.

    Does nothing where `run_info` is not there, or is no run folder's. Of a format's folder go the files on its list;
    a file goes where the run folder's list names it, or run.json says that a start was asked for it. What cannot be
    removed stays, and a format's folder that is a link is not entered.
    """
    if run_info.name != RUN_INFO_NAME or not run_info.is_file():
        return
    folder = run_info.parent
    listed = set(islice(written_paths(folder), _MOST_LISTED)) if marker_format(folder) == RUN else set()
    adopt_older(run_info, [(format, folder / name) for format, name in _FORMATS.items()])
    for format, name in _FORMATS.items():
        path = folder / name
        if path in kept or path.is_symlink():
            continue
        if path.is_dir():
            remove_written(path)
        elif name in listed or is_of_older_run(run_info, format):
            with contextlib.suppress(OSError):
                path.unlink()
    if folder / REPORT_NAME not in kept:
        remove_written(folder / REPORT_PAGES_NAME)


def adopt_older(run_info: Path, documents: Iterable[tuple[str, Path]]) -> None:
    """Give a list of its files to each format's folder that an earlier start made before there were lists.

    Only one that run.json says was asked for, and that holds nothing but the kinds of files its format has.
    """
    for format, path in documents:
        suffixes = _SUFFIXES.get(format)
        is_unlisted = path.is_dir() and not path.is_symlink() and not has_marker(path)
        is_older = is_unlisted and is_of_older_run(run_info, format)
        if suffixes is None or not is_older:
            continue
        if all(os.path.splitext(name)[1].lower() in suffixes for name in files_below(path)):
            with contextlib.suppress(OSError):
                write_marker(path, format, files_below(path))
