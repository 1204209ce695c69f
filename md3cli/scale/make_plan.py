"""Making the plan: INPUT is read once and streamed into the manifest. Nothing counts until plan.json is there.

Memory is a row group and 8 bytes a request. Those 8 bytes are a hash: only requests whose hash comes twice can be
repeats of each other, and only those are compared exactly, in a second pass over the manifest. What is added to a plan
counts on: its repeats are of all that was asked before. Of many ranks one makes
the plan; the others wait for it, and take over where it has died. `plan/planner.json` says who makes it, with a counter
that a thread of the planner raises every other second.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import json
import os
import socket
import stat
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from md3cli.console.progress import clock as duration
from md3cli.errors import OutputError
from md3cli.files import output_error
from md3cli.records import Request, RunIdentity, SourceRow, printable
from md3cli.remote.address import is_address, shown
from md3cli.run.record_index import RequestIds
from md3cli.run.run_info import utc_now
from md3cli.scale.attempts import Clock, Signs, Teller
from md3cli.scale.folder import RunFolder, host_name, plan_names
from md3cli.scale.plan import (
    FINGERPRINT_KEY,
    PLAN_SCHEMA,
    Plan,
    PlanReader,
    RowColumns,
    columns_of,
    hash_of,
    parquet_of,
    read_group,
    read_one_plan,
    row_of,
    then_in,
)
from md3cli.system import is_alive

PLANNER = "plan/planner.json"  # there while a rank makes the plan
BEAT_S = 2.0
NOBODY_PLANS_S, STANDSTILL_S = 10.0, 20.0  # without a planner, and without a beat of one, before another rank plans
POLL_S = 0.2
TURN_S, MOST_TURNS = 0.5, 40  # so that of many ranks that take over the first is seen by the others
SHARD_ROWS, FEWEST_SHARD_ROWS = 1024, 64  # the most, and so few that a batch is still full
WANTED_SHARDS, MAX_SHARDS = 64, 25_000  # to share out, and of files in one folder
_SCHEMA = pa.schema([("image", pa.string()), ("path", pa.binary()), ("more", pa.string())])
_REPEATS_SCHEMA = pa.schema([("row", pa.int64()), ("request", pa.int32()), ("repeat", pa.int64())])
OWNER_ONLY = 0o600  # the mode of a manifest that lets its reader in somewhere
_REPEATS_AT_A_TIME = 1 << 16
_ALLOCATIONS_A_COLLECTION = 100_000


class PlannerMark:
    """Tells the other ranks that this process makes the plan, and goes on to; a context manager."""

    def __init__(self, folder: RunFolder, rank: int) -> None:
        self._folder, self._rank, self._num_beats = folder, rank, 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True)

    def __enter__(self) -> Self:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._folder.store.remove(PLANNER)

    def beat(self) -> None:
        """Give a sign of life.

        Raises:
            OutputError: the folder cannot be written.
        """
        mark = {"host": host_name(), "pid": os.getpid(), "rank": self._rank, "beat": self._num_beats}
        self._num_beats += 1
        self._folder.store.put(PLANNER, json.dumps(mark).encode())

    def _beat_on(self) -> None:
        while not self._is_over.wait(BEAT_S):
            with contextlib.suppress(OutputError):  # what is wrong will end the plan too, and be told there
                self.beat()


class Planner(NamedTuple):
    """Who makes the plan, as far as the mark can be read."""

    host: str
    pid: int
    rank: int | None

    @classmethod
    def of(cls, mark: bytes) -> Planner:
        """Read a mark, which anybody may have written."""
        document: Any = {}
        with contextlib.suppress(ValueError, RecursionError):
            document = json.loads(mark)
        document = document if isinstance(document, dict) else {}
        pid, rank = document.get("pid"), document.get("rank")
        return cls(
            str(document.get("host", "an unknown host")),
            pid if type(pid) is int and 0 < pid < 2**31 else 0,
            rank if type(rank) is int else None,
        )

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to be gone; on another machine nobody knows."""
        return self.host == host_name() and self.pid > 0 and not is_alive(self.pid)

    def __str__(self) -> str:
        who = "a rank" if self.rank is None else f"rank {self.rank}"
        process = f", process {self.pid}" if self.pid else ""
        return printable(f"{who} (on {self.host}{process})")


