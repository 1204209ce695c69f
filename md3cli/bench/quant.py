"""One variant of a model measured in a process of its own: memory, speed by stage, answers, decisions.

`main` receives a `VariantJob` and sends back what it found; `run_variant` starts it in a child interpreter, so that
no variant's memory hides in another's. Judging the answers is the caller's business.

Decisions are counted along the path of the full-precision model: its choices are fed, whatever the
variant would have chosen, so that one early difference is one difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from md3cli.bench.stages import bench_decode, bench_prefill, bench_vision
from md3cli.child import Child, connect
from md3cli.config import ModelOptions
from md3cli.errors import EngineError, ImageError, InputError
from md3cli.images.crops import ImageLimits, PreparedImage, Tiling, prepare_image
from md3cli.model.api import Moondream
from md3cli.model.engine import plain
from md3cli.model.engine.load import load_engine
from md3cli.model.engine.memory import peak_rss
from md3cli.model.engine.prompts import Prompts
from md3cli.model.network.moondream import Moondream3
from md3cli.records import ImageItem, Request, Task

CAPTION = Request(Task.CAPTION)
DETECT = Request(Task.DETECT, "object")
MAX_TOKENS, MAX_OBJECTS = 64, 8
_NO_LIMITS = dict.fromkeys(("gemm_gflops", "vision_gemm_gflops", "read_gbytes"), math.inf)  # rates alone are wanted
_TIMES = ("seconds", "crops_per_second", "tokens_per_second")
_PROCESS = "md3cli.bench.quant:main"
_MOST_BYTES = 1 << 30  # of a message: decisions of any number of pictures
_PHOTO = Tiling(2, 4)  # nine crops: what most photographs are cut into


@dataclass(frozen=True, slots=True)
class VariantJob:
    """What to run: a model in one precision, and on what.

    `requests` are mappings of `Moondream.annotate`, answered into `records`; `images` are followed
    decision by decision, along `followed` (what the full-precision variant decided) where it is given.
    """

    model: str
    quant: str
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    requests: tuple[Mapping[str, Any], ...] = ()
    records: str | None = None
    images: tuple[str, ...] = ()
    followed: tuple[tuple[int, ...], ...] | None = None


def run_variant(job: VariantJob) -> dict[str, Any]:
    """Run a job in a new process.

    Raises:
        EngineError: it failed; the message is the process's own.
    """
    with Child(_PROCESS, may_print=True) as child:
        try:
            child.channel.send(asdict(job))
            return child.channel.receive(None, _MOST_BYTES)
        except (EOFError, OSError) as error:
            status = child.process.wait()
            words = child.last_words() or status
            raise EngineError(f"{job.model} with --quant {job.quant}: {words}") from error


def measure(job: VariantJob) -> dict[str, Any]:
    """Everything about one variant, in plain types: bytes, seconds, rates, decisions."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    options = ModelOptions(model=job.model, quant=job.quant, dtype=job.dtype, device=job.device, cache=False)
    engine = load_engine(options)
    loaded_rss = peak_rss()
    decisions = [_decide(engine.model, engine.prompts, image, forced) for image, forced in _followed(engine, job)]
    if job.records is not None:
        with Path(job.records).open("w", encoding="utf-8") as stream:
            for record in Moondream(engine, options).annotate(job.requests):
                stream.write(json.dumps(record) + "\n")
    answered_rss = peak_rss()
    return {
        "loaded_rss_bytes": loaded_rss,
        "peak_rss_bytes": answered_rss,
        "decisions": decisions,
        "stages": _stages(engine.model),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
    }


def _stages(model: Moondream3) -> dict[str, dict[str, float]]:
    """Seconds of a photograph's vision, a prefix, decode steps of 1 and 16 rows, and what that is per second."""
    side = model.config.vision.crop_size
    num_crops = 1 + _PHOTO.rows * _PHOTO.cols
    crops = np.random.default_rng(0).integers(0, 256, (num_crops, side, side, 3), dtype=np.uint8)
    photo = PreparedImage(crops, _PHOTO, side * _PHOTO.cols, side * _PHOTO.rows, "photo")
    with torch.inference_mode():
        stages = {
            "vision": bench_vision(model, [photo], _NO_LIMITS),
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
    """Every greedy decision of a caption and of a detection: token ids, bins, whether another object follows."""
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
    """Receive a job from the parent process, and send back what was found."""
    channel = connect()
    job = channel.receive(None, _MOST_BYTES)
    followed = job.pop("followed")
    channel.send(measure(VariantJob(**job, followed=followed and tuple(map(tuple, followed)))))
