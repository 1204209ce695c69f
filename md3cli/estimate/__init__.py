"""`md3 estimate`: what a run would take, from a count of INPUT and a sample run through the real engine.

sample.py    counts the rows of INPUT, draws pictures evenly, and runs up to 16 of each number of crops, warm
forecast.py  makes of both the time, tokens and bytes for all of INPUT, with a spread
show.py      says the forecast as lines or one JSON object, with money
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from md3cli.config import ModelOptions, RunConfig, ScaleOptions
from md3cli.console import RunConsole
from md3cli.errors import InputError
from md3cli.estimate.forecast import forecast
from md3cli.estimate.sample import count_and_draw, measure, open_drawn
from md3cli.estimate.show import as_json, as_lines
from md3cli.run.feed import make_pool, rows_ahead
from md3cli.run.model_handle import Model
from md3cli.signals import StopSignals
from md3cli.source.source import Source, check_found, empty_words

Clock = Callable[[], float]


def estimate(
    config: RunConfig,
    source: Source,
    console: RunConsole,
    *,
    find: Callable[[ModelOptions], Model],
    clock: Clock = time.perf_counter,
) -> int:
    """Count, sample, print; returns the exit status, 0. Writes no file.

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
    """Devices at work at the same time; a cluster that Ray schedules tells its own only when it is there."""
    return max(1, len(scale.devices)) * scale.world_size
