"""Whole runs of a benchmark: a workload with its pictures, the engine that works on it, and the plain path.

Pictures are noise, or JPEG files that decode workers read as in any run. Weights may be random and answers mean
nothing: only time and memory are looked at.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from md3cli.errors import EngineError
from md3cli.images.crops import CropConfig, ImageLimits, PreparedImage, Tiling
from md3cli.images.pool import PicturePool, num_beside_gpu
from md3cli.model.engine import plain
from md3cli.model.engine.encoder import EncodingCache, ImageEncoder, crop_sizes
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.kernels import resident_tensors
from md3cli.model.engine.load import make_cutter
from md3cli.model.engine.machine import MemoryPlan, free_bytes, peak_rss, plan_cuda, reset_peak_rss
from md3cli.model.engine.prompts import Prompt
from md3cli.model.network.moondream import Moondream3
from md3cli.model.weights.random_weights import forbid_end
from md3cli.records import ImageItem, Job, Request, RunIdentity, Task
from md3cli.system import return_freed_memory

SIZE = (1920, 1080)  # 2 megapixels; the real model cuts them into nine crops
NUM_SCENES = 4  # with different pixels; files of one scene differ in a comment, and so in their digest
WORD_ID = 1000  # of every word of a prompt, or the last id of a model that has fewer
ANSWER_ID, THINKING_ID = 3, 4  # what a prompt ends with
NUM_WORDS = {Task.QUERY: 8}  # of a question with its template; of other prompts 4
PHOTO = Tiling(2, 4)  # nine crops: what most photographs are cut into
AHEAD_PER_WORKER = 4  # pictures being decoded, or decoded and not taken


class PhotoFiles:
    """JPEG files and the workers that decode them."""

    def __init__(self, paths: Sequence[Path], pool: PicturePool, num_ahead: int) -> None:
        self._items = [ImageItem(path.name, str(path)) for path in paths]
        self._pool, self._num_ahead = pool, num_ahead

    def decode_all(self) -> list[PreparedImage]:
        """Return all pictures, cut, in order, before `serve`; afterwards every worker has been started."""
        pictures = [future.result() for future in [self._pool.submit(item) for item in self._items]]
        return [picture for picture in pictures if isinstance(picture, PreparedImage)]

    def serve(self, engine: Engine) -> None:
        """Have pictures made as `engine` wants them, as a run does; on a CPU nothing changes."""
        if engine.device.startswith("cuda"):
            self._pool.serve_gpu(engine.cutter)

    def jobs(self, request: Request, count: int) -> Iterator[Job | None]:
        """Yield a request for each of the first `count` files, in order; None while the next is not decoded."""
        items = iter(self._items[:count])
        decoding: deque[Future[PreparedImage]] = deque()
        for key in range(count):
            decoding.extend(self._pool.submit(item) for item in islice(items, self._num_ahead - len(decoding)))
            while not decoding[0].done():
                yield None
            yield Job(key, decoding.popleft().result(), request)


@contextmanager
def photo_files(
    count: int, crop_config: CropConfig, num_workers: int, seed: int, size: tuple[int, int] = SIZE
) -> Iterator[PhotoFiles]:
    """Make `count` photographs of `size` (width, height) in a temporary folder, and `num_workers` to decode them."""
    with (
        tempfile.TemporaryDirectory(prefix="md3-bench-") as folder,
        PicturePool(num_workers, crop_config, ImageLimits(), num_beside_gpu=num_beside_gpu(num_workers)) as pool,
    ):
        yield PhotoFiles(write_photos(Path(folder), count, seed, size), pool, AHEAD_PER_WORKER * num_workers)


def write_photos(folder: Path, count: int, seed: int, size: tuple[int, int] = SIZE) -> list[Path]:
    """Write JPEG files, no two with the same bytes."""
    scenes = [_scene(seed + number, size) for number in range(min(count, NUM_SCENES))]
    paths = [folder / f"{number:04}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(with_comment(scenes[number % NUM_SCENES], f"picture {number}"))
    return paths


def _scene(seed: int, size: tuple[int, int]) -> bytes:
    """Return a JPEG as hard to decode as a photograph: soft light, shapes with edges, grain; 2 bits a pixel."""
    random = np.random.default_rng(seed)
    light = Image.fromarray(random.integers(0, 256, (9, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(light)
    for left, top, width, height, red, green, blue in random.integers(0, (*size, 500, 400, 256, 256, 256), (60, 7)):
        pen.ellipse((left, top, left + width, top + height), (red, green, blue))
    grain = random.normal(0, 8, (*reversed(size), 1))
    pixels = (np.asarray(light) + grain).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


def with_comment(jpeg: bytes, text: str) -> bytes:
    """Return the same picture in other bytes: with a comment right behind the start marker."""
    comment = text.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


TOKENS_PER_OBJECT = {Task.DETECT: 3, Task.POINT: 2}  # x, y and, of a box, its size


@dataclass(frozen=True, slots=True)
class Workload:
    """What is run: pictures by tiling, and how many requests of which task each.

    A query with `reasoning` spends `max_tokens` twice: on thinking, and on its answer. Detect and point find
    `max_objects`. With `from_files` the pictures are JPEG files, which are decoded while the engine runs.
    """

    tilings: tuple[Tiling, ...]
    task: Task
    num_prompts: int
    max_tokens: int
    max_objects: int
    reasoning: bool = False
    from_files: bool = False

    @property
    def num_requests(self) -> int:
        return len(self.tilings) * self.num_prompts

    @property
    def answer_tokens(self) -> int:
        """The output tokens of each answer where none ends before its budget; a coordinate, or a size, is one."""
        if self.task in TOKENS_PER_OBJECT:
            return self.max_objects * TOKENS_PER_OBJECT[self.task]
        return self.max_tokens * (2 if self.reasoning else 1)

    @property
    def request(self) -> Request:
        """The question to each picture, without its prompt."""
        return Request(self.task, reasoning=self.reasoning, max_tokens=self.max_tokens, max_objects=self.max_objects)


WORKLOADS = {  # sizes for a CPU; a GPU gets `bench.gpu_workload`
    "query": Workload((PHOTO,) * 8, Task.QUERY, 1, max_tokens=3, max_objects=1),
    # 30 tokens altogether: 15 of reasoning, 15 of the answer
    "reasoning": Workload((PHOTO,) * 4, Task.QUERY, 1, max_tokens=15, max_objects=1, reasoning=True),
    "captions": Workload((Tiling(1, 1),) * 8, Task.CAPTION, 1, max_tokens=32, max_objects=1),
    "photos": Workload(
        tuple(Tiling(*t) for t in [(2, 2), (2, 4), (3, 3), (2, 3), (3, 4), (2, 4), (1, 4), (4, 2)] * 2),
        Task.DETECT,
        5,
        max_tokens=1,
        max_objects=2,
    ),
    "files": Workload((PHOTO,) * 8, Task.QUERY, 1, max_tokens=3, max_objects=1, from_files=True),
    "detect": Workload((PHOTO,) * 4, Task.DETECT, 1, max_tokens=1, max_objects=8),
    "point": Workload((PHOTO,) * 4, Task.POINT, 1, max_tokens=1, max_objects=8),
    "segment": Workload((PHOTO,) * 4, Task.SEGMENT, 1, max_tokens=64, max_objects=1),  # a box of 3, and its path
}


class SilentTokenizer:
    """A stand-in for the tokenizer where texts do not matter: it decodes every id to nothing."""

    def decode(self, ids: Any) -> str:
        return ""


class FixedPrompts:
    """A stand-in for `Prompts`: prompts of a typical length, made without a tokenizer."""

    def __init__(self, model: Moondream3) -> None:
        self._word_id = min(WORD_ID, model.config.text.vocab_size - 1)
        self._points_id = model.config.tokenizer.start_ground_points_id

    def build(self, request: Request, has_image: bool) -> Prompt:
        last = ANSWER_ID
        if request.task is Task.QUERY and request.reasoning:
            last = THINKING_ID
        elif request.task is Task.SEGMENT:
            last = self._points_id  # as `show_places` wants it
        return Prompt([1, *([self._word_id] * NUM_WORDS.get(request.task, 4)), last])

    def encode_choices(self, request: Request) -> tuple[tuple[int, ...], ...]:
        return ()


def make_images(model: Moondream3, workload: Workload, seed: int) -> list[PreparedImage]:
    """Return the workload's pictures: noise, cut already."""
    random = np.random.default_rng(seed)
    side = model.config.vision.crop_size
    images = []
    for number, tiling in enumerate(workload.tilings):
        crops = random.integers(0, 256, (1 + tiling.rows * tiling.cols, side, side, 3), dtype=np.uint8)
        if tiling == (1, 1):
            crops[1] = crops[0]
        images.append(PreparedImage(crops, tiling, side * tiling.cols, side * tiling.rows, f"{seed}-{number}"))
    return images


