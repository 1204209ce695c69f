"""Locks, limits and processes, each also where the system lacks a call."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from md3cli import system

# Stands in for Windows' own.
MSVCRT = """
LK_NBLCK = 2
held = {}
def locking(fd, mode, num_bytes):
    import os
    facts, offset = os.fstat(fd), os.lseek(fd, 0, os.SEEK_CUR)
    if (facts.st_ino, offset) in held:
        raise PermissionError(13, "Permission denied")
    held[facts.st_ino, offset] = fd
"""
WITHOUT_FCNTL = """
import sys
import without_posix
without_posix.hide()
from pathlib import Path
from md3cli.errors import OutputHeldError
from md3cli.files import OutputLock
import byte_locks
sys.modules["msvcrt"] = byte_locks
lock = OutputLock.acquire(Path("out.lock"), "out")
try:
    OutputLock.acquire(Path("out.lock"), "out")
except OutputHeldError as error:
    print(error)
print(lock.is_held, OutputLock.acquire(Path("shared.lock"), "out", is_shared=True).is_held)
"""


@pytest.mark.process
def test_windows_lock_leaves_the_holders_name_readable(tmp_path: Path) -> None:
    (tmp_path / "byte_locks.py").write_text(MSVCRT)
    support = str(Path(__file__).parent / "support")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([support, str(tmp_path)])}
    command = [sys.executable, "-c", WITHOUT_FCNTL]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    told, held = done.stdout.splitlines()
    pid, _ = (tmp_path / "out.lock").read_text().split()
    assert told.startswith(f"out is being written by another run: process {pid} on ")
    assert held == "True False"


def test_a_fifo_does_not_hang_and_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(system.NotRegularError, match="not a regular file"):
        system.open_regular(tmp_path / "fifo")


def test_a_link_is_not_followed_where_it_must_not(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="link"):
        system.open_at_once(tmp_path / "link", os.O_RDWR | os.O_CREAT, follows_links=False)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("has_pread", [True, False])
def test_reading_at_an_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_pread: bool) -> None:
    if not has_pread:
        monkeypatch.delattr(os, "pread")
    (tmp_path / "file").write_bytes(b"0123456789")
    fd = system.open_regular(tmp_path / "file")
    assert [system.read_at(fd, 3, 4), system.read_at(fd, 99, 8), system.read_at(fd, 1, 0)] == [b"456", b"89", b"0"]
    os.close(fd)


def test_a_folders_lock_is_held_by_one(tmp_path: Path) -> None:
    with system.locked_folder(tmp_path), pytest.raises(BlockingIOError), system.locked_folder(tmp_path):
        pass
    with system.locked_folder(tmp_path):
        pass


@pytest.mark.process
def test_whether_a_process_is_there() -> None:
    assert system.is_alive(os.getpid())
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert not system.is_alive(done.pid)
    assert not system.is_alive(10**30)


def test_asking_for_a_process_ends_none_where_signals_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getpgid")
    monkeypatch.setattr(os, "kill", lambda pid, number: pytest.fail("Windows takes signal 0 for Ctrl-C"))
    assert system.is_alive(1)


def test_signals_that_stop_a_run() -> None:
    assert system.STOP_SIGNALS == (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    assert -system.KILL_SIGNAL == -signal.SIGKILL


# -- the heap --------------------------------------------------------------------------------------

COUNT_FAULTS = """
import resource, sys
import torch
from md3cli.system import keep_freed_memory

def faults_of_reuse():
    block = torch.ones(4 << 20)  # 16 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        del block
        block = torch.ones(4 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_memory()
    faults_of_reuse()
print(faults_of_reuse())
"""


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_reused_memory_is_not_faulted_in_again() -> None:
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", COUNT_FAULTS, how], check=True, capture_output=True).stdout)
        for how in ("keep", "return")
    )
    assert kept < 64
    assert returned > 4096  # so that the number above means something
