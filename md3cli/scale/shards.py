"""Running one shard of a plan to its commit, with a model that stays warm: what every way of running shares.

    with ShardRunner(run_uri) as runner:      # in each process (or Ray actor); loads nothing yet
        result = runner.run(shard)            # -> ShardResult; the model is loaded by the first that needs it

`run_uri` is the path or URL of the run folder (`DIR/.md3run`) with its plan and run.json in it. `run` returns
at once for a shard that is committed, takes over what earlier attempts finished, and may run anywhere at
the same time as another `run` of the same shard: the first to commit wins, and the other gets its result.
`run` raises Md3Error where the run cannot go on here (no model, no disk), ShardStopped where `should_stop`
said so; a bad picture or request is an error record, never an exception.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from types import TracebackType
from typing import NamedTuple, Self, cast

from md3cli.config import DecodeOptions, ModelOptions
from md3cli.decode import DecodePool
from md3cli.engine_port import Model
from md3cli.errors import EngineError
from md3cli.feed import make_decode_pool
from md3cli.records import RecordDict
from md3cli.scale.asking import Asking, ShardStopped, WarmModel, history_of
from md3cli.scale.attempts import AttemptJournal, ShardHistory, forget_attempts
from md3cli.scale.commits import Commit, put_commit, read_commit
from md3cli.scale.layout import METRICS, host_name, new_attempt, open_run_folder, part_name
from md3cli.scale.plan import PlannedRow, PlanReader
from md3cli.scale.run_options import read_run_options

__all__ = ["FINDER", "ShardResult", "ShardRunner", "ShardStopped"]

ModelFinder = Callable[[ModelOptions], Model]
FINDER = "md3cli.engine_port:find_model"  # `module:function`, ModelOptions -> Model; tests name another


class ShardResult(NamedTuple):
    """`commit` is the shard's marker; `is_ours` is False where another attempt had put it."""

    shard: int
    commit: Commit
    is_ours: bool


def _never() -> bool:
    return False


def _untold(*facts: int | str) -> None:
    pass


