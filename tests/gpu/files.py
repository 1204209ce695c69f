"""Part `files`: photographs from JPEG files through md3's decode workers into the engine."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from md3cli.bench.runs import make_engine, make_jobs, photo_files
from md3cli.images.crops import select_tiling
from md3cli.model.engine.engine import Engine
from md3cli.records import Job
from md3cli.run.feed import num_auto_workers

from .child import Run
from .models import BF16, model_in
from .workloads import is_as_asked, loads_of, pictures_for, warm_up

SIZES = {"2 megapixels": (1920, 1080), "12 megapixels": (4032, 3024)}
CPU_SIZES = {"0.3 megapixels": (640, 480)}
BATCHES = 3  # that are timed, between two that are not: the pipeline fills in the first, and empties in the last


def measure(run: Run) -> None:
    """Queries a second about pictures cut before, and about files whose pictures have as many crops."""
    model, load = model_in(run, BF16), loads_of(run)[0]
    load = replace(load, num_requests=(BATCHES + 2) * load.batch)
    config, workers = model.config.vision.crop_config, num_auto_workers()
    name, pictures = f"batch {load.batch}, {BF16}", pictures_for(model, load.num_requests)
    run.note("decode workers", workers)
    engine = make_engine(model, load.batch, cuts=run.is_cuda)
    run.note("pictures are cut by", "the card" if engine.cutter else "the decode workers")
    warm_up(engine, load, pictures)
    cut_rate = steady_rate(engine, make_jobs(load.workload, pictures), load.batch)
    if not is_as_asked(run, engine, load.batch, name):
        return
    run.figure(f"cut before, {name}", cut_rate, "img/s")
    del pictures
    for what, size in (SIZES if run.is_cuda else CPU_SIZES).items():
        run.figure(f"{what}, crops of a picture", select_tiling(*size, config).num_crops, "count")
        with (
            run.if_it_fits(f"{what}, from files"),
            photo_files(load.num_requests, config, workers, seed=0, size=size) as files,
        ):
            files.serve(engine)
            rate = steady_rate(engine, files.jobs(load.workload.request, load.num_requests), load.batch)
            run.figure(f"{what}, from files, {name}", rate, "img/s")
            run.figure(f"{what}, from files, {name}: of cut before", rate / cut_rate, "share")


def steady_rate(engine: Engine, jobs: Iterable[Job | None], num_left_out: int) -> float:
    """Answers a second without the first and the last `num_left_out`: as many are under way at both ends."""
    times = []
    for answer in engine.run(jobs):
        assert answer.failure is None, answer.failure
        times.append(time.perf_counter())
    first, last = times[num_left_out - 1], times[-num_left_out - 1]
    return (len(times) - 2 * num_left_out) / (last - first)
