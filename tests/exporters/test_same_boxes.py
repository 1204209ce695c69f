"""Names, thresholds and doubles give the same boxes in every format, the report, the overlay and the scores.

One run: several prompts a name, limits of labels' own, a label that is never found, one that was never asked, failed
records, records without objects, points and masks. What each format shows is read back and compared in pixels.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from finished_runs import Run, failure, record, run
from PIL import Image
from typer.testing import CliRunner

from md3cli.cli import app
from md3cli.exporters.palette import palette
from md3cli.refine.labels import read_labels
from md3cli.refine.refinement import Refinement, refined

__all__ = ["run"]
WIDTH, HEIGHT = 400, 200  # boxes have whole pixels, so that VOC holds them, too
PICTURES = [f"p{n}.png" for n in range(6)]
LABELS = """
[[label]]
name = "ghost"
[[label]]
name = "vehicle"
prompts = ["car", "automobile"]
[[label]]
name = "animal"
prompts = ["dog"]
min_score = 0.2
[[label]]
name = "cat"
nms = 0.3
[[label]]
name = "bus"
min_score = 0.9
[[label]]
name = "nose"
"""
OPTIONS = ["--min-score", "0.4"]
CATEGORIES = ["ghost", "vehicle", "animal", "cat", "bus", "nose"]  # all of the file, found or not


class Shown(NamedTuple):
    """A box as somebody shows it: whole pixels; the score where the format has one."""

    image: str
    label: str
    x: int
    y: int
    width: int
    height: int


def boxes_of(draws: random.Random, prompt: str, count: int) -> list[dict[str, Any]]:
    """Boxes of which some overlap: their corners lie on a coarse grid."""
    found = []
    for _ in range(count):
        x, y = draws.randrange(0, 5) * 40, draws.randrange(0, 4) * 20
        width, height = draws.choice([80, 90, 160]), draws.choice([60, 70, 80])
        edges = {"x_min": x / WIDTH, "y_min": y / HEIGHT, "x_max": (x + width) / WIDTH, "y_max": (y + height) / HEIGHT}
        found.append({"label": prompt, **edges, "score": round(draws.uniform(0.05, 0.95), 3)})
    return found


def records_of_run(task: str) -> list[dict[str, Any]]:
    draws, lines = random.Random(8), []
    for place, image in enumerate(PICTURES):
        for prompt in ("car", "automobile", "dog", "cat", "bus"):
            if (image, prompt) == ("p3.png", "automobile"):
                lines.append(failure(image, task, prompt))
                continue
            found = boxes_of(draws, prompt, 0 if place == 4 or prompt == "bus" else 5)
            result: dict[str, Any] = {"objects": found}
            if task == "segment":
                path = "M 0 0 L 1 0 L 1 1 L 0 1 z"
                corners = ("x_min", "y_min", "x_max", "y_max")
                result = {
                    "segments": [
                        {"label": prompt, "svg_path": path, "bbox": {c: box[c] for c in corners}, "score": box["score"]}
                        for box in found
                    ]
                }
            lines.append(record(image, task, prompt, width=WIDTH, height=HEIGHT, **result))
        points = [{"label": "nose", "x": 0.1 * n, "y": 0.5, "score": 0.3 + 0.1 * n} for n in range(3)]
        lines.append(record(image, "point", "nose", width=WIDTH, height=HEIGHT, points=points))
    return [
        line | {"id": f"{n:032x}", "sha256": f"{PICTURES.index(line['image']):064x}"} for n, line in enumerate(lines)
    ]


@pytest.fixture(params=["detect", "segment"])
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(run: Run, task: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder, with labels.toml in it, as the working folder."""
    for name in PICTURES:
        Image.new("RGB", (WIDTH, HEIGHT), (30, 30, 30)).save(run.root / name)
    run.write(records_of_run(task))
    (run.folder / "labels.toml").write_text(LABELS)
    monkeypatch.chdir(run.folder)
    return run.folder


def md3(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments), "--labels", "labels.toml", *OPTIONS])
    assert result.exit_code == 0, result.output
    return result.stdout


