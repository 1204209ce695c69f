"""Names of outputs: inside the folder, never equal, never too long."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import ExportError, UsageError
from md3cli.exporters.files import NAME_LIMIT_BYTES, StagedFolder, candidates, portable, relative_name, staged_folder

AWKWARD = ["../../etc/passwd", "/etc/passwd", "a/../b.jpg", "https://h.example/a.jpg?x=../y", "", ".", "a//b", "a\0b"]
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=300) | st.sampled_from(AWKWARD)


@given(name=names)
def test_candidates_stay_inside_and_fit_the_file_system(name: str) -> None:
    for keep_suffix in (False, True):
        for candidate in candidates(name, ".txt", keep_suffix=keep_suffix):
            assert not candidate.is_absolute()
            assert not {"..", "."} & set(candidate.parts)
            assert "\0" not in str(candidate)
            assert candidate.name.endswith(".txt")
            assert len(candidate.name.encode()) <= NAME_LIMIT_BYTES


@given(name=names)
def test_the_last_candidate_belongs_to_one_image(name: str) -> None:
    assert list(candidates(name, ".txt"))[-1] != list(candidates(name + "x", ".txt"))[-1]


def test_the_plain_name_comes_first() -> None:
    assert next(candidates("a/photo.jpg", ".txt")) == PurePosixPath("a/photo.txt")
    assert next(candidates("a/photo.jpg", ".txt", keep_suffix=True)) == PurePosixPath("a/photo.jpg.txt")
    assert next(candidates("a/photo", ".txt")) == PurePosixPath("a/photo.txt")
    assert relative_name("https://example.com/a/b.jpg") == PurePosixPath("example.com/a/b.jpg")


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    folder = StagedFolder(tmp_path)
    given_names = ["a.jpg", "a.png", "a.jpg", "a.txt/b.jpg", "n" * 255, "n" * 254 + "m", "x/" * 1000 + "y.jpg"]
    made = []
    for name in given_names:
        file, relative = folder.create(candidates(name, ".txt"))
        file.close()
        made.append(relative)
    assert len(set(made)) == len(given_names)
    assert all((tmp_path / relative).is_file() for relative in made)
    assert made[:2] == [PurePosixPath("a.txt"), PurePosixPath("a.png.txt")]


def test_no_name_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(ExportError):
        StagedFolder(tmp_path).create([PurePosixPath("a")])


def fill(folder: StagedFolder, name: str) -> None:
    (folder.path / name).write_text("new")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep/out"

    def stop_midway() -> None:
        with staged_folder(out, overwrite=False, format="voc") as folder:
            fill(folder, "half.txt")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stop_midway()
    assert list(out.parent.iterdir()) == []
    with staged_folder(out, overwrite=False, format="voc") as folder:
        fill(folder, "whole.txt")
        assert not out.exists()
    assert sorted(path.name for path in out.iterdir()) == [".md3", "whole.txt"]
    assert list(out.parent.iterdir()) == [out]


def test_an_empty_folder_may_stand_there_and_a_full_one_only_when_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with staged_folder(out, overwrite=False, format="voc") as folder:
        fill(folder, "first.txt")
    with pytest.raises(UsageError, match="--overwrite"), staged_folder(out, overwrite=False, format="voc"):
        pass
    with staged_folder(out, overwrite=True, format="voc") as folder:
        fill(folder, "second.txt")
    assert sorted(path.name for path in out.iterdir()) == [".md3", "second.txt"]
    (out / "thesis.docx").touch()
    with pytest.raises(UsageError, match="thesis"), staged_folder(out, overwrite=True, format="voc"):
        pass
    assert len(list(out.iterdir())) == 3


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with (
        pytest.raises(UsageError, match="is a file"),
        staged_folder(tmp_path / "out", overwrite=True, format="voc"),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("übung/日本語 ☃.png", "übung/日本語 ☃.png"),
        ("train station.jpg", "train station.jpg"),
        ("con/aux.jpg", "_con/_aux.jpg"),
        ("COM1/lpt9.x.png", "_COM1/_lpt9.x.png"),
        ("console/auxiliary.png", "console/auxiliary.png"),
        ("trailing. /a.png", "trailing__/a.png"),
        ("a\\..\\..\\b.png", "a_.._.._b.png"),
        ("c:\\x.png", "c__x.png"),
        ("a::b?.png", "a__b_.png"),
        ("a\nb\x1b\x7f.png", "a_b__.png"),
    ],
)
def test_portable_names(name: str, expected: str) -> None:
    assert portable(PurePosixPath(name)) == PurePosixPath(expected)
