"""Sidecar texts: where they stand, and what they never replace."""

from __future__ import annotations

from pathlib import Path

import pytest
from finished_runs import NAMES, Run, failure, record

from md3cli.errors import UsageError


def texts_of(out: Path) -> dict[str, str]:
    return {path.relative_to(out).as_posix(): path.read_text(encoding="utf-8") for path in out.rglob("*.txt")}


@pytest.fixture
def caption_run(run: Run) -> Run:
    run.write([
        failure("broken.jpg", "caption", ""),
        *(record(name, "caption", length="short", caption=f"a ☃ {number}") for number, name in enumerate(NAMES)),
    ])  # fmt: skip
    return run


def test_texts_mirror_the_pictures(caption_run: Run) -> None:
    report, out = caption_run.export("txt", "out")
    texts = texts_of(out)
    assert texts["a/photo.txt"] == "a ☃ 0"
    assert texts["a/photo.png.txt"] == "a ☃ 2"  # its plain name is taken
    assert texts["übung/日本語 ☃.txt"] == "a ☃ 5"
    assert len(texts) == len(NAMES)
    assert report.notes == ("1 texts got a longer name because another text has the plain one",)


def test_texts_stand_beside_the_pictures(caption_run: Run) -> None:
    pictures = {path: path.read_bytes() for path in caption_run.root.rglob("*") if path.is_file()}
    report, _ = caption_run.export("txt", "unused", beside=True)
    assert report.out == caption_run.root.resolve()
    assert (caption_run.root / "b/photo.txt").read_text() == "a ☃ 1"
    assert all(path.read_bytes() == content for path, content in pictures.items())
    assert not list(caption_run.root.rglob(".md3*"))
    assert not (caption_run.folder / "unused").exists()


def test_a_text_that_stands_there_is_kept(caption_run: Run) -> None:
    (caption_run.root / "b/photo.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"photo\.txt exists already"):
        caption_run.export("txt", "", beside=True)
    assert list(texts_of(caption_run.root)) == ["b/photo.txt"]
    caption_run.export("txt", "", beside=True, overwrite=True)
    assert (caption_run.root / "b/photo.txt").read_text() == "a ☃ 1"


def test_only_texts_that_md3_wrote_are_replaced(caption_run: Run) -> None:
    _, out = caption_run.export("txt", "texts")
    written = texts_of(out)
    (out / "b/photo.txt").write_text("md3's, and changed")
    caption_run.export("txt", "texts", overwrite=True)
    assert texts_of(out) == written

    foreign = out.with_name("notes") / "b/photo.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with pytest.raises(UsageError, match="was not written by md3"):
        caption_run.export("txt", "notes", overwrite=True)
    assert texts_of(out.with_name("notes")) == {"b/photo.txt": "mine"}


def test_every_text_of_an_image_is_written(run: Run) -> None:
    run.write([record("a.jpg", "query", str(n), answer=str(n), id=f"../../{n}") for n in range(9)])
    _, out = run.export("txt", "out")
    assert sorted(texts_of(out).values()) == sorted(map(str, range(9)))
    assert {path.parent for path in out.rglob("*.txt")} == {out}
    assert sorted(path.name for path in run.folder.iterdir()) == ["out", "records.jsonl", "run.json"]


def test_a_text_is_one_line(run: Run) -> None:
    text = " a dog\n\nruns\r\nfast\rover\x0bthe\x0cgreen\x85wide\u2028old\u2029field  here\n"
    run.write([record("a.jpg", "caption", caption=text)])
    _, out = run.export("txt", "out")
    assert (out / "a.txt").read_bytes() == b"a dog runs fast over the green wide old field  here"


def test_boxes_alone_leave_an_empty_folder_and_a_note(detect_run: Run) -> None:
    report, out = detect_run.export("txt", "out")
    assert texts_of(out) == {}
    assert "no captions or answers" in report.notes[0]


def test_a_link_does_not_lead_out(caption_run: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    out = caption_run.folder / "out"
    out.mkdir()
    (out / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="leads out"):
        caption_run.export("txt", "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert [path.name for path in out.iterdir()] == ["a"]
