"""`md3 bench`: this machine's throughput beside its limits, measured in the same run.

Weights are loaded (or drawn) before any clock starts. On a CPU each workload runs, again with its encodings cached,
and from files. On CUDA, which is quick, workloads run at several batch sizes on different photographs of nine crops,
with the GPU's own memory and the share of time in which the GPU works. The plain path on the same requests is the
baseline. `md3 bench` alone imports this file, when it measures: torch comes with it. Knows nothing of how the numbers
are shown.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from md3cli.bench.device import GpuMemory, busy_seconds, gpu_memory, reset_gpu_peak
from md3cli.bench.runs import (
    PHOTO,
    WORKLOADS,
    PhotoFiles,
    Workload,
    make_engine,
    make_images,
    make_jobs,
    open_pictures,
    run_baseline,
    run_engine,
    time_run,
    weight_bytes,
)
from md3cli.bench.stages import bench_decode, bench_prefill, bench_vision, measure_limits
from md3cli.console import say
from md3cli.errors import EngineError
from md3cli.file_cache import FileCache
from md3cli.images.crops import PreparedImage
from md3cli.model.engine.encoder import EncodingCache
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.kernels import optimise
from md3cli.model.engine.load import ONE_THREAD_BYTES, choose_device, choose_dtype, prepare_device
from md3cli.model.engine.machine import is_out_of_memory, release, shortage
from md3cli.model.network.moondream import Moondream3
from md3cli.model.weights.hub import resolve_model
from md3cli.model.weights.random_weights import CONFIGS, forbid_end, random_model, show_places
from md3cli.model.weights.read import load_model
from md3cli.system import keep_freed_memory

CACHE_BYTES = 1 << 30  # of the second run's encodings
HOST_WORKLOAD, HOST_BATCH = "captions", 16
GPU_WORKLOADS = ("query", "reasoning", "captions", "files")
GPU_PREFIXES = (1, 16)  # pictures of a prefill pass
BATCH_SIZES = (1, 8, 64, 128)  # on CUDA
# Workload -> full batches of it, and requests at least: enough for a steady rate, fewer where answers are long.
# A photo's crops take 3.9 MB of the host's memory: 2 GB at four batches of 128.
NUM_REQUESTS = {
    "query": (4, 64),
    "reasoning": (2, 32),
    "captions": (2, 16),
    "files": (4, 64),
    "detect": (2, 32),
    "point": (2, 32),
    "segment": (2, 16),
}
CAPTION_TOKENS = 150  # on CUDA, and of a segment's path
WARM_TOKENS = 3


def _rates(requests: int, images: int, output_tokens: float, seconds: float) -> dict[str, float]:
    """Return how many of each were done in a second; of tokens, a coordinate or a size is one."""
    return {
        "requests_per_second": requests / seconds,
        "images_per_second": images / seconds,
        "tokens_per_second": output_tokens / seconds,
    }


@dataclass(slots=True)
class HostRun:
    """One workload on a CPU: seconds, bytes and shares 0-1; None is what was not measured."""

    workload: str
    batch_size: int
    requests: int
    images: int
    engine: dict[str, float] = field(default_factory=dict)
    cached: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    files: dict[str, float] | None = None
    baseline: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, with rates, and how many times as long the plain path takes where that was run."""
        seconds, numbers = self.engine["seconds"], asdict(self)
        rates = _rates(self.requests, self.images, self.engine["output_tokens"], seconds)
        if self.baseline is not None:
            rates["baseline_ratio"] = self.baseline["seconds"] / seconds
        return {name: value for name, value in numbers.items() if value is not None} | rates


@dataclass(slots=True)
class BenchResult:
    """Numbers of one benchmark on a CPU: GFLOP/s, GB/s and shares 0-1."""

    device: str
    limits: dict[str, float]
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    runs: list[HostRun] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints; the first run's parts stand beside the list of all, too."""
        runs = [run.as_dict() for run in self.runs]
        parts = ("engine", "cached", "memory", "files", "baseline")
        first = {name: runs[0][name] for name in parts if name in runs[0]}
        return {"device": self.device, "limits": self.limits, "stages": self.stages, **first, "runs": runs}


