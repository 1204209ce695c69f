"""This machine's throughput, stage by stage, beside its limits measured in the same run.

A stage's share is its achieved rate over the limit that binds it: vision and prefill are bound by
matrix products, a decode step at batch 1 by reading weights. Weights are loaded (or drawn) before
any clock starts. The plain path (`plain.py`) run on the same requests is the baseline.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from md3cli.errors import ConfigError
from md3cli.images import PreparedImage, Tiling
from md3cli.model import plain
from md3cli.model.allocator import keep_freed_memory
from md3cli.model.bench_stages import bench_decode, bench_prefill, bench_vision, measure_limits
from md3cli.model.checkpoint import load_model
from md3cli.model.encoder import ImageEncoder
from md3cli.model.engine import Engine
from md3cli.model.hub import resolve_model
from md3cli.model.kernels import optimise, resident_tensors
from md3cli.model.load import choose_device, choose_dtype
from md3cli.model.memory import peak_rss, reset_peak_rss
from md3cli.model.moondream import Moondream3
from md3cli.model.prompts import Prompt
from md3cli.model.random_weights import CONFIGS, forbid_end, random_model
from md3cli.model.tasks import Job
from md3cli.records import Request, RunIdentity, Task

WORD_ID = 1000


@dataclass(frozen=True, slots=True)
class Workload:
    """What is run: pictures by tiling, and how many requests of which task each."""

    tilings: tuple[Tiling, ...]
    task: Task
    num_prompts: int
    max_tokens: int
    max_objects: int

    @property
    def num_requests(self) -> int:
        return len(self.tilings) * self.num_prompts


WORKLOADS = {
    "captions": Workload((Tiling(1, 1),) * 8, Task.CAPTION, 1, max_tokens=32, max_objects=1),
    "photos": Workload(
        tuple(Tiling(*t) for t in [(2, 2), (2, 4), (3, 3), (2, 3), (3, 4), (2, 4), (1, 4), (4, 2)] * 2),
        Task.DETECT,
        5,
        max_tokens=1,
        max_objects=2,
    ),
}


@dataclass(slots=True)
class BenchResult:
    """Numbers of one benchmark; `as_dict` is what `--json` prints."""

    device: str
    limits: dict[str, float]
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    engine: dict[str, float] = field(default_factory=dict)
    baseline: dict[str, float] | None = None
    memory: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers; seconds, GFLOP/s, GB/s and shares 0-1."""
        parts = {
            "device": self.device,
            "limits": self.limits,
            "stages": self.stages,
            "engine": self.engine,
            "memory": self.memory,
        }
        if self.baseline is not None:
            parts["baseline"] = self.baseline
        return parts


class SilentTokenizer:
    """Stands in for a tokenizer where texts do not matter: every id is decoded to nothing."""

    def decode(self, ids: Any) -> str:
        return ""


