"""Finished runs to export: pictures with every kind of awkward name, and their records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from md3cli.exporters import ExportOptions, ExportReport, export_records
from md3cli.finished.records_file import NamedRecords, RecordsFiles
from md3cli.finished.run_json import seal_of
from md3cli.refine.collection import Collection
from md3cli.refine.labels import Labels, labels_with
from md3cli.refine.refinement import Refinement

Record = dict[str, Any]

WIDTH, HEIGHT = 120, 80
NAMES = (
    "a/photo.jpg",
    "b/photo.jpg",  # equal base names in two folders
    "a/photo.png",  # equal stems in one
    "train/station.jpg",
    "test_a.jpg",
    "übung/日本語 ☃.png",
    "empty.png",  # nothing found on it
    "line\nbreak.png",
    "n" * 251 + ".png",  # 255 bytes
)
CAR = {"label": "car", "x_min": 0.1, "y_min": 0.25, "x_max": 0.5, "y_max": 0.75, "score": 0.9}
DOG = {"label": "dog", "x_min": 0.5, "y_min": 0.1, "x_max": 1.2, "y_max": 0.6, "score": 0.4}  # leaves the image
NAME = NAMES[0]  # where something is said of objects
SMALL = {**CAR, "x_min": 0.6, "x_max": 0.7, "score": 0.3}
RING = {"label": "ring", "svg_path": "M 0 0 L 1 0 L 1 1 Z", "score": 0.7}  # half of its box
RING["bbox"] = {key: CAR[key] for key in ("x_min", "y_min", "x_max", "y_max")}
COLOUR, HOSTILE = "What colour is the car?", '"><b>&amp;\u202e\x07\n=1+1 {"a": null}'

# EXIF that says how to turn a picture, and whose maker is a number: Pillow reads it, and cannot write it again.
ODD_EXIF = b"Exif\0\0II*\0" + struct.pack("<IH HHII HHII III", 8, 2, 0x010F, 5, 1, 38, 0x0112, 3, 1, 6, 0, 1, 2)


def read_records(path: Path, notes: list[str] | None = None) -> Iterator[Record]:
    """The records of a file as commands read them, each request once; `notes` gets what a user should know."""
    with closing(RecordsFiles([NamedRecords(path)])) as file:
        if notes is not None:
            notes += file.notes
        for _, record in file.placed():
            yield record


def record(image: str | None, task: str, prompt: str | None = None, **fields: Any) -> Record:
    """An answered record; `fields` are its result keys, or replace others."""
    facts = {} if image is None else {"width": WIDTH, "height": HEIGHT, "sha256": "00"}
    return {
        "schema": "md3/1",
        "id": f"{task}-{prompt}-{image}",
        "image": image,
        "task": task,
        "prompt": prompt,
        "finish_reason": "stop",
        "tokens": {"prompt": 738, "output": 31},
        "model": "tiny@1",
        "meta": {},
        "error": None,
        **facts,
        **fields,
    }


def about(finder: Record, index: int, question: str | None, **fields: Any) -> Record:
    """A record about an object that `finder` found: an answer by itself, else what `fields` say."""
    thing = (finder.get("objects") or finder.get("segments"))[index]
    box = {key: thing.get("bbox", thing)[key] for key in ("x_min", "y_min", "x_max", "y_max")}
    region = {**box, "label": thing["label"], "of": finder["id"], "index": index}
    made = record(finder["image"], fields.pop("task", "query"), question, **fields, region=region)
    return made | {"id": f"{made['task']}-{question}-{index}-{finder['id']}"}


def failure(image: str, task: str, prompt: str) -> Record:
    """A failed record: no result, no size."""
    failed = record(image, task, prompt, error={"type": "decode", "message": "truncated", "retry": False})
    return {key: value for key, value in failed.items() if key not in ("width", "height", "finish_reason", "tokens")}


def write_records(path: Path, records: Iterable[Record]) -> Path:
    """`records` as a records file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in records), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Run:
    """A finished run on disk: `records.jsonl` and `run.json` in `folder`, pictures under `root`."""

    folder: Path
    root: Path

    @property
    def records(self) -> Path:
        return self.folder / "records.jsonl"

    def write(self, records: Iterable[Record]) -> Path:
        return write_records(self.records, records)

    def export(self, format: str, out: str, labels: Iterable[str] = (), **options: Any) -> tuple[ExportReport, Path]:
        """Export the run's records to `out` in its folder, under `labels` as OBJECTs are typed."""
        target, chosen = self.folder / out, Refinement(labels_with(labels, Labels()))
        records = Collection.of([self.records], chosen=chosen)
        return export_records(records, format, target, ExportOptions(**options)), target


