"""`md3 detect --everything` in one process: a list, then a request for each name in it, whatever interrupts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program import Program, make_pictures, records_of
from typer.testing import CliRunner

from md3cli.cli import app

EXAMPLES = Path(__file__).parents[2] / "examples"
EVERYTHING = ("--everything", "--list", "query:say: Cars, two people and a dog; a car")
NAMES = ["car", "person", "dog"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "photos", 5)


@pytest.fixture
def md3(monkeypatch: pytest.MonkeyPatch) -> Program:
    return Program(monkeypatch)


def test_a_list_then_its_names(md3: Program, pictures: Path, tmp_path: Path) -> None:
    output, plain = tmp_path / "all.jsonl", tmp_path / "plain.jsonl"
    assert md3("detect", pictures, *EVERYTHING, "-o", output).exit_code == 0
    records = records_of(output)
    assert [(r["image"], r["prompt"]) for r in records if r["task"] == "detect"] == [
        (f"p{n}.png", name) for n in range(5) for name in NAMES
    ]
    assert [r["task"] for r in records] == ["query", "detect", "detect", "detect"] * 5
    assert not any("region" in record for record in records)
    assert md3("detect", pictures, *NAMES, "-o", plain).exit_code == 0
    assert [r for r in records if r["task"] == "detect"] == records_of(plain)  # what is asked is asked as ever


def test_a_vocabulary_and_a_limit_hold_the_names(md3: Program, pictures: Path, tmp_path: Path) -> None:
    vocabulary = tmp_path / "names.txt"
    vocabulary.write_text("Dog\ncar\ncat\n")
    output = tmp_path / "out"
    given = ("--vocabulary", vocabulary, "-f", "coco", "-f", "jsonl")
    assert md3("detect", pictures, *EVERYTHING, *given, "-o", output).exit_code == 0
    asked = [r["prompt"] for r in records_of(output / "records.jsonl") if r["task"] == "detect"]
    assert asked == ["car", "Dog"] * 5
    coco = json.loads((output / "coco.json").read_text())
    assert [category["name"] for category in coco["categories"]] == ["Dog", "car", "cat"]  # as in the file
    one = tmp_path / "one.jsonl"
    assert md3("detect", pictures, *EVERYTHING, "--max-names", 1, "-o", one).exit_code == 0
    assert [r["prompt"] for r in records_of(one) if r["task"] == "detect"] == ["car"] * 5


def test_an_interrupted_run_asks_what_is_left(md3: Program, pictures: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert md3("detect", pictures, *EVERYTHING, "-o", whole).exit_code == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines)):
        part.write_bytes(b"".join(lines[:kept]))
        assert md3("detect", pictures, *EVERYTHING, "-o", part).exit_code == 0
        assert part.read_bytes() == whole.read_bytes(), kept
        assert md3.num_answered == len(lines) - kept


def test_a_list_that_failed_has_no_names(md3: Program, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "all.jsonl"
    (pictures / "p1.png").write_bytes(b"no picture")
    asked = ("--everything", "--list", "query:fail me")
    assert md3("detect", pictures, *asked, "-o", output).exit_code == 3
    assert [r["error"]["type"] for r in records_of(output)] == ["model", "not_an_image", "model", "model", "model"]


def test_a_name_that_failed_is_asked_again(md3: Program, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "all.jsonl"
    asked = ("--everything", "--list", "query:say: car, fail me")
    for again in ((), ("--retry-failed",)):
        assert md3("detect", pictures, *asked, *again, "-o", output).exit_code == 3
        assert [(r["prompt"], r["error"] is None) for r in records_of(output)][:3] == [
            ("say: car, fail me", True),
            ("car", True),
            ("fail me", False),
        ]
        assert len(records_of(output)) == 15
    assert md3.num_answered == 5


def test_a_picture_that_is_listed_twice_is_asked_twice(md3: Program, pictures: Path, tmp_path: Path) -> None:
    manifest, output = pictures / "rows.csv", tmp_path / "all.jsonl"
    manifest.write_text("image\np1.png\np1.png\n")
    for _ in range(2):
        assert md3("detect", manifest, *EVERYTHING, "-o", output).exit_code == 0
        records = records_of(output)
        assert [r["prompt"] for r in records if r["task"] == "detect"] == NAMES * 2
        assert len({record["id"] for record in records}) == len(records) == 8


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (["--max-names", "2"], "max-names 20, now 2"),
        (["--vocabulary", "names.txt"], 'vocabulary none, now ["car"]'),
        (["--max-objects", "7"], "max-objects 150, now 7"),
    ],
)
def test_another_vocabulary_is_another_run(
    md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch, other: list[str], words: str
) -> None:
    monkeypatch.chdir(pictures.parent)
    Path("names.txt").write_text("car\n")
    assert md3("detect", pictures, *EVERYTHING, "-o", "all.jsonl").exit_code == 0
    before = Path("all.jsonl").read_bytes()
    result = md3("detect", pictures, *EVERYTHING, *other, "-o", "all.jsonl")
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert Path("all.jsonl").read_bytes() == before


def test_one_picture_on_a_terminal_shows_what_was_found(md3: Program, pictures: Path) -> None:
    result = md3("detect", pictures / "p1.png", *EVERYTHING)
    assert [record["prompt"] for record in map(json.loads, result.stdout.splitlines())][1:] == NAMES


@pytest.mark.slow
def test_the_kinds_of_held_out_scenes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a caption names is found: 0.8 of the kinds that are there at least, and nothing beyond the vocabulary."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import shapes
    from world import KINDS

    scenes, output, vocabulary = tmp_path / "scenes", tmp_path / "all.jsonl", tmp_path / "kinds.txt"
    shapes.write_collection(7, 300, scenes)
    vocabulary.write_text("\n".join(KINDS))
    given = ["--everything", "--list", "caption:short", "--vocabulary", str(vocabulary), "--model", "tiny"]
    assert CliRunner().invoke(app, ["detect", str(scenes), *given, "-o", str(output)]).exit_code == 0
    truth = json.loads((scenes / "instances.json").read_text())
    kinds = {category["id"]: category["name"].split()[-1] for category in truth["categories"]}
    names = {image["id"]: image["file_name"] for image in truth["images"]}
    there = {(names[thing["image_id"]], kinds[thing["category_id"]]) for thing in truth["annotations"]}
    found = {(r["image"], r["prompt"]) for r in records_of(output) if r.get("objects")}
    print(f"{len(there & found)} of {len(there)} kinds found")
    assert len(there & found) >= 0.8 * len(there)
    assert {r["prompt"] for r in records_of(output) if r["task"] == "detect"} <= set(KINDS)


def test_rows_that_ask_for_names_or_lists_themselves_have_their_own_records(
    md3: Program, pictures: Path, tmp_path: Path
) -> None:
    manifest, output = pictures / "rows.jsonl", tmp_path / "all.jsonl"
    rows = [
        {"image": "p0.png", "task": "detect", "prompt": "car", "reasoning": True},
        {"image": "p0.png"},
        {"image": "p0.png", "task": "query", "prompt": "say: car, tree"},
        {"image": "p0.png", "task": "detect", "prompt": "dog", "reasoning": True},
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        assert md3("detect", manifest, *EVERYTHING, "-o", output).exit_code == 0
        found = [record["prompt"] for record in records_of(output)]
        assert found == ["car", EVERYTHING[2][len("query:") :], *NAMES, "say: car, tree", "car", "tree", "dog"]
        assert len({record["id"] for record in records_of(output)}) == len(found)
    assert md3.num_answered == 0


def test_a_list_without_a_picture_names_nothing(md3: Program, pictures: Path, tmp_path: Path) -> None:
    manifest, output = pictures / "rows.jsonl", tmp_path / "all.jsonl"
    manifest.write_text('{"image":null,"task":"query","prompt":"say: car, dog"}\n{"image":"p0.png"}\n')
    assert md3("detect", manifest, *EVERYTHING, "-o", output).exit_code == 0
    assert [record["image"] for record in records_of(output)] == [None, *["p0.png"] * 4]