@dataclass(frozen=True, slots=True)
class GpuRun:
    """One workload at one batch size; `busy_seconds` of the GPU is None where it cannot be seen."""

    workload: str
    batch_size: int
    requests: int
    images: int
    seconds: float
    output_tokens: int
    busy_seconds: float | None
    weights_bytes: int
    kv_bytes: int
    memory: GpuMemory

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, memory among them, with the rate and the share of time in which the GPU was busy."""
        numbers: dict[str, Any] = asdict(self)
        memory: dict[str, Any] = numbers.pop("memory")
        busy_share = self.busy_seconds / self.seconds if self.busy_seconds is not None else None
        rates = _rates(self.requests, self.images, self.output_tokens, self.seconds)
        return numbers | rates | {"gpu_busy_share": busy_share} | memory


@dataclass(slots=True)
class GpuBenchResult:
    """Numbers of one benchmark on CUDA; `notes` say what did not fit, `baseline` is the plain path by workload."""

    device: str
    limits: dict[str, float]
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    runs: list[GpuRun] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    baseline: dict[str, dict[str, float]] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        numbers = asdict(self) | {"runs": [run.as_dict() for run in self.runs]}
        return {name: value for name, value in numbers.items() if value is not None}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the model to measure comes from: `make` makes it on `device`, its parts still plain.

    `threads` is the number of CPU threads; None leaves it to the model's size.
    """

    device: torch.device
    make: Callable[[], Moondream3]
    threads: int | None = None


def model_source(
    model: str | None, config: str, *, device: str, dtype: str, threads: int | None, seed: int
) -> ModelSource:
    """Return a source of random models of a size in `CONFIGS`, or of the weights of `model`.

    Raises:
        ConfigError: this machine has no such device or dtype.
        CheckpointError: `model` cannot be had.
    """
    torch.set_flush_denormal(True)
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    place = choose_device(device)
    prepare_device(place)
    kind = choose_dtype(dtype, place, 1 << 40)
    if model is None:
        return ModelSource(place, lambda: _made_up(config, kind, place, seed), threads)
    files = resolve_model(model, tell=partial(say, err=True))
    return ModelSource(place, lambda: load_model(files.path, dtype=kind, device=place), threads)


def _made_up(config: str, dtype: torch.dtype, device: torch.device, seed: int) -> Moondream3:
    model = random_model(CONFIGS[config], dtype=dtype, device=device, seed=seed)
    show_places(model)
    return model


def run_bench(
    source: ModelSource,
    *,
    workloads: Sequence[str] = (),
    batch_size: int | None,
    has_baseline: bool,
    num_workers: int,
    baseline_images: int | None = None,
    seed: int = 0,
) -> BenchResult | GpuBenchResult:
    """Measure limits, stages, the engine on a workload, and the plain path.

    Args:
        workloads: names of `WORKLOADS`; none is `HOST_WORKLOAD`, on CUDA all of `GPU_WORKLOADS`.
        batch_size: None is `HOST_BATCH`, on CUDA all of `BATCH_SIZES`.
        num_workers: processes that decode the pictures of `files`.
        baseline_images: run the baseline on the first so many pictures and scale up.

    Raises:
        ConfigError: the device is too small to hold one picture.
        EngineError: the model cannot run here.
    """
    if source.device.type == "cuda":
        names = workloads or GPU_WORKLOADS
        batch_sizes = BATCH_SIZES if batch_size is None else (batch_size,)
        result = _bench_gpu(source, names, batch_sizes, num_workers, seed)
        if has_baseline:
            release(source.device)  # many cards hold one model, not two
            result.baseline = run_plain(source.make(), names, baseline_images, seed)
        return result
    host = _bench_host(source, workloads or (HOST_WORKLOAD,), batch_size or HOST_BATCH, num_workers, seed)
    if has_baseline:
        model = source.make()
        for run in host.runs:
            workload = WORKLOADS[run.workload]
            run.baseline = run_baseline(model, workload, make_images(model, workload, seed), baseline_images)
    return host


def _model_to_measure(source: ModelSource) -> Moondream3:
    model = source.make()
    if source.device.type == "cpu" and source.threads is None and weight_bytes(model) < ONE_THREAD_BYTES:
        torch.set_num_threads(1)  # as `load_engine` does
    forbid_end(model)  # so that every answer has the length that its workload speaks of
    optimise(model)
    return model


def _bench_host(source: ModelSource, names: Sequence[str], batch_size: int, num_workers: int, seed: int) -> BenchResult:
    model = _model_to_measure(source)
    result = BenchResult(_device_name(source.device), {})
    with torch.inference_mode():
        images = make_images(model, WORKLOADS[names[0]], seed)
        limits = result.limits = measure_limits(model)
        result.stages["vision"] = bench_vision(model, images, limits)
        result.stages["prefill"] = bench_prefill(model, limits)
        result.stages["decode"] = bench_decode(model, 1, limits)
        result.stages["decode_16"] = bench_decode(model, 16, limits)
        result.runs = [_run_host(model, name, batch_size, num_workers, seed) for name in names]
    return result


