"""One model in one precision, measured in a child interpreter: bytes, memory, seconds and decisions.

A child, so that no variant's memory hides in another's. In it, `main` receives a `VariantJob` and sends back what
`measure` finds. Knows neither other variants nor tables.

Decisions are counted along the path of the full-precision model: its choices are fed, whatever the variant would have
chosen, so that one early difference is one difference.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from md3cli.bench.device import gpu_memory, reset_gpu_peak
from md3cli.bench.runs import PHOTO, WORKLOADS, make_engine, make_images, make_jobs, time_run, weight_bytes
from md3cli.bench.stages import bench_decode, bench_prefill, bench_vision
from md3cli.child import Child, connect
from md3cli.config import ModelOptions
from md3cli.errors import ConfigError, EngineError, ImageError, InputError
from md3cli.images.crops import ImageLimits, PreparedImage, prepare_image
from md3cli.model.api import Moondream
from md3cli.model.engine import plain
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.kernels import optimise
from md3cli.model.engine.load import (
    ONE_THREAD_BYTES,
    choose_device,
    choose_dtype,
    load_engine,
    prepare_device,
    quantise_vision_for,
)
from md3cli.model.engine.machine import peak_rss, release, reset_peak_rss
from md3cli.model.engine.prompts import Prompts, Tokenizer
from md3cli.model.network.moondream import Moondream3
from md3cli.model.quant.layers import low_bit_matrices
from md3cli.model.quant.load import quantise_decoder
from md3cli.model.weights.codes import LowBit
from md3cli.model.weights.random_weights import CONFIGS, forbid_end, random_model
from md3cli.records import ImageItem, Request, Task
from md3cli.system import return_freed_memory

CAPTION = Request(Task.CAPTION)
DETECT = Request(Task.DETECT, "object")
QUESTION = "What is in this picture?"
MAX_TOKENS, MAX_OBJECTS = 64, 8
NUM_QUERIES = 3  # timed, one after another; one more before them
TEST_BATCH = 16
VISION = "vision"  # of `VariantJob.quant`: full precision, but for the vision encoder
_NO_LIMITS = dict.fromkeys(("gemm_gflops", "vision_gemm_gflops", "read_gbytes"), math.inf)  # rates alone are wanted
_TIMES = ("seconds", "crops_per_second", "tokens_per_second")
_PROCESS = "md3cli.bench.variant:main"
_MOST_BYTES = 1 << 30  # of a message: decisions of any number of pictures


@dataclass(frozen=True, slots=True)
class VariantJob:
    """A model in one precision, and what to run it on.

    `model` None is a random one of the size `config` in `CONFIGS`. `quant` is as `--quant`, or `VISION`. `tests` are
    names and mappings of `Moondream.annotate`, answered into the file `records`. `images` are followed decision by
    decision, along `followed` (what the full-precision variant decided) where it is given.
    """

    model: str | None
    quant: str
    config: str = "mid"
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    tests: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    records: str | None = None
    images: tuple[str, ...] = ()
    followed: tuple[tuple[int, ...], ...] | None = None


def run_variant(job: VariantJob) -> dict[str, Any]:
    """Measure a variant in a child interpreter.

    Raises:
        EngineError: it failed; the message holds the child's last words.
    """
    with Child(_PROCESS, may_print=True) as child:
        try:
            child.channel.send(asdict(job))
            return child.channel.receive(None, _MOST_BYTES)
        except (EOFError, OSError) as error:
            status = child.process.wait()
            words = child.last_words() or status
            raise EngineError(f"{job.model or job.config} with --quant {job.quant}: {words}") from error


def measure(job: VariantJob) -> dict[str, Any]:
    """Return bytes, seconds, rates and decisions of one variant, in plain types.

    Where this machine cannot put the vision encoder into few bits, only `refused`: why.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    options = _options(job)
    try:
        engine = load_engine(options) if job.model is not None else _random_engine(job, options)
    except ConfigError as error:
        if job.quant != VISION:
            raise
        return {"refused": str(error)}
    model, loaded_rss = engine.model, peak_rss()
    found = {"dtype": str(model.dtype).removeprefix("torch."), "loaded_rss_bytes": loaded_rss}
    found |= {"vision_bits": options.quant_vision, "weights_bytes": _all_weight_bytes(model)} | _asked_alone(engine)
    decisions = [_decide(model, engine.prompts, image, forced) for image, forced in _followed(engine, job)]
    if job.records is not None:
        texts = engine.tokenizer, engine.prompts
        del engine  # its slots, where memory holds one engine
        found["tests"] = _answer(job, model, texts)
    return found | {"peak_rss_bytes": max(loaded_rss, peak_rss()), "decisions": decisions, "stages": _stages(model)}


def _options(job: VariantJob) -> ModelOptions:
    is_vision = job.quant == VISION
    vision = "none" if not is_vision else "fp8" if choose_device(job.device).type == "cuda" else "int8"
    return ModelOptions(
        model=job.model or job.config,
        quant="none" if is_vision else job.quant,
        quant_vision=vision,
        dtype=job.dtype,
        device=job.device,
        cache=False,
        batch_size=1,
    )


