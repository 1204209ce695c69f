"""What lies where in a run folder, and the two places it is made of.

    plan/plan.json             what the run is: counts, fingerprint, config; put if absent, never rewritten
    plan/manifest.parquet      the rows of INPUT, row group k = shard k; for its owner alone where addresses are signed
    plan/repeats.parquet       which requests ask again what was asked before, where there are any
    plan/added-1.json ...      the same three of what --add asked of the same rows later; its shards are counted on
    run.json                   how to run it: model and decode options of the latest start
    wip/00012.ATTEMPT.jsonl    journal of one attempt at shard 12 (on the machine itself for an object store)
    parts/part-00012-ATTEMPT.jsonl    the records of a shard, in input order
    commits/00012.json         which part counts: {part, rows, ok, errors, sha256, ...}; the only truth
    starts/*.json  metrics/*.jsonl    who ran it when, and how fast
    kept.jsonl                 records that OUTPUT had and the plan does not ask for; exported first
    errors.jsonl  exported.json       written by the export

A run folder is `DIR/.md3run` for OUTPUT DIR, and `OUT.md3run` beside a file OUT. A command runs in one because that was
asked for, or because OUTPUT has begun so; pipeline.py looks here only in these cases. A run folder whose
records were all exported is as good as gone: the records file is the truth then, and whatever changes that file takes
the run folder away first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from os import getpid
from pathlib import Path
from typing import Any, NamedTuple

from md3cli.config import RunConfig
from md3cli.errors import InputError, UsageError
from md3cli.finished.run_json import RECORDS_NAME, RUN_INFO_NAME
from md3cli.records import printable
from md3cli.remote.address import folder_of, host_of, is_address
from md3cli.run.output import OutputPlan
from md3cli.run.run_info import FORMER, RUN_FOLDER, OutputPaths
from md3cli.scale.store import LocalStore, Store, open_store
from md3cli.settings import user_cache_dir

PLAN, MANIFEST, REPEATS = "plan/plan.json", "plan/manifest.parquet", "plan/repeats.parquet"
RUN, KEPT, ERRORS, EXPORTED = "run.json", "kept.jsonl", "errors.jsonl", "exported.json"
WIP, PARTS, COMMITS, STARTS, METRICS, DAMAGED = "wip", "parts", "commits", "starts", "metrics", "damaged"


class PlanNames(NamedTuple):
    """The files of one plan of a run folder."""

    plan: str
    manifest: str
    repeats: str


def plan_names(number: int) -> PlanNames:
    """Return where a plan stands: 0 is the first one, n what was added to it for the n-th time."""
    if number == 0:
        return PlanNames(PLAN, MANIFEST, REPEATS)
    return PlanNames(*(f"plan/added-{number}{suffix}" for suffix in (".json", ".parquet", "-repeats.parquet")))


@dataclass(frozen=True, slots=True)
class RunFolder:
    """An opened run folder: `store` is what all processes share, `wip` is where journals can be appended to."""

    store: Store
    wip: LocalStore

    @property
    def uri(self) -> str:
        return self.store.uri


def open_run_folder(uri: str) -> RunFolder:
    """Open the run folder at `uri`, a path or a URL; it need not be there yet.

    Raises:
        MissingExtraError: a URL without the `remote` extra.
    """
    store = open_store(uri)
    if isinstance(store, LocalStore):
        return RunFolder(store, store)
    digest = hashlib.sha256(store.uri.encode()).hexdigest()[:16]
    return RunFolder(store, LocalStore(user_cache_dir() / "wip" / digest))


def run_folder_uri(output: str, *, is_folder: bool) -> str:
    """Return where the run folder of OUTPUT is."""
    return f"{output.rstrip('/')}/{RUN_FOLDER}" if is_folder else f"{output}{RUN_FOLDER}"


def find_run_folder(typed: str) -> RunFolder:
    """Open the run folder that a user names by itself, by the OUTPUT it belongs to, or by its records file.

    Raises:
        InputError: there is none.
    """
    is_remote = is_address(typed)
    bare = typed.rstrip("/") if is_remote else typed
    beside = folder_of(bare) if is_remote else str(Path(typed).parent)
    candidates = [bare, run_folder_uri(bare, is_folder=True), f"{bare}{RUN_FOLDER}"]
    if is_remote or not Path(f"{bare}.{RUN_INFO_NAME}").is_file():  # else it is a run of its own inside a run folder
        candidates.append(f"{beside}/{RUN_FOLDER}")
    for candidate in candidates:
        if is_remote and host_of(candidate) != host_of(typed):  # another's bucket
            continue
        folder = open_run_folder(candidate)
        if folder.store.read(PLAN) is not None:
            return folder
    raise InputError(
        f"no run folder at {printable(typed)} (one process on a local OUTPUT makes none); give what stood after -o of "
        "a run with --devices, --workers-per-device, --world-size or --engine"
    )


def shard_name(shard: int) -> str:
    """Return `00012`, which sorts as the number does up to 99,999 shards."""
    return f"{shard:05d}"


def shard_of(name: str) -> int | None:
    """Return the shard that a file of `wip`, `parts` or `commits` belongs to; None for a name that is none of ours."""
    found = re.fullmatch(r"(?:part-)?(\d{5,})(?:[.-].*)", name)
    return int(found[1]) if found else None


def commit_name(shard: int) -> str:
    return f"{COMMITS}/{shard_name(shard)}.json"


def part_name(shard: int, attempt: str) -> str:
    return f"{PARTS}/part-{shard_name(shard)}-{attempt}.jsonl"


def journal_name(shard: int, attempt: str) -> str:
    return f"{WIP}/{shard_name(shard)}.{attempt}.jsonl"


def damaged_name(shard: int) -> str:
    """Return where copies of the damaged lines of a shard's journals are kept."""
    return f"{DAMAGED}/{shard_name(shard)}.jsonl"


