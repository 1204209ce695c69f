"""`md3 … --compile` with a real compiler that is stopped, killed, raced and given no space; its files are damaged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import wait_until
from program import clean_environment, make_pictures
from small_disk import has_small_disks, small_disk

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.timeout(3600)]


class Compiling:
    """Runs `md3 detect … --compile` of the same pictures, with its folders under `home`."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.pictures = make_pictures(folder / "pictures", 2)
        self.folder, self.cache = folder, home / "cache" / "md3cli"
        self.environment = clean_environment(home) | {"TMPDIR": str(folder / "temporary")}
        (folder / "temporary").mkdir()

    def start(self, name: str, **environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "md3cli", "detect", str(self.pictures), "red circle", "--model", "tiny"]
        command += ["--device", "cpu", "--batch-size", "1", "--workers", "1", "--compile", "-o", str(self.output(name))]
        return subprocess.Popen(command, env=self.environment | environment, stderr=subprocess.PIPE)

    def output(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def finish(self, process: subprocess.Popen[bytes]) -> str:
        """Return what a process said that must have ended well."""
        _, said = process.communicate()
        assert process.returncode == 0, said.decode()
        return said.decode()

    def run(self, name: str, **environment: str) -> str:
        return self.finish(self.start(name, **environment))

    def wait(self, process: subprocess.Popen[bytes], pattern: str) -> None:
        """Wait until a compiler has written such a file."""
        found = lambda: any(next(folder.rglob(pattern), None) for folder in self.left)  # noqa: E731
        wait_until(lambda: found() or process.poll() is not None, "nothing is compiled", patience_s=1200)

    @property
    def left(self) -> list[Path]:
        """What compilers left behind."""
        return [*self.cache.glob("md3-compile-*"), *(self.folder / "temporary").glob("*aotinductor*")]

    @property
    def kept(self) -> list[Path]:
        return sorted((self.cache / "compiled").rglob("*.enc"))


def test_whatever_stops_a_compiler_the_next_start_is_well(tmp_path: Path) -> None:
    compiling = Compiling(tmp_path, tmp_path / "home")
    for signum, pattern in (
        (signal.SIGINT, "holder"),
        (signal.SIGTERM, "*.wrapper.cpp"),
        (signal.SIGKILL, "*.kernel.cpp"),
    ):
        process = compiling.start(signum.name)
        compiling.wait(process, pattern)
        process.send_signal(signum)
        process.communicate()
        assert process.returncode == (-signum if signum is signal.SIGKILL else 128 + signum)
        assert len(compiling.left) == (signum is signal.SIGKILL)
    for folder in compiling.left:
        os.utime(folder, (1, 1))

    both = [compiling.start(name) for name in ("one", "other")]
    for process in both:
        assert "is compiled" not in compiling.finish(process)
    records = compiling.output("one").read_bytes()
    assert compiling.output("other").read_bytes() == records
    assert not compiling.left
    assert len(compiling.kept) == 2  # code, and what it was worth

    for path in compiling.kept:
        path.write_bytes(path.read_bytes()[:-1])
    assert "is compiled" not in compiling.run("damaged")
    assert "is compiled" not in compiling.run("quick", CXX="false")  # a compiler that compiles nothing is not asked
    for name in ("damaged", "quick"):
        assert compiling.output(name).read_bytes() == records
    for path in compiling.kept:
        path.unlink()
    assert "nothing is compiled: the compiler failed" in compiling.run("eager", CXX="false")
    assert compiling.output("eager").read_bytes() == records


@pytest.mark.skipif(not has_small_disks(), reason="needs a disk that is soon full")
def test_a_full_disk_is_a_line(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    compiling = Compiling(tmp_path, home)
    with small_disk(home, 1024):
        assert "nothing is compiled: the compiler failed" in compiling.run("full")
        assert not compiling.left