def open_pictures(
    stack: ExitStack, model: Moondream3, workload: Workload, num_workers: int, seed: int
) -> tuple[list[PreparedImage], PhotoFiles | None]:
    """Return the workload's pictures, cut already, and the files they come from; closing `stack` removes the files."""
    if not workload.from_files:
        return make_images(model, workload, seed), None
    crop_config = model.config.vision.crop_config
    files = stack.enter_context(photo_files(workload.num_requests, crop_config, num_workers, seed))
    return files.decode_all(), files


def make_jobs(workload: Workload, images: Sequence[PreparedImage]) -> list[Job]:
    """Return a job for every prompt of every picture; prompts differ in name only."""
    requests = [replace(workload.request, prompt=f"object {number}") for number in range(workload.num_prompts)]
    return [Job(key, *pair) for key, pair in enumerate(product(images, requests))]


def make_engine(
    model: Moondream3,
    batch_size: int,
    store: EncodingCache | None = None,
    *,
    delay: int | None = None,
    captures: bool = True,
    is_planned: bool | None = None,
    cuts: bool = False,
) -> Engine:
    """Make an engine without texts. On CUDA its sizes are planned as for a run, so the batch may come out smaller.

    There its step is captured as a graph, too, unless `captures` is False. `delay` and `is_planned` are `Engine`'s.
    With `cuts` pictures from files are cut there (`PhotoFiles.serve`).

    Raises:
        ConfigError: a CUDA device has no room for one picture at a time.
    """
    max_context = model.config.text.max_context
    plan = MemoryPlan(batch_size)
    if model.device.type == "cuda":
        plan = plan_cuda(free_bytes(model.device), model.config, model.dtype, max_context, asked=batch_size)
    engine = Engine(
        model,
        SilentTokenizer(),  # type: ignore[arg-type]  # a stand-in
        FixedPrompts(model),  # type: ignore[arg-type]  # a stand-in
        ImageEncoder(
            model,
            store=store,
            max_crops=plan.max_crops,
            sizes=crop_sizes(plan.max_crops, model.device),
        ),
        identity=RunIdentity("bench"),
        batch_size=plan.slots,
        max_context=max_context,
        prefill_tokens=plan.prefill_tokens,
        delay=delay,
        is_planned=is_planned,
    )
    engine.cutter = make_cutter(model.device, model.config) if cuts else None
    if captures and model.device.type == "cuda":
        engine.capture()
    return engine


