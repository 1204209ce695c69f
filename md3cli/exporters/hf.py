"""Hugging Face ImageFolder: pictures under `train/` and what was found in `train/metadata.jsonl`; so for each set.

`load_dataset("imagefolder", data_dir=OUT)` guesses splits from names, so everything lies under `train/`: a picture
called `test_a.jpg` would otherwise take the rest away. Every row has the same keys, those that the records' tasks can
fill. `README.md` names the types, classes (`ClassLabel`) among them, for `load_dataset(OUT)`; with "imagefolder" it is
not read, so that each object has its label as text, too. What is said about parts of a picture is in `regions`, with
the part's label and box, and not among the picture's own captions and answers. Pixels are of the upright picture, as
`datasets` decodes it. A picture that only md3 reads (no end marker, another format than the suffix says) becomes PNG,
and so do kinds that `datasets` does not load. Other pictures are copied.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from md3cli.errors import UsageError
from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.copies import Copy, Kinds, copied, named_copies
from md3cli.exporters.files import staged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex, Survey
from md3cli.exporters.names import Names, portable
from md3cli.exporters.objects import PixelBox, flat
from md3cli.exporters.pictures import Pictures
from md3cli.exporters.splits import Sets
from md3cli.records import compact_json
from md3cli.refine.collection import Collection
from md3cli.source.walk import IMAGE_SUFFIXES

METADATA, CARD = "metadata.jsonl", "README.md"
_KINDS = Kinds(  # of ImageFolder of datasets 5.2, which looks at the content, not at the suffix
    taken=IMAGE_SUFFIXES,
    remade=frozenset({".avif", ".heic", ".heif"}),
    formats=("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"),  # MPO is opened as JPEG
    are_whole=True,  # one that does not decode stops the loop over the set
)
_NAMES = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
# What `datasets` takes for the name of another split in a folder's name, at any depth (data_files.py).
_SPLIT = re.compile(
    r"(?<![^-._ 0-9])(train(?:ing)?|val(?:id(?:ation)?)?|dev|test(?:ing)?|eval(?:uation)?)(?![^-._ 0-9])"
)
_READ = str.maketrans("[]{}$%", "______")  # as patterns, and as variables of the environment ($HOME, %TEMP%)


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write a folder that `datasets` loads; images whose picture cannot be read are left out."""
    pictures, sets = Pictures(records, options), Sets(options.splits)
    pictures.require_root("hf")
    folders = _folders(sets)
    with (
        closing(ImageIndex(records)) as index,
        staged_folder(out, overwrite=options.overwrite, format="hf") as folder,
        ExitStack() as files,
    ):
        survey = index.survey
        classes = {label: number for number, label in enumerate(survey.categories())}
        tables, digest = {}, hashlib.sha256()
        for part, name in folders.items():
            (folder.path / name).mkdir()
            tables[part] = files.enter_context((folder.path / name / METADATA).open("xb"))
        names = Names(is_flat=options.is_flat, fitted=_plain)
        copies = named_copies(
            index.images(),
            folder,
            folders,
            sets,
            names,
            _KINDS,
            partial(Copy.of, pictures=pictures, out=out),
        )
        for copy, is_there in copied(copies, pictures, _KINDS, are_upright=options.is_flat):
            if is_there:
                row = compact_json({"file_name": copy.name, **_columns(copy.group, survey, classes)})
                tables[copy.part].write(row + b"\n")
                digest.update(compact_json(copy.part) + row)
                sets.add(copy.group.name, copy.group.records)
        files.close()
        card = _card(survey, list(classes), f"{sets.counts.total()} pictures, {digest.hexdigest()[:16]}")
        (folder.path / CARD).write_text(card, encoding="utf-8")
        for name in folders.values():  # a set without rows stops `datasets`
            if sets.splits is not None and not (folder.path / name / METADATA).stat().st_size:
                shutil.rmtree(folder.path / name)
        notes = (*survey.notes(), *survey.part_notes(have_place=True), *pictures.notes(), *sets.notes())
    return ExportReport("hf", out, survey.num_records, sets.counts.total(), survey.num_failures, notes)


def _folders(sets: Sets) -> dict[str, str]:
    """Return what the folder of each set is called: as `datasets` knows it."""
    if sets.splits is None:
        return {"": "train"}
    if unknown := [name for name in sets.names if name not in _NAMES]:
        raise UsageError(f"hf has sets called train, val and test, not {unknown[0]}; name them so in --split")
    return sets.folders(_NAMES, "hf")


def _plain(name: PurePosixPath) -> PurePosixPath:
    r"""Return `name` without what `datasets` reads as pattern, variable, chain (`::`), folder (`\`), split, hidden."""
    parts = [part.translate(_READ) for part in portable(name).parts]
    parts = [f"_{part.lstrip('._')}" if part.startswith((".", "__")) else part for part in parts]
    return PurePosixPath(*(_SPLIT.sub(r"\1~", part) for part in parts[:-1]), parts[-1])


