"""Streams that are closed, break, or lie on a full disk: the records and the exit status do not depend on them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from program import STUB_MD3, isolate, make_pictures, records_of

pytestmark = pytest.mark.process

NUM_PICTURES = 30


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    isolate(monkeypatch, tmp_path / "home")
    pictures = make_pictures(tmp_path / "pictures", NUM_PICTURES)
    (pictures / "p3.png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    return shlex.join([sys.executable, str(STUB_MD3), "caption", str(pictures), "-v", "--batch-size", "2"])


def bash(script: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["bash", "-c", script], capture_output=True, timeout=120, check=False)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2> >(true)", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_run_does_not_need_stderr(command: str, redirection: str) -> None:
    done = bash(f"{command} -o out.jsonl {redirection}")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b""), "the failed picture counts"
    assert len(records_of(Path("out.jsonl"))) == NUM_PICTURES


def test_records_on_stdout_do_not_need_stderr(command: str) -> None:
    done = bash(f"{command} 2>&-")
    assert done.returncode == 3
    assert len(records_of(done.stdout)) == NUM_PICTURES


@pytest.mark.parametrize("redirection", ["2>&-", "2> >(true)"])
def test_an_error_that_nobody_reads_is_still_an_error(command: str, redirection: str) -> None:
    Path("out.jsonl").write_text("somebody else's\n")
    assert bash(f"{command} -o out.jsonl {redirection}").returncode == 2
    assert Path("out.jsonl").read_text() == "somebody else's\n"


@pytest.mark.parametrize("options", ["", "-f coco"])
def test_a_reader_of_stdout_who_leaves_ends_the_run_quietly(command: str, options: str) -> None:
    done = bash(f"{command} {options} | head -c 9; exit ${{PIPESTATUS[0]}}")
    assert done.returncode in (0, 3), "3: all of it fitted into the pipe"
    assert len(done.stdout) == 9
    assert b"rror:" not in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("options", ["", "-f coco"])
def test_a_reader_of_stdout_who_was_never_there(command: str, options: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as stdout:
        done = subprocess.run([*shlex.split(command), *options.split()], stdout=stdout, stderr=subprocess.PIPE)
    assert done.returncode == 0
    assert b"rror:" not in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", ["{run}", "{run} -f coco", "{run} --dry-run", "{md3} --version", "{md3} doctor"])
def test_a_full_disk_under_stdout_is_named(command: str, arguments: str) -> None:
    done = bash(arguments.format(run=f"{command} --quiet", md3=f"{sys.executable} -m md3cli") + " >/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        b"error: cannot write stdout: No space left on device; make space and run the same command again"
    ]


CLOSED = b"error: stdout is closed, so nothing can be printed; name a file with -o, or send stdout somewhere (> FILE)"


@pytest.mark.parametrize("redirection", [">&-", "<&- >&-", "1</dev/null"])
@pytest.mark.parametrize("options", ["", "-f coco", "-f html", "--dry-run"])
def test_a_run_without_stdout_is_refused_before_anything_is_computed(
    command: str, options: str, redirection: str
) -> None:
    done = bash(f"{command} {options} {redirection}")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [CLOSED]


@pytest.mark.parametrize(
    "arguments",
    [
        "export out.jsonl -f coco",
        "export out.jsonl -f csv",
        "eval out.jsonl --compare out.jsonl",
        "verify out.jsonl",
        "models list",
        "cache info",
        "doctor",
        "bench --model tiny",
        "--version",
        "detect --help",
    ],
)
def test_no_command_loses_what_it_prints_where_stdout_is_closed(command: str, arguments: str) -> None:
    assert bash(f"{command} -o out.jsonl --quiet").returncode == 3
    done = bash(f"{sys.executable} -m md3cli {arguments} >&-")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1:] == [CLOSED]


def test_a_closed_stdout_is_no_file_that_a_run_writes(command: str) -> None:
    done = bash(f"{command} -o out/ -f csv -f coco <&- >&-")
    assert done.returncode == 3, done.stderr
    assert len(records_of(Path("out/records.jsonl"))) == NUM_PICTURES
    assert bash(f"{sys.executable} -m md3cli export out/records.jsonl -o again.csv >&-").returncode == 0
    assert Path("again.csv").read_bytes() == Path("out/records.csv").read_bytes()


def test_the_table_into_a_terminal_that_goes_away(command: str) -> None:
    controller, terminal = os.openpty()
    process = subprocess.Popen(shlex.split(command), stdout=terminal, stderr=subprocess.PIPE)
    os.close(terminal)
    os.read(controller, 10)
    os.close(controller)
    _, stderr = process.communicate(timeout=60)
    assert b"Traceback" not in stderr
    assert process.returncode in (0, 1, 3), stderr
