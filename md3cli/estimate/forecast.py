"""From what a sample took to what all of INPUT will take, with a spread, and with money at the user's prices.

A bucket's mean times the bucket's share of INPUT, summed. The spread is a bootstrap: the sampled units of each bucket
are drawn again with replacement, and where not all pictures were opened the shares of the buckets too; low and high
hold nine tenths of a thousand such forecasts (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter
13). The spread knows of other pictures in INPUT, not of a busier machine. A forecast is said as lines for people or as
one JSON object for programs. Pure arithmetic and words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from md3cli.config import EstimateOptions, RunConfig
from md3cli.console.progress import clock
from md3cli.estimate.sample import NO_PICTURE, Drawn, Measured, Opened
from md3cli.records import printable

NUM_RESAMPLES = 1000
RANGE_PERCENT = (5, 95)
SEED = 0
_COLUMNS = ("engine_s", "num_failed", "prompt_tokens", "output_tokens", "record_bytes")
SCHEMA = "md3-estimate/1"
SIGNIFICANT_DIGITS = 4
NOT_INCLUDED = (
    "loading the model and compiling it",
    "encodings already in the cache, and records already in OUTPUT (a resumed run does less)",
    "other work on the machine, and a device that slows down when hot",
    "listing INPUT, fetching remote pictures, and the making of other formats than records",
)
ASKED_NEXT = "what records ask next: about each object found (--then), or to find what they list (--everything)"

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
    asks_more: bool = False  # once records are there

    @property
    def not_included(self) -> tuple[str, ...]:
        """What is not in the figures, in words."""
        return (*NOT_INCLUDED, ASKED_NEXT) if self.asks_more else NOT_INCLUDED


def forecast(drawn: Drawn, opened: Opened, measured: Measured, *, num_devices: int) -> Forecast:
    """Forecast all of INPUT from its sample; `num_devices` share the model's work, not the opening of pictures."""
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
        asks_more=drawn.asks_more,
    )


def _totals(tables: dict[int, Table], counts: NDArray[Any]) -> Table:
    """Return [columns] of all units, `counts` of each bucket."""
    means = np.array([table.mean(axis=0) for table in tables.values()])
    return np.asarray(counts @ means, dtype=np.float64)


def _resampled(tables: dict[int, Table], num_opened: NDArray[np.int64], num_bad: int, scale: float) -> Table:
    """Return [2, columns]: the low and the high end."""
    chance = np.random.default_rng(SEED)
    drawn = int(num_opened.sum()) + num_bad
    shares = np.array([*num_opened, num_bad]) / drawn
    totals = np.empty((NUM_RESAMPLES, len(_COLUMNS)))
    for i in range(NUM_RESAMPLES):
        counts = chance.multinomial(drawn, shares)[:-1] if scale > 1 else num_opened
        again = {crops: table[chance.integers(len(table), size=len(table))] for crops, table in tables.items()}
        totals[i] = _totals(again, counts * scale)
    return np.percentile(totals, RANGE_PERCENT, axis=0)


def as_json(found: Forecast, config: RunConfig) -> dict[str, Any]:
    """Return one object; every range is `{"value", "low", "high"}`, money is without a currency."""
    asked, measured = _asked(config), found.measured
    seconds = found.seconds
    num_good = _num_good(found)
    return {
        "schema": SCHEMA,
        "images": found.num_images,
        "requests": found.num_requests,
        "bad": {kind: round(count) for kind, count in found.num_bad.items()},
        "skipped": found.skipped,
        "opened": found.num_opened,
        "buckets": [
            {
                "crops": bucket.crops,
                "images": round(bucket.num_units),
                "sampled": bucket.num_sampled,
                "seconds_per_image": _rounded(bucket.engine_s),
            }
            for bucket in found.buckets
        ],
        "sample": {
            "requests": measured.num_requests,
            "failed": sum(cost.num_failed for cost in measured.costs),
            "seconds": _rounded(measured.engine_s),
            "batch_size": measured.batch_size,
            "device": measured.device,
        },
        "devices": found.num_devices,
        "bound_by": "opening" if found.is_bound_by_opening else "model",
        "load_seconds": _rounded(measured.load_s),
        "warm_up_seconds": _rounded(measured.warm_up_s),
        "opening_seconds": _rounded(found.opening_s),
        "seconds": _range(seconds),
        "hours": _range(seconds.times(1 / 3600)),
        "gpu_hours": _range(_device_hours(found)),
        "images_per_second": _range(_per_second(num_good, seconds)),
        "requests_per_second": _range(_per_second(found.num_requests, seconds)),
        "failed_requests": _range(found.num_failed),
        "prompt_tokens": _range(found.prompt_tokens),
        "output_tokens": _range(found.output_tokens),
        "records_bytes": _range(found.record_bytes),
        "cache_bytes": round(_cache_bytes(found, config)),
        "cost": None if (cost := _cost(found, asked)) is None else _range(cost),
        "cost_per_1000": None if cost is None else _range(cost.times(1000 / max(1, found.num_images))),
        "cost_elsewhere": None if (other := _cost_elsewhere(found, asked)) is None else _rounded(other),
        "not_included": list(found.not_included),
    }


