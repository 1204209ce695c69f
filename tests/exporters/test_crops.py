"""Crops opened again and compared with the pixels they were cut out of."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import CAR, DOG, HEIGHT, NAMES, WIDTH, Record, Run, detect_records, failure, record
from PIL import Image

from md3cli.errors import UsageError
from md3cli.exporters import crops
from md3cli.images.rects import padded_rect

PLAIN = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+_[0-9]+\.jpg")
SQUARE = "M 0 0 L 1 0 L 1 1 L 0 1 Z"


def table(out: Path) -> list[dict[str, str]]:
    with (out / "crops.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def files(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*.jpg")}


def gradient(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """A picture whose every pixel tells its place, smooth enough for JPEG."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([x, y, 255 - x], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def check_pixels(out: Path, row: dict[str, str], picture: np.ndarray) -> None:
    left, top, right, bottom = (int(row[key]) for key in ("x_min", "y_min", "x_max", "y_max"))
    with Image.open(out / row["file"]) as image:
        assert image.format == "JPEG"
        assert image.size == (right - left, bottom - top)
        assert np.abs(np.asarray(image).astype(int) - picture[top:bottom, left:right]).max() <= 12


def test_each_box_is_a_file_and_a_row_of_its_pixels(run: Run) -> None:
    pixels = gradient(run.root / "a/photo.png")
    segment = {"label": "cat", "svg_path": SQUARE, "bbox": {k: CAR[k] for k in ("x_min", "y_min", "x_max", "y_max")}}
    run.write(
        [
            record("a/photo.png", "detect", "car", objects=[CAR, DOG | {"label": "car"}]),
            record("a/photo.png", "segment", "cat", segments=[segment]),
        ]
    )
    report, out = run.export("crops", "out")
    rows = table(out)
    assert [row["file"] for row in rows] == ["car/a_photo_0.jpg", "car/a_photo_1.jpg", "cat/a_photo_0.jpg"]
    assert [(row["label"], row["image"], row["id"], row["index"]) for row in rows] == [
        ("car", "a/photo.png", "detect-car-a/photo.png", "0"),
        ("car", "a/photo.png", "detect-car-a/photo.png", "1"),
        ("cat", "a/photo.png", "segment-cat-a/photo.png", "0"),
    ]
    assert [int(rows[0][key]) for key in ("x_min", "y_min", "x_max", "y_max")] == [12, 20, 60, 60]
    for row in rows:
        check_pixels(out, row, pixels)
    assert report.num_images == 1


def test_room_around_a_box(run: Run) -> None:
    pixels = gradient(run.root / "empty.png")
    run.write([record("empty.png", "detect", "car", objects=[CAR])])
    _, out = run.export("crops", "out", pad=0.25)
    (row,) = table(out)
    assert [int(row[key]) for key in ("x_min", "y_min", "x_max", "y_max")] == [0, 10, 72, 70]
    check_pixels(out, row, pixels)


def test_names_are_plain_and_told_apart(detect_run: Run) -> None:
    more = [
        record("A/PHOTO.JPG", "detect", "car", objects=[CAR]),
        record("b/photo.jpg", "detect", "Car", objects=[CAR | {"label": "Car"}]),
        record("b/photo.jpg", "detect", "日本", objects=[CAR | {"label": "日本"}]),
        record("b/photo.jpg", "detect", "../..", objects=[CAR | {"label": "../.."}]),
        record("b/photo.jpg", "detect", "crops.csv", objects=[CAR | {"label": "crops.csv"}]),
        record("b/photo.jpg", "detect", "con", objects=[CAR | {"label": "con"}]),
    ]
    (detect_run.root / "A").mkdir(exist_ok=True)
    gradient(detect_run.root / "A/PHOTO.JPG")
    detect_run.write([*detect_records(), *more])
    report, out = detect_run.export("crops", "out")
    rows = table(out)
    assert len(rows) == len(files(out)) == 2 * (len(NAMES) - 1) + len(more)
    assert {row["file"] for row in rows} == files(out)
    assert all(map(PLAIN.fullmatch, files(out)))
    assert len({name.lower() for name in files(out)}) == len(rows)
    assert len({row["file"].partition("/")[0].lower() for row in rows}) == 7  # dog, car and those of `more`
    assert report.num_failures == 2


def test_the_number_of_an_object_is_its_place_in_the_record_as_written(run: Run) -> None:
    unsure = CAR | {"score": 0.1}
    run.write([record("empty.png", "detect", "car", objects=[unsure, CAR, unsure, DOG])])
    document = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps(document | {"refinement": {"min_score": 0.3}}))
    _, out = run.export("crops", "out", labels=["vehicle=car"])
    assert [(row["index"], row["label"]) for row in table(out)] == [("1", "vehicle"), ("3", "vehicle")]
    assert files(out) == {"vehicle/empty_0.jpg", "vehicle/empty_1.jpg"}


