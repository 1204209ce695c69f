"""A sample of INPUT through the real feed and engine, nothing written: what each unit took.

A picture's cost depends on its crops, which only its size tells; opening 100 million files for that would take days.
So every row is counted, a bounded number of pictures is drawn evenly over INPUT and opened, and the others are taken
to be like them. Where INPUT holds no more than may be opened, all are, and the counts are exact.

Rows of a batch share every pass, so nobody can say what one of them took. The time of each stage is shared out by what
that stage's work is proportional to: vision by crops, prefill by prompt tokens, decoding by output tokens, the rest
by requests. The engine has seen pictures of every tiling and every kind of request before the clock starts, and never
waits; the pace of opening is measured on its own, since in a run the two go on side by side.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from md3cli.console.summary import Summary
from md3cli.errors import ImageError
from md3cli.images.crops import PreparedImage, Tiling
from md3cli.images.pool import PicturePool
from md3cli.records import Answer, ImageItem, Job, RecordDict, Request, SourceRow
from md3cli.run.drive import WAIT_SLICE_S, drive
from md3cli.run.feed import CHANNELS, Feed, ReadyRequest, rows_ahead
from md3cli.run.journal import encode_record
from md3cli.run.model_handle import LazyEngine, Model
from md3cli.run.order import OrderedRecords
from md3cli.run.record_index import RequestIds
from md3cli.signals import StopSignals
from md3cli.source.source import Source

if TYPE_CHECKING:
    from md3cli.model.engine.engine import Engine

STAGES_OF_MODEL = ("vision", "prefill", "decode")
MOST_ROWS_A_UNIT = 256  # so that one picture with a million questions does not have to fit memory
NO_PICTURE = 0  # the bucket of questions without one
SEED = 0  # two estimates draw the same pictures


@dataclass(frozen=True, slots=True)
class Unit:
    """What is drawn and costs something: rows in a row about one picture, which is opened and encoded once."""

    rows: tuple[SourceRow, ...]

    @property
    def image(self) -> ImageItem | None:
        return self.rows[0].image

    @property
    def num_requests(self) -> int:
        return sum(len(row.requests) for row in self.rows)


@dataclass(slots=True)
class Drawn:
    """Exact counts of INPUT's rows and, in input order, the units that were drawn of `num_units`.

    `asks_more`: records may ask more, which is not counted.
    """

    num_images: int = 0
    num_requests: int = 0
    num_units: int = 0
    bad: Counter[str] = field(default_factory=Counter)  # rows that fail before anything is opened, by error type
    skipped: Counter[str] = field(default_factory=Counter)
    units: list[Unit] = field(default_factory=list)
    asks_more: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """The drawn units by number of crops (global one included; NO_PICTURE: none), and what did not open.

    `seconds_per_picture` is the decode workers' pace, all of them together; `tilings` one of each bucket.
    """

    buckets: dict[int, list[Unit]]
    tilings: dict[int, Tiling]
    bad: Counter[str]
    seconds_per_picture: float

    @property
    def num_bad(self) -> int:
        return self.bad.total()

    def sample(self, per_bucket: int) -> list[SampledUnit]:
        """Return up to `per_bucket` units of each bucket, buckets mixed as in a run."""
        taken = [
            [SampledUnit(unit, crops, self.tilings.get(crops)) for unit in units[:: -(-len(units) // per_bucket)]]
            for crops, units in sorted(self.buckets.items())
        ]
        return [unit for turn in itertools.zip_longest(*taken) for unit in turn if unit is not None]


@dataclass(frozen=True, slots=True)
class SampledUnit:
    """A unit to be run; `tiling` None where it has no picture."""

    unit: Unit
    crops: int
    tiling: Tiling | None


def count_and_draw(source: Source, size: int) -> Drawn:
    """Count all of INPUT in one pass and draw `size` units, which is all that memory holds.

    Raises:
        InputError: INPUT cannot be read.
    """
    drawn, chance = Drawn(), random.Random(SEED)
    kept: list[tuple[float, int, Unit]] = []  # the `size` units of lowest rank, the highest of them on top
    for unit in _units(_counted(source, drawn)):
        entry = (-chance.random(), drawn.num_units, unit)
        drawn.num_units += 1
        if len(kept) < size:
            heapq.heappush(kept, entry)
        elif entry > kept[0]:
            heapq.heapreplace(kept, entry)
    drawn.units = [unit for _, _, unit in sorted(kept, key=lambda entry: entry[1])]
    drawn.skipped = source.skipped
    return drawn


def _counted(source: Source, drawn: Drawn) -> Iterator[SourceRow]:
    """Yield the rows that can be asked; all rows are counted."""
    for row in source:
        drawn.num_requests += len(row.requests)
        drawn.asks_more = drawn.asks_more or bool(row.then)
        drawn.num_images += row.image is not None
        if row.failure is not None:
            drawn.bad[row.failure.type] += 1
        else:
            fit = row.fit_requests
            if row.refused:
                drawn.bad["bad_request"] += len(row.requests) - len(fit)
            if fit:
                yield row if fit is row.requests else replace(row, requests=fit, refused=None)


def _units(rows: Iterable[SourceRow]) -> Iterator[Unit]:
    together: list[SourceRow] = []
    for row in rows:
        is_same = together and row.image is not None and row.image == together[0].image
        if together and (not is_same or len(together) == MOST_ROWS_A_UNIT):
            yield Unit(tuple(together))
            together = []
        together.append(row)
    if together:
        yield Unit(tuple(together))


def open_drawn(drawn: Drawn, pool: PicturePool, *, num_ahead: int, clock: Callable[[], float]) -> Opened:
    """Open what was drawn, a bounded number at a time; pixels are not kept."""
    buckets: dict[int, list[Unit]] = {}
    tilings: dict[int, Tiling] = {}
    bad: Counter[str] = Counter()
    times: list[float] = [clock()]
    for unit, future in _decoded(drawn.units, pool, num_ahead):
        if future is None:
            buckets.setdefault(NO_PICTURE, []).append(unit)
            continue
        try:
            picture = future.result()
        except ImageError as error:
            bad[error.type] += 1
        else:
            buckets.setdefault(picture.tiling.num_crops, []).append(unit)
            tilings[picture.tiling.num_crops] = picture.tiling
        times.append(clock())
    return Opened(buckets, tilings, bad, _pace(times))


def _decoded(
    units: Iterable[Unit], pool: PicturePool, num_ahead: int
) -> Iterator[tuple[Unit, Future[PreparedImage] | None]]:
    ahead: deque[tuple[Unit, Future[PreparedImage] | None]] = deque()
    for unit in units:
        ahead.append((unit, pool.submit(unit.image) if unit.image is not None else None))
        if len(ahead) >= num_ahead:
            yield ahead.popleft()
    while ahead:
        yield ahead.popleft()


def _pace(times: list[float]) -> float:
    """Return seconds a picture, from the end of each but the first, which waits for workers to start."""
    if len(times) > 2:
        return (times[-1] - times[1]) / (len(times) - 2)
    return times[-1] - times[0]


WARM_UP_TOKENS = 4  # an answer's length does not matter there
UNTILED_CROPS = 2  # the only tile equals the global crop and is encoded once


@dataclass(frozen=True, slots=True)
class UnitCost:
    """What a sampled unit took. `engine_s` is its share of the engine's time."""

    crops: int
    engine_s: float
    num_failed: int
    prompt_tokens: int
    output_tokens: int
    record_bytes: int


