"""Cache and temporary folders that cannot be written: no run fails of them that could do without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from program import STUB_MD3, clean_environment, make_pictures, records_of

pytestmark = pytest.mark.process

STUB = (str(STUB_MD3),)
PROGRAM = ("-m", "md3cli")

# Each value is a file where a folder should be, which root cannot write to either; None: not set.
BROKEN = [
    {"HOME": "afile", "XDG_CACHE_HOME": None},
    {"HOME": None, "XDG_CACHE_HOME": "afile"},
    {"XDG_CACHE_HOME": "afile", "TMPDIR": "afile"},
    {"XDG_CACHE_HOME": "afile/below"},
]


def run(
    folder: Path, changes: dict[str, str | None], *arguments: str, program: tuple[str, ...] = STUB
) -> subprocess.CompletedProcess[str]:
    make_pictures(folder / "pictures", 2)
    (folder / "afile").write_text("no folder")
    environment = clean_environment(folder / "home") | {"OMP_NUM_THREADS": "1"}
    environment |= {name: str(folder / value) for name, value in changes.items() if value is not None}
    environment = {name: value for name, value in environment.items() if changes.get(name, value) is not None}
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(os.name == "nt", reason="other variables")
@pytest.mark.parametrize("changes", BROKEN)
@pytest.mark.parametrize("format", ["coco", "csv"])
def test_a_document_is_printed_without_a_cache_folder(
    tmp_path: Path, changes: dict[str, str | None], format: str
) -> None:
    done = run(tmp_path, changes, "detect", "pictures", "cat", "-f", format, "--no-progress")
    assert (done.returncode, "rror" in done.stderr) == (0, False), done.stderr
    assert "p1.png" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="other variables")
@pytest.mark.parametrize("options", [(), ("--devices", "cpu")])
def test_a_run_goes_on_without_its_encoding_cache(tmp_path: Path, options: tuple[str, ...]) -> None:
    asked = ("detect", "pictures", "cat", "--model", "tiny", "--device", "cpu", "-o", "out.jsonl", *options)
    done = run(tmp_path, BROKEN[1], *asked, program=PROGRAM)
    assert done.returncode == 0, done.stderr
    assert len(records_of(tmp_path / "out.jsonl")) == 2
    if not options:  # workers have a log of their own
        assert "nothing is kept for the next run: cache folder" in done.stderr


def test_a_cache_folder_that_was_asked_for_must_do(tmp_path: Path) -> None:
    asked = ("detect", "pictures", "cat", "--model", "tiny", "--device", "cpu", "--cache-dir", "afile")
    done = run(tmp_path, {}, *asked, program=PROGRAM)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "unexpected" not in done.stderr
    assert "afile" in done.stderr


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="no user without a home folder there")
def test_a_user_without_a_home_folder_has_folders_where_nothing_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from md3cli.settings import read_layers, user_cache_dir

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert not user_cache_dir({}).exists()
    assert len(read_layers({}, Path("/"))) == 1