def expected(task: str) -> list[Shown]:
    """What the pure function shows, picture by picture."""
    refinement, key = (
        Refinement(read_labels(Path("labels.toml")), min_score=0.4),
        {"segment": "segments"}.get(task, "objects"),
    )
    shown = []
    for image, records in groupby(records_of_run(task), lambda one: str(one["image"])):
        for one in refined([*records], refinement):
            for thing in one.get(key) or ():
                box = thing.get("bbox") or thing
                x, y, right, bottom = (
                    round(box[name] * side)
                    for name, side in (("x_min", WIDTH), ("y_min", HEIGHT), ("x_max", WIDTH), ("y_max", HEIGHT))
                )
                shown.append(Shown(image, thing["label"], x, y, right - x, bottom - y))
    return shown


def whole(*numbers: float) -> Iterator[int]:
    """Pixels that a format gives as decimals; they must be whole but for its rounding."""
    for number in numbers:
        assert number == pytest.approx(round(number), abs=0.02)
        yield round(number)


def test_the_fixture_has_something_of_everything(folder: Path, task: str) -> None:
    shown, told = Counter(box.label for box in expected(task)), Counter[str]()
    for one in records_of_run(task):
        told[{"car": "vehicle", "automobile": "vehicle", "dog": "animal"}.get(one["prompt"], one["prompt"])] += len(
            one.get("objects") or one.get("segments") or ()
        )
    assert set(shown) == {"vehicle", "animal", "cat"}
    assert all(0 < shown[label] < told[label] for label in shown)
    doubles = sum(len(one.get("objects", ())) for one in records_of_run("detect")) - len(expected("detect"))
    assert doubles > sum(
        thing["score"] < {"dog": 0.2}.get(one["prompt"], 0.4)
        for one in records_of_run("detect")
        for thing in one.get("objects", ())
    )


def test_coco(folder: Path, task: str) -> None:
    document = json.loads(md3("export", ".", "-f", "coco"))
    assert [one["name"] for one in document["categories"]] == CATEGORIES
    names = {one["id"]: one["file_name"] for one in document["images"]}
    labels = {one["id"]: one["name"] for one in document["categories"]}
    shown = [
        Shown(names[one["image_id"]], labels[one["category_id"]], *whole(*one["bbox"]))
        for one in document["annotations"]
    ]
    assert shown == expected(task)
    results = json.loads(md3("export", ".", "-f", "coco", "--coco-results"))
    assert [Shown(names[one["image_id"]], labels[one["category_id"]], *whole(*one["bbox"])) for one in results] == shown


def test_yolo(folder: Path, task: str) -> None:
    md3("export", ".", "-f", "yolo", "-o", "yolo")
    names = yaml.safe_load(Path("yolo/data.yaml").read_text())["names"]
    assert names == dict(enumerate(CATEGORIES))
    shown = []
    for image in PICTURES:
        text = Path("yolo/labels", image).with_suffix(".txt").read_text()
        for place, *numbers in (line.split() for line in text.splitlines()):
            if task == "detect":
                x, y, width, height = map(float, numbers)
                left, top = x - width / 2, y - height / 2
            else:  # a polygon
                xs, ys = [*map(float, numbers[::2])], [*map(float, numbers[1::2])]
                left, top, width, height = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
            pixels = whole(left * WIDTH, top * HEIGHT, width * WIDTH, height * HEIGHT)
            shown.append(Shown(image, names[int(place)], *pixels))
    assert shown == expected(task)


def test_voc(folder: Path, task: str) -> None:
    md3("export", ".", "-f", "voc", "-o", "voc")
    shown = []
    for image in PICTURES:
        for thing in ElementTree.parse(Path("voc/Annotations", image).with_suffix(".xml")).iter("object"):
            left, top, right, bottom = (
                int(thing.findtext(f"bndbox/{edge}") or "") for edge in ("xmin", "ymin", "xmax", "ymax")
            )
            pixels = left - 1, top - 1, right - left + 1, bottom - top + 1  # VOC counts pixels from 1, ends included
            shown.append(Shown(image, thing.findtext("name") or "", *pixels))
    assert shown == expected(task)


