"""What is read, and pictures, are never written over: with and without --overwrite, under any name.

md3's own files are never INPUT, and are counted; and what a stranger's list of files can do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from program import Program, beside_pictures, clean_environment, records_of, start

from md3cli.finished import guards
from md3cli.finished.guards import (
    check_not_foreign,
    check_not_foreign_run,
    foreign_file,
    remove_written,
    write_marker,
    written_paths,
)
from md3cli.run.order import WaitingRecords


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


@pytest.mark.process
@pytest.mark.parametrize("format", ["yolo", "hf", "overlay"])
@pytest.mark.parametrize("where", [".", "img", "**/*.png"])
def test_an_output_inside_input_is_not_annotated(md3: Program, format: str, where: str) -> None:
    out = "img/out" if where == "img" else "out"
    command = ("detect", where, "x", "-o", out, "-f", format)
    assert md3(*command).exit_code == 0
    before = Path(out, "records.jsonl").read_bytes()
    result = md3(*command)
    assert result.exit_code == 0
    assert Path(out, "records.jsonl").read_bytes() == before
    assert len(records_of(before)) == 3
    assert "3 of md3's own files" in result.stderr
    assert md3(*command, "--overwrite").exit_code == 0
    assert len(records_of(Path(out, "records.jsonl"))) == 3


def test_another_runs_folder_and_an_export_inside_input_are_left_out(md3: Program) -> None:
    md3("detect", "img", "x", "-o", "img/first", "-f", "overlay")
    md3("export", "img/first", "-f", "yolo", "-o", "img/data set")
    result = md3("caption", "img", "-o", "out.jsonl")
    assert result.exit_code == 0
    assert len(records_of(Path("out.jsonl"))) == 3
    assert "6 of md3's own files" in result.stderr
    counted = md3("caption", "img", "--dry-run")
    assert counted.exit_code == 0
    assert json.loads(counted.stdout)["skipped"]["of md3's own files"] == 6


def test_a_folder_that_is_named_is_walked(md3: Program) -> None:
    md3("detect", "img", "x", "-o", "out", "-f", "yolo")
    assert md3("caption", "out/yolo/images", "-o", "o.jsonl").exit_code == 0
    assert len(records_of(Path("o.jsonl"))) == 3
    assert md3("caption", "out/yolo", "-o", "p.jsonl").exit_code == 0
    assert len(records_of(Path("p.jsonl"))) == 3, "also one that has a list"


def test_a_strangers_list_in_a_data_folder_hides_nothing_unseen(md3: Program) -> None:
    shutil.copytree("img", "data/sub")
    Path("data/sub/.md3").write_text("whatever")
    shutil.copy("img/p0.png", "data/mine.png")
    result = md3("caption", "data", "-o", "o.jsonl")
    assert result.exit_code == 0
    assert [record["image"] for record in records_of(Path("o.jsonl"))] == ["mine.png"]
    assert "3 of md3's own files" in result.stderr


@pytest.mark.process
def test_many_processes_leave_out_the_same(md3: Program, tmp_path: Path) -> None:
    command = ("detect", ".", "x", "-o", "out", "-f", "yolo", "--no-progress", "--devices", "cpu")
    for _ in range(2):
        process = start(*command)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors.decode()
    assert len(records_of(Path("out/records.jsonl"))) == 3


@pytest.mark.parametrize("suffix", ["", ".early", ".damaged", ".run.json", ".lock"])
def test_files_beside_output_are_no_input(md3: Program, suffix: str) -> None:
    assert md3("caption", "img", "-o", "img/o.jsonl").exit_code == 0
    Path(f"img/o.jsonl{suffix}").touch()
    assert md3("caption", "img/*.*", "-o", "img/o.jsonl").exit_code == 0
    assert len(records_of(Path("img/o.jsonl"))) == 3


# -- lists of files ------------------------------------------------------------------------------


HEAD = json.dumps({"schema": "md3-files/1", "format": "yolo", "version": "1"})
HOSTILE = ["../precious.txt", "/etc/passwd", "a/../../precious.txt", "link/precious.txt", "./x", "", "\0", '"\\u0000"']


def listed(folder: Path, content: bytes) -> Path:
    folder.mkdir()
    (folder / ".md3").write_bytes(content)
    return folder


def test_a_hostile_list_removes_nothing_outside(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/precious.txt").write_text("mine")
    names = [*HOSTILE, str(precious), json.dumps(str(precious)), "ours.txt"]
    folder = listed(tmp_path / "out", "\n".join([HEAD, *names]).encode())
    (folder / "link").symlink_to(tmp_path / "other")
    (folder / "ours.txt").touch()
    assert foreign_file(folder) == "link"
    remove_written(folder)
    assert precious.read_text() == (tmp_path / "other/precious.txt").read_text() == "mine"
    assert os.listdir(folder) == ["link"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[]",
        b'{"schema": 7}',
        b"[" * 100_000,
        b'{"schema": "md3-files/2"}\nmine.txt\n',
        b"{" + b" " * (1 << 20) + b"}",
    ],
)
def test_a_list_that_is_none_names_nothing(tmp_path: Path, content: bytes) -> None:
    folder = listed(tmp_path / "out", content)
    (folder / "mine.txt").touch()
    assert list(written_paths(folder)) == []
    assert foreign_file(folder) == "mine.txt"
    remove_written(folder)
    assert sorted(os.listdir(folder)) == [".md3", "mine.txt"]


def test_a_line_without_end_or_text_ends_the_list_at_most(tmp_path: Path) -> None:
    folder = listed(tmp_path / "out", HEAD.encode() + b"\n" + b"x" * (1 << 22) + b"\nours.txt\n\xff\nlater.txt\n")
    assert "../" not in "".join(written_paths(folder))
    remove_written(folder)
    assert not (folder / ".md3").exists()


def test_a_list_that_is_a_link_or_a_pipe_is_none(tmp_path: Path) -> None:
    real = tmp_path / "list"
    real.write_text(f"{HEAD}\nmine.txt\n")
    for name in ("link", "pipe"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine.txt").touch()
        if name == "link":
            (folder / ".md3").symlink_to(real)
        elif hasattr(os, "mkfifo"):
            os.mkfifo(folder / ".md3")
        assert list(written_paths(folder)) == []


def test_foreign_files_in_an_export_stay_and_a_trainers_cache_does_too(md3: Program) -> None:
    md3("detect", "img", "x", "-o", "r.jsonl")
    export = ("export", "r.jsonl", "-f", "yolo", "-o", "set", "--overwrite")
    assert md3(*export).exit_code == 0
    Path("set/labels.cache").write_text("trained")
    assert md3(*export).exit_code == 0
    assert Path("set/labels.cache").read_text() == "trained"
    Path("set/.md3notes").write_text("mine")
    result = md3(*export)
    assert result.exit_code == 2
    assert ".md3notes was not written by md3" in result.stderr
    assert Path("set/.md3notes").read_text() == "mine"


@pytest.mark.parametrize("format", ["yolo", "hf", "overlay", "voc", "labelstudio"])
def test_a_folder_with_other_files_is_refused_and_gets_no_list(md3: Program, format: str) -> None:
    md3("detect", "img", "x", "-o", "r.jsonl")
    Path("holiday").mkdir()
    shutil.copy("img/p0.png", "holiday/beach.png")
    for more in ((), ("--overwrite",)):
        result = md3("export", "r.jsonl", "-f", format, "-o", "holiday", *more)
        assert result.exit_code == 2
        assert "holiday was not made by md3" in result.stderr
        assert os.listdir("holiday") == ["beach.png"]


def test_texts_join_a_folder_without_a_list(md3: Program) -> None:
    md3("caption", "img", "-o", "r.jsonl")
    Path("notes").mkdir()
    Path("notes/thesis.txt").write_text("mine")
    assert md3("export", "r.jsonl", "-f", "txt", "-o", "notes").exit_code == 0
    assert not Path("notes/.md3").exists()
    assert md3("export", "r.jsonl", "-f", "txt", "--beside", "--root", "img").exit_code == 0
    assert not Path("img/.md3").exists()


def test_texts_in_a_run_folder_leave_it_a_run_folder(md3: Program) -> None:
    md3("caption", "img", "-o", "run/")
    assert md3("export", "run", "-f", "txt", "-o", "run").exit_code == 0
    result = md3("export", "run", "-f", "overlay", "-o", "run", "--overwrite")
    assert result.exit_code == 2
    assert len(records_of(Path("run/records.jsonl"))) == 3


def test_an_export_through_a_link_replaces_the_folder_and_keeps_the_link(md3: Program) -> None:
    md3("detect", "img", "x", "-o", "r.jsonl")
    md3("export", "r.jsonl", "-f", "yolo", "-o", "set")
    os.symlink("set", "link")
    assert md3("export", "r.jsonl", "-f", "yolo", "-o", "link", "--overwrite").exit_code == 0
    assert Path("link").is_symlink()
    assert Path("set/data.yaml").is_file()


# -- links planted where md3 writes ---------------------------------------------------------------


def targets_of(run: str) -> list[str]:
    """Names beside a journal that md3 writes without asking."""
    return [f"{run}{suffix}" for suffix in (".lock", ".early", ".early.new", ".damaged", ".run.json")]


@pytest.mark.parametrize("name", targets_of("o.jsonl"))
@pytest.mark.parametrize("is_damaged", [False, True])
def test_nothing_is_written_through_a_planted_link(md3: Program, name: str, is_damaged: bool) -> None:
    """In a folder that others write to too, no file outside is made, emptied or changed."""
    victim = Path("../victim")
    victim.write_text("mine\n")
    if is_damaged:
        md3("caption", "img", "-o", "o.jsonl")
        lines = Path("o.jsonl").read_bytes().splitlines(keepends=True)
        Path("o.jsonl").write_bytes(lines[0] + b"damage\n" + lines[1])
    Path(name).unlink(missing_ok=True)
    os.symlink(victim, name)
    result = md3("caption", "img", "-o", "o.jsonl")
    assert victim.read_text() == "mine\n"
    assert "unexpected" not in result.stderr
    if name.endswith(".lock"):
        assert result.exit_code == 1
        assert "is a link" in result.stderr


@pytest.mark.parametrize("name", targets_of("o.jsonl"))
def test_a_link_into_nothing_makes_no_file_elsewhere(md3: Program, name: str) -> None:
    os.symlink("../victim", name)
    result = md3("caption", "img", "-o", "o.jsonl")
    assert not Path("../victim").exists()
    assert "unexpected" not in result.stderr


def test_answers_kept_ahead_are_not_written_through_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    journal = tmp_path / "o.jsonl"
    journal.touch()
    for name in ("o.jsonl.early", "o.jsonl.early.new"):
        (tmp_path / name).symlink_to(victim)
    waiting = WaitingRecords(journal, is_done=lambda _: False)
    record = {"schema": "md3/1", "id": "x", "error": None}
    waiting.keep([record], lambda: [record])  # type: ignore[list-item]
    waiting.close()
    assert victim.read_text() == "mine"


# -- pictures in exports -------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["yolo", "hf"])
@pytest.mark.parametrize("is_linked", [False, True])
def test_pictures_are_copies_unless_links_are_asked_for(md3: Program, format: str, is_linked: bool) -> None:
    shutil.copy("img/p0.png", "else.png")
    os.symlink("../else.png", "img/link.png")
    md3("detect", "img", "x", "-o", "r.jsonl")
    more = ("--link",) if is_linked else ()
    assert md3("export", "r.jsonl", "-f", format, "-o", "set", *more).exit_code == 0
    pictures = {path.name: path for path in Path("set").rglob("*.png")}
    assert sorted(pictures) == ["link.png", "p0.png", "p1.png", "p2.png"]
    assert not any(path.is_symlink() for path in pictures.values())
    assert pictures["p1.png"].samefile("img/p1.png") == is_linked
    assert pictures["link.png"].samefile("else.png") == is_linked
    before = Path("img/p2.png").read_bytes()
    assert pictures["p2.png"].read_bytes() == before
    with open(pictures["p2.png"], "r+b") as file:  # as a trainer does
        file.write(b"rewritten")
    assert (Path("img/p2.png").read_bytes() == before) == (not is_linked)


# -- ranks that write meanwhile ----------------------------------------------------------------------


def test_records_that_a_rank_puts_there_just_now_are_ours(
    md3: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    md3("caption", "img", "-o", "o.jsonl")
    records, begins = tmp_path / "records.jsonl", guards.begins_with_record

    def look_too_early(journal: Path) -> bool:
        found = begins(journal)
        shutil.copy("o.jsonl", journal)
        return found

    monkeypatch.setattr(guards, "begins_with_record", look_too_early)
    check_not_foreign_run(records, tmp_path / "run.json")
    assert not records.exists(), "what is not there is not looked into"


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_folder_that_a_rank_replaces_just_now_is_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_gone: bool
) -> None:
    """Its list was the old one's, or a folder inside it was."""
    looks = [0]

    def look_during_change(folder: Path) -> str | None:
        looks[0] += 1
        if looks[0] == 1 and is_gone:
            raise FileNotFoundError
        return "new.txt" if looks[0] == 1 else foreign_file(folder)

    (tmp_path / "new.txt").touch()
    write_marker(tmp_path, "voc", iter(["new.txt"]))
    monkeypatch.setattr(guards, "foreign_file", look_during_change)
    check_not_foreign(tmp_path)
    assert looks == [2]
