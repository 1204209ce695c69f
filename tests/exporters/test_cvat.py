"""CVAT for images 1.1 read back by the rules of CVAT's loader; tests/programs asks datumaro and cvat-sdk."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from finished_runs import CAR, NAMES, Run, detect_records, draw_pictures, mixed_records, record
from PIL import Image

from md3cli.errors import UsageError


def images_of(out: Path) -> list[ET.Element]:
    """The `<image>` elements, once the document's form is checked."""
    root = ET.parse(out / "annotations.xml").getroot()
    images = root.findall("image")
    assert root.findtext("version") == "1.1"
    assert root.findtext("meta/task/size") == str(len(images))
    assert [image.get("id") for image in images] == [str(number) for number in range(len(images))]
    declared = {label.findtext("name") for label in root.findall("meta/task/labels/label")}
    assert {shape.get("label") for image in images for shape in image} <= declared
    entries = json.loads((out / "labels.json").read_bytes())
    assert {entry["name"] for entry in entries} == declared
    assert all(0 < len(entry["name"].strip()) == len(entry["name"]) <= 64 for entry in entries)
    for entry in entries:  # by the rules of the raw editor (cvat-ui, labels-editor/common.ts)
        assert re.fullmatch("#[0-9a-fA-F]{6}", entry["color"])
        assert len({attribute["name"] for attribute in entry["attributes"]}) == len(entry["attributes"])
        for attribute in entry["attributes"]:
            assert 0 < len(attribute["values"]) == len({value.strip() for value in attribute["values"]})
    return images


def frames(out: Path) -> dict[str, ET.Element]:
    """The pictures below `images/` with what CVAT puts on them (bindings.py: `match_frame`, `match_dm_item`)."""
    images = out / "images"
    paths = sorted(path.relative_to(images).as_posix() for path in images.rglob("*") if path.is_file())
    mapping = {os.path.splitext(path)[0]: path for path in paths}
    assert len({path.casefold() for path in mapping}) == len(paths)
    found = {}
    for image in images_of(out):
        path = mapping[os.path.splitext(image.get("name", ""))[0]]  # another is taken for the frame of its id
        assert path == image.get("name")
        found[path] = image
    assert len(found) == len(paths)
    return found


def values(element: ET.Element, *keys: str) -> list[float]:
    return [float(element.get(key, "nan")) for key in keys]


def attributes(element: ET.Element) -> dict[str, Any]:
    return {attribute.get("name", ""): attribute.text for attribute in element.findall("attribute")}


def test_boxes_are_boxes_masks_polygons_and_points_points(run: Run) -> None:
    run.write(mixed_records())
    report, out = run.export("cvat", "out")
    found = frames(out)
    assert len(found) == report.num_images == len(NAMES)
    assert report.num_failures == 2
    dog, car, ring, nose, caption, answer = found["a/photo.jpg"]
    assert (dog.tag, dog.get("label"), values(dog, "xtl", "ytl", "xbr", "ybr")) == ("box", "dog", [60, 8, 120, 48])
    assert (car.get("source"), car.get("occluded"), car.get("z_order")) == ("auto", "0", "0")
    assert attributes(car) == {"score": "0.900"}
    assert (ring.tag, ring.get("points")) == ("polygon", "12.00,20.00;60.00,20.00;60.00,60.00")
    assert (nose.tag, nose.get("points"), attributes(nose)) == ("points", "120.00,20.00", {"score": "0.800"})
    assert (caption.tag, caption.get("label"), attributes(caption)) == ("tag", "caption", {"text": "a car,\na <dog>"})
    assert (answer.get("label"), attributes(answer)) == ("answer", {"question": "How many?", "text": "2 & 3"})
    assert (found["empty.png"].get("width"), found["empty.png"].get("height"), len(found["empty.png"])) == (
        "120",
        "80",
        0,
    )


def test_labels_are_declared_with_their_attributes_and_colours(run: Run) -> None:
    run.write(mixed_records())
    _, out = run.export("cvat", "out", labels=["person", "car", "dog"])
    entries = {entry["name"]: entry for entry in json.loads((out / "labels.json").read_bytes())}
    assert list(entries) == ["person", "car", "dog", "ring", "nose", "caption", "answer"]
    assert [attribute["name"] for attribute in entries["car"]["attributes"]] == ["score"]
    assert (entries["caption"]["type"], entries["car"]["type"]) == ("tag", "any")
    assert len({entry["color"] for entry in entries.values()}) == len(entries)
    root = ET.parse(out / "annotations.xml").getroot()
    (label,) = [label for label in root.iter("label") if label.findtext("name") == "car"]
    assert label.findtext("color") == entries["car"]["color"]
    assert label.findtext("attributes/attribute/values") == "0\n1\n0.001"


