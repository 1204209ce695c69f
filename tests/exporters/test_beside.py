"""Files beside the pictures: a user's own are named, kept or added to, and never damaged."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
from finished_runs import NAMES, Run, draw_pictures, record

from md3cli.errors import ExportError, UsageError
from md3cli.exporters import ExportOptions, ExportReport, export_records
from md3cli.finished.run_json import seal_of
from md3cli.refine.collection import Collection

STEMS = ("one", "two", "three")


@pytest.fixture
def three(run: Run) -> Run:
    """Three pictures, each with a caption."""
    shutil.rmtree(run.root)
    draw_pictures(run.root, [f"{stem}.png" for stem in STEMS])
    run.write([record(f"{stem}.png", "caption", caption=f"{stem} new") for stem in STEMS])
    return run


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the pictures, hidden ones too."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def facts_of(path: Path) -> tuple[int, ...]:
    """What changes when a path gets another file or other content; not when it was read."""
    facts = os.lstat(path)
    return facts.st_ino, facts.st_mode, facts.st_size, facts.st_nlink, facts.st_mtime_ns


def beside(run: Run, **options: Any) -> ExportReport:
    return run.export("txt", "", beside=True, **options)[0]


def test_a_file_that_is_there_is_named_and_nothing_is_written(three: Run) -> None:
    (three.root / "three.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"three\.txt exists already, so nothing was written; --existing says"):
        beside(three)
    assert files_of(three.root) == {"three.txt": b"mine"}


@pytest.mark.parametrize(
    ("existing", "text", "kept"),
    [
        ("skip", b"mine\r\n", 1),
        ("append", b"mine, two new\r\n", 0),
        ("prepend", b"two new, mine\r\n", 0),
        ("replace", b"two new", 0),
    ],
)
def test_what_becomes_of_a_file_and_again_nothing(three: Run, existing: str, text: bytes, kept: int) -> None:
    (three.root / "two.txt").write_bytes(b"mine\r\n")
    (three.root / "two.txt").chmod(0o640)
    notes = beside(three, existing=existing).notes
    assert notes == (("1 files that were there already stay as they are",) if kept else ())
    assert files_of(three.root) == {"one.txt": b"one new", "three.txt": b"three new", "two.txt": text}
    assert (three.root / "two.txt").stat().st_mode & 0o777 == 0o640

    times = {path: path.stat().st_mtime_ns for path in three.root.iterdir()}
    assert beside(three, existing=existing).notes == ("3 files that were there already stay as they are",)
    assert {path: path.stat().st_mtime_ns for path in three.root.iterdir()} == times


def link(path: Path) -> None:
    (path.parent / "elsewhere").write_text("mine")
    path.symlink_to("elsewhere")


def read_only(path: Path) -> None:
    path.write_text("mine")
    path.chmod(0o444)


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)  # no byte of which is stored


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "link": (link, "is a link"),
    "dead-link": (lambda path: path.symlink_to("nowhere"), "is a link"),
    "folder": (Path.mkdir, "is no file"),
    "pipe": (lambda path: os.mkfifo(path), "is no file"),
    "read-only": (read_only, "is read-only"),
    "latin-1": (lambda path: path.write_bytes(b"gr\xf6\xdfer"), "is not text in UTF-8"),
    "utf-16": (lambda path: path.write_text("mine", encoding="utf-16-le"), "is not text in UTF-8"),
    "picture": (lambda path: shutil.copyfile(path.with_suffix(".png"), path), "is a picture"),
    "huge": (huge, "is larger than 64 MiB"),
}


@pytest.mark.parametrize("existing", ["append", "prepend", "replace"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_a_text_of_the_user_is_refused_before_anything_is_written(
    three: Run, kind: str, existing: str
) -> None:
    make, words = REFUSED[kind]
    path = three.root / "three.txt"
    make(path)
    if existing == "replace" and "UTF-8" in words:  # which replacing does not have to understand
        beside(three, existing=existing)
        assert path.read_text() == "three new"
        return
    facts = facts_of(path)
    with pytest.raises(UsageError, match=words):
        beside(three, existing=existing)
    assert facts_of(path) == facts
    assert {path.name for path in three.root.iterdir()} - {"three.txt", "elsewhere"} == {
        f"{stem}.png" for stem in STEMS
    }
    assert not (three.root / "elsewhere").exists() or (three.root / "elsewhere").read_text() == "mine"


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_skipped_may_be_anything(three: Run, kind: str) -> None:
    path = three.root / "three.txt"
    REFUSED[kind][0](path)
    facts = facts_of(path)
    beside(three, existing="skip")
    assert facts_of(path) == facts
    assert (three.root / "one.txt").read_text() == "one new"


def test_the_records_are_not_replaced(three: Run) -> None:
    records = three.records.rename(three.root / "one.jsonl")
    (three.folder / "run.json").rename(three.root / "one.run.json")
    content = records.read_bytes()
    options = ExportOptions(beside=True, existing="replace", extension=".jsonl", root=three.root)
    with pytest.raises(UsageError, match=r"one\.jsonl is an input of this command, .* name another --extension"):
        export_records(records, "txt", Path("unused"), options)
    assert records.read_bytes() == content


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_takes_no_files_is_told_first(three: Run) -> None:
    three.root.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be written to"):
        beside(three)


# -- names -----------------------------------------------------------------------------------------


def test_pictures_of_one_stem_are_told(run: Run) -> None:
    run.write([record(name, "caption", caption=name) for name in NAMES])
    first, again = beside(run), beside(run, existing="append")
    assert (run.root / "a/photo.txt").read_text() == "a/photo.jpg"
    assert (run.root / "a/photo.png.txt").read_text() == "a/photo.png"
    for report in (first, again):
        told = [note for note in report.notes if "longer name" in note]
        assert len(told) == 1
        assert "(first: photo.png.txt); programs look for the plain one" in told[0]


def test_names_that_a_file_system_takes_for_one(three: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_pictures(three.root, ["Photo.jpg", "photo.png"])
    three.write([record(name, "caption", caption=name) for name in ("Photo.jpg", "photo.png")])
    beside(three)
    assert set(files_of(three.root)) == {"Photo.jpg", "Photo.txt", "photo.txt"}
    (three.root / "Photo.txt").unlink()
    (three.root / "photo.txt").unlink()
    monkeypatch.setattr("md3cli.exporters.beside._ignores_case", lambda picture: True)
    beside(three)
    assert set(files_of(three.root)) == {"Photo.jpg", "Photo.txt", "photo.png.txt"}


def test_a_name_of_other_bytes_and_a_link_to_a_picture(three: Run, tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff.png")
    draw_pictures(three.root, [odd])
    (three.root / "two.png").rename(tmp_path / "far.png")
    (three.root / "two.png").symlink_to(tmp_path / "far.png")
    three.write([
        record("\\xff.png", "caption", caption="odd", image_b64="/y5wbmc="),
        record("two.png", "caption", caption="far"),
    ])  # fmt: skip
    beside(three)
    assert files_of(three.root) == {os.fsdecode(b"\xff.txt"): b"odd", "two.txt": b"far"}
    assert not (tmp_path / "far.txt").exists()


def test_no_text_goes_where_no_picture_is(three: Run, tmp_path: Path) -> None:
    """What is missing is counted; a name that climbs out, an address and a link to another folder get nothing."""
    (tmp_path / "elsewhere").mkdir()
    draw_pictures(tmp_path / "elsewhere", ["x.png"])
    three.write(
        [record(name, "caption", caption="x") for name in ("one.png", "gone.png", "../x.png", "https://h/y.png")]
    )
    draw_pictures(three.root.parent, ["x.png"])
    report = beside(three)
    assert files_of(three.root) == {"one.txt": b"x"}
    assert [note[:33] for note in report.notes] == ["3 pictures cannot be read below /"]
    assert report.num_images == 1
    assert not (three.root.parent / "x.txt").exists()

    (three.root / "link").symlink_to(tmp_path / "elsewhere")
    three.write([record("one.png", "caption", caption="y"), record("link/x.png", "caption", caption="x")])
    with pytest.raises(UsageError, match="behind a link that leads out of the pictures' folder"):
        beside(three, existing="replace")
    assert files_of(three.root) == {"one.txt": b"x"}
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["x.png"]

    three.write([record("gone.png", "caption", caption="x")])
    with pytest.raises(ExportError, match="none of 1 pictures"):
        beside(three)


def test_nothing_stands_beside_a_picture_in_a_tar(three: Run) -> None:
    with tarfile.open(three.root / "set.tar", "w") as tar:
        tar.add(three.root / "one.png", "one.png")
    three.write([record("two.png", "caption", caption="x"), record("set.tar/one.png", "caption", caption="x")])
    with pytest.raises(UsageError, match=r"nothing can stand beside a picture in .*set\.tar"):
        beside(three)
    assert set(files_of(three.root)) == {"set.tar"}


@pytest.mark.parametrize("has_name", [True, False])
def test_each_text_stands_beside_its_own_picture_of_two_runs(three: Run, tmp_path: Path, has_name: bool) -> None:
    """Both runs have a `one.png`, told apart by `--as night=` or by what is in them."""
    other = Run(tmp_path / "night", tmp_path / "other")
    other.folder.mkdir()
    other.root.mkdir()
    (other.root / "one.png").write_bytes((three.root / "one.png").read_bytes() + b"\0")
    facts = {"schema": "md3-run/1", "root": str(other.root), "seal": seal_of(str(other.root))}
    (other.folder / "run.json").write_text(json.dumps(facts))
    for run, text in ((three, "day"), (other, "night")):
        digest = hashlib.sha256((run.root / "one.png").read_bytes()).hexdigest()
        run.write([record("one.png", "caption", caption=text, sha256=digest, id=text)])
    collection = Collection.of([three.records, other.records], [("night", other.records)] if has_name else [])
    export_records(collection, "txt", Path("unused"), ExportOptions(beside=True))
    assert (three.root / "one.txt").read_text() == "day"
    assert (other.root / "one.txt").read_text() == "night"


# -- kills -----------------------------------------------------------------------------------------


def _killed(run: Run, at: int, action: str, existing: str) -> None:
    faults.install(action, at, str(run.root))
    beside(run, existing=existing)


@pytest.mark.process
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("existing", ["append", "prepend", "replace", "skip"])
def test_a_kill_leaves_whole_texts_and_the_same_command_does_the_rest(three: Run, existing: str) -> None:
    """Killed, or out of disk, before each operation in turn; `two.txt` is the user's own."""
    own, path = b"mine\r\n", three.root / "two.txt"
    path.write_bytes(own)
    beside(three, existing=existing)
    wanted = files_of(three.root)
    num_killed = 0
    for at, action in itertools.product(range(1, 200), faults.ACTIONS):
        for stem in STEMS:
            (three.root / f"{stem}.txt").unlink(missing_ok=True)
        path.write_bytes(own)
        child = multiprocessing.get_context("fork").Process(target=_killed, args=(three, at, action, existing))
        child.start()
        child.join()
        left = files_of(three.root)
        assert left["two.txt"] in (own, wanted["two.txt"])
        assert all(content == wanted[name] for name, content in left.items() if name in wanted and name != "two.txt")
        assert (
            action == "kill" or left.keys() <= wanted.keys()
        )  # a kill leaves hidden files, which the next start removes
        beside(three, existing=existing)
        assert files_of(three.root) == wanted
        if action == "kill" and child.exitcode == 0:
            break
        num_killed += child.exitcode == -signal.SIGKILL
    assert num_killed >= 4
    assert child.exitcode == 0
