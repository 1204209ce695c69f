"""Names of an export's files: inside the folder, portable, told apart."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import ExportError
from md3cli.exporters.names import NAME_LIMIT_BYTES, Names, beside_pictures, candidates, portable, relative_name

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


# ---- flat names ------------------------------------------------------------------------------------


@given(st.lists(names, max_size=30))
def test_flat_names_are_plain_and_unique_without_suffix_and_case(given_names: list[str]) -> None:
    made = Names(is_flat=True)
    files = [file for name in given_names for file in made.of(name, ".txt")]
    assert len(files) == len(given_names)
    for file in files:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.txt", str(file)), file
        assert len(file.name) <= 200
    assert len({file.stem.casefold() for file in files}) == len(files)


def test_flat_names_keep_what_they_can() -> None:
    given_names = [
        "a/b.jpg",
        "a_b.jpg",
        "A/B.PNG",
        "Zoë/über 1.jpeg",
        "日本.png",
        "con.jpg",
        ".hidden.jpg",
        "v1.2",
        "a/b.jpg",
    ]
    made = Names(is_flat=True)
    files = [str(next(made.of(name, ""))) for name in given_names]
    assert files[0] == "a_b"
    assert files[1].startswith("a_b-")
    assert files[2].startswith("A_B-")
    assert files[3:8] == ["Zoe_uber_1", "_", "_con", "_hidden", "v1.2"]
    assert len(set(files)) == len(files)


def test_a_name_given_often_stays_unique() -> None:
    made = Names(is_flat=True)
    assert len({made.claimed("cat") for _ in range(50)}) == 50


def test_a_stem_is_given_once_whatever_suffix_and_case() -> None:
    names = Names(is_flat=False, fitted=beside_pictures)
    given = [str(names.first_free(image, ".png")) for image in ("d/a.jpg", "d/A.webp", "a.jpg", "d/a.jpg.png")]
    assert given == ["d/a.png", "d/A.webp.png", "a.png", "d/a.jpg.png"]
    assert str(names.first_free("frame 1.5", ".jpg")) == "frame 1.5.jpg"
    for _ in range(3):
        names.first_free("e.jpg", ".png")
    assert names.first_free("e.jpg", ".png").parent == PurePosixPath(".")
    with pytest.raises(ExportError, match="no file name is left"):
        names.first_free("e.jpg", ".png")


def test_no_folder_is_called_as_a_picture() -> None:
    assert beside_pictures(PurePosixPath("b.jpg/c.jpg")) == PurePosixPath("b.jp_/c.jpg")
    assert beside_pictures(PurePosixPath("b.d/c:d")) == PurePosixPath("b.d/c_d")
