"""Ground truth files: COCO instances, COCO captions, or questions with their answers; and what a true text is.

The content of a JSON file says which of the three it is; truth_rows.py reads tables. Images keep the names that the
file gives them. Knows no records.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from md3cli.errors import InputError
from md3cli.records import printable

MOST_TEXTS = 10_000  # that are true of one thing


@dataclass(frozen=True, slots=True)
class TruthImage:
    """An image of the ground truth; size in pixels, None where the file does not say."""

    name: str
    width: int | None
    height: int | None


@dataclass(frozen=True, slots=True)
class TruthObject:
    """One annotated object, in pixels. `mask` is COCO's: polygons, or run lengths; None where there is a box alone."""

    bbox: tuple[float, float, float, float]  # x, y, width, height
    mask: list[list[float]] | dict[str, Any] | None
    area: float
    is_crowd: bool
    id: int | str | None = None  # by which the file knows it

    def in_pixels(self, size_wh: tuple[int, int]) -> TruthObject:
        """Return an object that is given in shares, in pixels of a picture of this size."""
        scale = (*size_wh, *size_wh)
        x, y, width, height = (value * side for value, side in zip(self.bbox, scale, strict=True))
        mask = self.mask
        if isinstance(mask, list):
            mask = [[value * size_wh[place % 2] for place, value in enumerate(ring)] for ring in mask]
        return replace(self, bbox=(x, y, width, height), mask=mask, area=self.area * size_wh[0] * size_wh[1])

    @property
    def segmentation(self) -> list[list[float]] | dict[str, Any]:
        """The mask, else the box's outline."""
        x, y, width, height = self.bbox
        return self.mask or [[x, y, x + width, y, x + width, y + height, x, y + height]]


@dataclass(frozen=True, slots=True)
class Instances:
    """Objects, as COCO has them. `objects` by (image name, category name).

    `are_shares`: boxes and polygons are shares of the picture, 0-1, whose size the file does not say.
    """

    path: Path
    images: Mapping[str, TruthImage]
    categories: tuple[str, ...]
    objects: Mapping[tuple[str, str], tuple[TruthObject, ...]]
    notes: tuple[str, ...] = ()  # sentences about what of the file is not scored; of the others, too
    # The names of images by what a run over this very file calls its rows; of the others, too.
    rows: Mapping[str, str] = field(default_factory=dict)
    are_shares: bool = False


@dataclass(frozen=True, slots=True)
class Captions:
    """Reference captions by image name."""

    path: Path
    captions: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()
    rows: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Questions:
    """Accepted answers by (image name or None, question)."""

    path: Path
    answers: Mapping[tuple[str | None, str], tuple[str, ...]]
    notes: tuple[str, ...] = ()
    rows: Mapping[str, str] = field(default_factory=dict)


Truth = Instances | Captions | Questions


def read_document(path: Path, labelme_of: Callable[[Path, Mapping[str, Any]], Instances]) -> Truth:
    """Read a ground truth in JSON or JSON Lines; `labelme_of` makes one of what labelme writes.

    Raises:
        InputError: the file cannot be read, or is of no known kind; the message says which kinds there are.
    """
    document = _read_json(path)
    try:
        if isinstance(document, list):
            return _questions(path, document)
        if "shapes" in document:
            return labelme_of(path, document)
        annotations = document["annotations"]
        if annotations and "caption" in annotations[0]:
            return Captions(path, _captions(document["images"], annotations))
        return _instances(path, document["images"], document["categories"], annotations)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(
            f"{printable(str(path))} is no ground truth that md3 knows ({type(error).__name__}: {error}): it reads "
            "COCO instances, COCO captions, a list (JSON or JSON Lines) of {image, question, answer}, a table (.csv "
            ".tsv .parquet), a YOLO data.yaml, a labelme file, or a folder of YOLO or labelme files"
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


def _questions(path: Path, rows: Iterable[Mapping[str, Any]]) -> Questions:
    answers: dict[tuple[str | None, str], list[str]] = {}
    num_read = num_missing = 0
    for row in rows:
        num_read += 1
        if texts := true_texts(row["answer"]):
            answers.setdefault((row["image"], str(row["question"]).strip()), []).extend(texts)
        else:
            num_missing += 1
    missing = f"{num_missing:,} of {num_read:,} rows: no 'answer' in {printable(str(path))}, so not scored"
    found = {key: tuple(texts) for key, texts in answers.items()}
    return Questions(path, found, (missing,) if num_missing else ())


def true_texts(value: object, *, reads_json: bool = False) -> tuple[str, ...]:
    """Return the true texts that a value says: a text, a list of them, or VQA's list of {"answer": text}.

    Numbers are written as people do (2.0 is "2"), truth values as yes and no; what is null or blank is left out.

    Args:
        reads_json: a text that is a JSON list is that list, as a table has no other way to say one.

    Raises:
        ValueError: it holds something else, or more than `MOST_TEXTS`.
    """
    if reads_json and isinstance(value, str) and value.strip().startswith("["):
        value = _list_in(value)
    texts = tuple(map(_true_text, value if isinstance(value, list | tuple) else [value]))
    if len(texts) > MOST_TEXTS:
        raise ValueError(f"{len(texts):,} true answers to one question; at most {MOST_TEXTS:,}")
    return tuple(filter(str.strip, texts))


def _list_in(text: str) -> object:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list) else text


def _true_text(value: object) -> str:
    if isinstance(value, Mapping) and "answer" in value:
        value = value["answer"]
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping | list):
        raise ValueError(f"{'a list' if isinstance(value, list) else 'an object'} is no true answer")
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


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
        objects.setdefault(key, []).append(truth_object(annotation))
    named = {image.name: image for image in by_id.values()}
    distinct = tuple(dict.fromkeys(category_names.values()))
    return Instances(path, named, distinct, {key: tuple(found) for key, found in objects.items()})


def _refuse_doubled(names: Iterable[str]) -> None:
    """Raise ValueError where two images have one name: which of them a record means cannot be told."""
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise ValueError(f"{len(doubled)} file_names stand for several images each, first {printable(doubled[0])}")


def truth_object(annotation: Mapping[str, Any]) -> TruthObject:
    """Return the object of a COCO annotation; raises KeyError, TypeError or ValueError where it has no box."""
    x, y, width, height = map(float, annotation["bbox"])
    if not all(map(math.isfinite, (x, y, width, height))):
        raise ValueError("a bbox has a number that is not finite")
    area = annotation.get("area")
    return TruthObject(
        (x, y, width, height),
        annotation.get("segmentation") or None,
        float(width * height if area is None else area),
        bool(annotation.get("iscrowd", 0)),
        name if isinstance(name := annotation.get("id"), int | str) else None,
    )
