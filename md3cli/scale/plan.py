"""The frozen plan: which rows a run has, cut into shards, and what is asked; read by every process of the run.

What --add asks later is a plan of its own beside the first, of the same rows in the same shards, with the new requests
alone. Read back, all plans of a run are one: its shards are those of the first, then those of the next.

A shard is a contiguous range of rows and a row group of the manifest, so whoever runs it reads no other. The id of
every request follows from the plan alone: the k of the k-th repeat is frozen in it too. The manifest has a row as three
columns. `more` is null for a picture that is asked what the run asks of all; else it holds `item` (the other fields of
the picture: a place inside a tar), `requests`, `meta`, `typed`, `refused`, `failure` and `then`, each where it is not
the usual. A row of its own requests is asked nothing by what is added: its `requests` are an empty list.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from operator import attrgetter
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from md3cli.config import DEFAULT_PAD, MOST_PAD, RunConfig
from md3cli.errors import InputError, OutputError, OutputMismatchError
from md3cli.finished.run_json import number_of
from md3cli.records import ImageItem, Request, RowFailure, RunIdentity, SourceRow, printable, request_fields
from md3cli.remote.address import shown
from md3cli.run.asked import differences, request_of, requests_in, way_on
from md3cli.run.record_index import RequestIds
from md3cli.run.run_info import identity_of
from md3cli.scale.folder import PLAN, RunFolder, plan_names
from md3cli.source.specs import are_followed

_ITEM_DEFAULTS: Mapping[str, Any] = {
    field.name: field.default for field in fields(ImageItem) if field.default is not MISSING
}
_other_fields = attrgetter(*_ITEM_DEFAULTS)
_USUAL = tuple(_ITEM_DEFAULTS.values())
PLAN_SCHEMA = "md3-plan/1"
FINGERPRINT_KEY = "md3_fingerprint"
_SECOND_LOOK_S = 0.2
_IDENTITY_KEYS = ("model", "dtype", "quant", "adapter", "background")


class RowColumns(NamedTuple):
    """A row as the manifest holds it."""

    image: str | None
    path: bytes | None
    more: str | None


def columns_of(row: SourceRow, requests: tuple[Request, ...], then: tuple[Request, ...] = ()) -> RowColumns:
    """Return `row` as columns; `requests` is what the run asks of every picture, `then` of each object found."""
    item = row.image
    is_usual = row.requests is requests and not row.meta and row.failure is None
    is_usual = is_usual and row.then == _usual_then(requests, then)
    if item is None:
        return RowColumns(None, None, None if is_usual else _more(row, requests, then))
    is_usual = is_usual and _other_fields(item) == _USUAL
    path = item.path.encode("utf-8", "surrogateescape")
    return RowColumns(item.name, path, None if is_usual else _more(row, requests, then))


def _usual_then(requests: Sequence[Request], then: tuple[Request, ...]) -> tuple[Request, ...]:
    """Return what a row that asks `requests` asks of each object found, where it says nothing else."""
    return then if then and are_followed(requests) else ()


def _more(row: SourceRow, requests: tuple[Request, ...], then: tuple[Request, ...]) -> str | None:
    more: dict[str, Any] = {}
    if row.image is not None:
        values = zip(_ITEM_DEFAULTS.items(), _other_fields(row.image), strict=True)
        more["item"] = {name: value for (name, default), value in values if value != default}
    if row.requests != requests:
        more["requests"] = [request_fields(request) for request in row.requests]
    if row.meta:
        more["meta"] = dict(row.meta)
    if row.typed:
        more["typed"] = dict(row.typed)
    if row.refused:
        more["refused"] = dict(row.refused)
    if row.failure is not None:
        more["failure"] = [row.failure.type, row.failure.message]
    if row.then != _usual_then(row.requests, then):
        more["then"] = [request_fields(request) for request in row.then]
    more = {key: value for key, value in more.items() if value or key in ("requests", "then")}
    return json.dumps(more, separators=(",", ":")) if more else None


def row_of(columns: RowColumns, requests: tuple[Request, ...], then: tuple[Request, ...] = ()) -> SourceRow:
    """Return the row that `columns_of` was given."""
    more = json.loads(columns.more) if columns.more is not None else {}
    item = None
    if columns.image is not None:
        item = ImageItem(
            columns.image, (columns.path or b"").decode("utf-8", "surrogateescape"), **more.get("item", {})
        )
    asked = tuple(map(request_of, more["requests"])) if "requests" in more else requests
    failure = RowFailure(*more["failure"]) if "failure" in more else None
    follow = tuple(map(request_of, more["then"])) if "then" in more else _usual_then(asked, then)
    return SourceRow(item, asked, more.get("meta", {}), failure, more.get("typed"), more.get("refused"), follow)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """plan.json. `fingerprint` is a digest of all rows; `config` is what must be equal for a resume.

    `parts` are the plans of which one that has grown is put together, in their order; none of one that has not.
    """

    schema: str
    rows: int
    requests: int
    shards: int
    shard_size: int
    fingerprint: str
    has_repeats: bool
    config_hash: str
    config: Mapping[str, Any]
    made: str
    skipped: Mapping[str, int]
    parts: tuple[Plan, ...] = ()

    @property
    def each(self) -> tuple[Plan, ...]:
        """The plans as they stand in the folder: this one alone, where nothing was added."""
        return self.parts or (self,)

    @property
    def shards_of_rows(self) -> int:
        """Into how many shards the rows are cut; shard k + n * `shards_of_rows` has the rows of shard k."""
        return self.each[0].shards

    @property
    def asked(self) -> tuple[Request, ...]:
        """What the run asks of every row that asks nothing else."""
        return tuple(map(request_of, self.config["identity"]["requests"]))

    @property
    def then(self) -> tuple[Request, ...]:
        """What the run asks of each object found in a row that says nothing else."""
        return then_in(self.config)

    @property
    def pad(self) -> float:
        """The room around a region."""
        return float(self.config["identity"].get("pad", DEFAULT_PAD))

    @property
    def identity(self) -> RunIdentity:
        """The model and the settings that are part of every record's id."""
        return RunIdentity(**{key: self.config["identity"][key] for key in _IDENTITY_KEYS})

    @property
    def root(self) -> str:
        """The folder that names of pictures are relative to."""
        return str(self.config["identity"]["root"])


