"""What is read, and pictures, are never written over: with and without --overwrite, under any name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from program import Program, beside_pictures, clean_environment, records_of


@pytest.fixture
def md3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    return beside_pictures(monkeypatch, tmp_path)


def assert_refused(md3: Program, *command: object, kept: Path, word: str = "is an input of this command") -> None:
    """Both with and without --overwrite the command is refused, and `kept` is as it was."""
    before = kept.read_bytes()
    can_overwrite = command[0] != "eval"
    for more in ((), ("--overwrite",)) if can_overwrite else ((),):
        result = md3(*command, *more)
        assert result.exit_code == 2, result.stderr
        assert word in result.stderr
        assert "--overwrite" not in result.stderr
        assert kept.read_bytes() == before


def write_manifest(path: Path) -> Path:
    rows = [{"image": f"img/p{i}.png", "note": "precious"} for i in range(3)]
    if path.suffix == ".csv":
        path.write_text("image,note\n" + "".join(f"{row['image']},{row['note']}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv"])
@pytest.mark.parametrize("how", ["same", "spelled", "link", "hard"])
def test_a_manifest_is_not_written_over(md3: Program, name: str, how: str) -> None:
    manifest = write_manifest(Path(name))
    out = {"same": name, "spelled": f"img/../{name}", "link": f"l{manifest.suffix}", "hard": f"l{manifest.suffix}"}[how]
    if how == "link":
        os.symlink(name, out)
    if how == "hard":
        os.link(name, out)
    assert_refused(md3, "run", name, "--task", "caption:short", "-o", out, kept=manifest)


def test_a_journal_beside_out_that_is_the_input_is_not_written_over(md3: Program) -> None:
    manifest = write_manifest(Path("o.json.records.jsonl"))
    assert_refused(md3, "run", manifest, "--task", "detect:x", "-o", "o.json", kept=manifest)


@pytest.mark.parametrize("kind", ["link", "hard", "content", "suffix"])
def test_a_picture_is_not_written_over(md3: Program, kind: str) -> None:
    picture = Path("img/p2.png")
    out = "o.jsonl"
    if kind == "link":
        os.symlink(picture, out)
    elif kind == "hard":
        os.link(picture, out)
    elif kind == "content":  # a manifest may name pictures whose names do not say so
        Path(out).write_bytes(picture.read_bytes())
    else:
        out = str(picture)
    assert_refused(md3, "caption", "img/p1.png", "-f", "jsonl", "-o", out, kept=Path(out), word="is a picture")
    Path("m.jsonl").write_text(json.dumps({"image": out}) + "\n")
    assert_refused(md3, "run", "m.jsonl", "--task", "caption", "-f", "csv", "-o", out, kept=Path(out), word="a picture")


def test_a_file_that_a_glob_names_is_not_written_over(md3: Program) -> None:
    data = Path("data.parquet")
    assert md3("caption", "img", "-o", data).exit_code == 0
    for beside in Path().glob("data.parquet.*"):
        beside.unlink()
    assert_refused(md3, "run", "*.parquet", "--task", "caption", "-o", data, kept=data)


def test_a_model_and_settings_that_were_not_typed_are_not_written_over(
    md3: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    monkeypatch.setenv("MD3_MODEL", "model")
    assert_refused(md3, "caption", "img", "-o", "model/config.json", kept=Path("model/config.json"))
    Path("md3.toml").write_text("seed = 1\n")
    assert_refused(md3, "caption", "img", "-f", "csv", "-o", "md3.toml", kept=Path("md3.toml"))


def test_a_question_that_is_called_like_a_file_is_no_input(md3: Program) -> None:
    command = ("query", "img", "-q", "answers.csv", "-o", "answers.csv")
    assert md3(*command).exit_code == 0
    assert Path("answers.csv").is_file()
    assert md3(*command).exit_code == 0, "the same command goes on"
    assert md3(*command, "--overwrite").exit_code == 0


def finished(md3: Program) -> Path:
    assert md3("detect", "img", "x", "-o", "run/").exit_code == 0
    return Path("run/records.jsonl")


@pytest.mark.parametrize("name", ["run/records.jsonl", "run/run.json", "run/../run/run.json", "link.json"])
@pytest.mark.parametrize("command", ["export", "report"])
def test_what_is_read_of_a_run_is_not_written_over(md3: Program, name: str, command: str) -> None:
    finished(md3)
    if name == "link.json":
        os.symlink("run/run.json", name)
    out, word = name, "is an input of this command"
    if command == "report":
        out = "page.html"
        os.link(os.path.realpath(name), out)
    more = ("-f", "coco") if command == "export" else ()
    assert_refused(md3, command, "run", *more, "-o", out, kept=Path(name), word=word)


@pytest.mark.parametrize("format", ["coco", "csv", "jsonl", "html", "parquet"])
def test_no_export_takes_a_pictures_place(md3: Program, format: str) -> None:
    finished(md3)
    name = "o.html" if format == "html" else "o.dat"
    os.symlink("img/p0.png", name)
    assert_refused(md3, "export", "run", "-f", format, "-o", name, kept=Path("img/p0.png"), word="is a picture")
    assert Path(name).is_symlink()


def test_ground_truth_is_not_written_over(md3: Program) -> None:
    finished(md3)
    md3("export", "run", "-o", "gt.json")
    os.link("gt.json", "page.html")
    Path("scores").mkdir()
    os.symlink("../gt.json", "scores/eval.json")
    kept = Path("gt.json")
    assert_refused(md3, "export", "run", "--coco-ids-from", "gt.json", "-o", "gt.json", kept=kept)
    assert_refused(md3, "report", "run", "--gt", "gt.json", "-o", "page.html", kept=kept)
    assert_refused(md3, "eval", "run", "--gt", "gt.json", "-o", "scores", kept=kept)
    Path("scores/eval.json").unlink()
    os.symlink("../run/records.jsonl", "scores/eval.json")
    assert_refused(md3, "eval", "run", "--compare", "run", "-o", "scores", kept=Path("run/records.jsonl"))
    Path("scores/eval.json").unlink()
    os.symlink("../img/p0.png", "scores/eval.json")
    assert_refused(md3, "eval", "run", "--compare", "run", "-o", "scores", kept=Path("img/p0.png"), word="a picture")


@pytest.mark.parametrize("name", ["eval.json", "boxes-pr.png", "boxes-reliability.png"])
def test_scores_take_nobody_elses_place(md3: Program, name: str) -> None:
    finished(md3)
    kept = Path("scores", name)
    kept.parent.mkdir()
    kept.write_text('{"mine": 1}')
    word = "was not written by md3 eval"
    assert_refused(md3, "eval", "run", "--compare", "run", "-o", "scores", kept=kept, word=word)
    kept.rename(kept.with_name("notes.json"))
    for _ in range(2):  # what it wrote itself is replaced
        assert md3("eval", "run", "--compare", "run", "-o", "scores").exit_code == 0
    assert json.loads(Path("scores/eval.json").read_text())["schema"] == "md3-eval/1"


@pytest.mark.process
def test_a_list_on_stdin_is_not_written_over(tmp_path: Path) -> None:
    rows = tmp_path / "list.csv"
    rows.write_text("image\na.png\n")
    command = [sys.executable, "-m", "md3cli", "run", "-", "--task", "caption", "-m", "tiny", "-o", "list.csv"]
    with rows.open("rb") as stdin:
        environment = clean_environment(tmp_path / "home")
        done = subprocess.run(
            [*command, "--overwrite"], cwd=tmp_path, env=environment, stdin=stdin, capture_output=True, text=True
        )
    assert done.returncode == 2
    assert "list.csv is an input of this command" in done.stderr
    assert rows.read_text() == "image\na.png\n"


@pytest.mark.process
def test_the_same_command_still_goes_on(md3: Program) -> None:
    """What a run itself wrote is none of its inputs."""
    for out in ("o.jsonl", "o.csv", "img/o.json"):
        assert md3("detect", "img", "x", "-o", out).exit_code == 0
        assert md3("detect", "img", "x", "-o", out).exit_code == 0
        assert md3("detect", "img", "x", "-o", out, "--overwrite").exit_code == 0
    assert len(records_of(Path("o.jsonl"))) == 3
