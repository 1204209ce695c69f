"""What a run would do, without doing it: `md3 estimate`, from a sample run through the real engine, and `--dry-run`.

sample.py    counts the rows of INPUT, draws pictures evenly, and runs up to 16 of each number of crops, warm
forecast.py  makes of both the time, tokens and bytes for all of INPUT, with a spread, and says them with money

Forecast and sample are apart because one is arithmetic, tested with made-up costs, and the other runs the engine.

A dry run counts images, requests, crops and bad files, and needs no model. Neither writes a file.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from md3cli.config import ModelOptions, RunConfig, ScaleOptions
from md3cli.console import RunConsole
from md3cli.errors import ImageError, InputError, RequestError
from md3cli.estimate.forecast import ASKED_NEXT, as_json, as_lines, forecast
from md3cli.estimate.sample import count_and_draw, measure, open_drawn
from md3cli.images.crops import CropConfig, PreparedImage
from md3cli.images.tiles import tiles_of
from md3cli.records import Tiles
from md3cli.run.feed import make_pool, rows_ahead
from md3cli.run.model_handle import Model, crop_config_without_network
from md3cli.signals import StopSignals
from md3cli.source.emptiness import check_found, empty_words
from md3cli.source.source import Source

Clock = Callable[[], float]


def estimate(
    config: RunConfig,
    source: Source,
    console: RunConsole,
    *,
    find: Callable[[ModelOptions], Model],
    clock: Clock = time.perf_counter,
) -> int:
    """Count INPUT, run a sample, print the forecast, and return the exit status, 0.

    Raises:
        InputError: there is nothing in INPUT that could be asked.
        Md3Error: the model cannot be had or cannot run here.
        Interrupted: a signal stopped it.
    """
    asked = config.estimate
    assert asked is not None
    with StopSignals() as stop:
        with stop.interruptible():
            console.say("counting INPUT ...")
            drawn = count_and_draw(source, asked.num_opened)
            drawn.asks_more = drawn.asks_more or config.everything is not None
            if not drawn.num_units:
                check_found(source, config.source, is_allowed=config.allow_empty)
                console.say(f"{empty_words(config.source)}, so there is nothing to estimate")
                return 0
            device = next(iter(config.scale.devices), config.model.device)
            model = find(replace(config.model, device=device, cache=False))  # an encoding on disk would cost nothing
        with make_pool(config, model.crop_config) as pool:
            with stop.interruptible():
                console.say(f"opening {len(drawn.units):,} of {drawn.num_units:,} ...")
                opened = open_drawn(drawn, pool, num_ahead=rows_ahead(model.crop_config), clock=clock)
                if not opened.buckets:
                    bad = f"none of the {opened.num_bad:,} pictures that were tried opens"
                    raise InputError(f"nothing to estimate: {bad}")
                sample = opened.sample(asked.sample_per_bucket)
            console.say(f"loading the model, then a sample of {len(sample):,} ...")
            measured = measure(model, sample, pool, stop=stop, clock=clock)
    found = forecast(drawn, opened, measured, num_devices=_num_devices(config.scale))
    if asked.is_json or not console.is_stdout_terminal:
        text = json.dumps(as_json(found, config))
    else:
        text = "\n".join(as_lines(found, config))
    sys.stdout.write(text + "\n")
    return 0


def _num_devices(scale: ScaleOptions) -> int:
    """Return the devices at work at the same time; a cluster of Ray's tells its own only when it is there."""
    return max(1, len(scale.devices)) * scale.world_size