class PlannedRow(NamedTuple):
    """A row and the ids of its requests, in their order."""

    row: SourceRow
    ids: tuple[str, ...]


def plan_config(config: RunConfig, identity: RunIdentity, root: str) -> dict[str, Any]:
    """Return what two starts must share for the second to go on with the first one's plan: JSON without secrets."""
    document: dict[str, Any] = {"identity": identity_of(config.requests, identity, root, config.identity_of_rows())}
    source = config.source
    document["input"] = asdict(source) | {
        "inputs": [_without_secrets(typed) for typed in source.inputs],
        "root": None if source.root is None else _without_secrets(str(source.root)),
    }
    del document["input"]["own_files"], document["input"]["columns"]  # follow from OUTPUT; are in the identity
    if not config.requests:
        document["defaults"] = request_fields(config.defaults)
    return dict(json.loads(json.dumps(document)))


def _without_secrets(typed: str) -> str:
    """Return INPUT as anybody may read it."""
    bare = shown(typed)
    # An INPUT that is signed anew counts as another: the plan's rows have the old signature.
    # Sixteen bits of a digest tell two signatures apart, and are too few to try passwords on.
    return bare if bare == typed else f"{bare} ({hashlib.sha256(typed.encode()).hexdigest()[:4]})"


def then_in(config: Mapping[str, Any]) -> tuple[Request, ...]:
    """Return what the config of a plan asks of each object found."""
    return tuple(map(request_of, config.get("identity", {}).get("then", ())))


