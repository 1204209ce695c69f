"""One variant of a model measured in a process of its own: memory, speed by stage, answers, decisions.

`main` reads a `VariantJob` as JSON on stdin and prints what it found as JSON; `run_variant` starts it in a
fresh interpreter, so that no variant's memory hides in another's. Judging the answers is the caller's business.

Decisions are counted along the path of the full-precision model: its choices are fed, whatever the
variant would have chosen, so that one early difference is one difference.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from md3cli.bench.stages import bench_decode, bench_prefill, bench_vision
from md3cli.config import ModelOptions
from md3cli.errors import EngineError, ImageError, InputError
from md3cli.images.crops import ImageLimits, PreparedImage, Tiling, prepare_image
from md3cli.model.api import Moondream
from md3cli.model.engine.load import load_engine
from md3cli.model.engine.memory import peak_rss
from md3cli.model.engine.plain import PlainSequence
from md3cli.model.engine.prompts import Prompts
from md3cli.model.network.moondream import Moondream3
from md3cli.model.network.region import coord_value, size_value
from md3cli.records import ImageItem, Request, Task

CAPTION = Request(Task.CAPTION)
DETECT = Request(Task.DETECT, "object")
MAX_TOKENS, MAX_OBJECTS = 64, 8
_NO_LIMITS = dict.fromkeys(("gemm_gflops", "vision_gemm_gflops", "read_gbytes"), math.inf)  # rates alone are wanted
_TIMES = ("seconds", "crops_per_second", "tokens_per_second")
_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from md3cli.bench.quant import main; main()"
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
    command = [sys.executable, "-I", "-c", _CODE, json.dumps(sys.path)]  # no random.py beside the pictures is ours
    done = subprocess.run(command, input=json.dumps(asdict(job)), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise EngineError(f"{job.model} with --quant {job.quant}: {lines[-1] if lines else done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


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


class _Path:
    """Takes decisions: as the model makes them, or as another one made them."""

    def __init__(self, forced: tuple[int, ...] | None) -> None:
        self.made: list[int] = []
        self._forced = forced

    def take(self, choice: int) -> int:
        """Note what was chosen; returns what is to be gone on with."""
        self.made.append(choice)
        return choice if self._forced is None else self._forced[len(self.made) - 1]


@torch.inference_mode()
def _decide(model: Moondream3, prompts: Prompts, image: PreparedImage, forced: tuple[int, ...] | None) -> list[int]:
    """Every greedy decision of a caption and of a detection: token ids, bins, whether another object follows."""
    path = _Path(forced)
    sequence = _Sequence(model, image)
    sequence.feed_prompt(prompts.build(CAPTION, has_image=True))
    _caption(sequence, path)
    if model.config.tokenizer.templates.get("detect") is not None:
        sequence = _Sequence(model, image)
        sequence.feed_prompt(prompts.build(DETECT, has_image=True))
        _detect(sequence, path)
    return path.made


def _caption(sequence: _Sequence, path: _Path) -> None:
    ids = sequence.model.config.tokenizer
    token = path.take(sequence.choose())
    for _ in range(MAX_TOKENS - 1):
        if token == ids.eos_id:
            return
        sequence.feed_token(token)
        token = path.take(sequence.choose((ids.answer_id,)))


def _detect(sequence: _Sequence, path: _Path) -> None:
    ids = sequence.model.config.tokenizer
    goes_on = path.take(int(sequence.choose() != ids.eos_id))
    for _ in range(MAX_OBJECTS):
        if not goes_on:
            return
        for _ in range(2):
            sequence.feed_coord(path.take(sequence.coord_bin()))
        width, height = sequence.size_bins()
        sequence.feed_size(path.take(width), path.take(height))
        logits = sequence.logits()
        goes_on = path.take(int(logits[ids.coord_id] >= logits[ids.eos_id]))


class _Sequence(PlainSequence):
    """The plain path with reading and feeding apart."""

    def coord_bin(self) -> int:
        return int(self.model.region.coord_logits(self.hidden).argmax(-1))

    def size_bins(self) -> tuple[int, int]:
        width, height = self.model.region.size_logits(self.hidden).argmax(-1).tolist()
        return width, height

    def feed_coord(self, number: int) -> None:
        region = self.model.region
        value = coord_value(torch.tensor(number, device=self.model.device), region.num_coord_bins)
        self._feed(region.encode_coord(value)[None, None])

    def feed_size(self, width: int, height: int) -> None:
        region = self.model.region
        value = size_value(torch.tensor([width, height], device=self.model.device), region.num_size_bins)
        self._feed(region.encode_size(value)[None, None])


def main() -> None:
    """Read a job from stdin, print what was found. Whatever else is printed goes to stderr."""
    job = json.load(sys.stdin)
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    followed = job.pop("followed")
    found = measure(VariantJob(**job, followed=followed and tuple(map(tuple, followed))))
    json.dump(found, answers)
    answers.close()