def _card(survey: Survey, classes: Sequence[str], rows: str) -> str:
    """Return the dataset card: what `datasets` reads at the top, a line for people below; `rows` tells sets apart."""
    # `datasets` 5.2 takes what it has in its cache for a folder of this name with these `configs`, whatever else is in
    # the folder: without a word about the rows, a set that is exported again would load as it was before.
    head = {"configs": [{"config_name": "default", "description": rows, "features": _features(survey, classes)}]}
    data = yaml.safe_dump(head, sort_keys=False, width=math.inf)  # ASCII; a name cannot begin a line of its own
    return f"---\n{data}---\n\n`datasets.load_dataset` takes this folder; boxes are x, y, width, height in pixels.\n"


def _features(survey: Survey, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the types of `_columns` as `datasets` writes them in a card (`Features._to_yaml_list`).

    Without them a column whose first 10 MB hold nothing but null would have no type, and the file could not be read.
    """
    found = _typed({"image": "image", "width": "int64", "height": "int64"})
    if "caption" in survey.tasks:
        found += [*_typed({"text": "string"}), {"name": "captions", "list": "string"}]
    if "query" in survey.tasks:
        found += [{"name": "answers", "list": _typed({"question": "string", "answer": "string"})}]
    if survey.tasks & {"detect", "segment"}:
        kind: Any = {"class_label": {"names": {str(number): label for number, label in enumerate(classes)}}}
        columns = {"bbox": {"list": "float64"}, "categories": kind if classes else "int64"}
        columns |= {"labels": "string", "scores": "float64"}
        columns |= {"segmentation": {"list": {"list": "float64"}}} if "segment" in survey.tasks else {}
        found += [{"name": "objects", "struct": [{"name": name, "list": kind} for name, kind in columns.items()]}]
    if "point" in survey.tasks:
        point = {"x": "float64", "y": "float64", "label": "string", "score": "float64"}
        found += [{"name": "points", "list": _typed(point)}]
    if survey.num_part_texts:
        part = [
            {"name": "bbox", "list": "float64"},
            *_typed({"label": "string", "question": "string", "text": "string"}),
        ]
        found += [{"name": "regions", "list": part}]
    return found + (_typed({"meta": "string"}) if survey.has_meta else [])


def _typed(kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "dtype": kind} for name, kind in kinds.items()]


def _columns(group: ImageGroup, survey: Survey, classes: Mapping[str, int]) -> dict[str, Any]:
    """Return the row's columns; which ones depends on the tasks of the whole file, never on the row."""
    row: dict[str, Any] = {"width": group.width, "height": group.height}
    if "caption" in survey.tasks:
        captions = group.captions()
        row |= {"text": captions[0] if captions else None, "captions": captions}
    if "query" in survey.tasks:
        row["answers"] = [{"question": question, "answer": answer} for question, answer in group.answers()]
    if survey.tasks & {"detect", "segment"}:
        row["objects"] = _objects(group, classes, has_masks="segment" in survey.tasks)
    if "point" in survey.tasks:
        row["points"] = [
            {"x": round(point.x, 3), "y": round(point.y, 3), "label": point.label, "score": point.score}
            for point in group.points()
        ]
    if survey.num_part_texts:
        row["regions"] = [*_parts(group)]
    if survey.has_meta:  # as text: values of mixed types in a column make `datasets` refuse the file
        row["meta"] = json.dumps(group.meta(), ensure_ascii=False, allow_nan=False)
    return row


def _parts(group: ImageGroup) -> Iterator[dict[str, Any]]:
    """Yield each text about a part of the picture."""
    for box in (*group.told_boxes(), *(segment.box for segment in group.segments())):
        for question, text in box.texts.items():
            yield {"bbox": _rounded(box), "label": box.label, "question": question, "text": text}


def _rounded(box: PixelBox) -> list[float]:
    return [round(value, 3) for value in (box.x, box.y, box.width, box.height)]


def _objects(group: ImageGroup, classes: Mapping[str, int], *, has_masks: bool) -> dict[str, list[Any]]:
    boxes, segments = list(group.boxes()), list(group.segments())
    found = [*boxes, *(segment.box for segment in segments)]
    objects: dict[str, list[Any]] = {
        "bbox": [_rounded(box) for box in found],
        "categories": [classes[box.label] for box in found],
        "labels": [box.label for box in found],
        "scores": [box.score for box in found],
    }
    if has_masks:
        rings = [*([box.ring] for box in boxes), *(segment.rings for segment in segments)]
        objects["segmentation"] = [[flat(ring) for ring in parts] for parts in rings]
    return objects
