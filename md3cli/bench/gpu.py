"""Whole runs on CUDA: each workload at several batch sizes, with the GPU's own memory and the share of time it works.

All pictures are different photographs of nine crops and nothing is cached. A workload at one batch size has one
engine: a first batch, not timed, lets libraries and kernels get ready, then the workload runs against the clock, and
one more batch is profiled. A device without CUDA is bench.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from md3cli.bench.runs import (
    PHOTO,
    WORKLOADS,
    Workload,
    make_engine,
    make_images,
    make_jobs,
    open_pictures,
    run_baseline,
    time_run,
    weight_bytes,
)
from md3cli.errors import EngineError
from md3cli.images.crops import PreparedImage
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.memory import is_out_of_memory, shortage
from md3cli.model.network.moondream import Moondream3

if TYPE_CHECKING:
    from md3cli.bench.runs import PhotoFiles

BATCH_SIZES = (1, 8, 64, 128)
# Workload -> full batches of it, and requests at least: enough for a steady rate, fewer where answers are long.
# A photo's crops take 3.9 MB of the host's memory: 2 GB at four batches of 128.
NUM_REQUESTS = {"query": (4, 64), "reasoning": (2, 32), "captions": (2, 16), "files": (4, 64)}
CAPTION_TOKENS = 150
WARM_TOKENS = 3


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes of a CUDA device; the process's own memory is another matter."""

    gpu_peak_bytes: int  # most that tensors took at a time, weights included
    gpu_reserved_bytes: int  # most that torch took from the driver to hold them
    gpu_outside_bytes: int  # not torch's: the context, libraries, other programs