def hash_of(config: Mapping[str, Any]) -> str:
    """Return a digest of a plan's config: 16 hex digits."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def with_requests(config: Mapping[str, Any], requests: Sequence[Request]) -> dict[str, Any]:
    """Return the config of a plan that asks something else."""
    asked = json.loads(json.dumps([request_fields(request) for request in requests]))
    return {**config, "identity": {**config["identity"], "requests": asked}}


def read_plan(folder: RunFolder) -> Plan | None:
    """Return the plan of a run folder, with what was added to it; None while there is none.

    Raises:
        OutputError: what is there is no plan of this version.
    """
    found: list[Plan] = []
    while (plan := read_one_plan(folder, len(found))) is not None:
        if found and _of_rows(plan) != _of_rows(found[0]):
            raise _unreadable(folder, f"{plan_names(len(found)).plan} and {PLAN} are of two runs")
        found.append(plan)
    return whole(found) if found else None


def _of_rows(plan: Plan) -> tuple[Any, ...]:
    """Return what is the same in all plans of a run."""
    return plan.rows, plan.shards, plan.shard_size, with_requests(plan.config, [])


def whole(plans: Sequence[Plan]) -> Plan:
    """Put a first plan and what was added to it together."""
    first, *added = plans
    if not added:
        return first
    config = with_requests(first.config, [request for plan in plans for request in plan.asked])
    return replace(
        first,
        requests=sum(plan.requests for plan in plans),
        shards=sum(plan.shards for plan in plans),
        fingerprint="+".join(plan.fingerprint for plan in plans),
        has_repeats=any(plan.has_repeats for plan in plans),
        config_hash=hash_of(config),
        config=config,
        parts=tuple(plans),
    )


def read_one_plan(folder: RunFolder, number: int) -> Plan | None:
    """Return the plan of a number (`folder.plan_names`) by itself; raises as `read_plan`."""
    name = plan_names(number).plan
    data = _read_whole(folder, name)
    if data is None:
        return None
    damaged = _unreadable(folder, f"{name.rpartition('/')[2]} is damaged")
    try:
        plan = Plan(**json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged from error
    if plan.schema != PLAN_SCHEMA:
        raise _unreadable(folder, f"its plan is of another version ({printable(str(plan.schema))[:60]})")
    if not _is_sound(plan):
        raise damaged
    return plan


def _read_whole(folder: RunFolder, name: str) -> bytes | None:
    """Return a file of JSON; where it seems to be half of one it is read again.

    A file system without hard links shows what a rank is writing.
    """
    data = folder.store.read(name)
    try:
        json.loads(b"{}" if data is None else data)
    except (ValueError, RecursionError):
        time.sleep(_SECOND_LOOK_S)
        data = folder.store.read(name)
    return data


def _is_sound(plan: Plan) -> bool:
    """Return whether every field of a plan that anybody may have written is of the form that a run writes."""
    skipped, identity = plan.skipped, plan.config.get("identity") if isinstance(plan.config, dict) else None
    if not (isinstance(skipped, dict) and isinstance(identity, dict)):
        return False
    counts = (plan.rows, plan.requests, plan.shards, plan.shard_size, *skipped.values())
    texts = (plan.fingerprint, plan.config_hash, plan.made, *map(identity.get, (*_IDENTITY_KEYS, "root")))
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and plan.shard_size > 0
        and plan.shards == -(-plan.rows // plan.shard_size)
        and all(isinstance(text, str) for text in texts)
        and isinstance(plan.has_repeats, bool)
        and plan.parts == ()
        and None not in (requests_in(identity), requests_in(identity, "then"))
        and number_of(identity.get("pad", DEFAULT_PAD), MOST_PAD) is not None
    )


def _unreadable(folder: RunFolder, what: str) -> OutputError:
    return OutputError(f"{printable(folder.uri)}: {what}; choose another -o, or --overwrite to start over")


def check_config(
    plan: Plan, config: Mapping[str, Any], *, argv: Sequence[str] = ("md3",), output: str = "OUTPUT"
) -> None:
    """Refuse to go on with `plan` in a start with another `config`; `argv` is its command, `output` its OUTPUT.

    Raises:
        OutputMismatchError: names the differences.
    """
    if found := differences(plan.config, config):
        on = way_on(plan.config, config, argv, output, may_add_then=False)
        raise OutputMismatchError(
            f"OUTPUT was begun by another run, which is not finished: {'; '.join(found)}. {on}"
            f"{'Or repeat' if on else 'Repeat'} the earlier command, choose another -o, or --overwrite to start over"
        )


class PlanReader:
    """Reads the rows of a plan by shard; keeps the manifests open."""

    def __init__(self, folder: RunFolder, plan: Plan | None = None) -> None:
        """Open the plan of `folder`, or `plan` where it is not put yet.

        Raises:
            InputError: there is none: not a run folder, or not on storage that this machine shares.
            OutputError: plan and manifest do not belong together, or a manifest cannot be read.
        """
        plan = plan or read_plan(folder)
        if plan is None:
            raise InputError(f"no plan at {printable(folder.uri)}; is it on storage that this machine shares?")
        self.plan, self._folder = plan, folder
        self._ids = RequestIds(plan.identity)
        self._manifests = [self._opened(number) for number in range(len(plan.each))]
        self._requests, self._then = [part.asked for part in plan.each], plan.then

    def _opened(self, number: int) -> pq.ParquetFile:
        names = plan_names(number)
        with self._translate_errors(names.manifest):
            manifest = parquet_of(self._folder.store.open(names.manifest))
        metadata = manifest.metadata.metadata or {}
        if metadata.get(FINGERPRINT_KEY.encode(), b"").decode() != self.plan.each[number].fingerprint:
            what = " and ".join(name.rpartition("/")[2] for name in (names.plan, names.manifest))
            raise _unreadable(self._folder, f"{what} are of two plans")
        return manifest

    def shard(self, shard: int) -> list[PlannedRow]:
        """Return the rows of a shard in input order, with the ids of their requests."""
        repeats = self._repeats(shard)
        return [self._planned(number, row, repeats) for number, row in enumerate(self.rows(shard))]

    def rows(self, shard: int) -> Iterator[SourceRow]:
        """Return the rows of a shard in input order; raises as `columns`."""
        requests = self._requests[self._place(shard)[0]]
        return (row_of(columns, requests, self._then) for columns in self.columns(shard))

    def columns(self, shard: int) -> Iterator[RowColumns]:
        """Return the rows of a shard as the manifest holds them.

        Raises:
            OutputError: the manifest cannot be read.
        """
        number, group = self._place(shard)
        with self._translate_errors(plan_names(number).manifest):
            table = read_group(self._manifests[number], group)
        return map(RowColumns, *(table.column(name).to_pylist() for name in RowColumns._fields))

    def _place(self, shard: int) -> tuple[int, int]:
        """Return the number of the plan that has a shard, and the shard's number in it."""
        return divmod(shard, max(self.plan.shards_of_rows, 1))

    @contextlib.contextmanager
    def _translate_errors(self, name: str) -> Iterator[None]:
        """Raise what goes wrong with a Parquet file of the plan as OutputError."""
        try:
            yield
        except FileNotFoundError as error:
            raise _unreadable(self._folder, f"{name} is not there") from error
        except (OSError, LookupError, TypeError, pa.ArrowException) as error:
            raise _unreadable(self._folder, f"{name} cannot be read ({printable(str(error))})") from error

    def _planned(self, number: int, row: SourceRow, repeats: Mapping[tuple[int, int], int]) -> PlannedRow:
        ids = (
            self._ids.id_of(row.id_name, request, repeats.get((number, index), 0))
            for index, request in enumerate(row.requests)
        )
        return PlannedRow(row, tuple(ids))

    def _repeats(self, shard: int) -> dict[tuple[int, int], int]:
        """Return the k of each request that is a repeat, by row of the shard and place in the row."""
        number, group = self._place(shard)
        if not self.plan.each[number].has_repeats:
            return {}
        first, name = group * self.plan.shard_size, plan_names(number).repeats
        rows = range(first, first + self.plan.shard_size)
        found: dict[tuple[int, int], int] = {}
        with self._translate_errors(name), self._folder.store.open(name) as file, parquet_of(file) as repeats:
            for part in range(repeats.num_row_groups):
                known = repeats.metadata.row_group(part).column(0).statistics
                if known is not None and (known.max < rows.start or known.min >= rows.stop):
                    continue
                for entry in read_group(repeats, part).to_pylist():
                    if entry["row"] in rows:
                        found[entry["row"] - first, entry["request"]] = entry["repeat"]
        return found


def parquet_of(file: IO[bytes]) -> pq.ParquetFile:
    """Open a Parquet file of a plan, to be read by `read_group`.

    Threads of Arrow would hold the Python file for a moment longer than the read takes, and a process that ends in that
    moment is aborted (status 134: 3 of 200 md3 verify while eight ran at once).
    """
    return pq.ParquetFile(file, pre_buffer=False)


def read_group(parquet: pq.ParquetFile, group: int) -> pa.Table:
    """Read a row group of a file of `parquet_of`, on this thread alone."""
    return parquet.read_row_group(group, use_threads=False)
