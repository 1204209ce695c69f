"""Compiling: every specialisation of every kernel that the parts will run, several processes at a time.

Each process takes its share of the jobs: cases of the kernels, passes of a two-layer network in each
weight form, and the golden cases, whose odd sizes are specialisations of their own. A job is run once;
what Triton compiles for it lands in the cache that all children share. Nothing is timed here.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from support.golden_cases import CASES, load_case

from md3cli.model.network.config import ModelConfig
from md3cli.model.network.moondream import Moondream3

from . import golden, tile_sweep
from .child import Run, last_lines
from .kernels import all_cases
from .models import WEIGHT_FORMS, model_in
from .stages import PICTURES, ROWS, decode_of, prefix_of
from .workloads import CPU_LOADS, run_some

Job = Callable[[], object]
Load = Callable[[Run, str, torch.dtype], Moondream3]


def measure(run: Run) -> None:
    """The share that the argument names: `number-of`. A job that fails is told, and will fail in its part."""
    first, count = map(int, run.argument.split("-"))
    for what, job in islice(jobs(run), first, None, count):
        try:
            with run.if_it_fits(what):
                job()
        except Exception:  # noqa: BLE001
            run.fail(f"{what}: {last_lines(traceback.format_exc())}")


def jobs(run: Run) -> Iterator[tuple[str, Job]]:
    """Everything to compile; what belongs to one form stays together, so that no two compile the same."""
    for form in WEIGHT_FORMS:
        yield f"steps, {form}", partial(run_steps, run, form)
        yield f"prefixes, {form}", partial(run_prefixes, run, form)
        yield f"prompts, {form}", partial(run_prompts, run, form)
    for dtype in golden.DTYPES.values():
        for name in CASES:
            yield f"case {name}, {dtype}", partial(run_golden, run, name, golden.plain_model, dtype)
        for name in golden.LOW_BIT_CASES:
            yield f"low bits of case {name}, {dtype}", partial(run_golden, run, name, golden.stored_model, dtype)
    for case in all_cases(run):
        yield case.name, partial(run_case, case)
    for candidate in tile_sweep.candidates(run):
        yield str(candidate), partial(tile_sweep.compile_tile, run, candidate)


def two_layers(config: ModelConfig) -> ModelConfig:
    """A dense and a sparse layer at real size, and as little as can be of all else."""
    assert config.text.moe is not None
    text = replace(config.text, n_layers=2, moe=replace(config.text.moe, start_layer=1))
    return replace(config, text=text, vision=replace(config.vision, enc_n_layers=1))


@torch.inference_mode()
def run_steps(run: Run, form: str) -> None:
    model = model_in(run, form, two_layers(run.config))
    for rows in ROWS:
        decode_of(model, rows)()


@torch.inference_mode()
def run_prefixes(run: Run, form: str) -> None:
    model = model_in(run, form, two_layers(run.config))
    for count in PICTURES:
        prefix_of(model, count)()


def run_prompts(run: Run, form: str) -> None:
    """Whole requests, for what a prompt launches."""
    model = model_in(run, form, two_layers(run.config))
    for load in CPU_LOADS[:2]:
        run_some(model, load, load.num_requests, load.workload.max_tokens)


def run_golden(run: Run, name: str, load: Load, dtype: torch.dtype) -> None:
    golden.answered(load_case(name), golden.prepared(run, load(run, name, dtype)), batch=8, count=8)


@torch.inference_mode()
def run_case(case: Any) -> None:
    case.make().run()