class FixedPrompts:
    """Prompts of a typical length without a tokenizer."""

    def build(self, request: Request, has_image: bool) -> Prompt:
        return Prompt([1, *([WORD_ID] * 4), 3])

    def encode_choices(self, request: Request) -> tuple[tuple[int, ...], ...]:
        return ()


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
    """Measure limits, stages, the engine on `workload`, and the plain path beside it.

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
        result = BenchResult(_device_name(device), measure_limits(model.dtype, device))
        result.stages["vision"] = bench_vision(model, images, result.limits)
        result.stages["prefill"] = bench_prefill(model, result.limits)
        result.stages["decode"] = bench_decode(model, 1, result.limits)
        result.stages["decode_16"] = bench_decode(model, 16, result.limits)
    result.engine, result.memory = run_engine(model, workload, images, batch_size)
    if has_baseline:
        del model
        result.baseline = run_baseline(make_model(), workload, images, baseline_images)
    return result


def make_images(model: Moondream3, workload: Workload, seed: int) -> list[PreparedImage]:
    """Pictures of noise, cut already."""
    random = np.random.default_rng(seed)
    side = model.config.vision.crop_size
    images = []
    for number, tiling in enumerate(workload.tilings):
        crops = random.integers(0, 256, (1 + tiling.rows * tiling.cols, side, side, 3), dtype=np.uint8)
        if tiling == (1, 1):
            crops[1] = crops[0]
        images.append(PreparedImage(crops, tiling, side * tiling.cols, side * tiling.rows, f"{seed}-{number}"))
    return images


# -- whole runs ------------------------------------------------------------------------------------


def make_jobs(workload: Workload, images: list[PreparedImage]) -> list[Job]:
    """Every prompt of every picture; prompts differ in name only."""
    base = Request(workload.task, max_tokens=workload.max_tokens, max_objects=workload.max_objects)
    jobs: list[Job] = []
    for image in images:
        for number in range(workload.num_prompts):
            request = replace(base, prompt=f"object {number}")
            jobs.append(Job(len(jobs), image, request))
    return jobs


def run_engine(
    model: Moondream3, workload: Workload, images: list[PreparedImage], batch_size: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The engine on the whole workload: times by stage, and memory against its parts."""
    encoder = ImageEncoder(model)
    engine = Engine(
        model,
        SilentTokenizer(),  # type: ignore[arg-type]
        FixedPrompts(),  # type: ignore[arg-type]
        encoder,
        identity=RunIdentity("bench"),
        batch_size=min(batch_size, workload.num_requests),
        max_context=model.config.text.max_context,
    )
    jobs = make_jobs(workload, images)
    reset_peak_rss()
    started = time.perf_counter()
    num_tokens = sum(answer.output_tokens for answer in engine.run(jobs))
    seconds = time.perf_counter() - started
    busy = engine.stats.prefix_seconds + engine.stats.prompt_seconds + engine.stats.decode_seconds + encoder.seconds
    times = {
        "seconds": seconds,
        "requests_per_second": len(jobs) / seconds,
        "output_tokens": float(num_tokens),
        "vision_seconds": encoder.seconds,
        "prefill_seconds": engine.stats.prefix_seconds + engine.stats.prompt_seconds,
        "decode_seconds": engine.stats.decode_seconds,
        "forward_share": busy / seconds,
    }
    activations = activation_bytes(model, encoder.max_crops, engine.prefill_tokens)
    memory = {
        "weights_bytes": float(weight_bytes(model)),
        "kv_bytes": float(engine.cache.num_bytes),
        "activation_bytes": float(activations),
        "peak_rss_bytes": float(peak_rss()),
    }
    parts = memory["weights_bytes"] + memory["kv_bytes"] + memory["activation_bytes"]
    memory["ratio"] = memory["peak_rss_bytes"] / parts
    return times, memory


def weight_bytes(model: Moondream3) -> int:
    """Bytes of all tensors the model keeps, packed ones included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in resident_tensors(model))


def activation_bytes(model: Moondream3, num_crops: int, num_tokens: int) -> int:
    """Largest set of intermediate values of a vision micro-batch or a prefill pass, about."""
    v, t = model.config.vision, model.config.text
    rows = num_crops * v.num_patches
    vision = rows * (2 * v.enc_dim + max(3 * v.enc_dim, v.enc_ff_dim)) + num_crops * v.enc_n_heads * v.num_patches**2
    text = num_tokens * (3 * t.dim + max(3 * t.dim, t.ff_dim)) + t.n_heads * num_tokens * model.config.prefix_len
    return max(vision, text) * model.dtype.itemsize


def run_baseline(
    model: Moondream3, workload: Workload, images: list[PreparedImage], num_images: int | None
) -> dict[str, float]:
    """The plain path, one request after another, nothing shared between them."""
    forbid_end(model)
    chosen = images[:num_images]
    jobs = make_jobs(workload, chosen)
    started = time.perf_counter()
    for job in jobs:
        assert isinstance(job.image, PreparedImage)
        plain.answer(
            model,
            job.image,
            job.request.task,
            FixedPrompts().build(job.request, has_image=True),
            max_tokens=job.request.max_tokens,
            max_objects=job.request.max_objects,
        )
    measured = time.perf_counter() - started
    return {"seconds": measured * len(images) / len(chosen), "images_run": float(len(chosen))}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name", "CPU") if device.type == "cpu" else device.type
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(name)
