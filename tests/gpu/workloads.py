"""Part `engine`: whole workloads through the engine in bf16, from crops in memory, all pictures different."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from md3cli.bench.bench import gpu_workload
from md3cli.bench.device import busy_seconds, gpu_memory, reset_gpu_peak
from md3cli.bench.runs import PHOTO, WORKLOADS, Workload, make_engine, make_images, make_jobs, time_run
from md3cli.file_cache import FileCache
from md3cli.images.crops import PreparedImage
from md3cli.model.engine.encoder import EncodingCache
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.machine import peak_rss, reset_peak_rss
from md3cli.model.network.moondream import Moondream3
from md3cli.records import Task

from .child import Run
from .models import BF16, model_in

WARM_TOKENS = 3
AGAIN = "asked again"
STORE_BYTES = 4 << 30  # more than all encodings of a load
OBJECTS = 32  # of each picture
DETECTED, ALONE = 128, 2  # pictures asked for their objects, at a batch and one at a time


@dataclass(frozen=True)
class Load:
    """A workload of `md3 bench` in an engine of `batch` slots; alone, each request waits for the one before."""

    name: str
    workload_name: str
    batch: int
    num_requests: int
    shows_busy: bool = False
    is_alone: bool = False

    def figure_name(self, form: str) -> str:
        return f"{self.name}, {'one of ' if self.is_alone and self.batch > 1 else ''}batch {self.batch}, {form}"

    @property
    def workload(self) -> Workload:
        return replace(gpu_workload(self.workload_name, self.batch), tilings=(PHOTO,) * self.num_requests)


QUERY, REASONING, CAPTION = "query 3 tokens", "reasoning 30 tokens", "caption 150 tokens"
LOADS = (
    Load(QUERY, "query", 64, 256, shows_busy=True),
    Load(REASONING, "reasoning", 64, 128),
    Load(QUERY, "query", 1, 32, shows_busy=True, is_alone=True),
    Load(QUERY, "query", 8, 32, is_alone=True),  # as a program that asks one question after another is told to load
)
CPU_LOADS = (
    Load(QUERY, "query", 8, 16),
    Load(REASONING, "reasoning", 8, 8),
    Load(QUERY, "query", 1, 4, is_alone=True),
)


def loads_of(run: Run) -> tuple[Load, ...]:
    return LOADS if run.is_cuda else CPU_LOADS


def measure(run: Run) -> None:
    """Requests a second of each load; pictures asked again; objects a second; captures that came late."""
    model = model_in(run, BF16)
    pictures = pictures_for(model, max(load.num_requests for load in loads_of(run)))
    num_captures = 0
    first_rate: float | None = None
    for load in loads_of(run):
        with run.if_it_fits(load.figure_name(BF16)):
            found = measure_load(run, model, load, pictures, BF16)
            num_captures += found.num_captures
            first_rate = first_rate or found.rate
    with run.if_it_fits(AGAIN):
        measure_again(run, model, loads_of(run)[0], pictures, first_rate)
    with run.if_it_fits("detect"):
        measure_objects(run, model, pictures)
    run.figure("captures after the start", num_captures, "count")


def pictures_for(model: Moondream3, count: int, seed: int = 0) -> list[PreparedImage]:
    """Different pictures of noise, nine crops each, cut already."""
    return make_images(model, replace(gpu_workload("query", 1), tilings=(PHOTO,) * count), seed)


# -- requests --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a load showed: requests a second (None where memory held fewer at a time), and late captures."""

    rate: float | None
    num_captures: int


def measure_load(run: Run, model: Moondream3, load: Load, pictures: Sequence[PreparedImage], form: str) -> Found:
    """Measure and report one load in an engine that has answered a batch before, as one that serves for long."""
    name, images = load.figure_name(form), pictures[: load.num_requests]
    start_counting_memory(run)
    engine = make_engine(model, load.batch)
    warm_up(engine, load, pictures)
    captures = engine.stats.num_captures
    seconds = time_load(engine, load, images)
    late = engine.stats.num_captures - captures
    if not is_as_asked(run, engine, load.batch, name):
        return Found(None, late)
    run.figure(name, load.num_requests / seconds, "req/s")
    report_memory(run, name)
    if run.is_cuda and load.shows_busy:
        report_busy(run, engine, load, name, pictures)
    return Found(load.num_requests / seconds, late)


def time_load(engine: Engine, load: Load, images: Sequence[PreparedImage]) -> float:
    """Seconds of all requests: in a stream, or one after another."""
    workload = replace(load.workload, tilings=(PHOTO,) * len(images))
    jobs = make_jobs(workload, images)
    if not load.is_alone:
        return time_run(engine, jobs, workload)[0]
    return sum(time_run(engine, [job], workload)[0] for job in jobs)


def warm_up(engine: Engine, load: Load, pictures: Sequence[PreparedImage]) -> None:
    """One short batch, so that libraries choose their kernels before the clock starts."""
    workload = replace(load.workload, max_tokens=min(WARM_TOKENS, load.workload.max_tokens))
    time_run(engine, make_jobs(workload, renamed(pictures[: load.batch], "warm")), workload)


