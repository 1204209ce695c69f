"""Finding files: order, globs, links, hidden ones, and that it never loops or sorts more than a folder."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.source.walk import Glob, PathFilter, Walk, natural_sorted


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    names = "b/x2.jpg b/x10.jpg b/X1.PNG a10.jpeg a9.webp a.txt .hidden.jpg .git/y.jpg b/c/d/z.tiff b/c/w.gif"
    for name in names.split():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def files(tree: Path, **options: object) -> tuple[list[str], Counter[str]]:
    walk = Walk(**options)  # type: ignore[arg-type]
    return list(walk.files(str(tree))), walk.skipped


def test_natural_order_folder_by_folder_and_what_was_left_out(tree: Path) -> None:
    found, skipped = files(tree)
    assert found == ["a9.webp", "a10.jpeg", "b/c/d/z.tiff", "b/c/w.gif", "b/X1.PNG", "b/x2.jpg", "b/x10.jpg"]
    assert skipped == {"hidden": 2, "other suffix": 1}


def test_not_recursive(tree: Path) -> None:
    assert files(tree, recursive=False) == (["a9.webp", "a10.jpeg"], {"hidden": 2, "other suffix": 1, "sub-folders": 1})


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["a9.webp", "a10.jpeg"]),
        ("*.txt", ["a.txt"]),
        ("**/*.jpg", ["b/x2.jpg", "b/x10.jpg"]),
        ("**", ["a9.webp", "a10.jpeg", "b/c/d/z.tiff", "b/c/w.gif", "b/X1.PNG", "b/x2.jpg", "b/x10.jpg"]),
        ("b/*", ["b/X1.PNG", "b/x2.jpg", "b/x10.jpg"]),
        ("?/c/**/*", ["b/c/d/z.tiff", "b/c/w.gif"]),
        ("**/[xX]?.*", ["b/X1.PNG", "b/x2.jpg"]),
        ("**/x[!2-9]*.jpg", ["b/x10.jpg"]),
        (".git/*.jpg", [".git/y.jpg"]),
        (".g?t/*.jpg", [".git/y.jpg"]),
        ("**/.*.jpg", [".hidden.jpg"]),
        ("[z-a]*", []),
        ("[*", []),
    ],
)
def test_globs(tree: Path, pattern: str, expected: list[str]) -> None:
    glob = Glob.parse(f"{tree}/{pattern}")
    found = [os.path.relpath(f"{glob.base}/{path}", tree) for path in Walk().files(glob.base, glob)]
    assert found == expected


def test_the_base_of_a_glob_is_what_has_no_wildcard() -> None:
    typed = ["a/b/*.jpg", "*.jpg", "/*.jpg", "/a/**", "./x?/b"]
    assert [Glob.parse(text).base for text in typed] == ["a/b", "", "/", "/a", "."]
    assert Glob.parse("a//**/./x*").parts == ("**", "x*")


def test_a_folder_called_like_a_picture_is_one_when_it_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").mkdir()
    (tmp_path / "b.jpg").mkdir()
    (tmp_path / "b.jpg" / "c.jpg").touch()
    assert files(tmp_path)[0] == ["a.jpg", "b.jpg/c.jpg"]
    assert files(tmp_path, recursive=False)[0] == ["a.jpg"]


def test_file_links_are_followed_and_folder_links_only_on_demand(tree: Path) -> None:
    (tree / "z.jpg").symlink_to("b/x2.jpg")
    (tree / "dangling.jpg").symlink_to("nowhere")
    (tree / "self.jpg").symlink_to("self.jpg")
    (tree / "away").symlink_to("b/c")
    (tree / "b" / "up").symlink_to("..")
    found, skipped = files(tree)
    assert {"z.jpg", "dangling.jpg", "self.jpg"} <= set(found)
    assert not any(name.startswith(("away", "b/up")) for name in found)
    assert skipped["directory links"] == 2
    followed, _ = files(tree, follow_links=True)
    assert {"away/w.gif", "away/d/z.tiff", "b/c/w.gif"} <= set(followed)
    assert len(followed) == len(set(followed)) < 40


def test_folders_that_cannot_be_read_are_counted(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("/c"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr("md3cli.source.walk.os.scandir", refuse)
    found, skipped = files(tree)
    assert "b/x2.jpg" in found
    assert skipped["unreadable folders"] == 1
    assert files(tree / "nowhere") == ([], {"unreadable folders": 1})


@pytest.mark.process
def test_a_deep_tree_is_no_recursion(tmp_path: Path) -> None:
    depth = 1050
    fds = [os.open(tmp_path, os.O_RDONLY)]
    for _ in range(depth):
        os.mkdir("d", dir_fd=fds[-1])
        fds.append(os.open("d", os.O_RDONLY, dir_fd=fds[-1]))
        os.close(fds.pop(0))
    os.close(os.open("x.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=fds[-1]))
    os.close(fds[-1])
    found, _ = files(tmp_path)
    subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)  # deeper than what pytest can clear away
    assert found == ["d/" * depth + "x.jpg"]


def test_filters() -> None:
    names = "a.jpg b/a.jpg a.png keep/x.png thumbs/a.jpg b/thumbs/c/a.jpg raw/a.jpg b/raw/a.jpg b/a_s.jpg"
    kept = PathFilter.of(("*.jpg", "keep/**"), ("thumbs", "raw/*.jpg", "*_s.jpg"))
    assert [name for name in names.split() if kept.keeps(name)] == ["a.jpg", "b/a.jpg", "keep/x.png", "b/raw/a.jpg"]
    assert PathFilter.of((), ()).keeps("any/thing")
    assert PathFilter.of(("",), ()).keeps("x") is False


def test_an_excluded_folder_is_not_entered(tree: Path) -> None:
    found, skipped = files(tree, filter=PathFilter.of((), ("c",)))
    assert "b/x2.jpg" in found
    assert not any("/c/" in name for name in found)
    assert skipped["excluded"] == 1


@given(st.lists(st.integers(0, 10**6), max_size=20))
def test_numbers_in_names_sort_as_numbers(numbers: list[int]) -> None:
    names = [f"img{number}.jpg" for number in numbers]
    assert natural_sorted(names) == [f"img{number}.jpg" for number in sorted(numbers)]


@given(st.lists(st.text(st.characters(exclude_characters="/\0"), max_size=8), max_size=12), st.randoms())
def test_any_names_have_one_order(names: list[str], shuffler: object) -> None:
    shuffled = list(names)
    shuffler.shuffle(shuffled)  # type: ignore[attr-defined]
    assert natural_sorted(shuffled) == natural_sorted(names)
    assert sorted(natural_sorted(names)) == sorted(names)
