"""labelme files read back by the rules of labelme and X-AnyLabeling; tests/programs runs their own loaders."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from finished_runs import (
    CAR,
    KINDS,
    NAMES,
    Run,
    detect_records,
    draw_pictures,
    failure,
    mixed_records,
    mixed_run,
    record,
)
from PIL import Image, ImageOps

from md3cli.errors import ExportError, UsageError

__all__ = ["mixed_run"]

POINTS = {"rectangle": (2, 2), "point": (1, 1), "polygon": (3, 10_000)}


def read(path: Path) -> dict[str, Any]:
    """Read a file as labelme 6 does (`_label_file.py`): what it would refuse fails here."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert document["imageData"] is None
    assert "\\" not in document["imagePath"]
    for shape in document["shapes"]:
        least, most = POINTS[shape["shape_type"]]
        assert least <= len(shape["points"]) <= most
        assert all(type(value) in (int, float) for point in shape["points"] for value in point)
        assert isinstance(shape["label"], str)
        assert (shape["flags"], shape["group_id"], shape["mask"]) == ({}, None, None)
    assert document["flags"] == {}
    return document


def documents(out: Path) -> dict[str, dict[str, Any]]:
    """All files below `out`; the picture of each is there, in the size that the file says."""
    found = {path.relative_to(out).as_posix(): read(path) for path in out.rglob("*.json")}
    for name, document in found.items():
        # Both programs find the file of a picture by the name without suffix.
        picture = (out / name).parent / document["imagePath"]
        assert picture.with_suffix(".json") == out / name
        with Image.open(picture) as image:
            assert ImageOps.exif_transpose(image).size == (document["imageWidth"], document["imageHeight"])
    return found


def test_a_file_beside_each_picture_with_every_shape(run: Run) -> None:
    run.write(mixed_records())
    report, out = run.export("labelme", "out")
    found = documents(out)
    assert len(found) == report.num_images == len(NAMES)
    assert report.num_failures == 2
    first = found["a/photo.json"]
    assert first["version"].startswith("5.")
    assert [(shape["label"], shape["shape_type"], shape["score"], shape["points"]) for shape in first["shapes"]] == [
        ("dog", "rectangle", 0.4, [[60, 8], [120, 48]]),
        ("car", "rectangle", 0.9, [[12, 20], [60, 60]]),
        ("ring", "polygon", 0.7, [[12, 20], [60, 20], [60, 60]]),
        ("nose", "point", 0.8, [[120, 20]]),
    ]
    assert found["empty.json"]["shapes"] == []


def test_texts_are_where_x_anylabeling_keeps_them(run: Run) -> None:
    run.write(mixed_records())
    _, out = run.export("labelme", "out")
    first, second = read(out / "a/photo.json"), read(out / "b/photo.json")
    assert first["description"] == "a car,\na <dog>"
    assert [(said["role"], said["content"]) for said in first["chat_history"]] == [
        ("user", "How many?"),
        ("assistant", "2 & 3"),
    ]
    assert not {"description", "chat_history"} & second.keys()


def test_equal_names_are_told_apart_with_their_pictures(run: Run) -> None:
    names = ["d/a.jpg", "d/a.png", "d/A.JPG", "d/a.png.png"]
    for number, name in enumerate(names):
        draw_pictures(run.root, [name])
        Image.new("RGB", (120, 80), (60 * number, 0, 0)).save(run.root / name, "PNG")
    boxes = [{**CAR, "x_max": 0.2 + number / 10} for number in range(len(names))]
    run.write(record(name, "detect", "car", objects=[box]) for name, box in zip(names, boxes, strict=True))
    _, out = run.export("labelme", "out")
    found = documents(out)
    assert {"d/a.json", "d/a.png.json"} <= found.keys()
    for name, document in found.items():
        with Image.open((out / name).parent / document["imagePath"]) as image:
            number = image.convert("RGB").getpixel((0, 0))[0] // 60
        assert document["shapes"][0]["points"][1][0] == pytest.approx(120 * boxes[number]["x_max"])
    assert len(found) == len(names)