def renamed(images: Sequence[PreparedImage], name: str) -> list[PreparedImage]:
    """The pictures with other digests: nothing that an engine remembers of them is of use."""
    return [replace(image, sha256=f"{name} {image.sha256}") for image in images]


def is_as_asked(run: Run, engine: Engine, batch: int, name: str) -> bool:
    """False where memory held fewer requests at a time than the figure's name says: noted, and no figure."""
    if engine.stats.batch_sizes == [batch]:
        return True
    run.note(f"{name}: not measured, memory held batches of", engine.stats.batch_sizes)
    return False


def report_busy(run: Run, engine: Engine, load: Load, name: str, pictures: Sequence[PreparedImage]) -> None:
    """The share of a batch's time in which the device had something to do, by torch's profiler."""
    some = pictures[: max(load.batch, 8)]
    plain_s = time_load(engine, load, renamed(some, "plain"))
    busy_s = busy_seconds(lambda: time_load(engine, load, renamed(some, "profiled")))
    if busy_s is not None:
        run.figure(f"{name}: device busy", busy_s / plain_s, "share")


# -- pictures asked again --------------------------------------------------------------------------


def measure_again(
    run: Run, model: Moondream3, load: Load, pictures: Sequence[PreparedImage], first_rate: float | None
) -> None:
    """The same requests with encodings that another engine kept on disk, and the rate while that kept them."""
    name, images = load.figure_name(BF16), pictures[: load.num_requests]
    with tempfile.TemporaryDirectory(prefix="md3-check-") as folder:
        rates = []
        for what in ("encodings kept", AGAIN):
            store = EncodingCache(FileCache(Path(folder), STORE_BYTES), model, background="none")
            engine = make_engine(model, load.batch, store)
            warm_up(engine, load, pictures)
            if not is_as_asked(run, engine, load.batch, f"{name}, {what}"):
                return
            rates.append(len(images) / time_load(engine, load, images))
            run.figure(f"{name}, {what}", rates[-1], "req/s")
            engine.encoder.save_encoded()  # a thread may still be writing
            del engine
    if first_rate is not None:
        run.figure(f"{name}, {AGAIN}: of the first", rates[-1] / first_rate, "ratio")


# -- objects ---------------------------------------------------------------------------------------


def measure_objects(run: Run, model: Moondream3, pictures: Sequence[PreparedImage]) -> None:
    """Objects a second at a batch, and in loops of one row that read every decision before the next.

    One loop launches its steps one by one, as eager code does; the other replays the same graph as the batch.
    """
    batch, count = (64, DETECTED) if run.is_cuda else (8, 8)
    name = f"detect, batch {batch}, {BF16}"
    run.note("objects of each picture", OBJECTS)
    engine = make_engine(model, batch)
    rate = objects_per_second(engine, pictures[:count], pictures[:batch])
    if not is_as_asked(run, engine, batch, name):
        return
    run.figure(name, rate, "obj/s")
    for what, captures in (("eager", False), ("replayed", True)):
        engine = make_engine(model, 1, delay=0, captures=captures)
        alone = objects_per_second(engine, pictures[:ALONE], pictures[:1])
        run.figure(f"detect, one row, {what}, {BF16}", alone, "obj/s")
        run.figure(f"{name}: over one row, {what}", rate / alone, "ratio")
        del engine


def objects_per_second(engine: Engine, images: Sequence[PreparedImage], warm: Sequence[PreparedImage]) -> float:
    """Objects that are found in a second, after a few in `warm`."""
    few = replace(WORKLOADS["photos"], task=Task.DETECT, num_prompts=1, tilings=(PHOTO,) * len(warm), max_objects=1)
    time_run(engine, make_jobs(few, renamed(warm, "warm")), few)
    workload = replace(few, tilings=(PHOTO,) * len(images), max_objects=OBJECTS)
    before = engine.stats.num_decisions
    seconds, _ = time_run(engine, make_jobs(workload, images), workload)
    found = (engine.stats.num_decisions - before) / 3  # an object's x, y and size
    assert found >= OBJECTS * len(images), "random weights ended a list of objects"
    return OBJECTS * len(images) / seconds


# -- memory ----------------------------------------------------------------------------------------


def start_counting_memory(run: Run) -> None:
    if run.is_cuda:
        torch.cuda.empty_cache()
        reset_gpu_peak(run.device)
    else:
        reset_peak_rss()


def report_memory(run: Run, name: str) -> None:
    """The most since `start_counting_memory`: of tensors, and of all that the card gave up (a CPU: of the process)."""
    if not run.is_cuda:
        run.figure(f"{name}: peak memory", peak_rss() / 1e9, "GB")
        return
    found = gpu_memory(run.device)
    run.figure(f"{name}: peak memory", found.gpu_peak_bytes / 1e9, "GB")
    run.figure(f"{name}: card's memory", (found.gpu_reserved_bytes + found.gpu_outside_bytes) / 1e9, "GB")
