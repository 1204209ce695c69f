"""Files that appear whole or not at all, and folders for scratch that cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from program import STUB_MD3, clean_environment, make_pictures, records_of

from md3cli.errors import OutputError
from md3cli.files import (
    OutputLock,
    atomic_publish,
    held_folder,
    remove_folder,
    remove_stale_temps,
    temp_beside,
)


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    with atomic_publish(target) as temp:
        temp.write_text("new")
        assert temp.parent == tmp_path
        assert not target.exists()
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["out.json"]


def test_an_exception_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("old")

    def write_half() -> None:
        with atomic_publish(target) as temp:
            temp.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out.json").symlink_to("real/out.json")
    with atomic_publish(tmp_path / "out.json") as temp:
        temp.write_text("new")
    assert (tmp_path / "out.json").is_symlink()
    assert (tmp_path / "real" / "out.json").read_text() == "new"


def test_a_name_of_255_bytes_can_be_published(tmp_path: Path) -> None:
    target = tmp_path / ("ä" * 125 + ".json")
    with atomic_publish(target) as temp:
        temp.write_text("new")
    assert target.read_text() == "new"


def test_a_folder_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no/out"), atomic_publish(tmp_path / "no" / "out"):
        pass


def test_only_our_own_leftovers_are_removed(tmp_path: Path) -> None:
    for name in (".out.json.tmp-12", ".out.json.tmp-x", ".other.json.tmp-12", "out.json"):
        (tmp_path / name).touch()
    (tmp_path / ".out.json.tmp-13" / "labels").mkdir(parents=True)
    temp_beside(tmp_path / "out.json").touch()
    remove_stale_temps(tmp_path / "out.json")
    assert sorted(os.listdir(tmp_path)) == [".other.json.tmp-12", ".out.json.tmp-x", "out.json"]


def test_young_leftovers_may_be_another_writers(tmp_path: Path) -> None:
    for number, age_s in ((1, 0), (2, 50), (3, 70)):
        path = tmp_path / f".run.json.tmp-{number}"
        path.touch()
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age_s))
    remove_stale_temps(tmp_path / "run.json", older_than_s=60)
    assert sorted(os.listdir(tmp_path)) == [".run.json.tmp-1", ".run.json.tmp-2"]


def test_a_leftover_that_goes_by_itself_keeps_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        (tmp_path / f".run.json.tmp-{number}").touch()
    unlink, gone = os.unlink, []

    def be_late(path: str) -> None:
        unlink(path)
        if not gone:
            gone.append(path)
            unlink(path)

    monkeypatch.setattr("md3cli.files.os.unlink", be_late)
    remove_stale_temps(tmp_path / "run.json")
    assert os.listdir(tmp_path) == []


def test_what_comes_while_a_folder_is_removed_goes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, remove, late = tmp_path / "a", shutil.rmtree, ["b", "c"]

    def add_and_remove(path: Path, **options: object) -> None:
        remove(path, **options)
        if late:
            (path / late.pop()).mkdir(parents=True)

    monkeypatch.setattr("md3cli.files.shutil.rmtree", add_and_remove)
    folder.mkdir()
    remove_folder(folder)
    assert not folder.exists()


def test_a_folder_that_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    (tmp_path / "a").mkdir()
    monkeypatch.setattr("os.rmdir", refuse)
    with pytest.warns(UserWarning, match=r"a cannot be removed \(Permission denied\); remove it"):
        remove_folder(tmp_path / "a")


def test_a_lock_is_free_after_its_release(tmp_path: Path) -> None:
    path = tmp_path / "out.lock"
    lock = OutputLock.acquire(path, tmp_path / "out")
    with pytest.raises(OutputError, match="out is being written by another run"):
        OutputLock.acquire(path, tmp_path / "out")
    lock.release()
    lock.release()
    again = OutputLock.acquire(path, tmp_path / "out")
    assert again.is_held
    assert path.read_text().startswith(f"{os.getpid()} ")
    again.release()


@pytest.mark.parametrize("is_shared", [False, True])
def test_who_asks_for_the_holder_of_a_lock_refuses_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_shared: bool
) -> None:
    asking = OutputLock.acquire(tmp_path / "out.lock", "out")
    monkeypatch.setattr("md3cli.files.time.sleep", lambda seconds: asking.release())
    OutputLock.acquire(tmp_path / "out.lock", "out", is_shared=is_shared).release()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, flags: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("md3cli.system.fcntl.flock", no_locks)
    lock = OutputLock.acquire(tmp_path / "out.lock", tmp_path / "out")
    assert not lock.is_held
    lock.release()


# ---- no run fails of a scratch folder that it could do without -----------------------------------


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
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="other variables")
@pytest.mark.parametrize("changes", BROKEN)
@pytest.mark.parametrize("format", ["coco", "csv"])
def test_a_document_is_printed_without_a_cache_folder(
    tmp_path: Path, changes: dict[str, str | None], format: str
) -> None:
    done = run(tmp_path, changes, "detect", "pictures", "cat", "-f", format, "--no-progress")
    assert (done.returncode, "rror" in done.stderr) == (0, False), done.stderr
    assert "p1.png" in done.stdout


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="other variables")
@pytest.mark.parametrize("options", [(), ("--devices", "cpu")])
def test_a_run_goes_on_without_its_encoding_cache(tmp_path: Path, options: tuple[str, ...]) -> None:
    asked = ("detect", "pictures", "cat", "--model", "tiny", "--device", "cpu", "-o", "out.jsonl", *options)
    done = run(tmp_path, BROKEN[1], *asked, program=PROGRAM)
    assert done.returncode == 0, done.stderr
    assert len(records_of(tmp_path / "out.jsonl")) == 2
    if not options:  # workers have a log of their own
        assert "nothing is kept for the next run: cache folder" in done.stderr


@pytest.mark.process
def test_a_cache_folder_that_was_asked_for_must_do(tmp_path: Path) -> None:
    asked = ("detect", "pictures", "cat", "--model", "tiny", "--device", "cpu", "--cache-dir", "afile")
    done = run(tmp_path, {}, *asked, program=PROGRAM)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "unexpected" not in done.stderr
    assert "afile" in done.stderr


def test_scratch_folders_of_the_dead_are_removed_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = tmp_path / "md3cli"
    with held_folder("test-") as held:
        assert held.parent == place
        dead, new, other = place / "test-dead", place / "test-new", place / "other"
        strangers = place / "test-strangers"  # where the place is the system's, other programs have folders there
        strangers.mkdir()
        for folder in (dead, new, other):
            folder.mkdir()
            (folder / "holder").write_text("1 here")
        linked = place / "test-linked"
        linked.symlink_to(other)
        for folder in (dead, other, held, strangers):
            os.utime(folder, (1, 1))
        with held_folder("test-") as another:
            left = set(place.iterdir())
        assert left == {held, another, new, other, linked, strangers}
    assert set(place.iterdir()) == {new, other, linked, strangers}
    assert list(other.iterdir()) == [other / "holder"]


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "setuid"), reason="no user without a home folder there")
def test_a_user_without_a_home_folder_has_folders_where_nothing_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from md3cli.settings import read_layers, user_cache_dir

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert not user_cache_dir({}).exists()
    assert len(read_layers({}, Path("/"))) == 1
