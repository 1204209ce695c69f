"""Sidecar texts: one caption a picture, as the options word it, where trainers look for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from caption_trainers import kohya_caption, onetrainer_captions
from finished_runs import NAMES, Run, failure, record
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import UsageError
from md3cli.exporters.txt import merged


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


def test_the_texts_of_a_picture_are_one_caption_in_input_order(run: Run) -> None:
    """They may stand anywhere in the file, under any id."""
    texts = [record(name, "query", str(n), answer=f"{name[0]}{n}", id=f"../../{n}") for n in range(4) for name in NAMES]
    run.write([*texts, record("b/photo.jpg", "caption", caption="last"), record(None, "query", "?", answer="no image")])
    report, out = run.export("txt", "out")
    assert len(texts_of(out)) == len(NAMES) == report.num_images
    assert texts_of(out)["b/photo.txt"] == "b0, b1, b2, b3, last"
    assert sorted(path.name for path in run.folder.iterdir()) == ["out", "records.jsonl", "run.json"]
    assert "1 answers to questions without an image were left out" in report.notes


def test_the_options_word_the_text(run: Run) -> None:
    run.write([
        record("a.jpg", "caption", caption="A dog.\r\n\r\nIt runs.\n"),
        record("a.jpg", "query", "?", answer="yes\rno"),
    ])  # fmt: skip
    typed = {"prefix": "sks, ", "suffix": " ,8k\\n", "join": " | ", "extension": ".caption"}
    _, out = run.export("txt", "out", **typed)
    assert [path.name for path in out.rglob("[!.]*")] == ["a.caption"]
    assert (out / "a.caption").read_bytes() == b"sks, A dog. It runs. | yes no ,8k\\n"
    _, kept = run.export("txt", "kept", keeps_lines=True, join="\n", suffix="\n")
    assert (kept / "a.txt").read_bytes() == b"A dog.\n\nIt runs.\nyes\nno\n"


def test_what_is_typed_must_be_text(run: Run) -> None:
    run.write([record("a.jpg", "caption", caption="a")])
    with pytest.raises(UsageError, match="--prefix is not UTF-8"):
        run.export("txt", "out", prefix="\udcff")
    assert not (run.folder / "out").exists()


def test_an_empty_text_is_no_caption(run: Run) -> None:
    """kohya's scripts stop at an empty file; a prefix alone describes nothing."""
    run.write([
        record("a.jpg", "caption", caption=" \n"),
        record("a.jpg", "query", "?", answer=""),
        record("b.jpg", "query", "?", answer=""),
        record("b.jpg", "caption", caption="a dog"),
    ])  # fmt: skip
    report, out = run.export("txt", "out", prefix="sks, ")
    assert texts_of(out) == {"b.txt": "sks, a dog"}
    assert report.notes == ("1 pictures have empty texts, so no file (first: a.jpg)",)


def test_pictures_of_one_name_have_texts_of_their_own(run: Run) -> None:
    run.write([record("a.jpg", "caption", caption=text, sha256=text, id=text) for text in ("one", "two")])
    _, out = run.export("txt", "out")
    assert texts_of(out) == {"a.txt": "one", "a~2.txt": "two"}


@pytest.mark.parametrize("extension", [".txt", ".caption"])
def test_trainers_read_one_caption_a_picture(run: Run, extension: str) -> None:
    """Beside the pictures, of names without a rival of the same stem."""
    names = [name for name in NAMES if name != "a/photo.png"]
    (run.root / "a/photo.png").unlink()
    run.write([record(name, "caption", caption=f"a ☃\n{n}\u2028\x85!") for n, name in enumerate(names)])
    report, _ = run.export("txt", "", beside=True, prefix="sks, ", suffix=" .", extension=extension)
    too_long = [name for name in names if len(name) > 250]
    assert (
        bool(report.notes) == (extension == ".caption") == any("1 files got a longer name" in n for n in report.notes)
    )
    for number, name in enumerate(names):
        if name in too_long and extension == ".caption":  # 259 bytes: no file system has such a name
            continue
        caption = f"sks, a ☃ {number} ! ."
        assert kohya_caption(run.root / name, extension) == caption
        if extension == ".txt":
            assert onetrainer_captions(run.root / name) == [caption]


