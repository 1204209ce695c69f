"""YOLO read back by supervision, labelformat and a YAML reader."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import tarfile
from pathlib import Path

import pytest
import supervision as sv
import yaml
from finished_runs import CAR, DOG, NAMES, Run, detect_records, draw_pictures, record
from hypothesis import given
from hypothesis import strategies as st
from labelformat.formats.yolov8 import YOLOv8ObjectDetectionInput
from PIL import Image

from md3cli.errors import UsageError
from md3cli.exporters.splits import Splits
from md3cli.exporters.yolo import _yaml_string


def labels_of(out: Path) -> dict[str, str]:
    files = (path for path in (out / "labels").rglob("*.txt"))
    return {path.relative_to(out / "labels").as_posix(): path.read_text() for path in files}


def test_each_image_has_one_label_file_in_its_sub_folder(detect_run: Run) -> None:
    report, out = detect_run.export("yolo", "out")
    written = labels_of(out)
    assert len(written) == report.num_images == len(NAMES)
    assert written["a/photo.txt"] == "0 0.750000 0.350000 0.500000 0.500000\n1 0.300000 0.500000 0.400000 0.500000\n"
    assert written["empty.txt"] == ""
    assert {"a/photo.txt", "a/photo.png.txt", "b/photo.txt", "übung/日本語 ☃.txt"} <= set(written)


def test_labelformat_finds_every_image_with_its_boxes(detect_run: Run) -> None:
    _, out = detect_run.export("yolo", "out")
    labels = {
        label.image.filename: label.objects
        for label in YOLOv8ObjectDetectionInput(out / "data.yaml", "train").get_labels()
    }
    assert len(labels) == len(NAMES)
    assert [found.category.name for found in labels["a/photo.jpg"]] == ["dog", "car"]
    assert labels["a/photo.jpg"][1].box.xmin == pytest.approx(12)
    assert labels["empty.png"] == []


def test_supervision_reads_a_flat_folder(run: Run) -> None:
    run.write(detect_records(["test_a.jpg", "empty.png"]))
    _, out = run.export("yolo", "out")
    dataset = sv.DetectionDataset.from_yolo(str(out / "images"), str(out / "labels"), str(out / "data.yaml"))
    boxes = {Path(path).name: detections.xyxy.tolist() for path, _, detections in dataset}
    assert boxes == {"test_a.jpg": [[60, 8, 120, 48], [12, 20, 60, 60]], "empty.png": []}


def test_masks_make_every_line_a_polygon(run: Run) -> None:
    box = {key: CAR[key] for key in ("x_min", "y_min", "x_max", "y_max")}
    hole = "M 0 0 L 1 0 L 1 1 L 0 1 Z M 0.25 0.25 L 0.25 0.75 L 0.75 0.75 L 0.75 0.25 Z"
    segment = {"label": "ring", "svg_path": hole, "bbox": box, "score": 0.7}
    run.write([
        record("test_a.jpg", "detect", "car", objects=[CAR]),
        record("test_a.jpg", "segment", "ring", segments=[segment]),
    ])  # fmt: skip
    _, out = run.export("yolo", "out")
    dataset = sv.DetectionDataset.from_yolo(
        str(out / "images"), str(out / "labels"), str(out / "data.yaml"), force_masks=True
    )
    masks = next(detections.mask for path, _, detections in dataset if path.endswith("test_a.jpg"))
    assert masks is not None
    assert masks[0].sum() == pytest.approx(48 * 40, rel=0.06)
    assert masks[1].sum() == pytest.approx(48 * 40 * 0.75, rel=0.12)  # the hole stays one; its border is drawn


def test_linked_pictures_stand_beside_their_labels(detect_run: Run) -> None:
    _, out = detect_run.export("yolo", "out")
    images = [path for path in (out / "images").rglob("*") if path.is_file()]
    assert len(images) == len(NAMES)
    for image in images:
        label = out / "labels" / image.relative_to(out / "images").with_suffix(".txt")
        assert label.is_file(), label
    assert (out / "images/a/photo.png.png").read_bytes() == (detect_run.root / "a/photo.png").read_bytes()


def test_another_file_system_gets_copies_for_hard_links(detect_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    _, out = detect_run.export("yolo", "out", is_linked=True)
    copy, picture = out / "images/test_a.jpg", detect_run.root / "test_a.jpg"
    assert not copy.is_symlink()
    assert not copy.samefile(picture)
    assert copy.read_bytes() == picture.read_bytes()


def test_without_pictures_the_labels_are_written_and_told(detect_run: Run) -> None:
    (detect_run.folder / "run.json").unlink()
    report, out = detect_run.export("yolo", "out")
    assert len(labels_of(out)) == len(NAMES)
    assert "pictures were not found" in report.notes[0]


def test_replacing_does_not_harm_the_pictures(detect_run: Run) -> None:
    detect_run.export("yolo", "out")
    _, out = detect_run.export("yolo", "out", overwrite=True)
    assert len(labels_of(out)) == len(NAMES)
    assert all((detect_run.root / name).is_file() for name in NAMES)
    with pytest.raises(UsageError, match="was not made by md3"):
        detect_run.export("yolo", "../pictures", overwrite=True)
    assert all((detect_run.root / name).is_file() for name in NAMES)


def test_a_strangers_file_in_the_folder_is_kept(detect_run: Run) -> None:
    _, out = detect_run.export("yolo", "out")
    (out / "notes.md").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.md"):
        detect_run.export("yolo", "out", overwrite=True)
    assert (out / "notes.md").read_text() == "mine"


def test_names_keep_their_order_and_any_text(run: Run) -> None:
    labels = ["yes", "null", "a: b # c", 'say "hi"\n', "日本語 😀", "\x85\x7f", "- x"]
    draw_pictures(run.root, ["a.png"])
    run.write([record("a.png", "detect", label, objects=[{**DOG, "label": label}]) for label in labels])
    _, out = run.export("yolo", "out")
    data = yaml.safe_load((out / "data.yaml").read_text(encoding="utf-8"))
    assert data["names"] == dict(enumerate(labels))
    assert [line.split()[0] for line in labels_of(out)["a.txt"].splitlines()] == [str(n) for n in range(len(labels))]


@given(st.text())
def test_any_label_survives_yaml(text: str) -> None:
    assert yaml.safe_load(_yaml_string(text)) == text


AWKWARD = [
    "train/images/a.png",
    "val/images/b.png",
    "flat/c.png",
    "images/images/images/d.png",
    "images/e.png",
    "images_/e.png",
    "labels/f.png",
    "labels/images/g.png",
    "images/labels/images.png",
    "Images/h.png",
    "IMAGES/h.png",
    "images.d/i.jpg",
    "images/a.jpg",
    "images/a.png",
    "with.dots/and images/no suffix",
    "x.y/k",
    "l.jpe",
    "m.GIF",
    "n.JPG",
    "o\\images\\p.png",
    "images\n/q.png",
    "con/aux.jpg",
    "trailing. /s.png",
    ".hidden/t.png",
    "v/..u.png",
]


def where_trainers_look(picture: Path) -> Path:
    """As Ultralytics does it (ultralytics/data/utils.py, img2label_paths)."""
    return Path("/labels/".join(str(picture).rsplit("/images/", 1)).rsplit(".", 1)[0] + ".txt")


def test_labels_are_where_trainers_look_and_where_others_mirror(run: Run) -> None:
    names = AWKWARD
    for number, name in enumerate(names):
        path = run.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (120, 80), (number, 0, 0)).save(path, "PNG")
    found = [{**CAR, "x_max": 0.2 + number / 100} for number in range(len(names))]
    run.write(record(name, "detect", "car", objects=[box]) for name, box in zip(names, found, strict=True))
    report, out = run.export("yolo", "images/of/images")
    pictures = [path for path in (out / "images").rglob("*") if path.is_file()]
    assert len(pictures) == len(names) == report.num_images
    listed = glob.glob(f"{out}/images/**/*.*", recursive=True)  # as trainers do: nothing that is hidden
    assert {Path(name) for name in listed} >= set(pictures)
    for picture in pictures:
        label = where_trainers_look(picture)
        assert label == out / "labels" / picture.relative_to(out / "images").with_suffix(".txt")
        with Image.open(picture) as image:
            number = image.convert("RGB").getpixel((0, 0))[0]
        width = float(label.read_text().split()[3])
        assert width == pytest.approx(0.1 + number / 100, abs=1e-6)
    assert {path.suffix.lower() for path in pictures} <= {".jpg", ".jpeg", ".png"}
    assert not [path for path in pictures if set('\\:*?"<>|\n') & set(path.relative_to(out).as_posix())]


def test_names_of_addresses_have_their_label_where_trainers_look(run: Run) -> None:
    run.write([record("https://h.example/images/r.png", "detect", "car", objects=[CAR])])
    _, out = run.export("yolo", "out")
    assert list(labels_of(out)) == ["h.example/images_/r.txt"]


@pytest.mark.parametrize("names", [("d/b.jpg", "d/b.jpg/c.jpg"), ("d/b.jpg/c.jpg", "d/b.jpg")])
def test_a_tar_may_have_a_folder_called_as_a_picture(run: Run, tmp_path: Path, names: tuple[str, str]) -> None:
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        for name in names:
            content = io.BytesIO()
            Image.new("RGB", (120, 80)).save(content, "JPEG")
            member = tarfile.TarInfo(name)
            member.size = content.tell()
            content.seek(0)
            tar.addfile(member, content)
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    run.write(record(name, "detect", "car", objects=[CAR], sha256=digest) for name in names)
    _, out = run.export("yolo", "out", root=tmp_path / "two.tar")
    pictures = [path for path in (out / "images").rglob("*") if path.is_file()]
    assert len(pictures) == 2
    assert all(where_trainers_look(picture).is_file() for picture in pictures)


def test_sets_are_folders_and_a_flat_set_has_plain_names(detect_run: Run) -> None:
    splits = Splits((("train", 0.5), ("val", 0.5)))
    _, out = detect_run.export("yolo", "out", splits=splits, is_flat=True)
    data = yaml.safe_load((out / "data.yaml").read_text(encoding="utf-8"))
    assert (data["train"], data["val"]) == ("images/train", "images/val")
    labels = list((out / "labels").rglob("*.txt"))
    assert len(labels) == len(NAMES)
    assert len({path.stem.casefold() for path in labels}) == len(NAMES)
    for label in labels:
        assert re.fullmatch(r"(train|val)/[A-Za-z0-9._-]+\.txt", label.relative_to(out / "labels").as_posix())
        (picture,) = (out / "images" / label.parent.name).glob(f"{glob.escape(label.stem)}.*")
        assert picture.is_file()


@pytest.mark.parametrize("shares", [(("train", 1.0),), (("train", 1.0), ("val", 0.0))])
def test_a_set_that_is_missing_or_empty_is_stood_for(detect_run: Run, shares: tuple[tuple[str, float], ...]) -> None:
    _, out = detect_run.export("yolo", "out", splits=Splits(shares))
    data = yaml.safe_load((out / "data.yaml").read_text(encoding="utf-8"))
    assert (data["train"], data["val"]) == ("images/train", "images/train")


def test_a_flat_set_has_turned_pictures_upright(run: Run) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.new("RGB", (80, 120), "red")
    stored.paste("blue", (0, 0, 80, 10))  # upright this is the right edge
    for name, options in (("a.jpg", {"quality": 95}), ("a.png", {}), ("plain.jpg", {})):
        stored.save(run.root / name, exif=exif.tobytes() if name.startswith("a") else b"", **options)
    run.write([record(name, "detect", "car", objects=[CAR]) for name in ("a.jpg", "a.png")])
    for is_flat in (False, True):
        _, out = run.export("yolo", f"flat{is_flat}", is_flat=is_flat)
        for path in (out / "images").iterdir():
            with Image.open(path) as image:
                assert image.size == ((120, 80) if is_flat else (80, 120))
                assert bool(image.getexif()) is not is_flat
                if is_flat:
                    red, _, blue = image.convert("RGB").getpixel((115, 40))
                    assert red < 40 < 200 < blue


@pytest.mark.parametrize("name", ["images", "Labels", "path", "names", "download"])
def test_a_set_is_not_called_as_what_trainers_look_for(detect_run: Run, name: str) -> None:
    with pytest.raises(UsageError, match="--split"):
        detect_run.export("yolo", "out", splits=Splits(((name, 0.5), ("val", 0.5))))


def test_sets_by_a_column_that_is_not_there_leave_nothing(detect_run: Run) -> None:
    with pytest.raises(UsageError, match="patient"):
        detect_run.export("yolo", "out", splits=Splits((("train", 0.5), ("val", 0.5)), "patient"))
    assert not (detect_run.folder / "out").exists()
