"""Ground truth files: COCO instances, COCO captions, or questions with their answers.

A file's content says which of the three it is. Images keep the names that the file gives them. Knows no records.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md3cli.errors import InputError
from md3cli.records import printable


@dataclass(frozen=True, slots=True)
class TruthImage:
    """An image of the ground truth; size in pixels, None where the file does not say."""

    name: str
    width: int | None
    height: int | None


@dataclass(frozen=True, slots=True)
class TruthObject:
    """One annotated object, in pixels. `segmentation` is COCO's: polygons, or run lengths.

    Without a mask of its own (`has_mask`) the segmentation is the box's outline.
    """

    bbox: tuple[float, float, float, float]  # x, y, width, height
    segmentation: list[list[float]] | dict[str, Any]
    has_mask: bool
    area: float
    is_crowd: bool


@dataclass(frozen=True, slots=True)
class Instances:
    """COCO instances. `objects` by (image name, category name)."""

    path: Path
    images: Mapping[str, TruthImage]
    categories: tuple[str, ...]
    objects: Mapping[tuple[str, str], tuple[TruthObject, ...]]


@dataclass(frozen=True, slots=True)
class Captions:
    """Reference captions by image name."""

    path: Path
    captions: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Questions:
    """Accepted answers by (image name or None, question)."""

    path: Path
    answers: Mapping[tuple[str | None, str], tuple[str, ...]]


Truth = Instances | Captions | Questions


def load_truth(path: Path) -> Truth:
    """Read a ground truth file.

    Raises:
        InputError: the file cannot be read, or is of no known kind; the message says which kinds there are.
    """
    document = _read_json(path)
    try:
        if isinstance(document, list):
            return Questions(path, _questions(document))
        annotations = document["annotations"]
        if annotations and "caption" in annotations[0]:
            return Captions(path, _captions(document["images"], annotations))
        return _instances(path, document["images"], document["categories"], annotations)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(
            f"{printable(str(path))} is no ground truth that md3 knows ({type(error).__name__}: {error}): it reads "
            "COCO instances, COCO captions, or a list (JSON or JSON Lines) of {image, question, answer}"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {printable(str(path))}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{printable(str(path))} is not UTF-8 text; ground truth is JSON") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            raise InputError(f"{printable(str(path))} is neither JSON nor JSON Lines ({error})") from error


def _questions(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str | None, str], tuple[str, ...]]:
    answers: dict[tuple[str | None, str], tuple[str, ...]] = {}
    for row in rows:
        accepted = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        key = (row["image"], str(row["question"]).strip())
        answers[key] = answers.get(key, ()) + tuple(map(_answer_text, accepted))
    return answers


def _answer_text(answer: object) -> str:
    return {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else str(answer)


def _captions(
    images: Iterable[Mapping[str, Any]], annotations: Iterable[Mapping[str, Any]]
) -> dict[str, tuple[str, ...]]:
    names = {image["id"]: str(image["file_name"]) for image in images}
    _refuse_doubled(names.values())
    captions: dict[str, tuple[str, ...]] = {}
    for annotation in annotations:
        name = names[annotation["image_id"]]
        captions[name] = (*captions.get(name, ()), str(annotation["caption"]))
    return captions


def _instances(
    path: Path,
    images: Iterable[Mapping[str, Any]],
    categories: Iterable[Mapping[str, Any]],
    annotations: Iterable[Mapping[str, Any]],
) -> Instances:
    by_id = {i["id"]: TruthImage(str(i["file_name"]), i.get("width"), i.get("height")) for i in images}
    _refuse_doubled(image.name for image in by_id.values())
    category_names = {category["id"]: str(category["name"]) for category in categories}
    objects: dict[tuple[str, str], list[TruthObject]] = {}
    for annotation in annotations:
        key = (by_id[annotation["image_id"]].name, category_names[annotation["category_id"]])
        objects.setdefault(key, []).append(_object(annotation))
    named = {image.name: image for image in by_id.values()}
    distinct = tuple(dict.fromkeys(category_names.values()))
    return Instances(path, named, distinct, {key: tuple(found) for key, found in objects.items()})


def _refuse_doubled(names: Iterable[str]) -> None:
    """Raise ValueError where two images have one name: which of them a record means cannot be told."""
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise ValueError(f"{len(doubled)} file_names stand for several images each, first {printable(doubled[0])}")


def _object(annotation: Mapping[str, Any]) -> TruthObject:
    x, y, width, height = map(float, annotation["bbox"])
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    area, mask = annotation.get("area"), annotation.get("segmentation")
    return TruthObject(
        (x, y, width, height),
        mask or [corners],
        bool(mask),
        float(width * height if area is None else area),
        bool(annotation.get("iscrowd", 0)),
    )