def test_labelstudio(folder: Path, task: str) -> None:
    md3("export", ".", "-f", "labelstudio", "-o", "ls.json")
    shown = []
    for one in json.loads(Path("ls.json").read_text()):
        image = one["data"]["image"].rsplit("/", 1)[1]
        for found in one["predictions"][0]["result"]:
            value, kind = found["value"], found["type"]
            if kind == "rectanglelabels":
                percent = value["x"], value["y"], value["width"], value["height"]
            elif kind == "polygonlabels":
                xs, ys = zip(*value["points"], strict=True)
                percent = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
            else:
                assert kind == "keypointlabels"
                continue
            pixels = (share * side / 100 for share, side in zip(percent, (WIDTH, HEIGHT) * 2, strict=True))
            shown.append(Shown(image, value[kind][0], *whole(*pixels)))
    assert shown == expected(task)
    listed = re.findall('<Label value="([a-z]+)"', Path("ls.xml").read_text())
    assert list(dict.fromkeys(listed)) == CATEGORIES


def test_csv(folder: Path, task: str) -> None:
    rows = list(csv.DictReader(md3("export", ".", "-f", "csv").splitlines()))
    shown = [
        Shown(row["image"], row["label"], *whole(*(float(row[key]) for key in "xywh")))
        for row in rows
        if row["task"] == task and row["label"]
    ]
    assert shown == expected(task)
    assert {row["id"] for row in rows} == {line["id"] for line in records_of_run(task)}  # none is lost
    points = [(row["label"], float(row["score"])) for row in rows if row["task"] == "point"]
    assert points == [("nose", 0.4), ("nose", 0.5)] * len(PICTURES)


def test_crops(folder: Path, task: str) -> None:
    md3("export", ".", "-f", "crops", "-o", "crops")
    shown, written = [], {one["id"]: one for one in records_of_run(task)}
    for row in csv.DictReader(Path("crops/crops.csv").read_text().splitlines()):
        left, top, right, bottom = (int(row[key]) for key in ("x_min", "y_min", "x_max", "y_max"))
        shown.append(Shown(row["image"], row["label"], left, top, right - left, bottom - top))
        found = written[row["id"]].get("objects") or written[row["id"]]["segments"]
        box = found[int(row["index"])].get("bbox") or found[int(row["index"])]  # as the model said it
        assert [round(box["x_min"] * WIDTH), round(box["y_max"] * HEIGHT)] == [left, bottom]
        assert Image.open(Path("crops", row["file"])).size == (right - left, bottom - top)
    assert shown == expected(task)


def test_hf(folder: Path, task: str) -> None:
    md3("export", ".", "-f", "hf", "-o", "hf")
    shown = []
    for row in map(json.loads, Path("hf/train/metadata.jsonl").read_text().splitlines()):
        objects = row["objects"]
        for label, place, box in zip(objects["labels"], objects["categories"], objects["bbox"], strict=True):
            assert CATEGORIES[place] == label
            shown.append(Shown(Path(row["file_name"]).name, label, *whole(*box)))
    assert shown == expected(task)


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_records(folder: Path, task: str, format: str) -> None:
    md3("export", ".", "-f", format, "-o", f"r.{format}")
    path, key = Path(f"r.{format}"), "objects" if task == "detect" else "segments"
    rows = (
        pq.read_table(path).to_pylist()
        if format == "parquet"
        else [json.loads(line) for line in path.read_text().splitlines()]
    )
    assert [row["id"] for row in rows] == [line["id"] for line in records_of_run(task)]
    shown = []
    for row in rows:
        for thing in row.get(key) or ():
            box = thing.get("bbox") or thing
            x, y = box["x_min"] * WIDTH, box["y_min"] * HEIGHT
            pixels = whole(x, y, box["x_max"] * WIDTH - x, box["y_max"] * HEIGHT - y)
            shown.append(Shown(row["image"], thing["label"], *pixels))
    assert shown == expected(task)
    num_points = [len(row["points"]) for row in rows if row["task"] == "point"]
    assert num_points == [2] * len(PICTURES)