def host_name() -> str:
    """Return this machine's name, as far as file names can hold it."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname())[:40] or "host"


def attempts_prefix() -> str:
    """Return what the names of this process's attempts begin with."""
    return f"{host_name()}-{getpid()}-"


def new_attempt() -> str:
    """Return a name that no other attempt has: `host-pid-random`."""
    return f"{attempts_prefix()}{secrets.token_hex(4)}"


def run_folder_of(outputs: OutputPlan, config: RunConfig) -> RunFolder | None:
    """Return the run folder of OUTPUT, whether it is there or not; None where nothing stays on disk.

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
    """Return whether this command runs in its run folder; in a bucket all do, for nothing can be appended to there."""
    if config.output.address is not None or config.scale.needs_run_folder:
        return True
    if config.output.overwrite:
        return False
    former = former_of(folder)  # a start over was killed before its first record: what it set aside comes back
    return (former is not None and former.is_dir()) or is_unfinished(folder, has_records=files.journal.exists())


def is_unfinished(folder: RunFolder, *, has_records: bool) -> bool:
    """Return whether a run folder has what OUTPUT's records file, if there is one, does not have yet."""
    if folder.store.read(PLAN) is None:
        return False
    return not has_records or folder.store.read(plan_names(num_plans_exported(folder)).plan) is not None


def num_plans_exported(folder: RunFolder) -> int:
    """Return how many plans' records the last export wrote; 0 while there was none, or nobody knows."""
    exported: Any = None
    with contextlib.suppress(ValueError):
        exported = json.loads(folder.store.read(EXPORTED) or b"null")
    num_plans = exported.get("plans", 1) if isinstance(exported, dict) else 0
    return num_plans if type(num_plans) is int and num_plans > 0 else 0


def records_of(folder: RunFolder) -> tuple[Store, str]:
    """Return the store that holds the records file of a run folder, and the file's name there."""
    parent, _, name = folder.uri.rpartition("/")
    store = open_store(parent)
    if name == RUN_FOLDER:
        return store, RECORDS_NAME
    output = name.removesuffix(RUN_FOLDER)
    aside = f"{output}.{RECORDS_NAME}"
    return store, aside if store.modified_at(aside) is not None else output


def lock_path(folder: RunFolder) -> Path:
    """Return the file that a run in this folder locks; of one in a bucket it tells about this machine only."""
    if not isinstance(folder.store, LocalStore):
        return folder.wip.root.with_name(f"{folder.wip.root.name}.lock")
    root = folder.store.root
    output = RECORDS_NAME if root.name == RUN_FOLDER else root.name.removesuffix(RUN_FOLDER)
    return root.with_name(f"{output}.lock")


def former_of(folder: RunFolder) -> Path | None:
    """Return where a start over keeps the former run folder until it has a record; None in a bucket."""
    store = folder.store
    return store.root.with_name(store.root.name + FORMER) if isinstance(store, LocalStore) else None


def discard(folder: RunFolder) -> None:
    """Remove a run folder, its journals, and what a start over set aside; for the process that holds OUTPUT's lock."""
    remove_run(folder)
    if (former := former_of(folder)) is not None:
        shutil.rmtree(former, ignore_errors=True)


@contextlib.contextmanager
def discarded_once_written(folder: RunFolder) -> Iterator[None]:
    """Remove a run folder that is out of date from the first write of records on, which happens inside.

    One that is not exported, which --overwrite leaves, holds all records there are: it goes after the write.
    """
    is_kept = is_unfinished(folder, has_records=True)
    if not is_kept:
        discard(folder)
    yield
    if is_kept:
        discard(folder)


def remove_run(folder: RunFolder) -> None:
    """Remove a run folder and its journals, if they are there; for the process that holds OUTPUT's lock."""
    folder.store.remove_all()
    if folder.wip is not folder.store:
        shutil.rmtree(folder.wip.root, ignore_errors=True)


def take_place(following: RunFolder, folder: RunFolder) -> None:
    """Put a run folder that has a plan, and nothing committed yet, in the place of `folder`."""
    discard(folder)
    if isinstance(following.store, LocalStore) and isinstance(folder.store, LocalStore):
        following.store.root.rename(folder.store.root)
        return
    # In a bucket nothing can be renamed. The plan goes last: without it all is taken over again from the records.
    for name in (MANIFEST, REPEATS, KEPT, PLAN):
        with contextlib.suppress(FileNotFoundError):  # a plan need not have repeats
            _copy(name, following.store, folder.store)
    with contextlib.suppress(FileNotFoundError):  # nothing was taken over
        following.wip.root.rename(folder.wip.root)
    discard(following)


def _copy(name: str, source: Store, target: Store) -> None:
    with source.open(name) as there, target.put_file(name) as path, open(path, "wb") as here:
        shutil.copyfileobj(there, here)
