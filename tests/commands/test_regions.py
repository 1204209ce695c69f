"""A COCO file as INPUT, `--regions` and the column `then`, by the real command."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from program import Program, records_of

from md3cli.records import RecordDict

QUESTION = "What colour is the {label}?"
COMMAND = ("query", "coco.json", "--root", "pictures", "--regions", "-q", QUESTION, "--no-reasoning")
BOXES: list[dict[str, Any]] = [
    {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 40, 20]},
    {"id": 2, "image_id": 2, "category_id": 2, "bbox": [0, 0, 300, 200]},
    {"id": 3, "image_id": 1, "category_id": 2, "bbox": [90, 90, 0, 5]},
    {"id": 4, "image_id": 1, "category_id": 2, "bbox": [900, 0, 5, 5]},
    {"id": 5, "image_id": 1, "category_id": 2, "segmentation": {"counts": "x", "size": [1, 1]}},
    {"id": 6, "image_id": 2, "category_id": 9, "bbox": [1, 2, 3, 4]},
]


@pytest.fixture
def md3(md3: Program, tmp_path: Path) -> Program:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (200, 100), (40, 90, 9)).save(tmp_path / "pictures" / "a.png")
    Image.new("RGB", (300, 200), (9, 40, 90)).save(tmp_path / "pictures" / "b.png")
    Image.new("RGB", (30, 20), (9, 40, 99)).save(tmp_path / "pictures" / "c.png")
    sizes = {"a.png": (200, 100), "b.png": (300, 200), "c.png": (30, 20)}
    images = [
        {"id": n, "file_name": name, "width": w, "height": h} for n, (name, (w, h)) in enumerate(sizes.items(), 1)
    ]
    categories = [{"id": 1, "name": "car"}, {"id": 2, "name": "red bus"}]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": BOXES, "categories": categories}))
    return md3


def seen(records: list[RecordDict]) -> list[tuple[Any, ...]]:
    return [(r["image"], r["region"]["of"], r["prompt"], r["error"] and r["error"]["type"]) for r in records]


def test_pictures_of_a_coco_file_are_those_of_its_folder(md3: Program) -> None:
    listed = md3("caption", "coco.json", "--root", "pictures", "-f", "jsonl")
    assert listed.exit_code == 0, listed.stderr
    assert listed.stdout == md3("caption", "pictures", "-f", "jsonl").stdout


def test_each_box_is_a_record_whatever_it_is(md3: Program) -> None:
    result = md3(*COMMAND, "-f", "jsonl")
    assert result.exit_code == 3
    records = records_of(result.stdout)
    assert seen(records) == [
        ("a.png", "1", "What colour is the car?", None),
        ("a.png", "3", "What colour is the red bus?", "bad_request"),
        ("a.png", "4", "What colour is the red bus?", "bad_request"),
        ("a.png", "5", "What colour is the red bus?", "bad_request"),
        ("b.png", "2", "What colour is the red bus?", None),
        ("b.png", "6", QUESTION, "bad_request"),
    ]
    assert (records[0]["width"], records[0]["height"]) == (200, 100), "those of the whole picture"
    assert records[0]["region"] == {
        "x_min": 0.05, "y_min": 0.2, "x_max": 0.25, "y_max": 0.4, "label": "car", "of": "1", "index": 0,
    }  # fmt: skip
    assert len({record["id"] for record in records}) == len(records)
    assert "not taken: 1 pictures without boxes" in result.stderr


def test_the_model_sees_the_box_with_room_around_it(md3: Program) -> None:
    digest = hashlib.sha256(Path("pictures/a.png").read_bytes()).hexdigest()
    for pad, rect in [((), "6 18 54 42"), (("--pad", "0"), "10 20 50 40"), (("--pad", "50%"), "0 10 70 50")]:
        md3(*COMMAND, *pad, "--limit", "1", "-f", "jsonl")
        (part, request), *_ = md3.models[-1].engine.seen
        assert part == hashlib.sha256(f"{digest} {rect}".encode()).hexdigest()
        assert request.prompt == "What colour is the car?"


def test_it_goes_on_where_it_was_cut_off_and_says_what_differs(md3: Program) -> None:
    assert md3(*COMMAND, "-o", "out.jsonl").exit_code == 3
    whole = Path("out.jsonl").read_bytes()
    Path("out.jsonl").write_bytes(whole[: len(whole) // 2])
    assert md3(*COMMAND, "-o", "out.jsonl").exit_code == 3
    assert Path("out.jsonl").read_bytes() == whole
    for words, told in [(("--pad", "20%"), "pad none, now 0.2"), ((), "")]:
        result = md3(*COMMAND, *words, "-o", "out.jsonl")
        assert result.exit_code == (2 if told else 3)
        assert told in result.stderr
    without = [word for word in COMMAND if word != "--regions"]
    assert "regions on, now none" in md3(*without, "-o", "out.jsonl").stderr
    added = md3(*COMMAND, "-q", "Is it old?", "--add", "-o", "out.jsonl")
    assert added.exit_code == 3, added.stderr
    assert [prompt for _, of, prompt, _ in seen(records_of(Path("out.jsonl"))) if of == "1"] == [
        "What colour is the car?", "Is it old?",
    ]  # fmt: skip


@pytest.mark.process
def test_many_processes_ask_about_the_same_boxes(md3: Program) -> None:
    md3(*COMMAND, "-o", "one.jsonl")
    result = md3(*COMMAND, "-o", "many/", "--shard-size", "1")
    assert result.exit_code == 3, result.stderr
    assert Path("many/records.jsonl").read_bytes() == Path("one.jsonl").read_bytes()


def test_a_dry_run_counts_pictures_and_questions_about_boxes(md3: Program) -> None:
    result = md3(*COMMAND, "--dry-run")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["images"], found["requests"], found["requests_of_parts"]) == (2, 6, 6)
    assert found["skipped"] == {"pictures without boxes": 1}
    assert "requests_of_parts" not in json.loads(md3("caption", "pictures", "--dry-run").stdout)


def test_md3_reads_its_own_coco_files(md3: Program) -> None:
    assert md3("detect", "pictures", "car", "-o", "found.json").exit_code == 0
    boxes = json.loads(Path("found.json").read_bytes())["annotations"]
    result = md3("query", "found.json", "--root", "pictures", "--regions", "-q", QUESTION, "-f", "jsonl")
    records = records_of(result.stdout)
    assert len(records) == len(boxes) > 0
    assert {record["prompt"] for record in records} == {"What colour is the car?"}
    plain = md3("caption", "found.json", "--root", "pictures", "-f", "jsonl")
    assert [record["image"] for record in records_of(plain.stdout)] == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("caption", "pictures", "--regions"), "pictures is none"),
        (("query", "coco.json", "--regions", "-q", "Is it {this}?"), "{this} is filled by nothing"),
        (("point", "coco.json", "car", "--regions", "--spatial-ref", "0.1,0.2"), "--spatial-ref is a place"),
        (("detect", "coco.json", "car", "--regions", "--tile", "400"), "--tile is about whole pictures"),
        (("run", "coco.json", "--regions", "--task", "detect:car", "--then", "caption"), "leave out --then"),
        (("caption", "coco.json", "--pad", "5%"), "--pad is the room around a region"),
        (("query", "-q", "Why?", "--regions"), "there is no INPUT"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_slow(md3: Program, words: tuple[str, ...], told: str) -> None:
    result = md3(*words, "--root", "pictures")
    assert result.exit_code == 2
    assert told in result.stderr
    assert not md3.models


def test_output_may_not_be_the_file(md3: Program) -> None:
    result = md3("caption", "coco.json", "--root", "pictures", "-o", "coco.json", "--overwrite")
    assert result.exit_code == 2
    assert json.loads(Path("coco.json").read_bytes())["annotations"] == BOXES


def test_a_row_says_what_is_asked_of_its_objects(md3: Program) -> None:
    rows = [{"image": "a.png"}, {"image": "b.png", "then": ["query:Is the {label} old?", "caption:short"]}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("run", "rows.jsonl", "--root", "pictures", "--task", "detect:car", "-f", "jsonl")
    result = md3(*command, "--then", f"query:{QUESTION}")
    assert result.exit_code == 0, result.stderr
    asked = [(record["image"], record["task"], record["prompt"]) for record in records_of(result.stdout)]
    assert {one for one in asked if one[0] == "a.png"} == {
        ("a.png", "detect", "car"), ("a.png", "query", "What colour is the car?"),
    }  # fmt: skip
    assert {one for one in asked if one[0] == "b.png"} == {
        ("b.png", "detect", "car"), ("b.png", "query", "Is the car old?"), ("b.png", "caption", None),
    }  # fmt: skip
