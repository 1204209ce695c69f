"""Pascal VOC read back by supervision and labelformat."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import supervision as sv
from finished_runs import CAR, NAMES, Run, detect_records, draw_pictures, record
from hypothesis import given
from hypothesis import strategies as st
from labelformat.formats.pascalvoc import PascalVOCObjectDetectionInput

from md3cli.exporters.splits import Splits
from md3cli.exporters.voc import _pixels


def test_each_image_has_one_file_in_its_sub_folder(detect_run: Run) -> None:
    report, out = detect_run.export("voc", "out")
    files = {path.relative_to(out / "Annotations").as_posix() for path in out.rglob("*.xml")}
    assert len(files) == report.num_images == len(NAMES)
    assert {"a/photo.xml", "a/photo.png.xml", "b/photo.xml", "empty.xml", "train/station.xml"} <= files


def test_the_document_has_every_field(detect_run: Run) -> None:
    _, out = detect_run.export("voc", "out")
    root = ET.parse(out / "Annotations/a/photo.png.xml").getroot()
    assert (root.findtext("folder"), root.findtext("filename")) == ("a", "a/photo.png.png")  # as the copy is called
    assert [root.findtext(f"size/{tag}") for tag in ("width", "height", "depth")] == ["120", "80", "3"]
    dog, car = root.findall("object")
    assert [dog.findtext(tag) for tag in ("name", "pose", "truncated", "difficult")] == ["dog", "Unspecified", "1", "0"]
    assert car.findtext("truncated") == "0"
    assert [car.findtext(f"bndbox/{tag}") for tag in ("xmin", "ymin", "xmax", "ymax")] == ["13", "21", "60", "60"]


def test_supervision_gets_the_boxes_back(run: Run) -> None:
    run.write(detect_records(["test_a.jpg", "empty.png"]))
    _, out = run.export("voc", "out")
    dataset = sv.DetectionDataset.from_pascal_voc(str(run.root), str(out / "Annotations"))
    boxes = {path.rpartition("/")[2]: detections.xyxy.tolist() for path, _, detections in dataset}
    assert boxes["test_a.jpg"] == [[60, 8, 120, 48], [12, 20, 60, 60]]
    assert boxes["empty.png"] == []


def test_labelformat_gets_the_labels_back(run: Run) -> None:
    run.write(detect_records(["test_a.jpg", "empty.png"]))
    _, out = run.export("voc", "out")
    labels = PascalVOCObjectDetectionInput(out / "Annotations", "dog,car").get_labels()
    found = {label.image.filename: [box.category.name for box in label.objects] for label in labels}
    assert found == {"test_a.jpg": ["dog", "car"], "empty.png": []}


def test_control_characters_and_markup_are_harmless(run: Run) -> None:
    label = "<b>&\x00\x1b[31m"
    run.write([record("line\nbreak.png", "detect", label, objects=[{**CAR, "label": label}])])
    _, out = run.export("voc", "out")
    (file,) = out.rglob("*.xml")
    root = ET.parse(file).getroot()
    assert root.findtext("object/name") == "<b>&\\x00\\x1b[31m"
    assert root.findtext("filename") == "line_break.png"


@given(start=st.floats(0, 0.999), extent=st.floats(0.00001, 1), size=st.integers(1, 5000))
def test_pixels_count_from_one_and_stay_inside(start: float, extent: float, size: int) -> None:
    first, last = _pixels(start * size, min(start + extent, 1) * size, size)
    assert 1 <= first <= last <= size


def test_lists_name_every_annotation_without_suffix(detect_run: Run) -> None:
    _, out = detect_run.export("voc", "out")
    names = (out / "ImageSets/Main/default.txt").read_text(encoding="utf-8").splitlines()
    assert len(names) == len(NAMES)
    for name in names:
        assert (out / f"Annotations/{name}.xml").is_file()
        assert [path.name for path in (out / "JPEGImages" / name).parent.glob(f"{Path(name).name}.*")], name
    pictures = {
        path.relative_to(out / "JPEGImages").with_suffix("").as_posix() for path in files_of(out / "JPEGImages")
    }
    assert pictures == set(names)


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_label_map_can_be_read(run: Run) -> None:
    labels = ["car", "time: 3", "#1", "background", "日本"]
    run.write([record("test_a.jpg", "detect", label, objects=[{**CAR, "label": label}]) for label in labels])
    report, out = run.export("voc", "out")
    lines = (out / "labelmap.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split(":") for line in lines if not line.startswith("#")]
    assert [row[0] for row in rows] == ["car", "time_ 3", "_1", "background", "日本"]
    assert all(len(row) == 4 and len(row[1].split(",")) == 3 for row in rows)
    (file,) = (out / "Annotations").rglob("*.xml")
    assert [found.findtext("name") for found in ET.parse(file).getroot().findall("object")] == [row[0] for row in rows]
    assert any("time: 3" in note for note in report.notes)


def test_sets_have_a_list_each(detect_run: Run) -> None:
    splits = Splits((("train", 0.5), ("val", 0.5)))
    report, out = detect_run.export("voc", "out", splits=splits, is_flat=True)
    lists = {name: (out / f"ImageSets/Main/{name}.txt").read_text().split() for name in ("train", "val")}
    assert len(lists["train"]) + len(lists["val"]) == len(NAMES)
    assert {path.stem for path in files_of(out / "JPEGImages")} == {*lists["train"], *lists["val"]}
    assert all("/" not in name for names in lists.values() for name in names)
    assert any(note.startswith("sets: train ") for note in report.notes)


def test_names_are_in_the_lists_as_readers_take_them(run: Run) -> None:
    names = ["#1.png", " b.png", "c/d .png", "e f.png", "g.jpg/h.png"]
    draw_pictures(run.root, names)
    run.write(record(name, "detect", "car", objects=[CAR]) for name in names)
    _, out = run.export("voc", "out")
    lines = (out / "ImageSets/Main/default.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["_1", "_b", "c/d_", "e f", "g.jp_/h"]  # no folder that datumaro takes for a picture
    for line in lines:
        assert (out / f"JPEGImages/{line}.png").is_file()
        assert ET.parse(out / f"Annotations/{line}.xml").findtext("filename") == f"{line}.png"


def test_labels_that_a_label_map_shows_alike_stand_there_once(run: Run) -> None:
    found = [{**CAR, "label": label} for label in ("a:b", "a_b")]
    run.write([record(NAMES[0], "detect", "a_b", objects=found)])
    report, out = run.export("voc", "out")
    lines = (out / "labelmap.txt").read_text(encoding="utf-8").splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == ["background", "a_b"]
    assert any("a:b" in note for note in report.notes)


def test_a_label_of_any_characters_is_well_formed(run: Run) -> None:
    label = "\x00<&\uffff\ufffe"
    run.write([record(NAMES[0], "detect", "car", objects=[{**CAR, "label": label}])])
    _, out = run.export("voc", "out")
    assert ET.parse(out / "Annotations/a/photo.xml").findtext("object/name") == r"\x00<&\uffff\ufffe"