@dataclass(frozen=True, slots=True)
class Measured:
    """The sample's costs, in the order it ran, and where. `load_s` and `warm_up_s` are in none of the costs."""

    costs: list[UnitCost]
    num_requests: int
    load_s: float
    warm_up_s: float
    engine_s: float
    batch_size: int
    device: str
    encoding_bytes: int
    failure: str  # of the first request that failed; empty where none did


def measure(
    model: Model,
    sample: Sequence[SampledUnit],
    pool: PicturePool,
    *,
    stop: StopSignals,
    clock: Callable[[], float],
) -> Measured:
    """Load the model, warm it up and run the sample.

    Raises:
        Md3Error: the model cannot be loaded or cannot run.
        Interrupted: a signal came.
    """
    with stop.interruptible():
        started = clock()
        timed = _TimedEngine(model, clock)
        engine = timed.load()
        loaded = clock()
        _warm_up(engine, model, sample)
        warm = clock()
        before = engine.stage_seconds()
        records = _run(timed, model, sample, pool)
    stages_s = {stage: engine.stage_seconds().get(stage, 0.0) - before.get(stage, 0.0) for stage in STAGES_OF_MODEL}
    return Measured(
        costs=_costs(sample, records, stages_s, timed.engine_s),
        num_requests=len(records),
        load_s=loaded - started,
        warm_up_s=warm - loaded,
        engine_s=timed.engine_s,
        batch_size=engine.batch_size,
        device=engine.device,
        encoding_bytes=engine.encoding_bytes,
        failure=next((record["error"]["message"] for record in records if record["error"]), ""),
    )