def test_equal_names_are_told_apart_without_suffix_and_case(run: Run) -> None:
    names = ["d/a.jpg", "d/a.png", "d/A.JPG", "d/a.png.png", "e.gif", "e.avif"]
    for number, name in enumerate(names):
        draw_pictures(run.root, [name])
        kind = "AVIF" if name.endswith("avif") else "GIF" if name.endswith("gif") else "PNG"
        Image.new("RGB", (120, 80), (40 * number, 0, 0)).save(run.root / name, kind)
    boxes = [{**CAR, "x_max": 0.2 + number / 10} for number in range(len(names))]
    run.write(record(name, "detect", "car", objects=[box]) for name, box in zip(names, boxes, strict=True))
    _, out = run.export("cvat", "out")
    found = frames(out)
    assert len(found) == len(names)
    for name, image in found.items():
        with Image.open(out / "images" / name) as picture:
            assert picture.format in ("PNG", "JPEG")
            number = round(picture.convert("RGB").getpixel((0, 0))[0] / 40)
        assert values(image[0], "xbr") == [pytest.approx(120 * boxes[number]["x_max"])]


def test_hostile_labels_names_and_texts_are_one_document(run: Run) -> None:
    labels = ['"><box/>&', "\x00\x1b\n\uffff", " padded ", "padded", "x" * 80, "x" * 81, "caption", " "]
    names = ["../../o.png", "/etc/passwd", "o\\p.png", '\uffff<&".png', "https://h.example/a.png", "line\nbreak.png"]
    run.write([
        *(record(name, "detect", label, objects=[{**CAR, "label": label}]) for name in names for label in labels),
        record(names[0], "caption", length="long", caption="]]><\x00" + "y" * 5000),
    ])  # fmt: skip
    (run.folder / "run.json").unlink()
    report, out = run.export("cvat", "out")
    images = images_of(out)
    assert len(images) == len(names)
    assert len({shape.get("label") for shape in images[1]}) == len(labels)
    assert all(".." not in image.get("name", "").split("/") for image in images)
    (text,) = [attributes(tag)["text"] for tag in images[0].findall("tag")]
    assert (text[:8], len(text)) == ("]]><\\x00", 4096)
    assert any("1 texts were cut" in note for note in report.notes)
    assert any("labels that CVAT does not take" in note for note in report.notes)
    assert images[0].find("tag").get("label") not in {shape.get("label") for shape in images[1]}  # CVAT has each once


def test_a_picture_that_is_not_there_is_left_out_and_told(run: Run) -> None:
    run.write(record(name, "detect", "car", objects=[CAR]) for name in ("gone.jpg", NAMES[0], NAMES[1]))
    report, out = run.export("cvat", "out")
    assert frames(out).keys() == {NAMES[0], NAMES[1]}  # for CVAT image 0 would be the first frame
    assert any("1 pictures cannot be read" in note for note in report.notes)
    assert report.num_images == 2


def test_without_any_picture_all_are_listed_for_a_task_of_the_users_own(detect_run: Run) -> None:
    (detect_run.folder / "run.json").unlink()
    report, out = detect_run.export("cvat", "out")
    assert len(images_of(out)) == report.num_images == len(NAMES)
    assert images_of(out)[0].get("name") == NAMES[0]
    assert any("no picture was found" in note for note in report.notes)


def test_a_file_that_is_no_picture_is_not_carried(run: Run) -> None:
    (run.root / "secret.png").write_text("root:x:0:0")
    run.write(record(name, "detect", "car", objects=[CAR]) for name in ("secret.png", NAMES[0]))
    _, out = run.export("cvat", "out")
    assert frames(out).keys() == {NAMES[0]}


def test_links_share_the_file_and_copies_do_not(detect_run: Run) -> None:
    name = "a/photo.jpg"
    _, linked = detect_run.export("cvat", "linked", is_linked=True)
    assert (linked / "images" / name).samefile(detect_run.root / name)
    _, copies = detect_run.export("cvat", "copies")
    assert not (copies / "images" / name).samefile(detect_run.root / name)


def test_the_same_records_give_the_same_bytes_and_only_md3s_folder_is_replaced(run: Run) -> None:
    run.write(mixed_records())
    _, out = run.export("cvat", "out")
    first = (out / "annotations.xml").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        run.export("cvat", "out")
    run.export("cvat", "out", overwrite=True)
    assert (out / "annotations.xml").read_bytes() == first
    assert sorted(path.name for path in out.iterdir()) == [".md3", "annotations.xml", "images", "labels.json"]
    (out / "notes.md").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.md"):
        run.export("cvat", "out", overwrite=True)


def test_records_without_pictures_make_an_empty_task(run: Run) -> None:
    run.write([record(None, "query", "Why?", answer="Because.")])
    report, out = run.export("cvat", "out")
    assert (images_of(out), report.num_images) == ([], 0)
    assert report.notes == ("1 answers to questions without an image were left out",)


def test_detect_records_alone_declare_no_tags(run: Run) -> None:
    run.write(detect_records())
    _, out = run.export("cvat", "out")
    assert [entry["name"] for entry in json.loads((out / "labels.json").read_bytes())] == ["dog", "car"]