def test_report(folder: Path, task: str) -> None:
    md3("report", ".", "-o", "r.html")
    data = re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', Path("r.html").read_text(), re.DOTALL)
    assert data is not None
    shown = []
    for card in (card for piece in json.loads(data[1])["cards"] for card in piece):
        scale = (card.get("frame") or [320.0, 160.0])[0] / WIDTH
        for one in card["records"]:
            for shape in one.get("shapes") or ():
                if shape.get("rect"):
                    pixels = whole(*(side / scale for side in shape["rect"]))
                    shown.append(Shown(card["name"], shape["label"], *pixels))
    assert shown == expected(task)


def test_overlay(folder: Path, task: str) -> None:
    """Each box has its label's colour on its sides; and the picture is that of the records as they are shown."""
    md3("export", ".", "-f", "overlay", "-o", "overlay")
    styles = palette(CATEGORIES)
    pixels = {name: np.asarray(Image.open(Path("overlay", name))) for name in PICTURES}
    shares: list[float] = []
    for box in expected(task) if task == "detect" else ():  # outlines of masks lie under the tints of later ones
        is_colour = (pixels[box.image] == styles[box.label].colour).all(axis=2)
        around, inside = np.zeros((2, HEIGHT, WIDTH), bool)
        around[max(box.y - 3, 0) : box.y + box.height + 3, max(box.x - 3, 0) : box.x + box.width + 3] = True
        inside[box.y + 3 : box.y + box.height - 3, box.x + 3 : box.x + box.width - 3] = True
        shares.append((is_colour & around & ~inside).sum() / (2 * (box.width + box.height)))
    assert not shares or (min(shares) > 0.05 and np.mean(shares) > 0.3), shares  # names and other boxes lie over some
    for name in PICTURES:
        colours = {tuple(map(int, one)) for one in pixels[name].reshape(-1, 3)}
        found = {label for label, style in styles.items() if tuple(style.colour) in colours}
        assert found == {box.label for box in expected(task) if box.image == name} | {"nose"}
    md3("select", ".", "--refined", "-o", "shown.jsonl")
    md3("export", "shown.jsonl", "-f", "overlay", "-o", "again")
    for name in PICTURES:
        assert (np.asarray(Image.open(Path("again", name))) == pixels[name]).all(), name


def test_eval(folder: Path, task: str) -> None:
    """Against a truth of exactly these boxes nothing is missed and nothing is too much."""
    shown = expected(task)
    annotations = [
        {"id": n, "image_id": PICTURES.index(box.image), "category_id": CATEGORIES.index(box.label), "iscrowd": 0}
        | {"bbox": [*box[2:]], "area": box.width * box.height}
        | {
            "segmentation": [
                [
                    box.x,
                    box.y,
                    box.x + box.width,
                    box.y,
                    box.x + box.width,
                    box.y + box.height,
                    box.x,
                    box.y + box.height,
                ]
            ]
        }
        for n, box in enumerate(shown, 1)
    ]
    images = [{"id": n, "file_name": name, "width": WIDTH, "height": HEIGHT} for n, name in enumerate(PICTURES)]
    categories = [{"id": n, "name": name} for n, name in enumerate(CATEGORIES)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    Path("gt.json").write_text(json.dumps(truth))
    sections = json.loads(md3("eval", ".", "--gt", "gt.json", "--json"))["sections"]
    (section,) = (one for one in sections if one["name"] == {"detect": "boxes", "segment": "masks"}[task])
    assert section["scores"]["precision"] == section["scores"]["recall"] == section["scores"]["F1"] == 1
    assert json.loads(md3("stats", ".", "--json"))["labels"] == Counter(
        {"ghost": 0, "bus": 0} | Counter(box.label for box in shown) | {"nose": 2 * len(PICTURES)}
    )
