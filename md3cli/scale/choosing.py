"""Whether a command's OUTPUT is run in a run folder: because it was asked for, or has begun so. Light to import.

A run folder whose records were all exported is as good as gone: the records file is the truth then, and whatever
changes that file takes the run folder away first.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from md3cli.config import RunConfig
from md3cli.errors import UsageError
from md3cli.outputs import OutputPlan
from md3cli.run_info import RECORDS_NAME, OutputPaths
from md3cli.scale.layout import EXPORTED, FOLDER_NAME, PLAN, SUFFIX, RunFolder, open_run_folder
from md3cli.scale.store import LocalStore


def run_folder_of(outputs: OutputPlan, config: RunConfig) -> RunFolder | None:
    """Where the run folder of OUTPUT is, or would be; None where nothing stays on disk.

    Raises:
        UsageError: many processes are asked for, and there is no OUTPUT.
    """
    if outputs.files is None or config.output.path is None:
        if config.scale.needs_run_folder:
            raise UsageError("many processes cannot share stdout; name a folder or a file with -o")
        return None
    output = config.output.path
    is_folder = outputs.files.run_info.parent == output
    return open_run_folder(str(output / FOLDER_NAME if is_folder else output.with_name(output.name + SUFFIX)))


def is_run_there(folder: RunFolder, files: OutputPaths, config: RunConfig) -> bool:
    """Whether this command runs in its run folder."""
    return config.scale.needs_run_folder or (not config.output.overwrite and is_unfinished(folder, files))


def is_unfinished(folder: RunFolder, files: OutputPaths) -> bool:
    """Whether a run folder has what OUTPUT's records file does not have yet."""
    if folder.store.read(PLAN) is None:
        return False
    return folder.store.read(EXPORTED) is None or not files.journal.exists()


def records_of(folder: RunFolder) -> Path | None:
    """The records file that a local run folder is exported to; None on an object store."""
    if not isinstance(folder.store, LocalStore):
        return None
    root = folder.store.root
    if root.name == FOLDER_NAME:
        return root.parent / RECORDS_NAME
    output = root.with_name(root.name.removesuffix(SUFFIX))
    aside = output.with_name(f"{output.name}.{RECORDS_NAME}")
    return aside if aside.exists() else output


def discard(folder: RunFolder) -> None:
    """Remove a run folder and its journals, if they are there; for the process that holds OUTPUT's lock."""
    folder.store.remove_all()
    if folder.wip is not folder.store:
        shutil.rmtree(folder.wip.root, ignore_errors=True)