def time_run(engine: Engine, jobs: Iterable[Job | None], workload: Workload) -> tuple[float, int]:
    """Return the seconds from the first job to the last answer, and the output tokens of all answers.

    Raises:
        EngineError: a request failed, or its answer has another number of tokens than the workload says.
    """
    started = time.perf_counter()
    num_tokens = 0
    for answer in engine.run(jobs):
        if answer.failure is not None:
            raise EngineError(f"request {answer.key} of the benchmark failed: {answer.failure.message}")
        if workload.answer_tokens != answer.output_tokens:
            raise EngineError(
                f"request {answer.key} of the benchmark has {answer.output_tokens} tokens, not {workload.answer_tokens}"
            )
        num_tokens += answer.output_tokens
    return time.perf_counter() - started, num_tokens


def run_engine(
    model: Moondream3, workload: Workload, images: list[PreparedImage], batch_size: int, store: EncodingCache
) -> tuple[dict[str, float], dict[str, float]]:
    """Run the engine on the whole workload; return times by stage, and the process's memory beside its parts."""
    engine = make_engine(model, min(batch_size, workload.num_requests), store)
    encoder = engine.encoder
    jobs = make_jobs(workload, images)
    return_freed_memory()  # what the measurements before kept is not this run's
    reset_peak_rss()
    seconds, num_tokens = time_run(engine, jobs, workload)
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
    """Return the bytes of all tensors that the model keeps, packed ones included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in resident_tensors(model))


def activation_bytes(model: Moondream3, num_crops: int, num_tokens: int) -> int:
    """Return about how many bytes a vision micro-batch or a prefill pass takes at most."""
    v, t = model.config.vision, model.config.text
    rows = num_crops * v.num_patches
    vision = rows * (2 * v.enc_dim + max(3 * v.enc_dim, v.enc_ff_dim)) + num_crops * v.enc_n_heads * v.num_patches**2
    text = num_tokens * (3 * t.dim + max(3 * t.dim, t.ff_dim)) + t.n_heads * num_tokens * model.config.prefix_len
    return max(vision, text) * model.dtype.itemsize


def run_baseline(
    model: Moondream3, workload: Workload, images: list[PreparedImage], num_images: int | None
) -> dict[str, float]:
    """Run the plain path, one request after another, nothing shared between them."""
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
            FixedPrompts(model).build(job.request, has_image=True),
            max_tokens=job.request.max_tokens,
            max_objects=job.request.max_objects,
        )
    measured = time.perf_counter() - started
    return {"seconds": measured * len(images) / len(chosen), "images_run": float(len(chosen))}