def test_a_line_for_each_caption_where_that_is_typed(run: Run) -> None:
    run.write([record(NAMES[0], "caption", length=text, caption=text, id=text) for text in ("short", "long")])
    run.export("txt", "", beside=True, join="\n")
    assert onetrainer_captions(run.root / NAMES[0]) == ["short", "long"]
    assert kohya_caption(run.root / NAMES[0], ".txt") == "short"


# -- adding to a text ------------------------------------------------------------------------------

ADDED = [  # what stands there, what it becomes with "new" appended, and prepended
    ("", "new", "new"),
    (" \r\n", "new", "new"),
    ("old", "old, new", "new, old"),
    ("old\n", "old, new\n", "new, old\n"),
    ("\r\n old one\r\nold two \r\n", "\r\n old one\r\nold two, new \r\n", "\r\n new, old one\r\nold two \r\n"),
    ("\ufeffold\r\n", "\ufeffold, new\r\n", "\ufeffnew, old\r\n"),
    ("newer", "newer, new", "new, newer"),
    ("renew", "renew, new", "new, renew"),
    ("a new one", "a new one, new", "new, a new one"),
    *(
        (text, text, text)
        for text in ("new", "new\n", "\ufeffnew", "new, old", "old, new", "a, new, b", "a\r\nnew\r\nb")
    ),
]


@pytest.mark.parametrize(("former", "appended", "prepended"), ADDED)
def test_a_text_is_added_to_once(former: str, appended: str, prepended: str) -> None:
    for is_prepended, wanted in ((False, appended), (True, prepended)):
        once = merged(former.encode(), b"new", join=", ", is_prepended=is_prepended)
        assert once.decode() == wanted
        assert merged(once, b"new", join=", ", is_prepended=is_prepended) == once


PIECES = st.lists(
    st.sampled_from(["a", "dog", " ", ", ", "\n", "\r\n", "\r", "\ufeff", "\t", "é", "\u2028"]), max_size=7
)


@given(PIECES.map("".join), PIECES.map("".join), st.sampled_from([", ", "", "\n", " ", "a"]), st.booleans())
def test_whatever_stands_there_is_kept_and_added_to_once(former: str, new: str, join: str, is_prepended: bool) -> None:
    added = f"x{new}".encode()
    once = merged(former.encode(), added, join=join, is_prepended=is_prepended)
    assert former.strip("\ufeff").strip() in once.decode()
    assert added in once
    assert merged(once, added, join=join, is_prepended=is_prepended) == once


@pytest.mark.parametrize("former", ["größer".encode("latin-1"), "old".encode("utf-16"), "old".encode("utf-16-le")])
def test_only_utf_8_is_added_to(former: bytes) -> None:
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        merged(former, b"new", join=", ", is_prepended=False)


# -- one text --------------------------------------------------------------------------------------


def test_a_text_is_one_line(run: Run) -> None:
    text = " a dog\n\nruns\r\nfast\rover\x0bthe\x0cgreen\x85wide\u2028old\u2029field  here\n"
    run.write([record("a.jpg", "caption", caption=text)])
    _, out = run.export("txt", "out")
    assert (out / "a.txt").read_bytes() == b"a dog runs fast over the green wide old field  here"


def test_no_text_is_written_that_would_be_refused_the_next_time(run: Run) -> None:
    run.write([record(NAMES[0], "caption", length="short", caption="a\0b")])
    _, out = run.export("txt", "out")
    written = (out / "a/photo.txt").read_bytes()
    assert merged(written, written, join=", ", is_prepended=False) == written == b"a b"


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
