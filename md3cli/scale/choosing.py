"""Whether a command's OUTPUT is run in a run folder: because it was asked for, or has begun so. Light to import.

A run folder whose records were all exported is as good as gone: the records file is the truth then, and whatever
changes that file takes the run folder away first.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from md3cli.config import RunConfig
from md3cli.errors import UsageError
from md3cli.outputs import OutputPlan
from md3cli.run_info import RECORDS_NAME, OutputPaths
from md3cli.scale.layout import (
    EXPORTED,
    FOLDER_NAME,
    KEPT,
    MANIFEST,
    PLAN,
    REPEATS,
    SUFFIX,
    RunFolder,
    open_run_folder,
    run_folder_uri,
)
from md3cli.scale.store import LocalStore, Store, open_store


def run_folder_of(outputs: OutputPlan, config: RunConfig) -> RunFolder | None:
    """Where the run folder of OUTPUT is, or would be; None where nothing stays on disk.

    Raises:
        UsageError: many processes are asked for, and there is no OUTPUT.
    """
    if outputs.files is None or config.output.path is None:
        if config.scale.needs_run_folder:
            raise UsageError("many processes cannot share stdout; name a folder or a file with -o")
        return None
    is_folder = outputs.files.run_info.parent == config.output.path
    return open_run_folder(run_folder_uri(config.output.shown, is_folder=is_folder))


def is_run_there(folder: RunFolder, files: OutputPaths, config: RunConfig) -> bool:
    """Whether this command runs in its run folder; in a bucket all do, for nothing can be appended to there."""
    if config.output.address is not None or config.scale.needs_run_folder:
        return True
    if config.output.overwrite:
        return False
    former = former_of(folder)  # a start over was killed before its first record: what it set aside comes back
    return (former is not None and former.is_dir()) or is_unfinished(folder, has_records=files.journal.exists())


def is_unfinished(folder: RunFolder, *, has_records: bool) -> bool:
    """Whether a run folder has what OUTPUT's records file, if there is one, does not have yet."""
    if folder.store.read(PLAN) is None:
        return False
    return folder.store.read(EXPORTED) is None or not has_records


def records_of(folder: RunFolder) -> tuple[Store, str]:
    """The records file that a run folder is exported to: where it lies, and its name there."""
    parent, _, name = folder.uri.rpartition("/")
    store = open_store(parent)
    if name == FOLDER_NAME:
        return store, RECORDS_NAME
    output = name.removesuffix(SUFFIX)
    aside = f"{output}.{RECORDS_NAME}"
    return store, aside if store.modified_at(aside) is not None else output


def former_of(folder: RunFolder) -> Path | None:
    """Return where a start over keeps the former run folder until it has a record; None in a bucket."""
    store = folder.store
    return store.root.with_name(f"{store.root.name}-former") if isinstance(store, LocalStore) else None


def discard(folder: RunFolder) -> None:
    """Remove a run folder and its journals, and what a start over set aside; for who holds OUTPUT's lock."""
    remove_run(folder)
    if (former := former_of(folder)) is not None:
        shutil.rmtree(former, ignore_errors=True)


def remove_run(folder: RunFolder) -> None:
    """Remove a run folder and its journals, if they are there; for the process that holds OUTPUT's lock."""
    folder.store.remove_all()
    if folder.wip is not folder.store:
        shutil.rmtree(folder.wip.root, ignore_errors=True)


def take_place(following: RunFolder, folder: RunFolder) -> None:
    """Make a run folder that has a plan, and nothing committed yet, the one of OUTPUT.

    In a bucket, where nothing can be renamed, the plan goes last: without it all is taken over again from the records.
    """
    discard(folder)
    if isinstance(following.store, LocalStore) and isinstance(folder.store, LocalStore):
        following.store.root.rename(folder.store.root)
        return
    for name in (MANIFEST, REPEATS, KEPT, PLAN):
        with contextlib.suppress(FileNotFoundError):  # a plan need not have repeats
            _copy(name, following.store, folder.store)
    with contextlib.suppress(FileNotFoundError):  # nothing was taken over
        following.wip.root.rename(folder.wip.root)
    discard(following)


def _copy(name: str, source: Store, target: Store) -> None:
    with source.open(name) as there, target.put_file(name) as path, open(path, "wb") as here:
        shutil.copyfileobj(there, here)