def _warm_up(engine: Engine, model: Model, sample: Sequence[SampledUnit]) -> None:
    """Ask each tiling and kind of request once, with grey pictures: nothing of the sample's is encoded early."""
    jobs: dict[Hashable, tuple[SampledUnit, Request]] = {}
    for one in sample:
        for request in (request for row in one.unit.rows for request in row.requests):
            jobs.setdefault(one.crops, (one, request))
            jobs.setdefault((request.task, request.reasoning, bool(request.choices)), (one, request))
    for key, (one, request) in enumerate(jobs.values()):
        short = replace(request, max_tokens=min(WARM_UP_TOKENS, request.max_tokens))
        engine.add(Job(key, _grey(one, model), short))
    while engine.has_work:
        engine.step()


def _grey(one: SampledUnit, model: Model) -> PreparedImage | None:
    if one.tiling is None:
        return None
    side = model.crop_config.crop_size
    crops = np.full((one.crops, side, side, CHANNELS), 128, np.uint8)
    return PreparedImage(crops, one.tiling, one.tiling.cols * side, one.tiling.rows * side, f"grey {one.crops}")


class _TimedEngine(LazyEngine):
    """An engine under a stopwatch; `engine_s` is the time inside it."""

    def __init__(self, model: Model, clock: Callable[[], float]) -> None:
        super().__init__(model)
        self._clock = clock
        self.engine_s = 0.0

    def add(self, job: Job) -> None:
        started = self._clock()
        super().add(job)
        self.engine_s += self._clock() - started

    def step(self) -> Sequence[Answer]:
        started = self._clock()
        answers = super().step()
        self.engine_s += self._clock() - started
        return answers


class _PatientFeed(Feed):
    """A feed that waits for the next picture rather than let the engine run with less than it wants."""

    def poll(self) -> ReadyRequest | None:
        while (ready := super().poll()) is None and not self.is_exhausted:
            self.wait(WAIT_SLICE_S)
        return ready


def _run(engine: LazyEngine, model: Model, sample: Sequence[SampledUnit], pool: PicturePool) -> list[RecordDict]:
    """Return the records of the sample's requests, in order."""
    written: list[RecordDict] = []
    records = OrderedRecords(model.identity, written.extend, Summary())
    feed = _PatientFeed(
        (replace(row, then=()) for one in sample for row in one.unit.rows),  # what is asked next is not counted
        next_id=RequestIds(model.identity).next_id,
        is_done=lambda record_id, row, request: False,
        pool=pool,
        num_ahead=rows_ahead(model.crop_config),
        fail=records.fail,
        recall=records.recall,
        reading=contextlib.nullcontext,
    )
    drive(feed, engine, records, lambda: None)
    return written


def _costs(
    sample: Sequence[SampledUnit], records: Sequence[RecordDict], stages_s: Mapping[str, float], engine_s: float
) -> list[UnitCost]:
    """Share out the engine's time; the shares sum to `engine_s`."""
    remaining = iter(records)
    of_units = [[next(remaining) for _ in range(one.unit.num_requests)] for one in sample]
    tokens = np.array(
        [[sum(r["tokens"][kind] for r in own if not r["error"]) for own in of_units] for kind in ("prompt", "output")]
    )
    work = {
        "vision": np.array([1 if one.crops == UNTILED_CROPS else one.crops for one in sample]),
        "prefill": tokens[0],
        "decode": tokens[1],
    }
    rest_s = engine_s
    engine_s_of = np.zeros(len(sample))
    for stage, amounts in work.items():
        if amounts.sum():
            engine_s_of += stages_s[stage] * amounts / amounts.sum()
            rest_s -= stages_s[stage]
    num_requests = np.array([one.unit.num_requests for one in sample])
    engine_s_of += rest_s * num_requests / max(1, num_requests.sum())
    return [
        UnitCost(
            crops=one.crops,
            engine_s=float(engine_s_of[i]),
            num_failed=sum(bool(record["error"]) for record in of_units[i]),
            prompt_tokens=int(tokens[0, i]),
            output_tokens=int(tokens[1, i]),
            record_bytes=sum(len(encode_record(record)) for record in of_units[i]),
        )
        for i, one in enumerate(sample)
    ]
