"""Ground truth that lies in many small files: YOLO's (data.yaml, a .txt a picture) and labelme's (a JSON a picture).

YOLO's boxes are shares of the picture, whose size it does not say. Its pictures are listed where they are beside the
labels; one without a file, or with an empty one, has nothing in it. Elsewhere its label files are, and pictures are
called without suffix. A labelme picture without a JSON is not known. An annotation is known by its file and its place:
`labels/a.txt:3` is a line, `a.json#2` a shape, both from 1. Opens no picture, and holds one file's text at a time.
Source: https://docs.ultralytics.com/datasets/detect/ and the loaders named in exporters/labelme.py.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from md3cli.errors import InputError, UsageError
from md3cli.evaluate.truth import Instances, TruthImage, TruthObject
from md3cli.records import printable
from md3cli.refine.labels import FILE_LIMIT_BYTES, lines_of, names_by_number, read_text, yaml_document
from md3cli.source.walk import has_image_suffix, natural_sorted

SHAPES_LIMIT_BYTES = 1 << 28  # of a labelme file, in which the picture may stand, too
MOST_FILES = 10_000_000
_YAML = (".yaml", ".yml")
_SETS = ("train", "val", "test")
_CLASSES = "classes.txt"
Objects = dict[tuple[str, str], list[TruthObject]]


def read_folder(path: Path) -> Instances:
    """Read a data.yaml, or a folder of YOLO or labelme files.

    Raises:
        InputError: it cannot be read, or is neither; the message says what was looked for, or which file is damaged.
    """
    try:
        if not path.is_dir():
            return _read_yolo(path)
        found = _yaml_in(path) or next(filter(Path.is_file, (path / _CLASSES, path / "labels" / _CLASSES)), None)
        return _read_labelme(path) if found is None else _read_yolo(found)
    except UsageError as error:  # of a file that can also be one of --labels
        raise InputError(str(error)) from error
    except OSError as error:
        where = printable(str(error.filename or path))
        raise InputError(f"cannot read {where}: {error.strerror or error}") from error


def _yaml_in(folder: Path) -> Path | None:
    """Return the data.yaml of a folder, or the one file that could be it under another name."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _YAML and file.is_file())
    named = [file for file in files if file.stem.lower() in ("data", "dataset")]
    return named[0] if named else files[0] if len(files) == 1 else None


def _walk(folder: Path, fits: Callable[[str], bool]) -> Iterator[Path]:
    """Yield the files below a folder whose names fit, in natural order; no hidden ones, and none behind a link."""
    num_files = 0

    def stop(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=stop):
        folders[:] = natural_sorted([name for name in folders if not name.startswith(".")])
        for name in natural_sorted([name for name in files if not name.startswith(".") and fits(name)]):
            num_files += 1
            if num_files > MOST_FILES:
                raise InputError(f"{printable(str(folder))} has more than {MOST_FILES:,} files")
            yield Path(parent, name)


# ---- YOLO ------------------------------------------------------------------------------------------


def _read_yolo(file: Path) -> Instances:
    where, text, folder = f"--gt {printable(str(file))}", read_text(file, "--gt"), file.parent
    if file.suffix.lower() in _YAML:
        document = yaml_document(text, where)
        names, has_points = names_by_number(document, where), "kpt_shape" in document
        root, folders = _places(document, folder, where)
    else:
        names, has_points = dict(enumerate(lines_of(text))), False
        root = folder.parent if folder.name == "labels" else folder
        folders = [root / "images" if (root / "labels").is_dir() else root]
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise InputError(f"{where}: two classes are called {printable(twice[0])}")
    images: dict[str, TruthImage] = {}
    objects: Objects = {}
    for name, label in _labelled(root, folders):
        images.setdefault(name, TruthImage(name, None, None))
        for number, row in enumerate(_rows(label), start=1):
            if row:
                known_by = f"{_below(root, label)}:{number}"
                category, thing = _yolo_object(
                    row, names, has_points, f"{printable(str(label))}, line {number}", known_by
                )
                objects.setdefault((name, category), []).append(thing)
    if not images:
        looked = ", ".join(printable(str(one)) for one in folders)
        raise InputError(f"{where} leads to no pictures and no label files; looked in {looked}")
    frozen = {key: tuple(found) for key, found in objects.items()}
    return Instances(file, images, tuple(names.values()), frozen, are_shares=True)


