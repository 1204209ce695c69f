"""Small files by a child process: the same as without one; what it meets is raised here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from finished_runs import Run, detect_records

from md3cli.errors import ExportError
from md3cli.exporters import small_files
from md3cli.exporters.files import StagedFolder
from md3cli.exporters.small_files import SmallFiles

pytestmark = pytest.mark.process
CONTENTS = [b"", b"x", b"0 0.5 0.5 0.1 0.1\n" * 20_000, bytes(range(256))] * 3


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child from the second file on."""
    monkeypatch.setattr(small_files, "UNTIL_WORTH_IT", 1)
    monkeypatch.setattr(small_files, "num_cores", lambda: 2)


def names() -> Iterator[PurePosixPath]:
    return (PurePosixPath(f"{number}-ü\udcff.txt") for number in range(len(CONTENTS)))


def written(folder: Path) -> dict[bytes, bytes]:
    return {os.fsencode(path.name): path.read_bytes() for path in (folder / "labels").iterdir()}


def test_the_files_are_those_of_the_plain_way(tmp_path: Path) -> None:
    for are_unique in (False, True):
        folder = tmp_path / str(are_unique)
        (folder / "labels").mkdir(parents=True)
        with SmallFiles(StagedFolder(folder), are_unique=are_unique) as files:
            given = [
                files.write([name], content, inside="labels") for name, content in zip(names(), CONTENTS, strict=True)
            ]
        assert given == [*names()]
        assert (files._child is not None) is are_unique
    assert written(tmp_path / "True") == written(tmp_path / "False")
    assert [*written(tmp_path / "True").values()].count(b"x") == 3


def write_all(folder: Path, names: list[str], killed_at: int | None = None) -> None:
    with SmallFiles(StagedFolder(folder), are_unique=True) as files:
        for number, name in enumerate(names):
            files.write([PurePosixPath(name)], b"x" * 10_000, inside="labels")
            if number == killed_at:
                assert files._child is not None
                files._child.process.kill()


def test_what_the_child_meets_is_raised(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/there.txt").write_text("mine")
    with pytest.raises(OSError, match=r"there\.txt"):
        write_all(tmp_path, ["first.txt", "second.txt", "there.txt"])
    assert (tmp_path / "labels/there.txt").read_text() == "mine"


def test_a_child_that_is_killed_ends_it(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    with pytest.raises(ExportError, match="the process that writes the files has ended"):
        write_all(tmp_path, [f"{number}.txt" for number in range(100)], killed_at=5)


def test_a_flat_set_is_the_same_with_and_without_a_child(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write(detect_records([f"{number}/a.jpg" for number in range(40)]))
    _, handed = run.export("yolo", "handed", is_flat=True)
    monkeypatch.setattr(small_files, "num_cores", lambda: 1)
    _, plain = run.export("yolo", "plain", is_flat=True)
    assert {path.name: path.read_bytes() for path in (handed / "labels").iterdir()} == {
        path.name: path.read_bytes() for path in (plain / "labels").iterdir()
    }
    assert (handed / ".md3").read_text().count("labels/") == 40