def test_a_turned_picture_is_stored_upright(run: Run) -> None:
    """labelme turns it, X-AnyLabeling does not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 120)).save(run.root / "turned.jpg", exif=exif)
    run.write([record("turned.jpg", "detect", "car", objects=[CAR])])
    _, out = run.export("labelme", "out")
    assert documents(out)["turned.json"]["imageWidth"] == 120
    with Image.open(out / "turned.jpg") as image:
        assert (image.format, image.size, dict(image.getexif())) == ("JPEG", (120, 80), {})


def test_kinds_that_the_programs_do_not_open_become_png(run: Run) -> None:
    names = ["a.gif", "b.avif", "c.jfif"]
    Image.new("RGB", (120, 80)).save(run.root / "a.gif")
    Image.new("RGB", (120, 80)).save(run.root / "b.avif")
    Image.new("RGB", (120, 80)).save(run.root / "c.jfif", "JPEG")
    run.write(record(name, "detect", "car", objects=[CAR]) for name in names)
    _, out = run.export("labelme", "out")
    assert {document["imagePath"] for document in documents(out).values()} == {"a.png", "b.png", "c.jpg"}
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            assert image.format == "PNG"


def test_links_share_the_file_but_for_turned_pictures(mixed_run: Run) -> None:
    _, out = mixed_run.export("labelme", "out", is_linked=True)
    names = ("kinds/turned.jpg", "a/photo.jpg")
    assert [(out / name).samefile(mixed_run.root / name) for name in names] == [False, True]


def test_modes_that_labelme_stops_at_become_png(mixed_run: Run) -> None:
    _, out = mixed_run.export("labelme", "out")
    assert len(documents(out)) == len((*NAMES, *KINDS))
    found = {}
    for path in (out / "kinds").iterdir():
        if path.suffix != ".json":
            with Image.open(path) as image:
                found[path.name] = (image.format, image.mode)
    png, jpeg = ("PNG", "RGB"), ("JPEG", "RGB")
    made = dict.fromkeys(("moving.png", "new.png", "print.jpg", "deep.png", "few.tif"), png)
    assert found == {**made, "turned.jpg": jpeg, "PHOTO.jpg": jpeg}
    assert (out / "kinds/PHOTO.jpg").read_bytes() == (mixed_run.root / "kinds/PHOTO.jfif").read_bytes()


def test_without_pictures_the_files_are_written_and_told(run: Run) -> None:
    run.write([record(name, "detect", "car", objects=[CAR]) for name in ("gone.jpg", NAMES[0])])
    report, out = run.export("labelme", "out")
    assert read(out / "gone.json")["imagePath"] == "gone.jpg"
    assert any("1 pictures were not found" in note for note in report.notes)


def test_hostile_names_and_labels_stay_inside(run: Run, tmp_path: Path) -> None:
    label = '"},{\x00\x1b[31m\n‮'
    names = ["../../out.jpg", "/etc/passwd", "o\\p.png", "https://h.example/a.jpg", "no suffix 1.5", ".hidden.png"]
    run.write(record(name, "detect", label, objects=[{**CAR, "label": label}]) for name in names)
    before = sorted(tmp_path.rglob("*"))
    _, out = run.export("labelme", "out")
    assert [path for path in tmp_path.rglob("*") if path not in before and not path.is_relative_to(out)] == []
    found = {path.relative_to(out).as_posix(): read(path) for path in out.rglob("*.json")}
    assert len(found) == len(names)
    assert "no suffix 1.5.json" in found
    assert all(document["shapes"][0]["label"].isprintable() for document in found.values())


def test_beside_the_pictures_only_files_are_added(run: Run) -> None:
    run.write(mixed_records())
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    report, out = run.export("labelme", "out", beside=True)
    assert not out.exists()
    added = {path for path in run.root.rglob("*") if path.is_file()} - before.keys()
    assert len(added) == report.num_images == len(NAMES)
    assert {path.suffix for path in added} == {".json"}
    assert all(path.read_bytes() == content for path, content in before.items())
    for path in added:
        assert (path.parent / read(path)["imagePath"]).is_file()
    assert read(run.root / "a/photo.png.json")["imagePath"] == "photo.png"
    assert any("longer name" in note for note in report.notes)


def test_existing_files_are_refused_kept_or_replaced(run: Run) -> None:
    run.write(detect_records(["a/photo.jpg", "b/photo.jpg"]))
    mine = run.root / "b/photo.json"
    mine.write_text("{}")
    with pytest.raises(UsageError, match=r"b/photo\.json exists already"):
        run.export("labelme", "out", beside=True)
    assert not (run.root / "a/photo.json").exists()  # nothing at all was written
    report, _ = run.export("labelme", "out", beside=True, existing="skip")
    assert (mine.read_text(), len(read(run.root / "a/photo.json")["shapes"])) == ("{}", 2)
    assert any("1 files that were there already stay" in note for note in report.notes)
    run.export("labelme", "out", beside=True, existing="replace")
    assert len(read(mine)["shapes"]) == 2


@pytest.mark.parametrize("existing", ["append", "prepend"])
def test_a_json_cannot_be_added_to(run: Run, existing: str) -> None:
    run.write(detect_records())
    with pytest.raises(UsageError, match=f"--existing {existing} is for texts"):
        run.export("labelme", "out", beside=True, existing=existing)


def test_beside_pictures_that_are_not_there_nothing_is_written(run: Run) -> None:
    run.write([record("gone.jpg", "detect", "car", objects=[CAR])])
    with pytest.raises(ExportError, match="none of 1 pictures"):
        run.export("labelme", "out", beside=True)
    assert not list(run.root.rglob("*.json"))


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_name_that_is_not_utf_8_leads_to_its_picture(run: Run) -> None:
    exact = os.fsdecode(b"caf\xe9.png")
    try:
        Image.new("RGB", (120, 80)).save(run.root / exact)
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    shown = {"image": "caf\\xe9.png", "image_b64": "Y2Fm6S5wbmc="}
    run.write([{**record("x", "detect", "car", objects=[CAR]), **shown}])
    run.export("labelme", "out", beside=True)
    (path,) = run.root.glob("caf*.json")
    assert read(path)["imagePath"] == exact
    _, out = run.export("labelme", "out")
    assert documents(out).keys() == {"caf_xe9.json"}


def test_twins_of_a_tar_have_a_file_each(run: Run, tmp_path: Path) -> None:
    digests = []
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        for number in range(2):
            content = io.BytesIO()
            Image.new("RGB", (120, 80), (100 * number, 0, 0)).save(content, "PNG")
            member = tarfile.TarInfo("a.png")
            member.size = content.tell()
            tar.addfile(member, io.BytesIO(content.getvalue()))
            digests.append(hashlib.sha256(content.getvalue()).hexdigest())
    run.write(record("a.png", "detect", "car", objects=[CAR], sha256=digest, id=digest) for digest in digests)
    _, out = run.export("labelme", "out", root=tmp_path / "two.tar")
    assert documents(out).keys() == {"a.json", "a~2.json"}
    assert {hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.png")} == set(digests)


def test_what_stands_there_is_replaced_with_overwrite_only(run: Run) -> None:
    run.write([*detect_records(["a/photo.jpg"]), failure("broken.jpg", "detect", "dog")])
    _, out = run.export("labelme", "out")
    with pytest.raises(UsageError, match="exists already"):
        run.export("labelme", "out")
    run.write(detect_records(["b/photo.jpg"]))
    run.export("labelme", "out", overwrite=True)
    assert [path.relative_to(out).as_posix() for path in out.rglob("*.json")] == ["b/photo.json"]
