"""From what a sample took to what all of INPUT will take, with a spread.

A bucket's mean times the bucket's share of INPUT, summed. The spread is a bootstrap: the sampled units
of each bucket are drawn again with replacement, and where not all pictures were opened the shares of
the buckets too; low and high hold nine tenths of a thousand such forecasts (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13). It knows of other pictures in INPUT, not of a busier
machine. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from md3cli.estimate.sample import NO_PICTURE, Drawn, Measured, Opened

NUM_RESAMPLES = 1000
RANGE_PERCENT = (5, 95)
SEED = 0
_COLUMNS = ("engine_s", "num_failed", "prompt_tokens", "output_tokens", "record_bytes")

Table = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Range:
    """A forecast and its spread."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        return Range(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Bucket:
    """`num_units` of INPUT are of so many crops (0: no picture), by the drawn ones; `num_sampled` of them were run."""

    crops: int
    num_units: float
    num_sampled: int
    engine_s: float  # a unit, the mean


@dataclass(frozen=True, slots=True)
class Forecast:
    """All of INPUT. `seconds` are on the clock, with `num_devices`; the model's loading is not in them."""

    num_images: int
    num_requests: int
    num_units: int
    num_opened: int
    num_bad: dict[str, float]  # rows and pictures that fail unseen by the model, by error type
    skipped: dict[str, int]
    buckets: list[Bucket]
    seconds: Range
    is_bound_by_opening: bool
    opening_s: float
    num_failed: Range
    prompt_tokens: Range
    output_tokens: Range
    record_bytes: Range
    encoding_bytes: float
    num_devices: int
    measured: Measured


def forecast(drawn: Drawn, opened: Opened, measured: Measured, *, num_devices: int) -> Forecast:
    """All of INPUT from its sample; `num_devices` share the model's work, not the opening of pictures."""
    rows_of: dict[int, list[list[float]]] = {crops: [] for crops in opened.buckets}
    for cost in measured.costs:
        rows_of[cost.crops].append([float(getattr(cost, column)) for column in _COLUMNS])
    tables = {crops: np.array(rows) for crops, rows in sorted(rows_of.items())}
    num_opened = np.array([len(opened.buckets[crops]) for crops in tables])
    scale = drawn.num_units / len(drawn.units)
    totals = _totals(tables, num_opened * scale)
    spread = _resampled(tables, num_opened, opened.num_bad, scale)
    pictures = scale * sum(len(units) for crops, units in opened.buckets.items() if crops != NO_PICTURE)
    opening_s = opened.seconds_per_picture * (pictures + scale * opened.num_bad)
    model_s = Range(*(float(value) / num_devices for value in (totals[0], *spread[:, 0])))
    ranges = [Range(*map(float, (totals[i], *spread[:, i]))) for i in range(1, len(_COLUMNS))]
    bad = drawn.bad + opened.bad
    return Forecast(
        num_images=drawn.num_images,
        num_requests=drawn.num_requests,
        num_units=drawn.num_units,
        num_opened=len(drawn.units),
        num_bad={kind: drawn.bad[kind] + scale * opened.bad[kind] for kind in sorted(bad)},
        skipped=dict(sorted(drawn.skipped.items())),
        buckets=[
            Bucket(crops, float(count * scale), len(table), float(table[:, 0].mean()))
            for (crops, table), count in zip(tables.items(), num_opened, strict=True)
        ],
        seconds=Range(*(max(value, opening_s) for value in (model_s.value, model_s.low, model_s.high))),
        is_bound_by_opening=opening_s > model_s.value,
        opening_s=opening_s,
        num_failed=ranges[0],
        prompt_tokens=ranges[1],
        output_tokens=ranges[2],
        record_bytes=ranges[3],
        encoding_bytes=pictures * measured.encoding_bytes,
        num_devices=num_devices,
        measured=measured,
    )


def _totals(tables: dict[int, Table], counts: NDArray[Any]) -> Table:
    """[columns] of all units, `counts` of each bucket."""
    means = np.array([table.mean(axis=0) for table in tables.values()])
    return np.asarray(counts @ means, dtype=np.float64)


def _resampled(tables: dict[int, Table], num_opened: NDArray[np.int64], num_bad: int, scale: float) -> Table:
    """[2, columns]: the low and the high end."""
    chance = np.random.default_rng(SEED)
    drawn = int(num_opened.sum()) + num_bad
    shares = np.array([*num_opened, num_bad]) / drawn
    totals = np.empty((NUM_RESAMPLES, len(_COLUMNS)))
    for i in range(NUM_RESAMPLES):
        counts = chance.multinomial(drawn, shares)[:-1] if scale > 1 else num_opened
        again = {crops: table[chance.integers(len(table), size=len(table))] for crops, table in tables.items()}
        totals[i] = _totals(again, counts * scale)
    return np.percentile(totals, RANGE_PERCENT, axis=0)