def draw_pictures(root: Path, names: Iterable[str] = NAMES) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (40 * number % 256, 120, 200)).save(path)


def detect_records(names: Iterable[str] = NAMES) -> list[Record]:
    """`md3 detect` asked for dog and car, in this order; one image failed, one has no object."""
    records = []
    for name in names:
        is_empty = name.startswith("empty")
        records.append(record(name, "detect", "dog", objects=[] if is_empty else [DOG]))
        records.append(record(name, "detect", "car", objects=[] if is_empty else [CAR]))
    broken = [failure("broken.jpg", "detect", prompt) for prompt in ("dog", "car")]
    return [*broken, *records]


def family() -> list[Record]:
    """A picture with two cars and a ring, a caption and an answer of its own, and what was asked about the objects."""
    cars = record(NAME, "detect", "car", objects=[SMALL, CAR])
    ring = record(NAME, "segment", "ring", segments=[RING])
    return [
        cars,
        about(cars, 0, COLOUR, answer="red"),
        about(cars, 0, None, task="caption", length="short", caption="A small car."),
        about(cars, 1, COLOUR, answer=HOSTILE),
        about(cars, 1, "wheel", task="detect", objects=[DOG | {"label": "wheel"}]),
        ring,
        about(ring, 0, "Is it round?", answer="Yes"),
        record(NAME, "caption", length="short", caption="Cars."),
        record(NAME, "query", "How many?", answer="2"),
    ]


KINDS = {  # name -> Pillow's format and mode; readers of labels stop at one or the other
    "kinds/turned.jpg": ("JPEG", "RGB"),
    "kinds/moving.gif": ("GIF", "P"),
    "kinds/new.avif": ("AVIF", "RGB"),
    "kinds/PHOTO.jfif": ("JPEG", "RGB"),
    "kinds/print.jpg": ("JPEG", "CMYK"),
    "kinds/deep.png": ("PNG", "I;16"),
    "kinds/few.tif": ("TIFF", "P"),
}


def mixed_records(names: Iterable[str] = NAMES) -> list[Record]:
    """The boxes of `detect_records`, and on NAMES[0] a mask, a point, a caption and an answer."""
    return [
        *detect_records(names),
        record(NAMES[0], "segment", "ring", segments=[RING]),
        record(NAMES[0], "point", "nose", points=[{"label": "nose", "x": 1.0, "y": 0.25, "score": 0.8}]),
        record(NAMES[0], "caption", length="short", caption="a car,\na <dog>"),
        record(NAMES[0], "query", "How many?", answer="2 & 3"),
    ]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run without records yet: its pictures, and run.json that says where they are."""
    made = Run(tmp_path / "run", tmp_path / "pictures")
    made.folder.mkdir()
    draw_pictures(made.root)
    root = str(made.root)
    (made.folder / "run.json").write_text(json.dumps({"schema": "md3-run/1", "root": root, "seal": seal_of(root)}))
    return made


@pytest.fixture
def mixed_run(run: Run) -> Run:
    """The run with every task, and pictures of more kinds; one is turned by its EXIF, so that it is as the others."""
    (run.root / "kinds").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, (kind, mode) in KINDS.items():
        is_turned = "turned" in name
        picture = Image.new(mode, (HEIGHT, WIDTH) if is_turned else (WIDTH, HEIGHT))
        if mode == "P":
            picture.putpalette([255, 0, 0, 0, 255, 0])
        picture.save(run.root / name, kind, **({"exif": turned} if is_turned else {}))
    run.write(mixed_records((*NAMES, *KINDS)))
    return run


@pytest.fixture
def detect_run(run: Run) -> Run:
    """The run with boxes of two labels on every picture but one."""
    run.write(detect_records())
    return run
