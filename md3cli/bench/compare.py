"""`md3 bench --compare-quant`: the same model in 16, 8 and 4 bits, side by side.

`compare_quant` measures each variant in a child interpreter, so that no variant's memory hides in another's, and
judges the answers. In the child, `main` receives a `VariantJob` and sends back memory, speed by stage and decisions.
`md3 bench` alone imports it; it stands apart because it judges answers, which no other benchmark looks at. Knows
nothing of tables.

Decisions are counted along the path of the full-precision model: its choices are fed, whatever the variant would have
chosen, so that one early difference is one difference.
"""

from __future__ import annotations

import importlib.util
import json
import math
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from md3cli.bench.runs import PHOTO, WORKLOADS, make_images
from md3cli.bench.stages import bench_decode, bench_prefill, bench_vision
from md3cli.child import Child, connect
from md3cli.config import ModelOptions, SourceSpec
from md3cli.errors import EngineError, ImageError, InputError, UsageError
from md3cli.evaluate import evaluate, load_truth
from md3cli.images.crops import ImageLimits, PreparedImage, prepare_image
from md3cli.model.api import Moondream
from md3cli.model.engine import plain
from md3cli.model.engine.load import load_engine
from md3cli.model.engine.machine import peak_rss
from md3cli.model.engine.prompts import Prompts
from md3cli.model.network.moondream import Moondream3
from md3cli.model.quant.quantise import QuantiseSettings, stored_bytes
from md3cli.model.weights.codes import LowBit
from md3cli.model.weights.hub import TINY, model_path, present_path
from md3cli.model.weights.plan import plan_checkpoint
from md3cli.records import ImageItem, Request, Task
from md3cli.remote.address import is_address
from md3cli.source.source import open_source

VARIANTS = ("none", "int8", "int4")
# What is compared of each section of a score sheet: shares of one.
SCORES = {"boxes": ("AP50", "AP"), "points": ("F1",), "captions (short)": ("exact",), "answers": ("normalised",)}
CAPTION = Request(Task.CAPTION)
DETECT = Request(Task.DETECT, "object")
MAX_TOKENS, MAX_OBJECTS = 64, 8
_NO_LIMITS = dict.fromkeys(("gemm_gflops", "vision_gemm_gflops", "read_gbytes"), math.inf)  # rates alone are wanted
_TIMES = ("seconds", "crops_per_second", "tokens_per_second")
_PROCESS = "md3cli.bench.compare:main"
_MOST_BYTES = 1 << 30  # of a message: decisions of any number of pictures