def _random_engine(job: VariantJob, options: ModelOptions) -> Engine:
    device = choose_device(job.device)
    prepare_device(device)
    model = random_model(CONFIGS[job.config], dtype=choose_dtype(job.dtype, device, 1 << 40), device=device)
    if options.quant != "none":
        quantise_decoder(model, LowBit(options.quant), for_kernels=device.type == "cuda")
    if options.quant_vision != "none":
        quantise_vision_for(options, model)
    if device.type == "cpu" and job.threads is None and weight_bytes(model) < ONE_THREAD_BYTES:
        torch.set_num_threads(1)  # as `load_engine` does
    optimise(model)
    return make_engine(model, 1)


def _all_weight_bytes(model: Moondream3) -> int:
    return weight_bytes(model) + sum(matrix.num_bytes for matrix in low_bit_matrices(model))


def _asked_alone(engine: Engine) -> dict[str, Any]:
    """Ask about photos one after another; return a query's seconds (median), and the most memory meanwhile.

    Every answer has the tokens of the workload `query`, whatever the weights.
    """
    model = engine.model
    photos = replace(WORKLOADS["query"], tilings=(PHOTO,) * (1 + NUM_QUERIES))
    jobs = [
        replace(job, request=replace(job.request, prompt=QUESTION))
        for job in make_jobs(photos, make_images(model, photos, seed=0))
    ]
    bias = model.text.lm_head.bias.clone()
    forbid_end(model)
    return_freed_memory()
    release(model.device)
    reset_peak_rss()
    if model.device.type == "cuda":
        reset_gpu_peak(model.device)
    times = [time_run(engine, [job], photos)[0] for job in jobs]
    model.text.lm_head.bias.copy_(bias)
    if model.device.type == "cuda":
        card = gpu_memory(model.device)
        memory, name = card.gpu_reserved_bytes + card.gpu_outside_bytes, "VRAM"
    else:
        memory, name = peak_rss(), "resident memory"
    return {"seconds_per_query": median(times[1:]), "memory_bytes": memory, "memory": name}


def _answer(job: VariantJob, model: Moondream3, texts: tuple[Tokenizer, Prompts]) -> dict[str, dict[str, float]]:
    """Answer each test, in batches, into the file of records; return its requests, and seconds."""
    found = {}
    with Path(job.records or "").open("w", encoding="utf-8") as stream:
        for name, requests in job.tests.items():
            engine = make_engine(model, TEST_BATCH)
            engine.tokenizer, engine.prompts = texts
            started = time.perf_counter()
            for record in Moondream(engine).annotate(requests):
                stream.write(json.dumps(record) + "\n")
            found[name] = {"requests": len(requests), "seconds": time.perf_counter() - started}
            del engine
    return found


def _stages(model: Moondream3) -> dict[str, dict[str, float]]:
    photos = make_images(model, replace(WORKLOADS["query"], tilings=(PHOTO,)), seed=0)
    with torch.inference_mode():
        stages = {
            "vision": bench_vision(model, photos, _NO_LIMITS),
            "prefill": bench_prefill(model, _NO_LIMITS),
            "decode": bench_decode(model, 1, _NO_LIMITS),
            "decode_16": bench_decode(model, 16, _NO_LIMITS),
        }
    return {name: {key: value for key, value in stage.items() if key in _TIMES} for name, stage in stages.items()}


# -- decisions -------------------------------------------------------------------------------------


def _followed(engine: Any, job: VariantJob) -> Iterator[tuple[PreparedImage, tuple[int, ...] | None]]:
    for number, path in enumerate(job.images):
        try:
            image = prepare_image(ImageItem(path, path), engine.crop_config, ImageLimits(), None)
        except ImageError as error:
            raise InputError(f"{path}: {error}") from error
        yield image, job.followed[number] if job.followed is not None else None


@torch.inference_mode()
def _decide(model: Moondream3, prompts: Prompts, image: PreparedImage, forced: tuple[int, ...] | None) -> list[int]:
    """Return each greedy decision of a caption and of a detection: token ids, bins, whether another object follows."""
    made: list[int] = []

    def choose(decision: int) -> int:
        made.append(decision)
        return decision if forced is None else forced[len(made) - 1]

    can_detect = model.config.tokenizer.templates.get("detect") is not None
    for request in (CAPTION, DETECT) if can_detect else (CAPTION,):
        prompt = prompts.build(request, has_image=True)
        plain.answer(model, image, request.task, prompt, max_tokens=MAX_TOKENS, max_objects=MAX_OBJECTS, choose=choose)
    return made


def main() -> None:
    """Receive a job from the parent process, and send back what `measure` finds."""
    channel = connect()
    job = channel.receive(None, _MOST_BYTES)
    followed = job.pop("followed")
    channel.send(measure(VariantJob(**job, followed=followed and tuple(map(tuple, followed)))))
