"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from md3cli.errors import OutputError
from md3cli.files import OutputLock, atomic_publish, remove_stale_temps, temp_beside


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


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, flags: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("md3cli.system.fcntl.flock", no_locks)
    lock = OutputLock.acquire(tmp_path / "out.lock", tmp_path / "out")
    assert not lock.is_held
    lock.release()
