"""Overlays opened again by PIL, and what is drawn on them looked at pixel by pixel."""

from __future__ import annotations

import base64
import os
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import CAR, DOG, HEIGHT, NAMES, WIDTH, Run, detect_records, draw_pictures, record
from fontTools.ttLib import TTFont
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from md3cli.errors import UsageError
from md3cli.exporters.grouping import ImageGroup
from md3cli.exporters.overlay import FONT_FILE, draw_records, fitted, font_of, shown, strokes
from md3cli.exporters.palette import COLOURS, Style, style_at
from md3cli.exporters.plates import Plates, Rect
from md3cli.exporters.splits import ONE_SET
from md3cli.source.walk import IMAGE_SUFFIXES


def names_in(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {".md3"}


def drawn(base: Image.Image, *records: dict[str, object], place: int = 0) -> np.ndarray:
    """What records look like on a picture, all labels in the style of `place`."""
    styles: dict[str, Style] = defaultdict(lambda: style_at(place))
    draw_records(base, ImageGroup("x", None, base.width, base.height, list(records)), styles)
    return np.asarray(base)


def test_every_picture_keeps_its_name_size_and_kind(detect_run: Run) -> None:
    report, out = detect_run.export("overlay", "out")
    assert names_in(out) == set(NAMES)
    assert report.num_images == len(NAMES)
    for name in NAMES:
        with Image.open(out / name) as image:
            assert image.size == (WIDTH, HEIGHT)
            assert image.format == {".jpg": "JPEG", ".png": "PNG"}[Path(name).suffix]


def test_boxes_are_drawn_where_they_are(run: Run) -> None:
    run.write([record("empty.png", "detect", "car", objects=[CAR])])
    _, out = run.export("overlay", "out")
    pixels = np.asarray(Image.open(out / "empty.png"))
    colour = COLOURS[0]
    for x, y in ((12, 40), (59, 40), (30, 20), (30, 59)):
        near = pixels[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3)
        assert (near == colour).all(axis=1).any(), (x, y)
    before = np.asarray(Image.open(run.root / "empty.png"))
    assert (pixels[65:, :] == before[65:, :]).all()
    assert (pixels[40, 30] == before[40, 30]).all()


@pytest.mark.parametrize("background", ["white", "black", "grey", (0, 0, 255), (255, 0, 0)])
@pytest.mark.parametrize("place", range(12))
def test_lines_stand_out_on_any_background(background: str, place: int) -> None:
    size = (640, 480)
    pixels = drawn(Image.new("RGB", size, background), record("x", "detect", "car", objects=[CAR]), place=place)
    plain = np.asarray(Image.new("RGB", size, background))
    rows = pixels[240:300, 50:80].astype(int)  # across the left side of the box, strokes and gaps
    is_seen = np.abs(rows - plain[240:300, 50:80].astype(int)).max(axis=(1, 2)) >= 100
    assert is_seen.mean() >= (1 if style_at(place).dash is None else 0.5)  # a gap may be as the background is


def test_a_mask_tints_its_area_and_leaves_its_hole() -> None:
    box = {"x_min": 0.25, "y_min": 0.25, "x_max": 0.75, "y_max": 0.75}
    path = "M 0 0 L 1 0 L 1 1 L 0 1 Z M 0.25 0.25 L 0.25 0.75 L 0.75 0.75 L 0.75 0.25 Z"
    segment = {"label": "ring", "svg_path": path, "bbox": box, "score": 0.5}
    pixels = drawn(Image.new("RGB", (800, 800), "white"), record("x", "segment", "ring", segments=[segment]))
    assert (pixels[400, 400] == 255).all()
    assert (pixels[250, 400] != 255).any()
    assert (pixels[100, 400] == 255).all()


def test_a_point_is_a_dot_of_its_labels_colour() -> None:
    point = {"label": "nose", "x": 0.5, "y": 0.5, "score": 0.5}
    pixels = drawn(Image.new("RGB", (400, 400), "black"), record("x", "point", "nose", points=[point]))
    assert tuple(pixels[200, 200]) == COLOURS[0]


def test_lines_and_letters_grow_with_the_picture() -> None:
    def coloured(scale: int) -> int:
        size = (160 * scale, 120 * scale)
        pixels = drawn(Image.new("RGB", size, "white"), record("x", "detect", "car", objects=[CAR]))
        return int((pixels == COLOURS[0]).all(axis=2).sum())

    assert coloured(16) > 8 * 4 * coloured(4) / 5  # area grows with the square: lines of the same width would give 4


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 2)])
def test_the_smallest_pictures_can_be_drawn_on(size: tuple[int, int]) -> None:
    everything = {"label": "a very long label " * 9, "x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1, "score": 0.5}
    assert drawn(Image.new("RGB", size), record("x", "detect", "car", objects=[everything])).shape[:2] == size[::-1]


def test_a_turned_picture_is_drawn_upright(run: Run) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "Secret camera"
    exif.get_ifd(0x8825)[1] = "N"
    picture = Image.new("RGB", (HEIGHT, WIDTH), "white")
    picture.save(run.root / "turned.jpg", exif=exif, comment=b"secret", xmp=b"<x>secret</x>", icc_profile=b"secret")
    run.write([record("turned.jpg", "detect", "car", objects=[CAR])])
    _, out = run.export("overlay", "out")
    content = (out / "turned.jpg").read_bytes()
    with Image.open(out / "turned.jpg") as image:
        assert image.size == (WIDTH, HEIGHT)
        assert not image.getexif()
        assert not {"comment", "xmp", "icc_profile"} & set(image.info)
    assert b"ecret" not in content


def test_other_kinds_become_png_beside_equal_names(run: Run) -> None:
    for name in ("photo.webp", "photo.webp.png", "photo.gif", "photo.PNG"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(run.root / name)
    names = ("photo.webp.png", "photo.webp", "photo.gif", "photo.PNG")
    run.write([record(name, "detect", "car", objects=[]) for name in names])
    _, out = run.export("overlay", "out")
    assert len(names_in(out)) == 4
    assert {"photo.webp.png", "photo.gif.png", "photo.PNG"} <= names_in(out)
    assert {Path(name).suffix.lower() for name in names_in(out)} <= IMAGE_SUFFIXES


def test_names_that_climb_out_are_not_opened(run: Run) -> None:
    draw_pictures(run.root.parent, ["secret.png"])
    run.write([record(name, "detect", "car", objects=[]) for name in ("../secret.png", "empty.png")])
    report, out = run.export("overlay", "out")
    assert names_in(out) == {"empty.png"}
    assert "1 pictures cannot be read" in report.notes[0]
    _, out = run.export("overlay", "trusted", is_confined=False)
    assert names_in(out) == {"empty.png", "secret.png"}


def test_names_that_are_not_utf8_are_found_by_their_bytes(run: Run) -> None:
    exact = os.fsdecode(b"\xff.png")
    os.rename(run.root / "empty.png", run.root / exact)
    run.write([record("\\xff.png", "detect", "car", objects=[], image_b64=base64.b64encode(b"\xff.png").decode())])
    for format in ("overlay", "hf", "yolo"):
        report, out = run.export(format, format)
        assert (report.num_images, {*report.notes} - {ONE_SET}) == (1, set())
        assert sum(path.suffix == ".png" for path in out.rglob("*")) == 1


def test_pictures_that_cannot_be_read_any_more_are_told(detect_run: Run) -> None:
    (detect_run.root / NAMES[0]).write_bytes(b"no picture")
    (detect_run.root / NAMES[1]).unlink()
    report, out = detect_run.export("overlay", "out")
    assert names_in(out) == set(NAMES[2:])
    assert "2 pictures cannot be read" in report.notes[0]


def test_originals_are_never_replaced(detect_run: Run) -> None:
    before = {name: (detect_run.root / name).read_bytes() for name in NAMES}
    for out in ("../pictures", "../pictures/a"):
        with pytest.raises(UsageError):
            detect_run.export("overlay", out, overwrite=True)
    assert {name: (detect_run.root / name).read_bytes() for name in NAMES} == before


def test_pictures_in_a_tar_are_found(run: Run) -> None:
    tar = run.folder / "pictures.tar"
    with tarfile.open(tar, "w") as archive:
        for name in NAMES[:3]:
            archive.add(run.root / name, name)
    run.write(detect_records(NAMES[:3]))
    _, out = run.export("overlay", "out", root=tar)
    assert names_in(out) == set(NAMES[:3])


def test_the_font_covers_latin_greek_and_cyrillic() -> None:
    text = "Straße déjà Łódź Ελληνικά ῥήτωρ Русский Ђорђе"
    assert shown(text) == text
    covered = set(TTFont(FONT_FILE).getBestCmap())
    assert shown("".join(map(chr, sorted(covered & set(range(0x370, 0x530)))))).count("[") == 0


def test_other_characters_are_shown_by_their_number() -> None:
    assert shown("汽车 bus") == "[6C7D][8F66] bus"
    assert shown("😀") == "[1F600]"
    assert shown("a\n\tb \x1b") == "a b \\x1b"
    assert shown("汽") != shown("车")


@pytest.mark.process
@given(st.text(max_size=80))
def test_a_fitted_text_is_no_wider_than_allowed(text: str) -> None:
    font = font_of(12)
    assert font.getlength(fitted(shown(text), font, 60)) <= 60


def test_labels_have_the_colours_of_their_order(run: Run) -> None:
    half = {**DOG, "x_max": 0.9}
    run.write([record("empty.png", "detect", "car", objects=[]), record("empty.png", "detect", "dog", objects=[half])])
    for labels, place in (((), 1), (("dog",), 0)):
        _, out = run.export("overlay", f"out{place}", labels=labels)
        pixels = np.asarray(Image.open(out / "empty.png"))
        counts = [(pixels == colour).all(axis=2).sum() for colour in COLOURS[:2]]
        assert counts[place] > 50 > counts[1 - place]


@pytest.mark.parametrize("place", [4, 8])
def test_dashes_have_gaps_and_keep_the_corners(place: int) -> None:
    pixels = drawn(Image.new("RGB", (640, 480)), record("x", "detect", "car", objects=[CAR]), place=place)
    is_ink = (pixels == style_at(place).colour).all(axis=2)
    line = is_ink[359, 64:320]  # the lower side; the label's plate lies above the upper one
    assert 0.4 < line.mean() < 0.75
    assert line[:2].all()
    assert line[-2:].all()
    assert is_ink[120:360, 64].sum() < is_ink[120:360, 64].size


def test_a_mask_is_outlined_with_its_dash() -> None:
    box = {"x_min": 0.25, "y_min": 0.25, "x_max": 0.75, "y_max": 0.75}
    segment = {"label": "ring", "svg_path": "M 0 0 L 1 0 L 1 1 L 0 1 Z", "bbox": box, "score": 0.5}
    shares = [
        (
            drawn(Image.new("RGB", (800, 800)), record("x", "segment", "ring", segments=[segment]), place=place)[
                600, 200:600
            ]
            == style_at(place).colour
        )
        .all(axis=1)
        .mean()
        for place in (0, 4, 8)
    ]
    assert shares[0] == 1
    assert 0.4 < shares[2] < shares[1] < 0.75


def test_strokes_bend_with_the_line_and_keep_their_length() -> None:
    line = [(0.0, 0.0), (10.0, 0.0), (10.0, 10.0)]
    assert list(strokes(line, (8, 4))) == [[(0.0, 0.0), (8.0, 0.0)], [(10.0, 2.0), (10.0, 10.0)]]
    assert list(strokes(line, (12, 2))) == [[(0.0, 0.0), (10.0, 0.0), (10.0, 2.0)], [(10.0, 4.0), (10.0, 10.0)]]
    assert list(strokes([(0.0, 0.0), (0.0, 0.0)], (2, 2))) == [[(0.0, 0.0), (0.0, 0.0)]]


def test_each_label_is_named_before_any_is_named_twice() -> None:
    """On a picture of 64 pixels there is no room for four names."""
    many = [{**CAR, "x_min": x, "x_max": x + 0.3, "y_min": 0.3, "y_max": 0.7, "score": 0.9} for x in (0.05, 0.35, 0.65)]
    truck = {**many[1], "label": "bus", "score": 0.2}
    image = Image.new("RGB", (64, 48))
    records = [record("x", "detect", "car", objects=many), record("x", "detect", "bus", objects=[truck])]
    draw_records(image, ImageGroup("x", None, 64, 48, list(records)), {"car": style_at(0), "bus": style_at(1)})
    plates = [(np.asarray(image) == style_at(place).colour).all(axis=2).sum() for place in (0, 1)]
    assert plates[1] > 9 * 12  # far more than the lines of the box


@pytest.mark.parametrize("size", [(64, 48), (640, 480), (4000, 3000)])
def test_a_name_has_whole_letters_on_its_plate(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the letters and the plate's outline lies a pixel of its colour at least, on all sides."""
    taken: list[Rect] = []
    take = Plates.take

    def noted(*args: Any) -> Rect | None:
        place = take(*args)
        taken.extend([place] if place is not None else [])
        return place

    monkeypatch.setattr(Plates, "take", noted)
    pixels = drawn(Image.new("RGB", size, "white"), record("x", "detect", "car", objects=[CAR]))
    ((left, top, right, bottom),) = taken
    plate = pixels[round(top) + 1 : round(bottom) - 1, round(left) + 1 : round(right) - 1]
    for side in (plate[0], plate[-1], plate[:, 0], plate[:, -1]):
        assert (side == COLOURS[0]).all()
    assert (plate != COLOURS[0]).any(axis=2).mean() > 0.15  # letters


def test_one_worker_and_several_write_the_same_files(detect_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (detect_run.root / NAMES[4]).write_bytes(b"no picture")
    made = {}
    for number in (1, 2, 7):
        monkeypatch.setattr("md3cli.exporters.at_once.num_cores", lambda number=number: number)
        far: list[tuple[int, int | None]] = []
        report, out = detect_run.export("overlay", f"out{number}", told=lambda *now, far=far: far.append(now))
        files = {name: (out / name).read_bytes() for name in names_in(out)}
        made[number] = files, (out / ".md3").read_bytes(), report.notes, far
    assert made[1] == made[2] == made[7]
    assert len(made[1][0]) == len(NAMES) - 1
    assert made[1][3] == [(0, None), *((number, len(NAMES)) for number in range(len(NAMES)))]
