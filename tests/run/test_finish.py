"""The failures that a summary names, through the program, and the command that lists all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from program import Program, make_pictures, records_of
from rich.cells import cell_len

from md3cli.console.summary import Failure, Summary, summary_lines
from md3cli.run.finish import NamedFailures

WAYS = {"one process": ("-o", "out.jsonl"), "a run folder": ("-o", "out", "--shard-size", "2")}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


@pytest.fixture
def md3(md3: Program, tmp_path: Path) -> Program:
    """The program in a folder with two good pictures and eight bad ones."""
    folder = make_pictures(tmp_path / "in", 2)
    for number in range(7):
        (folder / f"bad{number}.png").write_text(f"no picture {number}")
    (folder / "bad\x1b[2J.png").write_bytes(b"")
    return md3


def named(stderr: str) -> list[str]:
    return [line.removeprefix("  ").partition(":")[0] for line in stderr.splitlines() if line.startswith("  ")]


def command_in(stderr: str) -> str:
    return next(line.partition(": ")[2] for line in stderr.splitlines() if line.startswith("all failures: "))


@pytest.mark.process
@ways
def test_five_are_named_and_a_command_lists_all(md3: Program, way: tuple[str, ...]) -> None:
    for _ in ("now", "done before"):
        result = md3("detect", "in", "a", "b", "--no-progress", *way)
        assert result.exit_code == 3
        assert named(result.stderr) == ["bad\\x1b[2J.png", *(f"bad{i}.png" for i in range(4))]
        assert "  bad0.png: not_an_image: the content is no known picture format\n" in result.stderr
        assert "\x1b" not in result.stderr
        command = command_in(result.stderr)
        if os.name != "nt" and shutil.which("grep"):
            listed = records_of(subprocess.run(command, shell=True, capture_output=True, check=True).stdout)
            assert len(listed) == 16
            assert all(record["error"] for record in listed)


def test_a_name_that_a_shell_would_split(md3: Program) -> None:
    result = md3("detect", "in", "a", "--no-progress", "-o", "it's a $folder/r.jsonl")
    assert command_in(result.stderr).endswith(""" 'it'"'"'s a $folder/r.jsonl'""") or os.name == "nt"


def test_on_stdout_there_is_nothing_to_list_them_with(md3: Program) -> None:
    result = md3("detect", "in", "a", "--no-progress")
    assert len(named(result.stderr)) == 5
    assert "all failures" not in result.stderr


@pytest.mark.process
def test_quiet_names_none_and_success_neither(md3: Program) -> None:
    assert md3("detect", "in", "a", "--quiet").stderr == ""
    assert named(md3("detect", "in/p0.png", "a", "--no-progress").stderr) == []


def test_the_second_process_names_what_the_first_left_when_failures_are_done_again(md3: Program) -> None:
    md3("detect", "in", "a", "--no-progress", "-o", "out.jsonl")
    shutil.copy("in/p0.png", "in/bad0.png")
    result = md3("detect", "in", "a", "--no-progress", "-o", "out.jsonl", "--retry-failed")
    assert named(result.stderr) == ["bad\\x1b[2J.png", *(f"bad{i}.png" for i in range(1, 5))]


def test_a_failure_without_a_picture_is_named_by_its_prompt() -> None:
    failures = NamedFailures()
    failures.note({"image": None, "prompt": "why?", "error": {"type": "model", "message": "no"}})
    failures.note_lines([b'{"torn', b'{"image":"a","prompt":null,"error":{"type":"io","message":"gone"}}\n', b"[]\n"])
    assert failures.found == [Failure("why?", "model", "no"), Failure("a", "io", "gone")]


@pytest.mark.parametrize("name", ["a.png", "deep/" * 40 + "picture.png", "画" * 90 + ".png"])
@pytest.mark.parametrize("message", ["short", "long " * 60, "字" * 80])
def test_a_line_fits_the_terminal(name: str, message: str) -> None:
    summary = Summary(failed={"decode": 1}, failures=[Failure(name, "decode", message)])
    line = next(text for text, _ in summary_lines(summary, width=80) if text.startswith("  "))
    assert cell_len(line) <= 80
    assert f"{name[-5:]}: decode: " in line
    full = next(text for text, _ in summary_lines(summary) if text.startswith("  "))
    assert full == f"  {name}: decode: {message}", "nothing is cut in a log"
