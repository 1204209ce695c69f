"""This machine's throughput, stage by stage, beside its limits measured in the same run.

A stage's share is its achieved rate over the limit that binds it: vision and prefill are bound by
matrix products, a decode step at batch 1 by reading weights. Weights are loaded (or drawn) before
any clock starts. The plain path (`plain.py`) run on the same requests is the baseline.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from md3cli.errors import ConfigError
from md3cli.file_cache import FileCache
from md3cli.model.allocator import keep_freed_memory
from md3cli.model.bench_runs import WORD_ID, WORKLOADS, Workload, make_images, run_baseline, run_engine
from md3cli.model.bench_stages import bench_decode, bench_prefill, bench_vision, measure_limits
from md3cli.model.checkpoint import load_model
from md3cli.model.encoding_cache import EncodingCache
from md3cli.model.hub import resolve_model
from md3cli.model.kernels import optimise
from md3cli.model.load import choose_device, choose_dtype, prepare_device
from md3cli.model.moondream import Moondream3
from md3cli.model.random_weights import CONFIGS, forbid_end, random_model

__all__ = ["WORKLOADS", "BenchResult", "model_maker", "run_bench"]
CACHE_BYTES = 1 << 30  # of the second run's encodings


@dataclass(slots=True)
class BenchResult:
    """Numbers of one benchmark; `as_dict` is what `--json` prints."""

    device: str
    limits: dict[str, float]
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    engine: dict[str, float] = field(default_factory=dict)
    cached: dict[str, float] = field(default_factory=dict)
    baseline: dict[str, float] | None = None
    memory: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers; seconds, GFLOP/s, GB/s and shares 0-1."""
        parts = {
            "device": self.device,
            "limits": self.limits,
            "stages": self.stages,
            "engine": self.engine,
            "cached": self.cached,
            "memory": self.memory,
        }
        if self.baseline is not None:
            parts["baseline"] = self.baseline
        return parts


def model_maker(
    model: str | None, config: str, *, device: str, dtype: str, threads: int | None, seed: int
) -> Callable[[], Moondream3]:
    """A function that makes the model to measure, its parts still plain.

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
        return lambda: random_model(CONFIGS[config], dtype=kind, device=place, seed=seed)
    files = resolve_model(model)
    return lambda: load_model(files.path, dtype=kind, device=place).model


def run_bench(
    make_model: Callable[[], Moondream3],
    *,
    workload: Workload,
    batch_size: int,
    has_baseline: bool,
    baseline_images: int | None = None,
    seed: int = 0,
) -> BenchResult:
    """Measure limits, stages, the engine on `workload` (and again with encodings cached), and the plain path.

    Args:
        make_model: a fresh model with its plain parts; called once, twice with a baseline.
        baseline_images: run the baseline on the first so many pictures and scale up.

    Raises:
        ConfigError: the model is too small to hold the workload's prompts.
    """
    model = make_model()
    if model.config.text.vocab_size <= WORD_ID:
        raise ConfigError("bench needs a vocabulary of more than 1,000 ids; use --config mid")
    device = model.device
    forbid_end(model)
    optimise(model)
    images = make_images(model, workload, seed)
    with torch.inference_mode():
        result = BenchResult(_device_name(device), measure_limits(model))
        result.stages["vision"] = bench_vision(model, images, result.limits)
        result.stages["prefill"] = bench_prefill(model, result.limits)
        result.stages["decode"] = bench_decode(model, 1, result.limits)
        result.stages["decode_16"] = bench_decode(model, 16, result.limits)
    with tempfile.TemporaryDirectory() as folder:

        def store() -> EncodingCache:
            return EncodingCache(FileCache(Path(folder), CACHE_BYTES), model, background="none")

        result.engine, result.memory = run_engine(model, workload, images, batch_size, store())
        result.cached, _ = run_engine(model, workload, images, batch_size, store())
    if has_baseline:
        del model
        result.baseline = run_baseline(make_model(), workload, images, baseline_images)
    return result


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name", "CPU") if device.type == "cpu" else device.type
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(name)
