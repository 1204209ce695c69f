"""What lies where in a run folder, and the two places it is made of.

    plan/plan.json             what the run is: counts, fingerprint, config; put if absent, never rewritten
    plan/manifest.parquet      the rows of INPUT, row group k = shard k; for its owner alone where addresses are signed
    plan/repeats.parquet       which requests ask again what was asked before, where there are any
    run.json                   how to run it: model and decode options of the latest start
    wip/00012.ATTEMPT.jsonl    journal of one attempt at shard 12 (on the machine itself for an object store)
    parts/part-00012-ATTEMPT.jsonl    the records of a shard, in input order
    commits/00012.json         which part counts: {part, rows, ok, errors, sha256, ...}; the only truth
    starts/*.json  metrics/*.jsonl    who ran it when, and how fast
    kept.jsonl                 records that OUTPUT had and the plan does not ask for; exported first
    errors.jsonl  exported.json       written by the export

A run folder is `DIR/.md3run` for OUTPUT DIR, and `OUT.md3run` beside a file OUT.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import socket
from dataclasses import dataclass
from os import getpid
from pathlib import Path

from md3cli.errors import InputError
from md3cli.records import printable
from md3cli.remote.address import folder_of, host_of, is_address
from md3cli.scale.store import LocalStore, Store, open_store
from md3cli.settings import user_cache_dir

FOLDER_NAME, SUFFIX = ".md3run", ".md3run"
PLAN, MANIFEST, REPEATS = "plan/plan.json", "plan/manifest.parquet", "plan/repeats.parquet"
RUN, KEPT, ERRORS, EXPORTED = "run.json", "kept.jsonl", "errors.jsonl", "exported.json"
WIP, PARTS, COMMITS, STARTS, METRICS, DAMAGED = "wip", "parts", "commits", "starts", "metrics", "damaged"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """An opened run folder: `store` is what all processes share, `wip` is where journals can be appended to."""

    store: Store
    wip: LocalStore

    @property
    def uri(self) -> str:
        return self.store.uri


def open_run_folder(uri: str) -> RunFolder:
    """The run folder at `uri`, a path or a URL; it need not be there yet.

    Raises:
        MissingExtraError: a URL without the `remote` extra.
    """
    store = open_store(uri)
    if isinstance(store, LocalStore):
        return RunFolder(store, store)
    digest = hashlib.sha256(store.uri.encode()).hexdigest()[:16]
    return RunFolder(store, LocalStore(user_cache_dir() / "wip" / digest))


def run_folder_uri(output: str, *, is_folder: bool) -> str:
    """Where the run folder of OUTPUT is."""
    return f"{output.rstrip('/')}/{FOLDER_NAME}" if is_folder else f"{output}{SUFFIX}"


def find_run_folder(typed: str) -> RunFolder:
    """The run folder that a user names by itself, by the OUTPUT it belongs to, or by its records file.

    Raises:
        InputError: there is none.
    """
    is_remote = is_address(typed)
    bare = typed.rstrip("/") if is_remote else typed
    beside = folder_of(bare) if is_remote else str(Path(typed).parent)
    candidates = [bare, run_folder_uri(bare, is_folder=True), f"{bare}{SUFFIX}", f"{beside}/{FOLDER_NAME}"]
    for candidate in candidates:
        if is_remote and host_of(candidate) != host_of(typed):  # another's bucket
            continue
        folder = open_run_folder(candidate)
        if folder.store.read(PLAN) is not None:
            return folder
    raise InputError(
        f"no run folder at {printable(typed)} (one process on a local OUTPUT makes none: its counts are in run.json, "
        "and the same command says what is left); give what stood after -o of a run with --devices, "
        "--workers-per-device, --world-size or --engine"
    )


def shard_name(shard: int) -> str:
    """`00012`: sorts as the number does up to 99,999 shards."""
    return f"{shard:05d}"


def shard_of(name: str) -> int | None:
    """The shard that a file of `wip`, `parts` or `commits` belongs to; None for a name that is none of ours."""
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
    """This machine's name, as far as file names can hold it."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname())[:40] or "host"


def attempts_prefix() -> str:
    """What the names of this process's attempts begin with."""
    return f"{host_name()}-{getpid()}-"


def new_attempt() -> str:
    """A name no other attempt has: `host-pid-random`."""
    return f"{attempts_prefix()}{secrets.token_hex(4)}"
