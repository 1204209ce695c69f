"""Compiling: every specialisation of every kernel that the parts will run, several processes at a time.

Each process takes its share of the jobs: cases of the kernels, passes of a two-layer network in each
weight form, and the golden cases, whose odd sizes are specialisations of their own. A job is run once;
what Triton compiles for it lands in the cache that all children share. Nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from support.golden_cases import CASES, load_case

from md3cli.bench.runs import make_engine
from md3cli.model.network.config import ModelConfig
from md3cli.model.network.moondream import Moondream3

from . import golden, tile_sweep
from .child import Run
from .kernels import all_cases
from .models import WEIGHT_FORMS, model_in
from .stages import PICTURES, prefix_of
from .workloads import CPU_LOADS, pictures_for, time_load

ENGINES = (64, 8, 1)  # slots: a kernel is compiled once more for numbers that are no multiple of 16, and for 1
REQUESTS = 2

Job = Callable[[], object]
Load = Callable[[Run, str, torch.dtype], Moondream3]


def measure(run: Run) -> None:
    """The share that the argument names: `number-of`, with `-tiles` of other tiles, too.

    A job that fails is told, and will fail in its part.
    """
    first, count, *also = run.argument.split("-")
    for what, job in islice(jobs(run, has_tiles=bool(also)), int(first), None, int(count)):
        with run.if_it_fits(what):
            job()


def jobs(run: Run, *, has_tiles: bool) -> Iterator[tuple[str, Job]]:
    """Everything to compile; what belongs to one form stays together, so that no two compile the same."""
    for form in WEIGHT_FORMS:
        yield f"prefixes, {form}", partial(run_prefixes, run, form)
        for batch in ENGINES:
            yield f"an engine of {batch}, {form}", partial(run_engine, run, form, batch)
    for dtype in golden.DTYPES.values():
        for name in CASES:
            yield f"case {name}, {dtype}", partial(run_golden, run, name, golden.plain_model, dtype)
        for name in golden.LOW_BIT_CASES:
            yield f"low bits of case {name}, {dtype}", partial(run_golden, run, name, golden.stored_model, dtype)
    for case in all_cases(run):
        yield case.name, partial(run_case, case)
    for candidate in tile_sweep.candidates(run) if has_tiles else ():
        yield str(candidate), partial(tile_sweep.compile_tile, run, candidate)


def two_layers(config: ModelConfig) -> ModelConfig:
    """A dense and a sparse layer at real size, and as little as can be of all else."""
    assert config.text.moe is not None
    text = replace(config.text, n_layers=2, moe=replace(config.text.moe, start_layer=1))
    return replace(config, text=text, vision=replace(config.vision, enc_n_layers=1))


@torch.inference_mode()
def run_prefixes(run: Run, form: str) -> None:
    model = model_in(run, form, two_layers(run.config))
    for count in PICTURES:
        prefix_of(model, count)()


def run_engine(run: Run, form: str, batch: int) -> None:
    """Whole requests through an engine that captures its steps."""
    model = model_in(run, form, two_layers(run.config))
    engine = make_engine(model, batch)
    for load in CPU_LOADS[:2]:
        time_load(engine, replace(load, batch=batch), pictures_for(model, REQUESTS))


def run_golden(run: Run, name: str, load: Load, dtype: torch.dtype) -> None:
    model = golden.prepared(run, load(run, name, dtype))
    for batch in golden.BATCHES:
        golden.answered(load_case(name), model, batch, count=8)


@torch.inference_mode()
def run_case(case: Any) -> None:
    case.make().run()