def _run_host(model: Moondream3, name: str, batch_size: int, num_workers: int, seed: int) -> HostRun:
    workload = WORKLOADS[name]
    batch_size = min(batch_size, workload.num_requests)
    run = HostRun(name, batch_size, workload.num_requests, len(workload.tilings))
    with ExitStack() as stack:
        images, files = open_pictures(stack, model, workload, num_workers, seed)
        folder = stack.enter_context(tempfile.TemporaryDirectory())

        def store() -> EncodingCache:
            return EncodingCache(FileCache(Path(folder), CACHE_BYTES), model, background="none")

        run.engine, run.memory = run_engine(model, workload, images, batch_size, store())
        run.cached, _ = run_engine(model, workload, images, batch_size, store())
        if files is not None:
            engine = make_engine(model, batch_size)
            seconds, _ = time_run(engine, files.jobs(workload.request, workload.num_requests), workload)
            run.files = {
                "seconds": seconds,
                "pictures_per_second": workload.num_requests / seconds,
                "share": run.engine["seconds"] / seconds,
                "decode_workers": float(num_workers),
            }
    return run


def _bench_gpu(
    source: ModelSource, names: Sequence[str], batch_sizes: Sequence[int], num_workers: int, seed: int
) -> GpuBenchResult:
    model = _model_to_measure(source)
    with torch.inference_mode():
        limits = measure_limits(model)
        result = GpuBenchResult(_device_name(source.device), limits)
        images = make_images(model, WORKLOADS["query"], seed)
        stages: dict[str, Callable[[], dict[str, float]]] = {"vision": partial(bench_vision, model, images, limits)}
        for count in GPU_PREFIXES:
            stages[_stage_name("prefill", count)] = partial(bench_prefill, model, limits, count)
        for count in sorted({1, *batch_sizes}):
            stages[_stage_name("decode", count)] = partial(bench_decode, model, count, limits)
        for name, measure in stages.items():
            try:
                result.stages[name] = measure()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                result.notes.append(f"{name}: {shortage(error)}")
    run_workloads(result, model, names, batch_sizes, num_workers=num_workers, seed=seed)
    return result


def _stage_name(stage: str, count: int) -> str:
    return stage if count == 1 else f"{stage}_{count}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name", "CPU") if device.type == "cpu" else device.type
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(name)


# -- workloads on CUDA -----------------------------------------------------------------------------


def gpu_workload(name: str, batch_size: int) -> Workload:
    """Return the workload with as many photographs as a batch of this size takes to show a steady rate."""
    workload = WORKLOADS[name]
    if name not in NUM_REQUESTS:
        return workload
    batches, least = NUM_REQUESTS[name]
    workload = replace(workload, tilings=(PHOTO,) * max(least, batches * batch_size))
    return replace(workload, max_tokens=CAPTION_TOKENS) if name in ("captions", "segment") else workload


def run_workloads(
    found: GpuBenchResult,
    model: Moondream3,
    names: Iterable[str],
    batch_sizes: Sequence[int],
    *,
    num_workers: int,
    seed: int,
) -> None:
    """Run every workload at every batch size; note in `found` each run, and what does not fit.

    `num_workers` processes decode files.

    Raises:
        ConfigError: there is no room for one picture at a time.
        EngineError: a request failed for another reason than memory.
    """
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


def _run_batch(
    found: GpuBenchResult,
    model: Moondream3,
    name: str,
    asked: int,
    images: Sequence[PreparedImage],
    files: PhotoFiles | None,
) -> None:
    engine = make_engine(model, asked, cuts=files is not None)
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
    """Run the engine on as many of `images` as the workload has, all cut already.

    A first batch, not timed, lets libraries and kernels get ready; then the workload runs against the clock, and one
    more batch is profiled.
    """
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
        len(workload.tilings),
        seconds,
        num_tokens,
        None if busy is None else busy * workload.num_requests / len(profiled),
        weight_bytes(engine.model),
        engine.cache.num_bytes,
        memory,
    )


def measure_files(engine: Engine, cut: GpuRun, workload: Workload, files: PhotoFiles) -> GpuRun:
    """Run the same requests with pictures that are decoded meanwhile; the GPU has the same work as in the run `cut`."""
    reset_gpu_peak(engine.model.device)
    files.serve(engine)
    seconds, num_tokens = time_run(engine, files.jobs(workload.request, workload.num_requests), workload)
    return replace(cut, seconds=seconds, output_tokens=num_tokens, memory=gpu_memory(engine.model.device))


def _renamed(images: Iterable[PreparedImage], run: str) -> list[PreparedImage]:
    """Give the pictures other digests, so that what the engine remembers of an earlier run is of no use."""
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