def _places(document: Mapping[str, Any], folder: Path, where: str) -> tuple[Path, list[Path]]:
    """Return the root of a data set, and the folders of pictures and lists of them that its sets name."""
    path = document.get("path")
    root = folder / path if isinstance(path, str) and (folder / path).is_dir() else folder
    found: dict[Path, None] = {}
    for name in _SETS:
        value = document.get(name)
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, str) and entry:
                # As Ultralytics does: many a data.yaml says ../train/images of what lies beside it.
                ways = (root / entry, root / entry.removeprefix("../"))
                found.setdefault(next((way for way in ways if way.exists()), ways[0]), None)
    if not found:
        raise InputError(f"{where} names no pictures; it needs train, val or test")
    return root, list(found)


def _labelled(root: Path, folders: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Yield each picture's name, below the root where it lies there, with the file that would have its labels."""
    for folder in folders:
        if folder.is_file():  # a list of pictures
            for line in lines_of(read_text(folder, "--gt")):
                picture = folder.parent / line
                yield _below(root, picture), _label_of(picture)
            continue
        num_pictures = 0
        for picture in _walk(folder, has_image_suffix) if folder.is_dir() else ():
            num_pictures += 1
            yield _below(root, picture), _label_of(picture)
        labels = _label_of(folder / "_").parent
        if not num_pictures and labels.is_dir():
            for label in _walk(labels, lambda name: name.lower().endswith(".txt") and name.lower() != _CLASSES):
                yield _below(root, folder / label.relative_to(labels).with_suffix("")), label


def _label_of(picture: Path) -> Path:
    """Return where a picture's labels are: where the last `images` of its path is `labels`."""
    parts = list(picture.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _below(root: Path, path: Path) -> str:
    """Return the path from the root, else its last three parts, so that it can be told from others."""
    whole, start = os.path.normpath(path), os.path.normpath(root)
    relative = os.path.relpath(whole, start)
    return Path(*Path(whole).parts[-3:] if relative.startswith("..") else Path(relative).parts).as_posix()


def _rows(label: Path) -> Iterator[list[str]]:
    if label.is_file():
        with label.open("rb") as file:
            text = file.read(FILE_LIMIT_BYTES + 1)
        if len(text) > FILE_LIMIT_BYTES:
            raise InputError(f"{printable(str(label))} has more than {FILE_LIMIT_BYTES:,} bytes")
        yield from (line.split() for line in text.decode("utf-8-sig", "replace").splitlines())


def _yolo_object(
    row: Sequence[str], names: Mapping[int, str], has_points: bool, where: str, known_by: str
) -> tuple[str, TruthObject]:
    """Return the class and the object of a line: a box (a score, or points of a body, may follow), or a polygon."""
    try:
        number, *values = int(float(row[0])), *map(float, row[1:])
        category = names.get(number)
        if not all(map(math.isfinite, values)) or len(values) < 4:
            raise ValueError("it needs four finite numbers")
    except (ValueError, OverflowError) as error:
        raise InputError(f"{where}: no line of YOLO's (class x y width height, or a polygon): {error}") from error
    if category is None:
        raise InputError(f"{where}: class {number} has no name")
    if len(values) >= 6 and len(values) % 2 == 0 and not has_points:
        return category, _polygon(values, known_by)
    x, y, width, height = values[:4]
    bbox = (x - width / 2, y - height / 2, width, height)
    return category, TruthObject(bbox, None, width * height, is_crowd=False, id=known_by)


def _polygon(ring: list[float], known_by: str) -> TruthObject:
    left, top = min(ring[::2]), min(ring[1::2])
    width, height = max(ring[::2]) - left, max(ring[1::2]) - top
    return TruthObject((left, top, width, height), [ring], width * height, is_crowd=False, id=known_by)


# ---- labelme ---------------------------------------------------------------------------------------


def labelme_of(path: Path, document: Mapping[str, Any]) -> Instances:
    """Return the boxes of one labelme file; raises KeyError, TypeError or ValueError where it is damaged."""
    images: dict[str, TruthImage] = {}
    objects: Objects = {}
    num_other = _add_labelme(document, Path(path.name), images, objects)
    return _labelme(path, images, objects, num_other)


def _read_labelme(folder: Path) -> Instances:
    images: dict[str, TruthImage] = {}
    objects: Objects = {}
    num_other = 0
    for file in _walk(folder, lambda name: name.lower().endswith(".json")):
        with file.open("rb") as stream:
            text = stream.read(SHAPES_LIMIT_BYTES + 1)
        if len(text) > SHAPES_LIMIT_BYTES:
            raise InputError(f"{printable(str(file))} has more than {SHAPES_LIMIT_BYTES:,} bytes")
        try:
            document = json.loads(text)
            if isinstance(document, dict) and "shapes" in document:
                num_other += _add_labelme(document, file.relative_to(folder), images, objects)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            why = f"{type(error).__name__}: {error}"
            raise InputError(f"{printable(str(file))} is no labelme file that can be read ({why})") from error
    if not images:
        raise InputError(
            f"{printable(str(folder))} is no ground truth that md3 knows: a folder has YOLO's data.yaml (or "
            "classes.txt with its labels), or labelme's JSON files"
        )
    return _labelme(folder, images, objects, num_other)


def _labelme(path: Path, images: dict[str, TruthImage], objects: Objects, num_other: int) -> Instances:
    categories = tuple(dict.fromkeys(label for _, label in objects))
    frozen = {key: tuple(found) for key, found in objects.items()}
    notes = (f"shapes without an area (points, lines), which are no boxes: {num_other:,}",) if num_other else ()
    return Instances(path, images, categories, frozen, notes)


def _add_labelme(document: Mapping[str, Any], file: Path, images: dict[str, TruthImage], objects: Objects) -> int:
    """Add a file's picture and boxes; return how many of its shapes have no area."""
    # The picture lies beside its JSON, whatever folder it was in when it was labelled.
    image = str(document["imagePath"]).replace("\\", "/").rpartition("/")[2]
    name = (file.parent / image).as_posix()
    sides = [document.get(key) for key in ("imageWidth", "imageHeight")]
    width, height = (
        side if isinstance(side, int) and not isinstance(side, bool) and side > 0 else None for side in sides
    )
    images.setdefault(name, TruthImage(name, width, height))
    num_other = 0
    for number, shape in enumerate(document["shapes"], start=1):
        ring = _ring_of(shape)
        if ring is None:
            num_other += 1
            continue
        thing = _polygon(ring, f"{file.as_posix()}#{number}")
        objects.setdefault((name, str(shape["label"])), []).append(thing)
    return num_other


def _ring_of(shape: Mapping[str, Any]) -> list[float] | None:
    """Return the outline of a shape in pixels, x and y in turn; None where it has no area."""
    points = [(float(x), float(y)) for x, y in shape["points"]]
    if not all(math.isfinite(value) for point in points for value in point):
        raise ValueError("a point that is not finite")
    kind = shape.get("shape_type", "polygon")
    if kind == "circle" and len(points) == 2:
        (x, y), edge = points[0], math.dist(*points)
        points = [(x - edge, y - edge), (x + edge, y + edge)]
    is_box = kind in ("rectangle", "circle", "mask") and len(points) == 2
    if is_box:
        (left, top), (right, bottom) = points
        points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    elif kind not in ("polygon", "rectangle", "rotation") or len(points) < 3:
        return None
    return [value for point in points for value in point]
