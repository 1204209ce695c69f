"""Signals, pipes and broken streams, on the program as a process of its own with a stub in the model's place."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import wait_until
from program import STUB_MD3, isolate, make_pictures, records_of, start

from md3cli.signals import Interrupted, StopSignals

pytestmark = pytest.mark.process

NUM_PICTURES = 60


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    isolate(monkeypatch, tmp_path / "home")
    return make_pictures(tmp_path / "pictures", NUM_PICTURES)


def wait_for_records(path: Path, count: int) -> None:
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= count, "no records came")


def alive_children_of(pid: int) -> list[int]:
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != b"Z":
            children.append(int(stat.parent.name))
    return children


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_first_signal_flushes_and_says_how_to_resume(
    pictures: Path, tmp_path: Path, signum: signal.Signals, status: int
) -> None:
    out = tmp_path / "out file.jsonl"
    command = ("caption", pictures, "-o", out, "--batch-size", 2, "--workers", 1)
    process = start(*command, step_s=0.2)
    wait_for_records(out, 4)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == status, stderr.decode()
    num_records = len(records_of(out))
    assert 4 <= num_records < NUM_PICTURES
    lines = stderr.decode().splitlines()
    assert lines[-2] == f"stopped by {signum.name}: {num_records} new records are in {out}"
    assert lines[-1] == "resume with: " + shlex.join(["md3", *map(str, command)])
    assert b"Traceback" not in stderr
    resumed = start(*command)
    _, stderr = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, stderr.decode()
    assert [record["image"] for record in records_of(out)] == [f"p{i}.png" for i in range(NUM_PICTURES)]


def test_the_resume_command_does_not_start_over(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    process = start("caption", pictures, "-o", out, "--overwrite", "--batch-size", 2, step_s=0.2)
    wait_for_records(out, 2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=240)
    assert "--overwrite" not in stderr.decode().splitlines()[-1]


def test_the_second_signal_leaves_at_once(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    process = start("caption", pictures, "-o", out, "--batch-size", 1, "--workers", 1, step_s=20)
    wait_for_records(out, 1)
    time.sleep(1)  # the second step is under way
    children = alive_children_of(process.pid)
    assert children, "decode workers run"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None, "the step is finished first"
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=240)
    assert process.returncode == 130
    assert time.monotonic() - started < 10, "the step was waited for"
    wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in children), "children outlive the run")
    assert len(records_of(out)) >= 1


def test_a_signal_while_python_ends_changes_no_status() -> None:
    """Python has given the signals back by then, and runs no more Python: an abort stands for a second Ctrl-C."""
    program = (
        "import ctypes, os, signal, sys; from md3cli.signals import StopSignals, lasting_status\n"
        "ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).abort)\n"
        "print('kept', end='')\n"
        "with lasting_status(), StopSignals(): os.kill(os.getpid(), signal.SIGINT); sys.exit({status})"
    )
    of_a_stop, plain = (
        subprocess.run([sys.executable, "-c", program.format(status=status)], capture_output=True, timeout=240)
        for status in (130, 1)
    )
    assert (of_a_stop.returncode, of_a_stop.stdout, of_a_stop.stderr) == (130, b"kept", b"")
    assert plain.returncode == -signal.SIGABRT, "the moment is there"


def test_a_signal_while_stdin_is_waited_for(pictures: Path) -> None:
    process = start("caption", "-", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(f"{pictures}/p0.png\n".encode())
    process.stdin.flush()
    assert process.stdout is not None
    assert b'/p0.png"' in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=240)  # its stdin is open all the time
    stdout, stderr = process.communicate()
    assert process.returncode == 130, stderr.decode()
    assert b"Traceback" not in stderr
    assert stdout == b""


def test_a_signal_during_imports_is_silent(tmp_path: Path) -> None:
    program = "import md3cli.__main__, os, signal; os.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_nohup_is_respected(tmp_path: Path) -> None:
    program = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "import md3cli.__main__; from md3cli.signals import StopSignals\n"
        "with StopSignals(): assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_reader_of_stdout_who_leaves_is_no_failure(pictures: Path) -> None:
    command = shlex.join([sys.executable, str(STUB_MD3), "caption", str(pictures), "--batch-size", "1"])
    script = f"{command} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=240)
    assert done.returncode == 0
    assert done.stdout.count(b"\n") == 1
    assert b"rror" not in done.stderr
    assert b"Traceback" not in done.stderr


def test_help_into_a_closed_pipe_is_quiet() -> None:
    script = f"{shlex.quote(sys.executable)} -m md3cli detect --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("kill", [signal.SIGKILL])
def test_killed_runs_lose_and_double_nothing(pictures: Path, tmp_path: Path, kill: signal.Signals) -> None:
    out = tmp_path / "out.jsonl"
    command = ("detect", pictures, "a", "b", "-o", out, "--batch-size", 3, "--workers", 1)
    for target in (5, 40, 77):
        process = start(*command, step_s=0.02, start_new_session=True)
        wait_for_records(out, target)
        os.killpg(process.pid, kill)
        process.communicate(timeout=240)
    start(*command).communicate(timeout=120)
    asked = [(record["image"], record["prompt"]) for record in records_of(out)]
    assert asked == [(f"p{i}.png", prompt) for i in range(NUM_PICTURES) for prompt in "ab"]


# -- the handlers themselves --------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back what was there: after a signal the handlers stay."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def test_without_a_signal_the_handlers_go() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("handlers")
def test_outside_of_interruptible_regions_a_signal_waits() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(Interrupted) as caught, stop.interruptible():
            pytest.fail("entered although a signal waits")
        assert caught.value.exit_status == 143


@pytest.mark.usefixtures("handlers")
def test_inside_an_interruptible_region_a_signal_raises_at_once() -> None:
    def sleep(stop: StopSignals) -> None:
        with stop.interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(5)
            pytest.fail("slept on")

    with StopSignals() as stop, pytest.raises(Interrupted):
        sleep(stop)


# ---- streams that are closed, break, or lie on a full disk ---------------------------------------


FEW_PICTURES = 30


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    isolate(monkeypatch, tmp_path / "home")
    pictures = make_pictures(tmp_path / "pictures", FEW_PICTURES)
    (pictures / "p3.png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    return shlex.join([sys.executable, str(STUB_MD3), "caption", str(pictures), "-v", "--batch-size", "2"])


def bash(script: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["bash", "-c", script], capture_output=True, timeout=240, check=False)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2> >(true)", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_run_does_not_need_stderr(command: str, redirection: str) -> None:
    done = bash(f"{command} -o out.jsonl {redirection}")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b""), "the failed picture counts"
    assert len(records_of(Path("out.jsonl"))) == FEW_PICTURES


def test_records_on_stdout_do_not_need_stderr(command: str) -> None:
    done = bash(f"{command} 2>&-")
    assert done.returncode == 3
    assert len(records_of(done.stdout)) == FEW_PICTURES


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
    assert len(records_of(Path("out/records.jsonl"))) == FEW_PICTURES
    assert bash(f"{sys.executable} -m md3cli export out/records.jsonl -o again.csv >&-").returncode == 0
    assert Path("again.csv").read_bytes() == Path("out/records.csv").read_bytes()


def test_the_table_into_a_terminal_that_goes_away(command: str) -> None:
    controller, terminal = os.openpty()
    process = subprocess.Popen(shlex.split(command), stdout=terminal, stderr=subprocess.PIPE)
    os.close(terminal)
    os.read(controller, 10)
    os.close(controller)
    _, stderr = process.communicate(timeout=240)
    assert b"Traceback" not in stderr
    assert process.returncode in (0, 1, 3), stderr
