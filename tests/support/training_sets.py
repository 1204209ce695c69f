"""Runs for trainers and readers: pictures with the names and the bytes that data sets break on, and boxes on them.

Equal names, folders called `images`, other letters, EXIF that turns a picture, kinds that a suffix hides, pictures
without objects, failures. `boxes_in_pixels` says what a reader must find, whatever the format.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finished_runs import Record, Run, failure, record
from PIL import Image
from typer.testing import CliRunner

from md3cli.cli import app

LABELS = ("red circle", "Straße ☃")
SIDES = (120, 80)
NAMES = (
    "images/a.jpg",
    "images/a.png",
    "a.jpg",
    "train/images/b.jpg",
    "images/images/c.png",
    "labels/d.jpg",
    "labels/images/e.png",
    "val/images/labels/f.webp",
    "images/turned 6.jpg",
    "turned 8.jpg",
    "übung/日本語 ☃.png",
    "images/empty.jpg",
    "empty.png",
    "line\nbreak.png",
    ".hidden/.h.png",
    "no suffix",
    "UPPER.JPG",
    "moving.gif",
    "a gif in truth.jpg",
    "an avif in truth.jpg",
    "more bytes.jpg",  # behind the JPEG's end: Ultralytics 8.3 writes such a file anew, in place
    "many.jpeg",
    "x.y/z.tiff",
    *(f"rows/{n}.bmp" for n in range(8)),
)
HALF_FAILED = "a.jpg"  # the second label was asked in vain
BROKEN = "broken.jpg"  # both were
KINDS = {".png": "PNG", ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP", ".tiff": "TIFF"}
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tiff"})  # of pictures in a set
Box = tuple[str, float, float, float, float]


def size_of(name: str) -> tuple[int, int]:
    """The upright size."""
    return SIDES[::-1] if "turned" in name else SIDES


def draw(path: Path, number: int) -> None:
    """Write a picture as its name says: turned ones lie on their side, with the EXIF tag that turns them back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = KINDS.get(path.suffix, "JPEG")
    if "in truth" in path.name:
        kind = path.name.split()[1].upper()
    exif = Image.Exif()
    if "turned" in path.name:
        exif[0x0112] = int(path.stem[-1])
    Image.new("RGB", SIDES, (7 * number % 256, 120, 200)).save(path, kind, exif=exif)
    if path.name == "more bytes.jpg":
        path.write_bytes(path.read_bytes() + b"end")


def boxes_of(name: str) -> dict[str, list[dict[str, float]]]:
    """What the model said of a picture, for each label: corners in 0-1, some outside the picture."""
    draws, count = random.Random(name), 0 if "empty" in name else 40 if name == "many.jpeg" else 2
    found: dict[str, list[dict[str, float]]] = {}
    for label in LABELS:
        corners = [(draws.uniform(-0.1, 0.6), draws.uniform(-0.1, 0.6)) for _ in range(count)]
        found[label] = [
            {"x_min": x, "y_min": y, "x_max": x + draws.uniform(0.2, 0.5), "y_max": y + draws.uniform(0.2, 0.5)}
            for x, y in corners
        ]
    return found


def records_of(root: Path, task: str, names: Iterable[str]) -> list[Record]:
    """The records of `md3 detect` or `segment`, of pictures below `root`, failures among them."""
    lines = [failure(BROKEN, task, label) for label in LABELS]
    for name in names:
        width, height = size_of(name)
        facts = {"width": width, "height": height, "sha256": digest_of(root / name)}
        for label, boxes in boxes_of(name).items():
            if (name, label) == (HALF_FAILED, LABELS[1]):
                lines.append(failure(name, task, label))
            elif task == "detect":
                objects = [{"label": label, **box, "score": 0.9} for box in boxes]
                lines.append(record(name, task, label, **facts, objects=objects))
            else:
                inside = [{edge: min(max(value, 0.0), 1.0) for edge, value in box.items()} for box in boxes]
                path = {"label": label, "svg_path": "M 0 0 L 1 0 L 1 1 L 0 1 Z", "score": 0.9}
                lines.append(record(name, task, label, **facts, segments=[{**path, "bbox": box} for box in inside]))
    return lines


def boxes_in_pixels(name: str) -> list[Box]:
    """What a reader must find on a picture: labels and corners, from the top left, inside the picture."""
    width, height = size_of(name)
    found = []
    for label, boxes in boxes_of(name).items():
        for box in [] if (name, label) == (HALF_FAILED, LABELS[1]) else boxes:
            x_min, y_min, x_max, y_max = (min(max(edge, 0.0), 1.0) for edge in box.values())
            found.append((label, x_min * width, y_min * height, x_max * width, y_max * height))
    return found


def make_run(run: Run, task: str, names: Iterable[str] = NAMES) -> Run:
    """Draw the pictures of a run and write its records."""
    names = list(names)
    for number, name in enumerate((*names, BROKEN)):
        draw(run.root / name, number)
    run.write(records_of(run.root, task, names))
    return run


def export(run: Run, format: str, out: str, *options: str) -> Path:
    """`md3 export` of a run, into its folder."""
    target = run.folder / out
    words = ["export", str(run.folder), "-f", format, "-o", str(target), *options]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return target


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names_of_pictures(run: Run, out: Path) -> dict[str, str]:
    """The record's name of each picture below `out`, by its path there: copies have its bytes, others are new files."""
    originals = {digest_of(run.root / name): name for name in NAMES if (run.root / name).exists()}
    new = (name for name in NAMES if "gif" in name or "avif" in name or "turned" in name)
    made_anew = {Path(name).with_suffix("").as_posix().replace("/", " "): name for name in new}
    found = {}
    for path in (path for path in out.rglob("*") if path.suffix.lower() in SUFFIXES):
        name = originals.get(digest_of(path)) or made_anew[path.stem.replace("_", " ")]
        found[path.relative_to(out).as_posix()] = name
    return found


def worst_edges(shown: Mapping[str, Sequence[Sequence[Any]]], names: Iterable[str]) -> tuple[float, ...]:
    """How far the edges (left, top, right, bottom) that a reader shows are from the true ones at most, in pixels.

    Fails unless it shows each of the pictures `names`, and as many boxes of each label as there are. A shown box is
    compared with the nearest true one; where the picture's border cuts boxes there is no order to go by.
    """
    assert sorted(shown) == sorted(names)
    worst = [0.0] * 4
    for name, boxes in shown.items():
        true = boxes_in_pixels(name)
        assert Counter(label for label, *_ in boxes) == Counter(label for label, *_ in true), name
        for label, *edges in boxes:
            away = [[abs(a - b) for a, b in zip(edges, box[1:], strict=True)] for box in true if box[0] == label]
            worst = list(map(max, worst, min(away, key=max)))
    return tuple(worst)