class ShardRunner:
    """Runs shards of one run folder, one at a time, in one thread; a context manager.

    Attributes:
        folder: the opened run folder.
        plan: what is to be done.
        attempt: name of the attempt under way, before and after that the one it will have or had.
    """

    def __init__(
        self,
        run_uri: str,
        *,
        finder: str | ModelFinder = FINDER,
        model: ModelOptions | None = None,
        decode: DecodeOptions | None = None,
    ) -> None:
        """`model` and `decode` default to what run.json of the folder says.

        Raises:
            InputError: no plan there, or run.json is missing.
            CheckpointError: no such model.
            EngineError: it is another model than the plan's.
        """
        self.folder = open_run_folder(run_uri)
        self._reader = PlanReader(self.folder)
        self.plan = self._reader.plan
        if model is None or decode is None:
            options = read_run_options(self.folder)
            model, decode = model or options.model, decode or options.decode
        self._decode = decode
        self._model = WarmModel(_find(finder, model))
        if self._model.identity != self.plan.identity:
            raise EngineError(
                f"the model here is {self._model.identity}, the plan was made for {self.plan.identity}; "
                "name the same --model and --revision on every machine"
            )
        self._worker = new_attempt()
        self._pool: DecodePool | None = None
        self.attempt = new_attempt()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the decode workers; a second call does nothing."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def run(
        self,
        shard: int,
        *,
        should_stop: Callable[[], bool] = _never,
        on_start: Callable[[int, str], None] = _untold,
        on_progress: Callable[[int, int], None] = _untold,
    ) -> ShardResult:
        """Run a shard to its commit.

        Args:
            should_stop: asked between two steps of the model.
            on_start: told the shard and the attempt's name before anything is asked.
            on_progress: told how many requests of the shard are ok and how many have failed so far.

        Raises:
            ShardStopped: `should_stop` said so; what was finished is in the attempt's journal. The runner is
                spent: its model still has requests under way.
            Md3Error: the run cannot go on here.
        """
        committed = read_commit(self.folder, shard)
        if committed is not None:
            forget_attempts(self.folder, shard)
            return ShardResult(shard, committed, False)
        started = time.monotonic()
        rows = self._reader.shard(shard)
        self.attempt = new_attempt()
        history = history_of(self.folder, shard, rows)
        journal = AttemptJournal(self.folder, shard, self.attempt)
        on_start(shard, self.attempt)
        try:
            asking = Asking(history, journal, self._pool_of_run(), self._model, should_stop, on_progress)
            asking.to_the_end(rows)
        finally:
            journal.close()
        return self._commit(shard, rows, history, asking, started)

    @property
    def is_loading(self) -> bool:
        """True while the model is being loaded; asked from another thread."""
        return self._model.is_loading

    def _pool_of_run(self) -> DecodePool:
        if self._pool is None:
            background = self.plan.identity.background
            self._pool = make_decode_pool(self._decode, background, self._model.crop_config)
        return self._pool

    def _commit(
        self, shard: int, rows: Sequence[PlannedRow], history: ShardHistory, asking: Asking, started: float
    ) -> ShardResult:
        lines = [asking.lines[record_id] for row in rows for record_id in row.ids]
        data, counts, before = b"".join(lines), Counts.of(lines), Counts.of(history.records.values())
        pictured = [row for row in rows if row.row.image is not None]
        part = part_name(shard, self.attempt)
        commit = Commit(
            part=part,
            rows=len(rows),
            images=len(pictured),
            ok=counts.ok,
            errors=counts.num_failed,
            error_types=counts.error_types,
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            attempt=self.attempt,
            host=host_name(),
            seconds=round(time.monotonic() - started, 3),
            ended=round(time.time(), 3),
            reused=len(history.records),
            reused_errors=before.error_types,
            reused_images=sum(all(record_id in history.records for record_id in row.ids) for row in pictured),
            prompt_tokens=counts.prompt_tokens - before.prompt_tokens,
            output_tokens=counts.output_tokens - before.output_tokens,
        )
        self.folder.store.put(part, data)
        is_ours = put_commit(self.folder, shard, commit)
        if not is_ours:
            self.folder.store.remove(part)
            commit = read_commit(self.folder, shard) or commit
        forget_attempts(self.folder, shard)
        self._note_metrics(shard, commit, is_ours)
        return ShardResult(shard, commit, is_ours)

    def _note_metrics(self, shard: int, commit: Commit, is_ours: bool) -> None:
        """A line a shard in this worker's file; a disk that refuses it is no failure."""
        if self.folder.store is not self.folder.wip:  # object stores take no appending; the marker has the times
            return
        engine = self._model.engine
        stages = dict(engine.stage_seconds()) if engine is not None else {}
        line = {
            "time": commit.ended,
            "shard": shard,
            "records": commit.num_records,
            "seconds": commit.seconds,
            "committed": is_ours,
            "stages": {name: round(seconds, 3) for name, seconds in stages.items()},
        }
        path = self.folder.wip.path(f"{METRICS}/{self._worker}.jsonl")
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            with open(path, "ab") as file:
                file.write(json.dumps(line).encode() + b"\n")


class Counts(NamedTuple):
    """What records say, summed up."""

    ok: int
    error_types: dict[str, int]
    prompt_tokens: int
    output_tokens: int

    @property
    def num_failed(self) -> int:
        return sum(self.error_types.values())

    @classmethod
    def of(cls, lines: Iterable[bytes]) -> Counts:
        """The counts of records as lines."""
        ok = prompt = output = 0
        errors = Counter[str]()
        for line in lines:
            record: RecordDict = json.loads(line)
            if record["error"] is None:
                ok += 1
                prompt += record["tokens"]["prompt"]
                output += record["tokens"]["output"]
            else:
                errors[record["error"]["type"]] += 1
        return cls(ok, dict(sorted(errors.items())), prompt, output)


def _find(finder: str | ModelFinder, options: ModelOptions) -> Model:
    if not isinstance(finder, str):
        return finder(options)
    module, _, function = finder.partition(":")
    return cast("Model", getattr(import_module(module), function)(options))