@dataclass(slots=True)
class DryRun:
    """What was counted: `crops` is images by number of crops, the global one included, `bad` is rows by error type.

    `num_of_parts` is how many requests are about a part of an image, which has crops of its own.
    `num_tiles` are beside the images, whose crops alone are counted; None where none are asked for. `asks_more`:
    records may ask more, and nobody knows how much.
    """

    num_images: int = 0
    num_requests: int = 0
    num_of_parts: int = 0
    crops: Counter[int] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    num_tiles: int | None = None
    asks_more: bool = False

    def add(self, picture: PreparedImage, looked_at: Iterable[Tiles], crop_config: CropConfig) -> None:
        """Count a picture, and each tile of it once."""
        self.crops[picture.tiling.num_crops] += 1
        for tiles in looked_at:
            count = len(tiles_of(picture.width, picture.height, tiles, crop_config))
            self.num_tiles = (self.num_tiles or 0) + (count if count > 1 else 0)  # one alone is the picture

    def as_json(self) -> dict[str, Any]:
        """Return the counts as `--json` prints them; what was not asked for has no key."""
        parts = {"requests_of_parts": self.num_of_parts} if self.num_of_parts else {}
        tiles = {} if self.num_tiles is None else {"tiles": self.num_tiles}
        not_counted = {"not_counted": [ASKED_NEXT]} if self.asks_more else {}
        return {
            "images": self.num_images,
            "requests": self.num_requests,
            **parts,
            "crops": {str(crops): count for crops, count in sorted(self.crops.items())},
            **tiles,
            "bad": dict(sorted(self.bad.items())),
            "skipped": dict(sorted(self.skipped.items())),
            **not_counted,
        }

    def lines(self) -> list[str]:
        """Return the same for people."""
        crops = ", ".join(f"{count:,} of {crops} crops" for crops, count in sorted(self.crops.items()))
        bad = ", ".join(f"{name} {count:,}" for name, count in sorted(self.bad.items()))
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.skipped.items()))
        parts = f", {self.num_of_parts:,} of them about parts of images" if self.num_of_parts else ""
        return [
            f"images     {self.num_images:,}",
            f"requests   {self.num_requests:,}{parts}",
            f"crops      {sum(crops * count for crops, count in self.crops.items()):,}{f': {crops}' if crops else ''}",
            *([] if self.num_tiles is None else [f"tiles      {self.num_tiles:,}, each with crops of its own"]),
            f"bad files  {self.bad.total():,}{f': {bad}' if bad else ''}",
            f"not taken  {self.skipped.total():,}{f': {skipped}' if skipped else ''}",
            *([f"not in it  {ASKED_NEXT}"] if self.asks_more else []),
        ]


def dry_run(config: RunConfig, source: Source, console: RunConsole) -> int:
    """Count what INPUT holds, print it, and return the exit status, 0.

    Raises:
        InputError: there is nothing to annotate in INPUT, and that is not allowed; the counts are printed.
    """
    counts = DryRun()
    crop_config = crop_config_without_network(config.model)
    for future, looked_at in _decoded(config, source, counts, crop_config):
        try:
            counts.add(future.result(), looked_at, crop_config)
        except (ImageError, RequestError) as error:
            counts.bad[error.type] += 1
    counts.skipped = source.skipped
    text = "\n".join(counts.lines()) if console.is_stdout_terminal else json.dumps(counts.as_json())
    sys.stdout.write(text + "\n")
    if not counts.num_requests:
        check_found(source, config.source, is_allowed=config.allow_empty)
    return 0


def _decoded(
    config: RunConfig, source: Source, counts: DryRun, crop_config: CropConfig
) -> Iterator[tuple[Future[PreparedImage], frozenset[Tiles]]]:
    """Yield the pictures in order with the tiles that are asked for; a bounded number of pictures is in decoding.

    `counts` takes the rows on the way.
    """
    ahead: deque[tuple[Future[PreparedImage], frozenset[Tiles]]] = deque()
    with make_pool(config, crop_config) as pool:
        for row in source:
            counts.num_requests += len(row.requests)
            counts.asks_more = counts.asks_more or bool(row.then) or config.everything is not None
            counts.num_of_parts += sum(request.region is not None for request in row.requests)
            counts.num_images += row.image is not None
            if row.failure is not None:
                counts.bad[row.failure.type] += 1
                continue
            fit = row.fit_requests
            if row.refused:
                counts.bad["bad_request"] += len(row.requests) - len(fit)
            if fit and row.image is not None:
                looked_at = frozenset(request.tiles for request in fit if request.tiles is not None)
                ahead.append((pool.submit(row.image), looked_at))
            while len(ahead) >= rows_ahead(crop_config):
                yield ahead.popleft()
        yield from ahead