@dataclass(frozen=True, slots=True)
class VariantJob:
    """A model in one precision, and what to run it on.

    `requests` are mappings of `Moondream.annotate`, answered into the file `records`. `images` are followed
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


def compare_quant(
    model: str, against: Sequence[str], images: str | None, *, device: str, dtype: str, threads: int | None
) -> dict[str, Any]:
    """Measure `model` in each precision, and every checkpoint of `against`; return plain types for `--json`.

    Quality is measured on the embedded model's held-out scenes, so only for that model and checkpoints made from it.
    Agreement is measured on the pictures of INPUT `images`.

    Raises:
        EngineError: a variant failed.
        UsageError: `images` names pictures that are no files of their own.
    """
    base = VariantJob(model, "none", dtype=dtype, device=device, threads=threads, images=_pictures(images))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="md3-bench-") as temporary:
        folder = Path(temporary)
        if _is_tiny(model):
            base = replace(base, requests=tuple(unpack_scenes(folder)))
        for name, weights, quant, file_bytes in _variants(model, against):
            records = folder / f"{len(results)}.jsonl"
            job = replace(base, model=weights, quant=quant, records=str(records) if base.requests else None)
            found = run_variant(job) | {"file_bytes": file_bytes}
            if base.requests:
                found["quality"] = _quality(records, folder)
            results[name] = found
            base = _compared(found, results["none"], base)
    return {"model": model, "pictures": len(base.images), "variants": results}


def _pictures(images: str | None) -> tuple[str, ...]:
    if images is None:
        return ()
    items = [row.image for row in open_source(SourceSpec((images,)), ()) if row.image is not None]
    inside = next((item for item in items if item.size is not None or item.row_group is not None), None)
    if inside is not None or any(is_address(item.path) for item in items):
        raise UsageError("--images takes pictures that are files of their own, not members of a tar or addresses")
    return tuple(item.path for item in items)


def _is_tiny(model: str) -> bool:
    return model == TINY or Path(model).resolve() == model_path(TINY).resolve()


def _variants(model: str, against: Sequence[str]) -> Iterator[tuple[str, str, str, int]]:
    """Yield the name in the table, the model, how its weights are loaded, and their bytes on disk."""
    plan = plan_checkpoint(present_path(model))
    for quant in VARIANTS:
        settings = None if quant == "none" else QuantiseSettings(LowBit(quant))
        yield quant, model, quant, stored_bytes(plan, settings)
    for other in against:
        yield other, other, "stored", plan_checkpoint(present_path(other)).files.num_bytes


def _compared(found: dict[str, Any], full: dict[str, Any], job: VariantJob) -> VariantJob:
    """Note in `found` agreement and loss beside the full-precision variant; return the job that follows its path."""
    decisions = found.pop("decisions")
    if job.followed is None:
        job = replace(job, followed=tuple(map(tuple, decisions)))
    pairs = [
        pair
        for ours, theirs in zip(decisions, job.followed or (), strict=True)
        for pair in zip(ours, theirs, strict=True)  # one path, so equally long
    ]
    found["decisions"] = len(pairs)
    found["agreement"] = sum(ours == theirs for ours, theirs in pairs) / len(pairs) if pairs else None
    if "quality" in found:
        losses = [100 * (full["quality"][name] - score) for name, score in found["quality"].items()]
        found["points_lost"] = sum(losses) / len(losses)
    return job


# -- the held-out scenes ---------------------------------------------------------------------------


def unpack_scenes(folder: Path) -> Iterator[dict[str, Any]]:
    """Unpack the embedded model's held-out scenes and ask of each what the ground truth knows."""
    with tarfile.open(model_path(TINY) / "held_out.tar.gz") as scenes:
        scenes.extractall(folder, filter="data")
    instances, questions = (json.loads((folder / f"{name}.json").read_bytes()) for name in ("instances", "questions"))
    kinds = {category["id"]: category["name"] for category in instances["categories"]}
    for image in instances["images"]:
        row = {"image": str(folder / image["file_name"]), "name": image["file_name"]}
        present = {
            kinds[thing["category_id"]] for thing in instances["annotations"] if thing["image_id"] == image["id"]
        }
        yield from ({**row, "task": "detect", "prompt": kind} for kind in kinds.values())
        yield from ({**row, "task": "point", "prompt": kind} for kind in sorted(present))
        yield {**row, "task": "caption", "length": "short"}
    for asked in questions:
        row = {"image": str(folder / asked["image"]), "name": asked["image"], "reasoning": False}
        yield {**row, "task": "query", "prompt": asked["question"], "spatial_refs": asked.get("spatial_refs", [])}


def _quality(records: Path, folder: Path) -> dict[str, float]:
    names = ["captions.json", "questions.json"]
    if importlib.util.find_spec("faster_coco_eval") is not None:
        names.insert(0, "instances.json")  # needs the extra `eval`
    sheet = evaluate(records, [load_truth(folder / name) for name in names])
    return {
        f"{section.name} {score}": float(section.scores[score] or 0.0)
        for section in sheet.sections
        for score in SCORES[section.name]
    }


# -- one variant, in a child interpreter -----------------------------------------------------------


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
            raise EngineError(f"{job.model} with --quant {job.quant}: {words}") from error


def measure(job: VariantJob) -> dict[str, Any]:
    """Return bytes, seconds, rates and decisions of one variant, in plain types."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    options = ModelOptions(model=job.model, quant=job.quant, dtype=job.dtype, device=job.device, cache=False)
    engine = load_engine(options)
    loaded_rss = peak_rss()
    decisions = [_decide(engine.model, engine.prompts, image, forced) for image, forced in _followed(engine, job)]
    if job.records is not None:
        with Path(job.records).open("w", encoding="utf-8") as stream:
            for record in Moondream(engine).annotate(job.requests):
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
