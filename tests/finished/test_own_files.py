"""md3's own files are never INPUT, and are counted; and what a stranger's list of files can do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from program import Program, beside_pictures, records_of, start

from md3cli.finished.own_files import foreign_file, remove_written, written_paths
from md3cli.run.order import WaitingRecords


@pytest.fixture
def md3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    return beside_pictures(monkeypatch, tmp_path)


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