def wait_for_plan(
    folder: RunFolder,
    rank: int,
    say: Callable[[str], None],
    *,
    number: int = 0,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Plan | None:
    """Wait for another rank's plan of a number and return it; None where this rank has to make the plan.

    Says every 30 s who is waited for. A planner whose process on this machine is gone is given up at once, one
    elsewhere after 20 s without a beat. A rank that should begin and does not is waited for 10 s.
    """
    signs, teller = Signs(clock), Teller(say, clock=clock)
    turn_s = min(max(rank - 1, 0), MOST_TURNS) * TURN_S
    while (plan := read_one_plan(folder, number)) is None:
        mark = folder.store.read(PLANNER)
        still_s = signs.still_for(PLANNER, mark)
        planner = None if mark is None else Planner.of(mark)
        if planner is None:
            if still_s >= NOBODY_PLANS_S + turn_s:
                return None
            teller.tell("waiting for rank 0 to begin")
        elif planner.is_dead or still_s >= STANDSTILL_S + turn_s:
            why = "its process is gone" if planner.is_dead else f"no sign of life for {still_s:.0f} s"
            say(f"{planner} does not make the plan any more: {why}; rank {rank} makes it")
            return None
        else:
            teller.tell(f"waiting for {planner} to make the plan, {duration(teller.waited_s)} so far")
        sleep(POLL_S)
    return plan


class PlanOvertakenError(Exception):
    """Another process has put its plan while this one made one; caught where plans are made."""

    def __init__(self, plan: Plan) -> None:
        super().__init__("another process has put its plan")
        self.plan = plan


@dataclass(frozen=True, slots=True)
class Manifest:
    """The rows once all are written; `suspects` are the hashes that came more than once, also before, sorted."""

    rows: int
    requests: int
    shard_size: int
    fingerprint: str
    suspects: NDArray[np.int64]


def shard_size_for(num_rows: int) -> int:
    """Return rows a shard: enough shards to share out, enough rows to keep a batch full, and never too many files."""
    size = min(SHARD_ROWS, max(FEWEST_SHARD_ROWS, num_rows // WANTED_SHARDS))
    return max(size, -(-num_rows // MAX_SHARDS))


def make_plan(
    folder: RunFolder,
    rows: Iterable[SourceRow],
    requests: tuple[Request, ...],
    identity: RunIdentity,
    config: Mapping[str, Any],
    *,
    shard_size: int | None = None,
    skipped: Mapping[str, int] | None = None,
    before: Plan | None = None,
) -> Plan:
    """Write the manifest of `rows` and return the plan, which counts only once `put_plan` has put it.

    Args:
        requests: what the run asks of every row that asks nothing else.
        config: what must be equal for a resume.
        shard_size: rows a shard; None chooses.
        skipped: filled while `rows` is read.
        before: the plan of `folder` to which this one is added; None makes a first plan.

    Raises:
        InputError: INPUT cannot be read.
        OutputError: the folder cannot be written.
        PlanOvertakenError: another process has put a plan meanwhile.
    """
    number = len(before.each) if before is not None else 0
    with folder.store.put_file(plan_names(number).manifest) as path:
        manifest = _write_checked(path, rows, requests, then_in(config), shard_size, _rows_of(folder, before))
        if (plan := read_one_plan(folder, number)) is not None:
            raise PlanOvertakenError(plan)  # whose manifest must stay
    has_repeats = _write_repeats(folder, manifest, requests, identity, before)
    return Plan(
        schema=PLAN_SCHEMA,
        rows=manifest.rows,
        requests=manifest.requests,
        shards=-(-manifest.rows // manifest.shard_size),
        shard_size=manifest.shard_size,
        fingerprint=manifest.fingerprint,
        has_repeats=has_repeats,
        config_hash=hash_of(config),
        config=config,
        made=f"{utc_now()} on {socket.gethostname()}",
        skipped=dict(skipped or {}),
    )


def put_plan(folder: RunFolder, plan: Plan, number: int = 0) -> Plan:
    """Make `plan` the one of its number that counts, unless one is there; return the one that counts."""
    document = asdict(plan)
    del document["parts"]  # it is one of them
    if folder.store.put_if_absent(plan_names(number).plan, json.dumps(document, indent=1).encode()):
        return plan
    return read_one_plan(folder, number) or plan


def _rows_of(folder: RunFolder, plan: Plan | None) -> Iterator[SourceRow]:
    """Yield the rows of all shards of `plan`; None has none."""
    if plan is not None:
        reader = PlanReader(folder, plan)
        for shard in range(plan.shards):
            yield from reader.rows(shard)


def _write_checked(
    path: Path,
    rows: Iterable[SourceRow],
    requests: tuple[Request, ...],
    then: tuple[Request, ...],
    shard_size: int | None,
    before: Iterable[SourceRow],
) -> Manifest:
    try:
        manifest = write_manifest(path, rows, requests, shard_size, before, then)
        if shard_size is None and manifest.rows > SHARD_ROWS * MAX_SHARDS:
            manifest = _regroup(path, manifest)
    except (OSError, pa.ArrowInvalid) as error:
        raise output_error(path, error if isinstance(error, OSError) else OSError(0, str(error))) from error
    return manifest


def write_manifest(
    path: Path,
    rows: Iterable[SourceRow],
    requests: tuple[Request, ...],
    shard_size: int | None = None,
    before: Iterable[SourceRow] = (),
    then: tuple[Request, ...] = (),
) -> Manifest:
    """Write `rows` to a Parquet file with one row group for each shard; those `before` have been asked already.

    Most ask `requests` of their picture and `then` of each object found.
    """
    stream = iter(rows)
    if shard_size is None:
        head = list(itertools.islice(stream, SHARD_ROWS * WANTED_SHARDS))
        shard_size = shard_size_for(len(head))
        stream = itertools.chain(head, stream)
        del head  # the chain lets go of it when it is through
    fingerprint, hashes, num_rows, has_secrets = Fingerprint(), array("q"), 0, False
    hashes_of_usual = tuple(map(hash, requests))
    with _seldom_collecting(), pq.ParquetWriter(path, _SCHEMA, compression="zstd", write_statistics=False) as writer:
        while group := list(itertools.islice(stream, shard_size)):
            columns = [columns_of(row, requests, then) for row in group]
            for row in group:
                hashes.extend(_hashes_of(row, requests, hashes_of_usual))
            fingerprint.note(columns)
            num_rows += len(group)
            if not has_secrets and any(map(_has_secret, group)):
                has_secrets = True
                path.chmod(OWNER_ONLY)
            _write_group(writer, columns)
        writer.add_key_value_metadata({FINGERPRINT_KEY: fingerprint.hexdigest()})
    num_requests = len(hashes)
    for row in before:
        hashes.extend(_hashes_of(row, (), ()))
    return Manifest(num_rows, num_requests, shard_size, fingerprint.hexdigest(), _twice(hashes))


def _has_secret(row: SourceRow) -> bool:
    """Return whether the address of a row's picture is signed or holds a password."""
    return row.image is not None and is_address(row.image.path) and shown(row.image.path) != row.image.path


@contextlib.contextmanager
def _seldom_collecting() -> Iterator[None]:
    # Rows have no circles, and looking for garbage in circles takes 40 % of the time of a plan.
    before = gc.get_threshold()
    gc.set_threshold(_ALLOCATIONS_A_COLLECTION, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _hashes_of(row: SourceRow, requests: tuple[Request, ...], usual: Sequence[int]) -> list[int]:
    """Return 8 bytes for each request of a row, equal where the request is; they hold in this process alone."""
    asked = usual if row.requests is requests else map(hash, row.requests)
    return [hash((row.id_name, request_hash)) for request_hash in asked]


class Fingerprint:
    """A digest of rows, whatever the groups they come in; no name, path or JSON holds a NUL or a 0x01."""

    def __init__(self) -> None:
        self._digests = [hashlib.sha256() for _ in RowColumns._fields]

    def note(self, columns: Sequence[RowColumns]) -> None:
        """Take more rows in."""
        images, paths, more = zip(*columns, strict=True)
        self._digests[0].update(b"".join(b"\1\0" if image is None else image.encode() + b"\0" for image in images))
        self._digests[1].update(b"".join(b"\1\0" if path is None else path + b"\0" for path in paths))
        self._digests[2].update(b"".join(b"\1\0" if text is None else text.encode() + b"\0" for text in more))

    def hexdigest(self) -> str:
        """Return 32 hex digits."""
        return hashlib.sha256(b"".join(digest.digest() for digest in self._digests)).hexdigest()[:32]


def _write_group(writer: pq.ParquetWriter, columns: Sequence[RowColumns]) -> None:
    arrays = [pa.array(values, field.type) for values, field in zip(zip(*columns, strict=True), _SCHEMA, strict=True)]
    writer.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA), row_group_size=len(columns))


def _regroup(path: Path, manifest: Manifest) -> Manifest:
    """Rewrite the manifest with fewer, larger row groups: that there are so many rows was not known before."""
    size = SHARD_ROWS * -(-shard_size_for(manifest.rows) // SHARD_ROWS)
    old = path.with_name(path.name + ".small")
    path.rename(old)
    try:
        with pq.ParquetFile(old) as reader, pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
            path.chmod(stat.S_IMODE(old.stat().st_mode))
            per_group = size // SHARD_ROWS
            for first in range(0, reader.num_row_groups, per_group):
                numbers = list(range(first, min(first + per_group, reader.num_row_groups)))
                table = reader.read_row_groups(numbers)
                writer.write_table(table, row_group_size=size)
            writer.add_key_value_metadata({FINGERPRINT_KEY: manifest.fingerprint})
    finally:
        old.unlink()
    return replace(manifest, shard_size=size)


def _write_repeats(
    folder: RunFolder, manifest: Manifest, requests: tuple[Request, ...], identity: RunIdentity, before: Plan | None
) -> bool:
    """Find the requests that were asked before, write the k of each, and return whether there are any."""
    if not len(manifest.suspects):
        return False
    names, ids = plan_names(len(before.each) if before is not None else 0), RequestIds(identity)
    for _ in _repeats(_rows_of(folder, before), ids, manifest.suspects):
        pass  # counted, so that what is added counts on
    found = _repeats(_manifest_rows(folder, names.manifest, requests), ids, manifest.suspects)
    first = next(found, None)
    if first is None:
        return False
    entries = itertools.chain([first], found)
    with folder.store.put_file(names.repeats) as path, pq.ParquetWriter(path, _REPEATS_SCHEMA) as writer:
        while group := list(itertools.islice(entries, _REPEATS_AT_A_TIME)):
            writer.write_table(pa.Table.from_pylist(group, schema=_REPEATS_SCHEMA))
    return True


def _twice(hashes: array[int]) -> NDArray[np.int64]:
    """Return the values that occur more than once, sorted; `hashes` is sorted in place."""
    ordered = np.frombuffer(hashes, dtype=np.int64)
    ordered.sort()
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def _repeats(rows: Iterable[SourceRow], ids: RequestIds, suspects: NDArray[np.int64]) -> Iterator[dict[str, int]]:
    """Yield where the repeats are, in input order; memory is 21 bytes a suspect and some more for each repeat."""
    stream, number = iter(rows), 0
    while group := list(itertools.islice(stream, SHARD_ROWS)):
        hashes = [each for row in group for each in _hashes_of(row, (), ())]
        is_suspect = iter(np.isin(hashes, suspects).tolist())
        for row in group:
            for index, request in enumerate(row.requests):
                if next(is_suspect) and (repeat := ids.next_repeat(row.id_name, request)):
                    yield {"row": number, "request": index, "repeat": repeat}
            number += 1


def _manifest_rows(folder: RunFolder, manifest: str, requests: tuple[Request, ...]) -> Iterator[SourceRow]:
    """Yield the rows of a manifest whose plan is not put yet."""
    with folder.store.open(manifest) as file, parquet_of(file) as reader:
        for group in range(reader.num_row_groups):
            columns = map(RowColumns, *(column.to_pylist() for column in read_group(reader, group).columns))
            yield from (row_of(row, requests) for row in columns)