def test_doubles_are_left_out_and_numbers_stay(run: Run) -> None:
    near = CAR | {"x_min": 0.11, "score": 0.95, "label": "van"}
    run.write(
        [record("empty.png", "detect", "car", objects=[DOG, CAR]), record("empty.png", "detect", "van", objects=[near])]
    )
    _, out = run.export("crops", "out", labels=["vehicle=car", "vehicle=van"])
    assert [(row["id"].split("-")[1], row["index"]) for row in table(out)] == [("car", "0"), ("van", "0")]


def test_points_and_boxes_outside_are_told(run: Run) -> None:
    outside = CAR | {"x_min": 1.2, "x_max": 1.5}
    run.write(
        [
            record("empty.png", "point", "nose", points=[{"label": "nose", "x": 0.5, "y": 0.5}]),
            record("empty.png", "detect", "car", objects=[CAR, outside, CAR | {"x_max": 0.1}]),
        ]
    )
    report, out = run.export("crops", "out")
    assert len(table(out)) == 1
    assert any("1 point was left out" in note for note in report.notes)
    assert any("2 boxes were left out" in note for note in report.notes)


def test_what_is_too_large_for_jpeg_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops, "JPEG_SIDE_PX", 50)
    run.write([record("empty.png", "detect", "car", objects=[CAR, CAR | {"x_max": 0.9}])])
    report, out = run.export("crops", "out")
    assert len(table(out)) == 1
    assert any("1 boxes were left out" in note for note in report.notes)


def test_nothing_to_cut_out(run: Run) -> None:
    run.write([record("empty.png", "caption", caption="empty", length="short"), failure("b.jpg", "detect", "car")])
    report, out = run.export("crops", "out")
    assert table(out) == []
    assert "the records hold no boxes to cut out" in report.notes


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_boxes_are_of_the_upright_picture(run: Run, orientation: int) -> None:
    upright = gradient(run.root / "upright.png")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Secret camera"
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    Image.fromarray(upright).transpose(turn).save(run.root / "turned.png", exif=exif)
    run.write([record("turned.png", "detect", "car", objects=[CAR])])
    _, out = run.export("crops", "out")
    (row,) = table(out)
    check_pixels(out, row, upright)
    assert b"ecret" not in (out / row["file"]).read_bytes()


def test_pictures_that_are_gone_or_damaged_are_told(detect_run: Run) -> None:
    (detect_run.root / "a/photo.jpg").unlink()
    (detect_run.root / "b/photo.jpg").write_bytes(b"no picture")
    report, out = detect_run.export("crops", "out")
    assert len(table(out)) == 2 * (len(NAMES) - 3)
    assert any(note.startswith("2 pictures cannot be read") for note in report.notes)


def test_a_cell_that_a_spreadsheet_would_run_is_guarded(run: Run) -> None:
    gradient(run.root / "=cmd().png")
    run.write([record("=cmd().png", "detect", "@car", objects=[CAR | {"label": "@car"}])])
    _, out = run.export("crops", "out")
    (row,) = table(out)
    assert (row["image"], row["label"]) == ("'=cmd().png", "'@car")


def test_transparent_pictures_lie_on_what_the_run_laid_them_on(run: Run) -> None:
    Image.new("RGBA", (WIDTH, HEIGHT), (255, 0, 0, 0)).save(run.root / "clear.png")
    run.write([record("clear.png", "detect", "car", objects=[CAR])])
    document = json.loads((run.folder / "run.json").read_text())

    def colour(out: str, **options: Any) -> tuple[int, ...]:
        _, folder = run.export("crops", out, **options)
        with Image.open(folder / "car/clear_0.jpg") as image:
            return image.getpixel((5, 5))  # type: ignore[return-value]  # of RGB

    assert colour("plain") == (254, 0, 0)
    (run.folder / "run.json").write_text(json.dumps(document | {"identity": {"background": "white"}}))
    assert colour("seen") == (255, 255, 255)
    assert colour("typed", background="blue") == (0, 0, 254)
    assert colour("dropped", background="none") == (254, 0, 0)
    backgrounds = {"backgrounds": ["white", "none"]}
    (run.folder / "run.json").write_text(json.dumps(document | backgrounds))
    with pytest.raises(UsageError, match="--background"):
        colour("either")


def many(names: Iterable[str], boxes: int) -> list[Record]:
    objects = [CAR | {"x_max": 0.2 + number / 1000} for number in range(boxes)]
    return [record(name, "detect", "car", objects=objects) for name in names]


def test_rows_come_in_order_however_many_work(run: Run) -> None:
    run.write(many(NAMES, 20))
    _, out = run.export("crops", "out")
    rows = table(out)
    assert [row["image"] for row in rows] == [name for name in NAMES for _ in range(20)]
    assert [int(row["index"]) for row in rows] == [*range(20)] * len(NAMES)
    for row in rows[:40]:
        rect = padded_rect(CAR | {"x_max": 0.2 + int(row["index"]) / 1000}, WIDTH, HEIGHT)
        assert rect == tuple(int(row[key]) for key in ("x_min", "y_min", "x_max", "y_max"))
