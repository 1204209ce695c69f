"""`md3 bench --compare-quant`: the same model in 16, 8 and 4 bits, one process each, side by side."""

from __future__ import annotations

import importlib.util
import json
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from md3cli.errors import UsageError
from md3cli.records import printable
from md3cli.remote.address import is_address

if TYPE_CHECKING:
    from md3cli.bench.quant import VariantJob

VARIANTS = ("none", "int8", "int4")
# What is compared of each section of a score sheet (`md3cli.evaluate`), all of them shares of one.
SCORES = {"boxes": ("AP50", "AP"), "points": ("F1",), "captions (short)": ("exact",), "answers": ("normalised",)}
STAGES = {"vision": "a photo", "prefill": "a picture", "decode": "a token", "decode_16": "16 tokens"}


@dataclass(frozen=True, slots=True)
class ComparedModel:
    """One variant as it stands in the table: `model` loaded with `quant`; `file_bytes` of its weights on disk."""

    name: str
    model: str
    quant: str
    file_bytes: int


def compare_quant(
    model: str, against: Sequence[str], images: str | None, *, device: str, dtype: str, threads: int | None
) -> dict[str, Any]:
    """Measure `model` in each precision and every checkpoint of `against`; plain types for `--json`.

    Quality is measured on the embedded model's held-out scenes, so for that model (and checkpoints
    made from it) alone; agreement on the pictures of INPUT `images`.
    """
    from md3cli.bench.quant import VariantJob, run_variant

    base = VariantJob(model, "none", dtype=dtype, device=device, threads=threads, images=_pictures(images))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="md3-bench-") as name:
        folder = Path(name)
        if _is_tiny(model):
            base = replace(base, requests=tuple(unpack_scenes(folder)))
        for variant in _variants(model, against):
            records = folder / f"{len(results)}.jsonl"
            job = replace(base, model=variant.model, quant=variant.quant, records=str(records))
            found = run_variant(job if base.requests else replace(job, records=None))
            found["file_bytes"] = variant.file_bytes
            if base.requests:
                found["quality"] = _quality(records, folder)
            results[variant.name] = found
            base = _compared(found, results["none"], base)
    return {"model": model, "pictures": len(base.images), "variants": results}


def _pictures(images: str | None) -> tuple[str, ...]:
    from md3cli.source.source import SourceSpec, open_source

    if images is None:
        return ()
    items = [row.image for row in open_source(SourceSpec((images,)), ()) if row.image is not None]
    inside = next((item for item in items if item.size is not None or item.row_group is not None), None)
    if inside is not None or any(is_address(item.path) for item in items):
        raise UsageError("--images takes pictures that are files of their own, not members of a tar or addresses")
    return tuple(item.path for item in items)


def _is_tiny(model: str) -> bool:
    from md3cli.model.weights.hub import TINY, model_path

    return model == TINY or Path(model).resolve() == model_path(TINY).resolve()


def _variants(model: str, against: Sequence[str]) -> Iterator[ComparedModel]:
    from md3cli.model.quant.quantise import QuantiseSettings, stored_bytes
    from md3cli.model.weights.codes import LowBit
    from md3cli.model.weights.hub import present_path
    from md3cli.model.weights.plan import plan_checkpoint

    plan = plan_checkpoint(present_path(model))
    for quant in VARIANTS:
        settings = None if quant == "none" else QuantiseSettings(LowBit(quant))
        yield ComparedModel(quant, model, quant, stored_bytes(plan, settings))
    for other in against:
        yield ComparedModel(other, other, "stored", plan_checkpoint(present_path(other)).files.num_bytes)


def _compared(found: dict[str, Any], full: dict[str, Any], job: VariantJob) -> VariantJob:
    """Note agreement and loss against the full-precision variant; the job with its decisions to follow."""
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
    from md3cli.model.weights.hub import TINY, model_path

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
    """Scores 0-1 by name; what needs the extra `eval` is left out without it."""
    from md3cli.evaluate import evaluate, load_truth

    names = ["captions.json", "questions.json"]
    if importlib.util.find_spec("faster_coco_eval") is not None:
        names.insert(0, "instances.json")
    sheet = evaluate(records, [load_truth(folder / name) for name in names])
    return {
        f"{section.name} {score}": float(section.scores[score] or 0.0)
        for section in sheet.sections
        for score in SCORES[section.name]
    }


# -- the tables ------------------------------------------------------------------------------------


def show(result: Mapping[str, Any]) -> None:
    """Size, memory, time by stage and what was lost, a column for each variant."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    variants: Mapping[str, Any] = result["variants"]
    table = Table(box=None, header_style="bold")
    table.add_column("")
    for name in variants:
        table.add_column(Text(printable("full" if name == "none" else Path(name).name)), justify="right")
    for title, *cells in _rows(variants.values()):
        table.add_row(title, *cells)
    Console().print(table)
    if not any("quality" in found for found in variants.values()):
        typer.echo("quality is measured on the embedded model's scenes: -m tiny", err=True)
    elif importlib.util.find_spec("faster_coco_eval") is None:
        typer.echo("boxes and points were not scored: pip install 'md3cli[eval]'", err=True)


def _rows(variants: Any) -> Iterator[tuple[str, ...]]:
    found = list(variants)
    yield ("weights on disk", *(f"{one['file_bytes'] / 1e9:,.3f} GB" for one in found))
    yield ("peak memory", *(f"{one['peak_rss_bytes'] / 1e9:,.2f} GB" for one in found))
    for stage, unit in STAGES.items():
        yield (f"{stage.removesuffix('_16')}, {unit}", *_times(found, stage))
    for name in found[0].get("quality", {}):
        yield (name, *(f"{one['quality'][name]:.3f}" for one in found))
    if "points_lost" in found[0]:
        yield ("points lost, mean", *(f"{one['points_lost']:.2f}" for one in found))
    if found[0]["agreement"] is not None:
        yield (f"same of {found[0]['decisions']:,} decisions", *(f"{one['agreement']:.1%}" for one in found))


def _times(found: Sequence[Mapping[str, Any]], stage: str) -> Iterator[str]:
    full = found[0]["stages"][stage]["seconds"]
    for one in found:
        seconds = one["stages"][stage]["seconds"]
        yield f"{seconds * 1000:,.1f} ms {full / seconds:.1f}x"
