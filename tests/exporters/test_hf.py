"""ImageFolder read back by `datasets`."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from finished_runs import CAR, HEIGHT, NAMES, ODD_EXIF, WIDTH, Run, detect_records, draw_pictures, failure, record
from PIL import Image

from md3cli.errors import ExportError, UsageError
from md3cli.exporters.splits import Splits


def load(folder: Path, cache: Path) -> Any:
    return load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(cache))


def test_datasets_loads_every_picture_with_its_objects(detect_run: Run, tmp_path: Path) -> None:
    report, out = detect_run.export("hf", "out")
    splits = load(out, tmp_path / "cache")
    assert list(splits) == ["train"]  # although names say train and test
    rows = {json.dumps(row["objects"]["bbox"]): row for row in splits["train"]}
    assert len(splits["train"]) == report.num_images == len(NAMES)
    full = rows["[[60.0, 8.0, 60.0, 40.0], [12.0, 20.0, 48.0, 40.0]]"]
    assert full["image"].size == (full["width"], full["height"]) == (WIDTH, HEIGHT)
    assert full["objects"]["categories"] == [0, 1]
    assert full["objects"]["labels"] == ["dog", "car"]
    assert full["objects"]["scores"] == [0.4, 0.9]
    assert "[]" in rows  # the image without objects


def test_pictures_keep_their_content(detect_run: Run) -> None:
    _, out = detect_run.export("hf", "out")
    rows = [json.loads(line) for line in (out / "train/metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["file_name"] for row in rows}) == len(NAMES)
    for name, row in zip(NAMES, rows, strict=True):
        assert (out / "train" / row["file_name"]).read_bytes() == (detect_run.root / name).read_bytes()


def test_all_tasks_fit_one_row(run: Run, tmp_path: Path) -> None:
    box = {key: CAR[key] for key in ("x_min", "y_min", "x_max", "y_max")}
    path = {"label": "ring", "svg_path": "M 0 0 L 1 0 L 1 1 Z", "bbox": box, "score": 0.7}
    run.write([
        *detect_records(NAMES[:2]),
        record(NAMES[1], "segment", "ring", segments=[path]),
        record(NAMES[1], "point", "nose", points=[{"label": "nose", "x": 0.5, "y": 0.25, "score": 0.8}]),
        record(NAMES[1], "caption", length="short", caption="a car", meta={"image": "theirs", "n": 1}),
        record(NAMES[1], "query", "How many?", answer="2", meta={"n": "one"}),
    ])  # fmt: skip
    _, out = run.export("hf", "out")
    rows = sorted(load(out, tmp_path / "cache")["train"], key=lambda row: len(row["captions"]))
    assert rows[0]["text"] is None
    row = rows[1]
    assert (row["text"], row["captions"]) == ("a car", ["a car"])
    assert row["answers"] == [{"question": "How many?", "answer": "2"}]
    assert row["points"] == [{"x": 60.0, "y": 20.0, "label": "nose", "score": 0.8}]
    assert row["objects"]["segmentation"][2] == [[12.0, 20.0, 60.0, 20.0, 60.0, 60.0]]
    assert json.loads(row["meta"]) == {"image": "theirs", "n": "one"}  # and the picture is still the picture
    assert row["image"].size == (WIDTH, HEIGHT)


def test_a_turned_picture_is_upright_for_its_boxes(run: Run, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(run.root / "turned.jpg", exif=exif)
    run.write([record("turned.jpg", "detect", "car", objects=[CAR])])
    _, out = run.export("hf", "out")
    assert load(out, tmp_path / "cache")["train"][0]["image"].size == (WIDTH, HEIGHT)


def test_names_that_are_patterns_load(run: Run, tmp_path: Path) -> None:
    names = ["a[1].png", "b*.png", "c?.png", "d/../e.png"]
    draw_pictures(run.root, [*names[:3], "d/x.png", "e.png"])
    run.write([record(name, "caption", length="short", caption=name) for name in names])
    _, out = run.export("hf", "out")
    assert sorted(load(out, tmp_path / "cache")["train"]["text"]) == sorted(names)


def test_pictures_without_a_suffix_load(run: Run, tmp_path: Path) -> None:
    for name in ("plain", "a.thing"):
        (run.root / name).write_bytes((run.root / "empty.png").read_bytes())
    run.write([record(name, "caption", length="short", caption=name) for name in ("plain", "a.thing")])
    _, out = run.export("hf", "out")
    rows = load(out, tmp_path / "cache")["train"]
    assert {row["text"]: row["image"].size for row in rows} == {"plain": (WIDTH, HEIGHT), "a.thing": (WIDTH, HEIGHT)}


def test_kinds_that_datasets_does_not_load_become_png(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(run.root / "a.avif")
    run.write([record("a.avif", "caption", length="short", caption="x")])
    _, out = run.export("hf", "out")
    assert load(out, tmp_path / "cache")["train"][0]["image"].size == (WIDTH, HEIGHT)
    assert sorted(path.name for path in (out / "train").iterdir()) == ["a.avif.png", "metadata.jsonl"]


def test_missing_pictures_are_left_out_and_told(detect_run: Run) -> None:
    (detect_run.root / NAMES[0]).unlink()
    report, out = detect_run.export("hf", "out")
    assert report.num_images == len(NAMES) - 1
    assert "1 pictures cannot be read" in report.notes[0]
    assert not (out / "train" / NAMES[0]).exists()


def test_a_wrong_root_is_an_error_and_leaves_nothing(detect_run: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ExportError, match="--root"):
        detect_run.export("hf", "out", root=tmp_path / "elsewhere")
    assert {path.name for path in detect_run.folder.iterdir()} == {"records.jsonl", "run.json"}


def test_without_a_root_it_asks_for_one(detect_run: Run) -> None:
    (detect_run.folder / "run.json").unlink()
    with pytest.raises(UsageError, match="--root"):
        detect_run.export("hf", "out")


def test_awkward_names_load(run: Run, tmp_path: Path) -> None:
    names = [
        "a::b.png", "c\\d.png", "\\e.png", "x::y/z.png", "https://h.example/not there.png", "%41#?.png",
        "[0-9]{a,b}*.png", "train station.jpg", "test/validation.jpg", "a/my_val 2/dev.x/j.png",
        "testing/contest/k.png", ".hidden.png", "__special/f.png", "..g/h.png",
        "blank .png", "folder. /i.png", "con/aux.jpg", "l\nm\x1b\x7f.png", "metadata.jsonl.png", "~", "'\"&;$.png",
        "$HOME.png", "${HOME}/o.png", "%HOME%.png",
    ]  # fmt: skip
    shown = "\\xff\\xfe.png"
    there = [name for name in names if "://" not in name]
    draw_pictures(run.root, [name for name in there if name.endswith("g")])
    (run.root / "~").write_bytes((run.root / "empty.png").read_bytes())
    (run.root / os.fsdecode(b"\xff\xfe.png")).write_bytes((run.root / "empty.png").read_bytes())
    (run.root / shown).write_bytes((run.root / "empty.png").read_bytes())
    lines = [record(name, "caption", length="short", caption=name) for name in [*names, shown]]
    exact = base64.b64encode(b"\xff\xfe.png").decode()
    run.write([*lines, record(shown, "caption", length="short", caption="bytes", image_b64=exact)])
    report, out = run.export("hf", "out")
    rows = load(out, tmp_path / "cache")["train"]
    assert sorted(row["text"] for row in rows) == sorted([*there, shown, "bytes"])
    assert all(row["image"].size == (WIDTH, HEIGHT) for row in rows)
    assert report.num_images == len(rows)


def test_a_picture_that_only_md3_reads_does_not_stop_the_loop(run: Run, tmp_path: Path) -> None:
    draw_pictures(run.root, ["whole.png"])
    content = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(content, "JPEG")
    (run.root / "no_end.jpg").write_bytes(content.getvalue()[:-2])
    (run.root / "cut.jpg").write_bytes(content.getvalue()[:300])
    Image.new("RGB", (WIDTH, HEIGHT)).save(run.root / "named.jpg", "AVIF")
    Image.new("RGB", (HEIGHT, WIDTH)).save(run.root / "odd.jpg", exif=ODD_EXIF)
    names = ["whole.png", "no_end.jpg", "cut.jpg", "named.jpg", "odd.jpg"]
    run.write([record(name, "caption", length="short", caption=name) for name in names])
    report, out = run.export("hf", "out")
    rows = load(out, tmp_path / "cache")["train"]
    assert {row["text"] for row in rows} >= {"whole.png", "named.jpg", "odd.jpg"}
    assert all(row["image"].size == (WIDTH, HEIGHT) for row in rows)
    assert any("cut.jpg" in note for note in report.notes)


@pytest.mark.parametrize("is_tar", [True, False])
def test_pictures_of_one_name_never_share_a_row(run: Run, tmp_path: Path, is_tar: bool) -> None:
    lines, root = [], run.root
    with tarfile.open(root / "twins.tar", "w") as tar:
        for number, width in enumerate((50, 60, 70)):
            content = io.BytesIO()
            Image.new("RGB", (width, 40)).save(content, "PNG")
            digest = hashlib.sha256(content.getvalue()).hexdigest()
            member = tarfile.TarInfo("twin.png")
            member.size = len(content.getvalue())
            tar.addfile(member, io.BytesIO(content.getvalue()))
            size = {"width": width, "height": 40}
            fields = {"id": str(number), "sha256": digest, "objects": [CAR], **size}
            lines.append(record("twin.png", "detect", "car", **fields))
            (root / "twin.png").write_bytes(content.getvalue())  # in the folder the last one stays
    run.write(lines)
    _, out = run.export("hf", "out", root=root / "twins.tar" if is_tar else root)
    rows = load(out, tmp_path / "cache")["train"]
    assert [row["image"].width for row in rows] == ([50, 60, 70] if is_tar else [70])
    assert all(row["objects"]["bbox"] == [[0.1 * row["image"].width, 10.0, 0.4 * row["width"], 20.0]] for row in rows)


HOSTILE = ["dog", "a: b \"'\\ é\u2028\x07 😀\n---\n# x", "null", "1", "{{ a }}", "&a *a", " ", "l" * 500]


def test_the_folder_itself_loads_with_the_names_of_its_classes(run: Run, tmp_path: Path) -> None:
    draw_pictures(run.root, ["a::b.png", "c\\d.png", "test/e.png"])
    box = {key: CAR[key] for key in ("x_min", "y_min", "x_max", "y_max")}
    masks = [{"label": "ring", "svg_path": "M 0 0 L 1 0 L 1 1 Z", "bbox": box, "score": 0.7}]
    run.write([
        *(record("a::b.png", "detect", label, objects=[CAR | {"label": label}]) for label in HOSTILE),
        record("a::b.png", "segment", "ring", segments=masks),
        record("c\\d.png", "point", "nose", points=[{"label": "nose", "x": 0.5, "y": 0.25, "score": 0.8}]),
        record("c\\d.png", "query", "How many?", answer="2", meta={"n": "one"}),
        record("c\\d.png", "caption", length="short", caption="late"),
        record("test/e.png", "detect", "dog", objects=[]),
        failure("gone.png", "detect", "dog"),
        record("missing.png", "detect", "dog", objects=[CAR | {"label": "dog"}]),
    ])  # fmt: skip
    report, out = run.export("hf", "out")
    assert (report.num_images, report.num_failures) == (3, 1)
    data = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    classes = data["train"].features["objects"]["categories"].feature
    assert classes.names == [*HOSTILE, "ring"]
    rows = {row["text"] or len(row["objects"]["bbox"]): row for row in data["train"]}  # decodes each picture
    assert set(rows) == {9, 0, "late"}
    assert [classes.int2str(number) for number in rows[9]["objects"]["categories"]] == [*HOSTILE, "ring"]
    assert rows[9]["objects"]["segmentation"][-1] == [[12.0, 20.0, 60.0, 20.0, 60.0, 60.0]]
    assert rows["late"]["points"] == [{"x": 60.0, "y": 20.0, "label": "nose", "score": 0.8}]
    assert rows["late"]["answers"] == [{"question": "How many?", "answer": "2"}]
    by_pictures = load(out, tmp_path / "cache")["train"]
    assert by_pictures.column_names == data["train"].column_names  # the card names each column
    assert [row["objects"]["labels"] for row in by_pictures] == [row["objects"]["labels"] for row in data["train"]]


def test_a_set_that_is_exported_again_does_not_come_from_the_cache(run: Run, tmp_path: Path) -> None:
    draw_pictures(run.root, ["a.png", "b.png"])

    def boxes(*records: dict[str, Any]) -> dict[str, list[Any]]:
        run.write(list(records))
        _, out = run.export("hf", "out", overwrite=True)
        sets = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
        return {name: [row["objects"]["bbox"] for row in rows] for name, rows in sets.items()}

    car, none = (record("a.png", "detect", "car", objects=objects) for objects in ([CAR], []))
    box = [[12.0, 20.0, 48.0, 40.0]]
    assert boxes(car) == {"train": [box]}
    assert boxes(none) == {"train": [[]]}
    assert boxes(car, record("b.png", "detect", "car", objects=[])) == {"train": [box, []]}
    assert boxes(car) == {"train": [box]}


def test_what_is_null_for_a_long_time_has_a_type(run: Run, tmp_path: Path) -> None:
    draw_pictures(run.root, ["a.png", "b.png"])
    long = "x" * (11 << 20)  # `datasets` infers types from the first 10 MB
    run.write([
        record("a.png", "query", "Why?", answer=long),
        record("b.png", "caption", length="short", caption="a car"),
        record("b.png", "detect", "car", objects=[]),
    ])  # fmt: skip
    _, out = run.export("hf", "out")
    rows = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))["train"]
    assert [row["text"] for row in rows] == [None, "a car"]


def test_sets_have_the_names_of_datasets(detect_run: Run) -> None:
    splits = Splits((("train", 0.5), ("val", 0.5)))
    report, out = detect_run.export("hf", "out", splits=splits)
    loaded = load(out, out.parent / "cache")
    assert set(loaded) == {"train", "validation"}
    assert sum(len(rows) for rows in loaded.values()) == report.num_images == len(NAMES)
    for rows in load_dataset(str(out), cache_dir=str(out.parent / "cache")).values():
        assert rows.features["objects"]["categories"].feature.names == ["dog", "car"]
    for folder, name in (("train", "train"), ("validation", "val")):
        found = {row["file_name"] for row in rows_in(out / folder)}
        assert found
        assert {splits.of(one, []) for one in found & set(NAMES)} <= {name}


def test_a_folder_called_as_a_set_stays_in_its_own_set(run: Run, tmp_path: Path) -> None:
    names = [f"{folder}/{number}.png" for folder in ("train", "training", "old-val", "test") for number in range(4)]
    draw_pictures(run.root, names)
    run.write([record(name, "caption", length="short", caption=name) for name in names])
    splits = Splits((("train", 0.4), ("val", 0.3), ("test", 0.3)))
    _, out = run.export("hf", "out", splits=splits)
    loaded = load(out, tmp_path / "cache")
    assert sorted(text for rows in loaded.values() for text in rows["text"]) == sorted(names)
    for part, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert {splits.of(text, []) for text in loaded[part]["text"]} == {name}


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_an_empty_set_is_left_out_and_told(detect_run: Run) -> None:
    report, out = detect_run.export("hf", "out", splits=Splits((("train", 1.0), ("test", 0.0))))
    assert not (out / "test").exists()
    assert any(note == f"sets: train {len(NAMES)}, test 0" for note in report.notes)


def test_sets_that_datasets_does_not_know_are_refused(detect_run: Run) -> None:
    for shares in ((("train", 0.5), ("holdout", 0.5)), (("val", 0.5), ("validation", 0.5))):
        with pytest.raises(UsageError, match="--split"):
            detect_run.export("hf", "out", splits=Splits(shares))


def test_flat_names_lie_in_one_folder(detect_run: Run) -> None:
    _, out = detect_run.export("hf", "out", is_flat=True)
    names = [row["file_name"] for row in rows_in(out / "train")]
    assert len(names) == len({name.rpartition(".")[0].casefold() for name in names}) == len(NAMES)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
