"""The options of `md3 export`: what they make, and where they would do nothing or contradict each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program import Program, beside_pictures


@pytest.fixture
def md3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    """The program beside three pictures that have two texts each."""
    program = beside_pictures(monkeypatch, tmp_path)
    done = program("run", "img", "--task", "caption", "--task", "query:Which?", "-o", "out", "-f", "txt")
    assert done.exit_code == 0, done.stderr
    return program


@pytest.fixture
def texts(md3: Program) -> dict[str, str]:
    """The two texts of each picture, joined; as the run's own folder of texts has them."""
    records = [json.loads(line) for line in Path("out/records.jsonl").read_text().splitlines()]
    found: dict[str, list[str]] = {}
    for record in records:
        found.setdefault(record["image"].replace(".png", ".txt"), []).append(record.get("caption") or record["answer"])
    joined = {name: ", ".join(words) for name, words in found.items()}
    assert joined == {path.name: path.read_text() for path in Path("out/txt").glob("*.txt")}
    assert len(joined) == 3
    return joined


def test_captions_go_beside_the_pictures_as_typed(md3: Program, texts: dict[str, str]) -> None:
    Path("img/p1.txt").write_text("mine\n")
    export = ("export", "out", "-f", "txt", "--beside", "--prefix", "sks, ", "--suffix", " .")
    refused = md3(*export)
    assert (refused.exit_code, "p1.txt exists already, so nothing was written" in refused.stderr) == (2, True)
    assert [path.name for path in Path("img").glob("*.txt")] == ["p1.txt"]

    added = md3(*export, "--existing", "append", "--join", " | ")
    assert added.exit_code == 0, added.stderr
    wanted = {name: f"sks, {text.replace(', ', ' | ', 1)} ." for name, text in texts.items()}
    wanted["p1.txt"] = f"mine | {wanted['p1.txt']}\n"
    assert {path.name: path.read_text() for path in Path("img").glob("*.txt")} == wanted
    again = md3(*export, "--existing", "append", "--join", " | ")
    assert "3 files that were there already stay as they are" in again.stderr
    assert {path.name: path.read_text() for path in Path("img").glob("*.txt")} == wanted

    replaced = md3("export", "out", "-f", "txt", "--beside", "--overwrite", "--extension", "txt")
    assert replaced.exit_code == 0, replaced.stderr
    assert {path.name: path.read_text() for path in Path("img").glob("*.txt")} == texts


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("-f txt -o t --existing skip", "--existing is about files beside the pictures; add --beside"),
        ("-f txt --beside --overwrite --existing append", "--overwrite replaces, and --existing says append"),
        ("-f coco -o t.json --prefix x", "--prefix is for txt, not for coco"),
        ("-f labelme --beside --link", "--link is about copies of the pictures, and --beside makes none"),
        ("-f coco --split train=0.8,val=0.2", "coco with --split or --roboflow cannot be printed; name a folder"),
        ("-f coco --roboflow", "coco with --split or --roboflow cannot be printed; name a folder"),
        ("-f txt -o t --bom", "--bom is for csv, not for txt"),
        ("-f coco -o t.json --flat", "which coco has with --roboflow; add it"),
        ("-f coco -o t.json --link", "which coco has with --roboflow; add it"),
        ("-f txt -o t --extension .png", "'.png' is no extension for a text"),
    ],
)
def test_options_that_do_nothing_or_contradict_are_refused(md3: Program, line: str, words: str) -> None:
    refused = md3("export", "out", *line.split())
    assert refused.exit_code == 2
    assert words in " ".join(refused.stderr.split())
    assert not [*Path("img").glob("*.txt"), *Path("img").glob("*.json")]


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("-f csv -o t.csv --root img", "--root changes nothing: csv looks for no pictures"),
        ("-f jsonl -o t.jsonl --max-file-size 1M", "--max-file-size changes nothing: jsonl looks for no pictures"),
        ("-f txt -o t --root img", "--root changes nothing: txt looks for no pictures"),
        ("-f coco -o t.json --max-pixels 1M", "--max-pixels changes nothing: coco decodes no pictures"),
        ("-f parquet -o t.parquet --root img", "--root changes nothing: parquet looks for no pictures"),
        ("-f labelstudio -o t --max-pixels 1M", "--max-pixels changes nothing: labelstudio decodes no pictures"),
        ("-f labelstudio -o t --url-prefix u --root img", "--root changes nothing: labelstudio looks for no pictures"),
        ("-f labelme --beside --max-pixels 1M", "--max-pixels changes nothing: labelme decodes no pictures"),
        ("-f txt -o t --min-score 0.4", "--min-score changes nothing: txt holds captions and answers, not objects"),
        ("-f csv --overwrite", "--overwrite changes nothing: what is printed replaces no file"),
        ("-f csv -o t.csv --seed 3", "--seed changes nothing: it is of a sample, and there is no --sample"),
    ],
)
def test_a_general_option_that_changes_nothing_is_told(md3: Program, line: str, note: str) -> None:
    done = md3("export", "out", *line.split())
    assert done.exit_code == 0, done.stderr
    assert f"note: {note}\n" in done.stderr


def test_settings_that_were_not_typed_do_nothing_where_they_are_of_no_use(md3: Program) -> None:
    settings = {"MD3_MAX_PIXELS": "1M", "MD3_MAX_FILE_SIZE": "1M", "MD3_SEED": "3", "MD3_MIN_SCORE": "0.4"}
    for line in ("-f csv", "-f txt -o t", "-f coco -o t.json"):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            done = md3("export", "out", *line.split())
        assert (done.exit_code, "changes nothing" in done.stderr) == (0, False), done.stderr


def test_pictures_are_looked_for_where_an_option_asks_for_them(md3: Program) -> None:
    limits = ("--root", "img", "--max-file-size", "1M", "--overwrite")
    for line in ("-f parquet -o t.parquet --embed-images", "-f coco -o t --roboflow", "-f txt --beside"):
        done = md3("export", "out", *line.split(), *limits)
        assert (done.exit_code, "changes nothing" in done.stderr) == (0, False), done.stderr


def test_a_run_that_grows_joins_its_texts_anew(md3: Program) -> None:
    for words in (("caption", "img"), ("query", "img", "-q", "Which?", "--add")):
        done = md3(*words, "-o", "grown", "-f", "txt")
        assert done.exit_code == 0, done.stderr
    assert {path.name: path.read_text() for path in Path("grown/txt").glob("*.txt")} == {
        path.name: path.read_text() for path in Path("out/txt").glob("*.txt")
    }


@pytest.mark.parametrize(("out", "is_told"), [("elsewhere", True), ("img/", False)])
def test_an_output_that_beside_does_not_use_is_told(md3: Program, out: str, is_told: bool) -> None:
    done = md3("export", "out", "-f", "txt", "--beside", "-o", out)
    assert done.exit_code == 0, done.stderr
    assert ("as --beside says; nothing is in elsewhere" in done.stderr) == is_told
    assert not Path("elsewhere").exists()


def test_a_page_keeps_to_the_limits_of_pictures(md3: Program) -> None:
    for typed, is_told in (("--max-pixels", True), ("--max-file-size", True), ("--root", False)):
        done = md3("export", "out", "-o", "page.html", "--overwrite", typed, "1" if is_told else "img")
        assert done.exit_code == 0, done.stderr
        assert ("3 pictures cannot be opened" in done.stderr) == is_told
