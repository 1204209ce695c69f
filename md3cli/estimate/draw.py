"""What INPUT holds: every row counted, a bounded number of pictures opened to learn their crops.

A picture's cost depends on its crops, which only its size tells; opening 100 million files for that
would take days. So pictures are drawn evenly over INPUT in one pass, and the others are taken to be
like them. Where INPUT holds no more than may be opened, all are, and the counts are exact.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from md3cli.decode import DecodePool
from md3cli.errors import ImageError
from md3cli.images import PreparedImage, Tiling
from md3cli.records import ImageItem, SourceRow
from md3cli.source import Source

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
    """Exact counts of INPUT's rows and, in input order, the units that were drawn of `num_units`."""

    num_images: int = 0
    num_requests: int = 0
    num_units: int = 0
    bad: Counter[str] = field(default_factory=Counter)  # rows that fail before anything is opened, by error type
    skipped: Counter[str] = field(default_factory=Counter)
    units: list[Unit] = field(default_factory=list)


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
        """Up to `per_bucket` units of each bucket, buckets mixed as in a run."""
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
    """One pass over INPUT; memory holds `size` units.

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
    """The rows that can be asked; all are counted."""
    for row in source:
        drawn.num_requests += len(row.requests)
        drawn.num_images += row.image is not None
        if row.failure is not None:
            drawn.bad[row.failure.type] += 1
        else:
            yield row


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


def open_drawn(drawn: Drawn, pool: DecodePool, *, num_ahead: int, clock: Callable[[], float]) -> Opened:
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
            buckets.setdefault(len(picture.crops), []).append(unit)
            tilings[len(picture.crops)] = picture.tiling
        times.append(clock())
    return Opened(buckets, tilings, bad, _pace(times))


def _decoded(
    units: Iterable[Unit], pool: DecodePool, num_ahead: int
) -> Iterator[tuple[Unit, Future[PreparedImage] | None]]:
    ahead: deque[tuple[Unit, Future[PreparedImage] | None]] = deque()
    for unit in units:
        ahead.append((unit, pool.submit(unit.image) if unit.image is not None else None))
        if len(ahead) >= num_ahead:
            yield ahead.popleft()
    while ahead:
        yield ahead.popleft()


def _pace(times: list[float]) -> float:
    """Seconds a picture, from the start and each one's end; the first is left out: it waits for workers to start."""
    if len(times) > 2:
        return (times[-1] - times[1]) / (len(times) - 2)
    return times[-1] - times[0]