def as_lines(found: Forecast, config: RunConfig) -> list[str]:
    """Return a line for each fact."""
    lines = [
        ("images", f"{found.num_images:,}{_bad(found)}"),
        ("requests", f"{found.num_requests:,}"),
        ("crops", _buckets(found)),
        ("sample", _sample(found)),
        ("time", _time(found)),
        ("speed", _speed(found)),
        ("tokens", f"{_count(found.prompt_tokens)} prompt, {_count(found.output_tokens)} output"),
        ("disk", f"{_size(found.record_bytes.value)} of records; {_cache(found, config)}"),
        *_money(found, _asked(config)),
        ("not in it", "; ".join(found.not_included)),
    ]
    return [printable(f"{name:<10} {text}") for name, text in lines]


def _asked(config: RunConfig) -> EstimateOptions:
    assert config.estimate is not None
    return config.estimate


# -- figures -------------------------------------------------------------------------------------------


def _num_good(found: Forecast) -> float:
    return max(0.0, found.num_images - sum(found.num_bad.values()))


def _device_hours(found: Forecast) -> Range:
    return found.seconds.times(found.num_devices / 3600)


def _per_second(amount: float, seconds: Range) -> Range:
    return Range(*(amount / max(s, 1e-9) for s in (seconds.value, seconds.high, seconds.low)))


def _cache_bytes(found: Forecast, config: RunConfig) -> float:
    return min(found.encoding_bytes, config.model.cache_size) if config.model.cache else 0


def _cost(found: Forecast, asked: EstimateOptions) -> Range | None:
    price = asked.price_per_gpu_hour
    return None if price is None else _device_hours(found).times(price)


def _cost_elsewhere(found: Forecast, asked: EstimateOptions) -> float | None:
    return None if asked.price_per_1000 is None else found.num_images / 1000 * asked.price_per_1000


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def _range(found: Range) -> dict[str, float]:
    return {"value": _rounded(found.value), "low": _rounded(found.low), "high": _rounded(found.high)}


# -- words ---------------------------------------------------------------------------------------------


def _bad(found: Forecast) -> str:
    if not found.num_bad:
        return ""
    about = "about " if found.num_opened < found.num_units else ""
    kinds = ", ".join(f"{kind} {count:,.0f}" for kind, count in found.num_bad.items())
    return f", {about}{sum(found.num_bad.values()):,.0f} of them bad ({kinds})"


def _buckets(found: Forecast) -> str:
    drawn = f" (from {found.num_opened:,} opened)" if found.num_opened < found.num_units else ""
    parts = [
        f"{bucket.num_units:,.0f} {f'of {bucket.crops} crops' if bucket.crops else 'without a picture'}"
        f" at {bucket.engine_s:.3g} s"
        for bucket in found.buckets
    ]
    return ", ".join(parts) + drawn


def _sample(found: Forecast) -> str:
    measured = found.measured
    text = (
        f"{sum(bucket.num_sampled for bucket in found.buckets):,} of them, {measured.num_requests:,} requests, "
        f"{clock(measured.engine_s)} on {measured.device} with a batch of {measured.batch_size}; "
        f"before that {clock(measured.load_s)} of loading and {clock(measured.warm_up_s)} of warming up"
    )
    failed = sum(cost.num_failed for cost in measured.costs)
    if failed:
        text += f"; {failed:,} failed, the first with: {measured.failure}"
    if measured.num_requests < 2 * measured.batch_size:
        text += "; too few to keep the batch full: a long run may be faster"
    return text


def _time(found: Forecast) -> str:
    seconds = found.seconds
    devices = "" if found.num_devices == 1 else f" with {found.num_devices} devices"
    by = "opening pictures; see --workers" if found.is_bound_by_opening else "the model"
    text = f"{clock(seconds.value)} ({clock(seconds.low)} to {clock(seconds.high)}){devices}, bound by {by}"
    if not found.measured.device.startswith("cpu"):
        hours = _device_hours(found)
        text += f"; {hours.value:,.3g} GPU hours ({hours.low:,.3g} to {hours.high:,.3g})"
    return text


def _speed(found: Forecast) -> str:
    images, requests = (
        _per_second(amount, found.seconds).value for amount in (_num_good(found), float(found.num_requests))
    )
    return f"{images:,.3g} images/s, {requests:,.3g} requests/s"


def _count(found: Range) -> str:
    if found.high - found.low < 1:
        return f"{found.value:,.0f}"
    return f"{found.value:,.0f} ({found.low:,.0f} to {found.high:,.0f})"


def _cache(found: Forecast, config: RunConfig) -> str:
    if not config.model.cache:
        return "no encodings, with --no-cache"
    kept = _cache_bytes(found, config)
    if kept < found.encoding_bytes:
        return f"{_size(kept)} of encodings, as --cache-size allows ({_size(found.encoding_bytes)} would be all)"
    return f"{_size(kept)} of encodings"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


def _money(found: Forecast, asked: EstimateOptions) -> list[tuple[str, str]]:
    cost, elsewhere, lines = _cost(found, asked), _cost_elsewhere(found, asked), []
    if cost is not None:
        per_1000 = cost.times(1000 / max(1, found.num_images)).value
        value, low, high = map(_money_text, (cost.value, cost.low, cost.high))
        price = f"{asked.price_per_gpu_hour:g} a GPU hour"
        lines.append(("cost", f"{value} ({low} to {high}) at {price}: {_money_text(per_1000)} per 1,000 images"))
    if elsewhere is not None:
        text = f"{_money_text(elsewhere)} at {asked.price_per_1000:g} per 1,000 images"
        if cost is not None and cost.value > 0:
            text += f": {elsewhere / cost.value:,.3g} times as much"
        lines.append(("elsewhere", text))
    return lines


def _money_text(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"
