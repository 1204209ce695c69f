"""Run the passes of the GPU check at full size on a CUDA device that is not there: mistakes in them cost its time.

    PYTHONPATH=.:tests:tests/support python tests/support/fake_gpu_check.py

Needs a CUDA build of torch, no GPU (`fake_cuda.py` says how). Graphs cannot be captured there, nothing is timed, and
numbers are none. Prints one JSON object: what was run -> how often the host had to wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import fake_cuda
import torch
from gpu import sameness, stages, steps, workloads
from gpu.child import Run

import md3cli.bench.runs as runs
from md3cli.bench.runs import make_jobs
from md3cli.model.engine.engine import Engine
from md3cli.model.network.moondream import Moondream3

FREE_BYTES = 60_000_000_000  # beside the weights of an H100
LINES_FILE = "/dev/null"


def make_engine(model: Moondream3, batch_size: int, *args: Any, **kwargs: Any) -> Engine:
    """Make the engine that the check makes, without graphs."""
    return runs.make_engine(model, batch_size, *args, **kwargs | {"captures": False})


def scenarios(run: Run, model: Moondream3) -> dict[str, Callable[[], object]]:
    """Return the passes by their names."""
    found: dict[str, Callable[[], object]] = {}
    for num_crops in stages.MICRO_BATCHES:
        found[f"vision, {num_crops} crops"] = stages.vision_of(run, model, num_crops)
    for count in stages.PICTURES:
        found[f"prefix, {count} pictures"] = stages.prefix_of(model, count)
    for slots, rows in stages.STEPS:
        running = steps.RunningEngine(model, slots, rows)
        found[f"step, {rows} of {slots}"] = running.step
        found[f"copied step, {rows} of {slots}"] = partial(steps._copied, running)
    engine = make_engine(model, 64)
    pictures = [replace(picture, sha256=name) for name in "abcd" for picture in workloads.pictures_for(model, 1)]
    found["pictures in a row"] = lambda: engine.encoder.encode(pictures)
    seat = SimpleNamespace(slot=3, generation=SimpleNamespace(prompt_end=740))
    found["digest"] = lambda: sameness._digest(engine, seat, 5)  # type: ignore[arg-type]  # a stand-in
    alone = make_engine(model, 1)
    for job in make_jobs(workloads.LOADS[2].workload, pictures[:1]):
        alone.add(job)
    found["a question alone"] = alone.step
    return found


def main() -> None:
    """Run every scenario once."""
    counter = fake_cuda.Counter()
    waits = {}
    with ExitStack() as stack:
        stack.enter_context(fake_cuda.FakeDevice(counter).active())
        stack.enter_context(torch.inference_mode())
        stack.enter_context(patch.object(runs, "free_bytes", lambda device: FREE_BYTES))
        stack.enter_context(patch.object(torch.cuda, "empty_cache"))
        stack.enter_context(patch.object(steps, "make_engine", make_engine))
        stack.enter_context(patch.object(sameness, "int", lambda tensor: 0, create=True))
        run = Run(LINES_FILE, "cuda", "full", "", {})
        for name, scenario in scenarios(run, fake_cuda.make_model("bf16")).items():
            with counter.around() as counts:
                scenario()
            waits[name] = counts.waits
    print(json.dumps(waits))


if __name__ == "__main__":
    main()