@dataclass(frozen=True, slots=True)
class GpuRun:
    """One workload at one batch size; `busy_seconds` of the GPU is None where it cannot be seen."""

    workload: str
    batch_size: int
    requests: int
    seconds: float
    output_tokens: int
    busy_seconds: float | None
    weights_bytes: int
    kv_bytes: int
    memory: GpuMemory

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, memory among them, with the rate and the share of time that the GPU was busy."""
        numbers: dict[str, Any] = asdict(self)
        memory: dict[str, Any] = numbers.pop("memory")
        busy_share = self.busy_seconds / self.seconds if self.busy_seconds is not None else None
        rates = {"requests_per_second": self.requests / self.seconds, "gpu_busy_share": busy_share}
        return numbers | rates | memory


@dataclass(slots=True)
class GpuRuns:
    """What was measured, and in words what did not fit."""

    runs: list[GpuRun] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def gpu_workload(name: str, batch_size: int) -> Workload:
    """Return the workload with as many photographs as a batch of this size takes to show a steady rate."""
    workload = WORKLOADS[name]
    if name not in NUM_REQUESTS:
        return workload
    batches, least = NUM_REQUESTS[name]
    workload = replace(workload, tilings=(PHOTO,) * max(least, batches * batch_size))
    return replace(workload, max_tokens=CAPTION_TOKENS) if name == "captions" else workload


def run_workloads(
    model: Moondream3, names: Iterable[str], batch_sizes: Sequence[int], *, num_workers: int, seed: int
) -> GpuRuns:
    """Run every workload at every batch size; what does not fit is noted. `num_workers` processes decode files.

    Raises:
        ConfigError: there is no room for one picture at a time.
        EngineError: a request failed for another reason than memory.
    """
    found = GpuRuns()
    for name in names:
        largest = gpu_workload(name, max(batch_sizes))
        with ExitStack() as stack:
            images, files = open_pictures(stack, model, largest, num_workers, seed)
            for batch_size in batch_sizes:
                try:
                    _run_batch(found, model, name, batch_size, images, files)
                except (RuntimeError, MemoryError, EngineError) as error:
                    if not is_out_of_memory(error):
                        raise
                    found.notes.append(f"{name}, batch {batch_size}: {shortage(error)}")
    return found


def _run_batch(
    found: GpuRuns, model: Moondream3, name: str, asked: int, images: Sequence[PreparedImage], files: PhotoFiles | None
) -> None:
    """One workload at the batch size asked for, or at what fits where that was not measured yet."""
    engine = make_engine(model, asked)
    fitting = engine.batch_size
    if fitting < asked:
        found.notes.append(f"{name}, batch {asked}: memory holds a batch of {fitting}")
        if any((run.workload, run.batch_size) == (name, fitting) for run in found.runs):
            return
    workload = gpu_workload(name, fitting)
    run = measure(engine, name, workload, images)
    if files is not None:
        found.runs.append(replace(run, workload=f"{name}, cut before"))
        run = measure_files(engine, run, workload, files)
    found.runs.append(run)
    if engine.stats.batch_sizes != [fitting] or engine.stats.num_smaller_passes:
        found.notes.append(
            f"{name}, batch {fitting}: out of memory on the way, and its time may hold tries that failed; it ended "
            f"with a batch of {engine.batch_size}, passes made smaller {engine.stats.num_smaller_passes} times"
        )


def measure(engine: Engine, name: str, workload: Workload, images: Sequence[PreparedImage]) -> GpuRun:
    """Run the engine on as many of `images` as the workload has, all cut already."""
    images = images[: len(workload.tilings)]
    first = images[: engine.batch_size]
    warm = replace(workload, max_tokens=min(WARM_TOKENS, workload.max_tokens))
    time_run(engine, make_jobs(warm, _renamed(first, "warm")), warm)
    reset_gpu_peak(engine.model.device)
    seconds, num_tokens = time_run(engine, make_jobs(workload, _renamed(images, "timed")), workload)
    memory = gpu_memory(engine.model.device)
    profiled = make_jobs(workload, _renamed(first, "profiled"))
    busy = busy_seconds(lambda: time_run(engine, profiled, workload))
    return GpuRun(
        name,
        engine.batch_size,
        workload.num_requests,
        seconds,
        num_tokens,
        None if busy is None else busy * workload.num_requests / len(profiled),
        weight_bytes(engine.model),
        engine.cache.num_bytes,
        memory,
    )


def measure_files(engine: Engine, cut: GpuRun, workload: Workload, files: PhotoFiles) -> GpuRun:
    """Run the same requests with pictures that are decoded meanwhile; the GPU has the same to do as in `cut`."""
    reset_gpu_peak(engine.model.device)
    seconds, num_tokens = time_run(engine, files.jobs(workload.request, workload.num_requests), workload)
    return replace(cut, seconds=seconds, output_tokens=num_tokens, memory=gpu_memory(engine.model.device))


def _renamed(images: Iterable[PreparedImage], run: str) -> list[PreparedImage]:
    """The same pictures for another run: what the engine remembers of an earlier one is of no use to it."""
    return [replace(image, sha256=f"{run} {image.sha256}") for image in images]


def run_plain(
    model: Moondream3, names: Iterable[str], num_images: int | None, seed: int
) -> dict[str, dict[str, float]]:
    """Run the plain path on each workload; return requests per second, and the number of pictures asked about."""
    found = {}
    for name in names:
        workload = gpu_workload(name, 1)
        done = run_baseline(model, workload, make_images(model, workload, seed), num_images)
        rate = workload.num_requests / done["seconds"]
        found[name] = {"requests_per_second": rate, "images_run": done["images_run"]}
    return found


# -- the device ------------------------------------------------------------------------------------


def reset_gpu_peak(device: torch.device) -> None:
    """Forget the most memory that was taken so far."""
    torch.cuda.reset_peak_memory_stats(device)


def gpu_memory(device: torch.device) -> GpuMemory:
    """Return the device's memory since `reset_gpu_peak`."""
    free, total = torch.cuda.mem_get_info(device)
    return GpuMemory(
        torch.cuda.max_memory_allocated(device),
        torch.cuda.max_memory_reserved(device),
        total - free - torch.cuda.memory_reserved(device),
    )


def busy_seconds(run: Callable[[], object]) -> float | None:
    """Return the seconds in which a CUDA device computed or copied while `run` ran; None where nothing was seen.

    The profiler makes `run` itself slower, but hardly what it sees of the device.
    """
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:  # without it torch 2.11 warns
        run()
    return covered(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    )


def covered(spans_us: Iterable[tuple[float, float]]) -> float | None:
    """Return the seconds that spans in microseconds cover together, overlaps once; None without spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans_us):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6 if total else None
