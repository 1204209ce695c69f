"""Part `engine`: whole workloads through the engine, from crops in memory, all pictures different."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from md3cli.bench.bench import busy_seconds, gpu_memory, gpu_workload, reset_gpu_peak
from md3cli.bench.runs import PHOTO, Workload, make_engine, make_images, make_jobs, time_run
from md3cli.images.crops import PreparedImage
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.machine import peak_rss, reset_peak_rss
from md3cli.model.network.moondream import Moondream3

from .child import Run
from .models import BF16, model_in

WARM_TOKENS = 3
LEAST_PROFILED = 8  # requests


@dataclass(frozen=True)
class Load:
    """A workload of `md3 bench` at one batch size; `shows_busy`: the device's share of the time is looked at too."""

    name: str
    workload_name: str
    batch: int
    num_requests: int
    shows_busy: bool = False

    def figure_name(self, form: str) -> str:
        return f"{self.name}, batch {self.batch}, {form}"

    @property
    def workload(self) -> Workload:
        return replace(gpu_workload(self.workload_name, self.batch), tilings=(PHOTO,) * self.num_requests)


LOADS = (
    Load("query 3 tokens", "query", 64, 256, shows_busy=True),
    Load("query 3 tokens", "query", 1, 24, shows_busy=True),
    Load("reasoning 30 tokens", "reasoning", 64, 128),
    Load("caption 150 tokens", "captions", 64, 128),
    Load("caption 150 tokens", "captions", 128, 128),
)
CPU_LOADS = (
    Load("query 3 tokens", "query", 8, 16),
    Load("query 3 tokens", "query", 1, 4),
    Load("reasoning 30 tokens", "reasoning", 8, 8),
    Load("caption 150 tokens", "captions", 8, 8),
)


def loads_of(run: Run) -> tuple[Load, ...]:
    return LOADS if run.is_cuda else CPU_LOADS


def measure(run: Run) -> None:
    """Requests a second of each load, and the most memory it took."""
    model = model_in(run, BF16)
    pictures = pictures_for(model, max(load.num_requests for load in loads_of(run)))
    for load in loads_of(run):
        with run.if_it_fits(load.figure_name(BF16)):
            measure_load(run, model, load, pictures, BF16)


def pictures_for(model: Moondream3, count: int, seed: int = 0) -> list[PreparedImage]:
    """Different pictures of noise, nine crops each, cut already."""
    return make_images(model, replace(gpu_workload("query", 1), tilings=(PHOTO,) * count), seed)


def measure_load(run: Run, model: Moondream3, load: Load, pictures: Sequence[PreparedImage], form: str) -> None:
    """Measure and report one load after a batch to warm up."""
    name, workload = load.figure_name(form), load.workload
    warm_up(model, load)
    engine = make_engine(model, load.batch)
    start_counting_memory(run)
    seconds, _ = time_run(engine, make_jobs(workload, pictures[: load.num_requests]), workload)
    if not is_as_asked(run, engine, load, name):
        return
    run.figure(name, load.num_requests / seconds, "req/s")
    run.figure(f"{name}: peak memory", counted_memory(run) / 1e9, "GB")
    if run.is_cuda and load.shows_busy:
        report_busy(run, model, load, form)


def is_as_asked(run: Run, engine: Engine, load: Load, name: str) -> bool:
    """False where memory held fewer requests at a time than the figure's name says: noted, and no figure."""
    if engine.stats.batch_sizes == [load.batch]:
        return True
    run.note(f"{name}: not measured, memory held batches of", engine.stats.batch_sizes)
    return False


def warm_up(model: Moondream3, load: Load) -> None:
    """One short batch, so that libraries choose their kernels before the clock starts."""
    run_some(model, load, load.batch, max_tokens=min(WARM_TOKENS, load.workload.max_tokens))


def run_some(model: Moondream3, load: Load, num_requests: int, max_tokens: int) -> float:
    """Requests about other pictures through an engine of their own; seconds."""
    workload = replace(load.workload, tilings=(PHOTO,) * num_requests, max_tokens=max_tokens)
    jobs = make_jobs(workload, pictures_for(model, num_requests, seed=1))
    return time_run(make_engine(model, load.batch), jobs, workload)[0]


def report_busy(run: Run, model: Moondream3, load: Load, form: str) -> None:
    """The share of a few requests' time in which the device had something to do, by torch's profiler."""
    some = functools.partial(run_some, model, load, max(load.batch, LEAST_PROFILED), load.workload.max_tokens)
    plain_s, busy_s = some(), busy_seconds(some)
    if busy_s is not None:
        run.figure(f"{load.figure_name(form)}: device busy", busy_s / plain_s, "share")


def start_counting_memory(run: Run) -> None:
    if run.is_cuda:
        torch.cuda.empty_cache()
        reset_gpu_peak(run.device)
    else:
        reset_peak_rss()


def counted_memory(run: Run) -> int:
    """Most bytes since `start_counting_memory`: of the device, or of the process on a CPU."""
    return gpu_memory(run.device).gpu_peak_bytes if run.is_cuda else peak_rss()
