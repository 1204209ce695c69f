"""An INPUT with nothing to annotate, in every way of running; and parts of INPUT that happen to be empty."""

from __future__ import annotations

from pathlib import Path

import pytest
from program import Program, make_pictures, records_of

WAYS = {
    "one process": (),
    "one process, a file": ("-o", "out.jsonl"),
    "a run folder": ("-o", "out", "--shard-size", "1"),
    "worker processes": ("-o", "out", "--devices", "cpu"),
    "a rank": ("-o", "out", "--world-size", "2", "--worker-rank", "1"),
    "dry run": ("--dry-run",),
    "estimate": ("--dry-run", "--estimate"),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


@pytest.fixture
def md3(md3: Program, tmp_path: Path) -> Program:
    """The program in a folder with two pictures, a folder without any, and an empty list."""
    make_pictures(tmp_path / "in", 2)
    (tmp_path / "none").mkdir()
    (tmp_path / "none/notes.txt").write_text("x")
    (tmp_path / "none/.hidden.png").write_text("x")
    (tmp_path / "list.csv").write_text("image\n")
    return md3


@ways
def test_nothing_in_the_whole_of_input_is_status_1(md3: Program, way: tuple[str, ...]) -> None:
    result = md3("caption", "none", "--no-progress", *way)
    assert result.exit_code == 1
    assert "error: there is nothing to annotate in none (not taken: 1 hidden, 1 other suffix); " in result.stderr
    assert "--allow-empty" in result.stderr
    assert md3.models == [], "no model is looked for"
    assert not list(Path().glob("out*"))


@pytest.mark.process
@ways
def test_it_is_status_0_where_that_is_allowed(md3: Program, way: tuple[str, ...]) -> None:
    result = md3("caption", "none", "--no-progress", "--allow-empty", *way)
    assert result.exit_code == 0, result.stderr
    assert "there is nothing to annotate in none" in result.stderr or "--dry-run" in way
    if way == ("-o", "out.jsonl"):
        assert Path("out.jsonl").read_bytes() == b""


@ways
def test_a_part_of_input_may_be_empty(md3: Program, way: tuple[str, ...]) -> None:
    if "--world-size" in way:
        pytest.skip("a rank shares a plan with the others")
    result = md3("caption", "in/p0.png", "--no-progress", "--shard", "0/999999937", *way)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list.csv"], "nothing to annotate in list.csv (it is empty)"),
        (["in", "--exclude", "*"], "nothing to annotate in in (not taken: 2 excluded)"),
        (["in", "--include", "*.gif"], "nothing to annotate in in (not taken: 2 excluded)"),
        (["*.gif"], "nothing to annotate in *.gif (nothing matches it)"),
        (["none", "list.csv"], "nothing to annotate in none, list.csv (not taken: 1 hidden, 1 other suffix)"),
        (["none", "--shard", "0/2"], "nothing to annotate in none ("),
    ],
)
def test_what_was_looked_at_is_named(md3: Program, arguments: list[str], words: str) -> None:
    result = md3("caption", *arguments, "--no-progress")
    assert result.exit_code == 1
    assert words in result.stderr


@pytest.mark.parametrize("way", [(), ("-o", "out", "--shard-size", "1")], ids=["one process", "a run folder"])
def test_stdin_without_a_line(md3: Program, way: tuple[str, ...]) -> None:
    result = md3("caption", "-", "--no-progress", *way, stdin="")
    assert result.exit_code == 1
    assert "nothing to annotate in stdin (it is empty)" in result.stderr
    again = md3("caption", "-", "--no-progress", *way, stdin="in/p0.png\n")
    assert again.exit_code == 0, "the empty list has not become the plan"
    assert "1 of 1 ok, 1 image in " in again.stderr


def test_a_limit_of_0_is_what_was_asked_for(md3: Program) -> None:
    result = md3("caption", "in", "--limit", "0", "--no-progress")
    assert result.exit_code == 0
    assert "--limit 0 takes nothing" in result.stderr


def test_a_finished_run_with_nothing_left_to_do_is_status_0(md3: Program) -> None:
    for expected in ("2 of 2 ok, 2 images in ", "nothing to do: all 2 were done before"):
        result = md3("caption", "in", "-o", "out.jsonl", "--no-progress")
        assert result.exit_code == 0
        assert expected in result.stderr


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["resume", "overwrite"])
def test_records_stay_where_input_has_become_empty(md3: Program, more: tuple[str, ...]) -> None:
    md3("caption", "in", "-o", "out.jsonl", "--no-progress")
    for picture in Path("in").iterdir():
        picture.unlink()
    assert md3("caption", "in", "-o", "out.jsonl", "--no-progress", *more).exit_code == 1
    assert len(records_of(Path("out.jsonl"))) == 2
