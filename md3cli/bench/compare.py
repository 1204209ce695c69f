"""`md3 bench --compare-quant`: the same model in 16, 8 and 4 bits, side by side.

Each variant is measured in a child interpreter (`variant`); here the answers are judged, and what a variant saves is
reckoned. `md3 bench` alone imports it; it stands apart because it judges answers, which no other benchmark looks at.
Knows nothing of tables.
"""

from __future__ import annotations

import importlib.util
import json
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from md3cli.bench.variant import VISION, VariantJob, run_variant
from md3cli.config import SourceSpec
from md3cli.errors import UsageError
from md3cli.evaluate import evaluate, load_truth
from md3cli.model.quant.load import STORED, has_low_bits
from md3cli.model.quant.quantise import QuantiseSettings, stored_bytes
from md3cli.model.weights.codes import LowBit
from md3cli.model.weights.hub import TINY, model_path, present_path
from md3cli.model.weights.plan import plan_checkpoint
from md3cli.records import Task
from md3cli.remote.address import is_address
from md3cli.source.source import open_source

SAVED = ("size_bytes", "memory_bytes", "seconds_per_query")
# The section of a score sheet that judges each task's answers.
SECTIONS = {
    Task.DETECT: "boxes",
    Task.POINT: "points",
    Task.CAPTION: "captions (short)",
    Task.QUERY: "answers",
}
# What is compared of each section of a score sheet: shares of one.
SCORES = {"boxes": ("AP50", "AP"), "points": ("F1",), "captions (short)": ("exact",), "answers": ("normalised",)}


def compare_quant(
    model: str | None,
    config: str,
    against: Sequence[str],
    images: str | None,
    *,
    device: str,
    dtype: str,
    threads: int | None,
) -> dict[str, Any]:
    """Measure `model` in each precision, and every checkpoint of `against`; return plain types for `--json`.

    Without a model a random one of the size `config` is measured. Quality is measured on the embedded model's held-out
    scenes, so only for that model and checkpoints made from it. Agreement is measured on the pictures of INPUT
    `images`. What a device does not offer is left out, and said under `notes`.

    Raises:
        EngineError: a variant failed.
        UsageError: `images` names pictures that are no files of their own, or a random model has nothing to decide.
    """
    if model is None and (against or images):
        raise UsageError("--against and --images compare what weights decide; name them with -m")
    base = VariantJob(model, "none", config, dtype=dtype, device=device, threads=threads, images=_pictures(images))
    results: dict[str, Any] = {}
    notes = []
    with tempfile.TemporaryDirectory(prefix="md3-bench-") as temporary:
        folder = Path(temporary)
        if model is not None and _is_tiny(model):
            base = replace(base, tests=_tests(folder))
        for name, weights, quant, file_bytes in _variants(model, against):
            records = folder / f"{len(results)}.jsonl"
            job = replace(base, model=weights, quant=quant, records=str(records) if base.tests else None)
            found = run_variant(job)
            if "refused" in found:
                notes.append(f"{name}: {found['refused']}")
                continue
            found["file_bytes"] = file_bytes
            found["size_bytes"] = file_bytes or found["weights_bytes"]
            if base.tests:
                found["quality"] = _quality(records, folder)
            results[name] = found
            base = _compared(found, results["none"], base)
    return {"model": model or config, "pictures": len(base.images), "variants": results, "notes": notes}


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


def _variants(model: str | None, against: Sequence[str]) -> Iterator[tuple[str, str | None, str, int | None]]:
    """Yield the name in the table, the model, how its weights are loaded, and their bytes on disk where they have any.

    The vision encoder in few bits comes last of the model's own: not every device offers it.
    """
    plan = plan_checkpoint(present_path(model)) if model is not None else None
    yield "none", model, "none", stored_bytes(plan, None) if plan is not None else None
    if plan is not None and has_low_bits(plan, STORED):
        yield STORED, model, STORED, plan.files.num_bytes
    for kind in (LowBit.INT8, LowBit.INT4):
        yield str(kind), model, str(kind), stored_bytes(plan, QuantiseSettings(kind)) if plan is not None else None
    yield VISION, model, VISION, None
    for other in against:
        yield other, other, STORED, plan_checkpoint(present_path(other)).files.num_bytes


def _compared(found: dict[str, Any], full: dict[str, Any], job: VariantJob) -> VariantJob:
    """Note in `found` what it saves and loses beside the full-precision variant; return the job on whose path it is."""
    found["saved"] = {name: 1 - found[name] / full[name] for name in SAVED}
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


def _tests(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what is asked of the held-out scenes, by the section of the score sheet that judges it."""
    rows = list(unpack_scenes(folder))
    return {section: [row for row in rows if row["task"] == task] for task, section in SECTIONS.items()}


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
