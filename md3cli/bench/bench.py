"""`md3 bench`: this machine's throughput beside its limits, measured in the same run.

Weights are loaded (or drawn) before any clock starts. On a CPU one workload runs, again with its encodings cached,
and from files; on CUDA, which is quick, every workload runs at several batch sizes (gpu.py). The plain path on the
same requests is the baseline. How the numbers are shown is not known here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from md3cli.bench.gpu import BATCH_SIZES, GpuRun, run_plain, run_workloads
from md3cli.bench.runs import (
    WORD_ID,
    WORKLOADS,
    Workload,
    make_engine,
    make_images,
    open_pictures,
    run_baseline,
    run_engine,
    time_run,
    weight_bytes,
)
from md3cli.bench.stages import bench_decode, bench_prefill, bench_vision, measure_limits
from md3cli.errors import ConfigError
from md3cli.file_cache import FileCache
from md3cli.images.crops import PreparedImage
from md3cli.model.engine.encoder import EncodingCache
from md3cli.model.engine.kernels import optimise
from md3cli.model.engine.load import ONE_THREAD_BYTES, choose_device, choose_dtype, prepare_device
from md3cli.model.engine.memory import is_out_of_memory, release, shortage
from md3cli.model.network.allocator import keep_freed_memory
from md3cli.model.network.moondream import Moondream3
from md3cli.model.weights.hub import resolve_model
from md3cli.model.weights.random_weights import CONFIGS, forbid_end, random_model
from md3cli.model.weights.read import load_model

CACHE_BYTES = 1 << 30  # of the second run's encodings
HOST_WORKLOAD, HOST_BATCH = "captions", 16
GPU_WORKLOADS = ("query", "reasoning", "captions", "files")
GPU_PREFIXES = (1, 16)  # pictures of a prefill pass


@dataclass(slots=True)
class BenchResult:
    """Numbers of one benchmark: seconds, GFLOP/s, GB/s and shares 0-1; None is what was not measured."""

    device: str
    limits: dict[str, float]
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    engine: dict[str, float] = field(default_factory=dict)
    cached: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    files: dict[str, float] | None = None
    baseline: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(slots=True)
class GpuBenchResult:
    """Numbers of one benchmark on CUDA; `notes` say what did not fit, `baseline` is by workload."""

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

    `threads` None leaves the number of CPU threads to the model's size.
    """

    device: torch.device
    make: Callable[[], Moondream3]
    threads: int | None = None


def model_source(
    model: str | None, config: str, *, device: str, dtype: str, threads: int | None, seed: int
) -> ModelSource:
    """Return a source of random models of a size in `CONFIGS`, or of the weights of `model`.

    Raises:
        ConfigError: a device or dtype that is not to be had here.
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
        return ModelSource(place, lambda: random_model(CONFIGS[config], dtype=kind, device=place, seed=seed), threads)
    files = resolve_model(model)
    return ModelSource(place, lambda: load_model(files.path, dtype=kind, device=place).model, threads)


def run_bench(
    source: ModelSource,
    *,
    workload: str | None,
    batch_size: int | None,
    has_baseline: bool,
    num_workers: int,
    baseline_images: int | None = None,
    seed: int = 0,
) -> BenchResult | GpuBenchResult:
    """Measure limits, stages, the engine on a workload, and the plain path.

    Args:
        workload: a name of `WORKLOADS`; None is `HOST_WORKLOAD`, on CUDA all of `GPU_WORKLOADS`.
        batch_size: None is `HOST_BATCH`, on CUDA all of `gpu.BATCH_SIZES`.
        num_workers: processes that decode the pictures of `files`.
        baseline_images: run the baseline on the first so many pictures and scale up.

    Raises:
        ConfigError: the model is too small to hold the workload's prompts, or the device to hold one picture.
        EngineError: the model cannot run here.
    """
    if source.device.type == "cuda":
        names = GPU_WORKLOADS if workload is None else (workload,)
        batch_sizes = BATCH_SIZES if batch_size is None else (batch_size,)
        result = _bench_gpu(source, names, batch_sizes, num_workers, seed)
        if has_baseline:
            release(source.device)  # many cards hold one model, not two
            result.baseline = run_plain(source.make(), names, baseline_images, seed)
        return result
    chosen = WORKLOADS[workload or HOST_WORKLOAD]
    host, images = _bench_host(source, chosen, batch_size or HOST_BATCH, num_workers, seed)
    if has_baseline:
        host.baseline = run_baseline(source.make(), chosen, images, baseline_images)
    return host


def _model_to_measure(source: ModelSource) -> Moondream3:
    """A model that never ends an answer, in the device's fastest forms."""
    model = source.make()
    if model.config.text.vocab_size <= WORD_ID:
        raise ConfigError("bench needs a vocabulary of more than 1,000 ids; use --config mid")
    if source.device.type == "cpu" and source.threads is None and weight_bytes(model) < ONE_THREAD_BYTES:
        torch.set_num_threads(1)  # as `load_engine` does
    forbid_end(model)
    optimise(model)
    return model


def _bench_host(
    source: ModelSource, workload: Workload, batch_size: int, num_workers: int, seed: int
) -> tuple[BenchResult, list[PreparedImage]]:
    """Everything but the plain path, and the pictures it was measured with."""
    model = _model_to_measure(source)
    with ExitStack() as stack:
        images, files = open_pictures(stack, model, workload, num_workers, seed)
        with torch.inference_mode():
            result = BenchResult(_device_name(source.device), measure_limits(model))
            result.stages["vision"] = bench_vision(model, images, result.limits)
            result.stages["prefill"] = bench_prefill(model, result.limits)
            result.stages["decode"] = bench_decode(model, 1, result.limits)
            result.stages["decode_16"] = bench_decode(model, 16, result.limits)
        folder = stack.enter_context(tempfile.TemporaryDirectory())

        def store() -> EncodingCache:
            return EncodingCache(FileCache(Path(folder), CACHE_BYTES), model, background="none")

        result.engine, result.memory = run_engine(model, workload, images, batch_size, store())
        result.cached, _ = run_engine(model, workload, images, batch_size, store())
        if files is not None:
            engine = make_engine(model, min(batch_size, workload.num_requests))
            seconds, _ = time_run(engine, files.jobs(workload.request, workload.num_requests), workload)
            result.files = {
                "seconds": seconds,
                "pictures_per_second": workload.num_requests / seconds,
                "share": result.engine["seconds"] / seconds,
                "decode_workers": float(num_workers),
            }
    return result, images


def _bench_gpu(
    source: ModelSource, names: Sequence[str], batch_sizes: Sequence[int], num_workers: int, seed: int
) -> GpuBenchResult:
    """Everything but the plain path, on CUDA."""
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
    found = run_workloads(model, names, batch_sizes, num_workers=num_workers, seed=seed)
    result.runs, result.notes = found.runs, result.notes + found.notes
    return result


def _stage_name(stage: str, count: int) -> str:
    return stage if count == 1 else f"{stage}_{count}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name", "CPU") if device.type == "cpu" else device.type
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(name)
