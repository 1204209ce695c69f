"""Files of an export: names stay inside the folder and differ; what goes and stays when a run starts over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pytest

from md3cli.errors import ExportError, UsageError
from md3cli.exporters.files import (
    StagedFolder,
    adopt_older,
    remove_leftovers,
    staged_folder,
)
from md3cli.exporters.names import candidates
from md3cli.finished.guards import files_below, has_marker, write_marker


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


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        ({"labels/train/a.txt": "0 1", "labels/val/b.txt": "0 2"}, ["train", "val"]),
        ({"labels/train/a.txt": "1 1", "labels/val/b.txt": "0 2"}, ["val"]),  # as long as before
        ({"labels/train/a.txt": "0 1", "labels/val/b.txt": "0 2", "labels/val/c.txt": ""}, ["train"]),
        ({"labels/train/a.txt": "0 1", "labels/val/c.txt": "0 2"}, ["train"]),
        ({"labels/a.txt": "0 1", "labels/b.txt": "0 2"}, []),
    ],
)
def test_a_trainers_cache_goes_with_its_labels(tmp_path: Path, labels: dict[str, str], kept: list[str]) -> None:
    out = tmp_path / "set"

    def make(files: dict[str, str]) -> None:
        with staged_folder(out, overwrite=True, format="yolo") as folder:
            for name, text in files.items():
                (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
                (folder.path / name).write_text(text)

    make({"labels/train/a.txt": "0 1", "labels/val/b.txt": "0 2"})
    for name in ("train", "val"):
        (out / f"labels/{name}.cache").write_text(name)
    (out / "labels.cache").write_text("all")
    make(labels)
    is_same = len(kept) == 2
    assert sorted(path.stem for path in out.rglob("*.cache")) == (["labels"] if is_same else []) + kept
    assert {name: (out / name).read_text() for name in labels} == labels


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with (
        pytest.raises(UsageError, match="is a file"),
        staged_folder(tmp_path / "out", overwrite=True, format="voc"),
    ):
        pass


# ---- starting over in a run folder ---------------------------------------------------------------


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def write_run(folder: Path, formats: Sequence[str] = ()) -> Path:
    """The run.json of a run that was asked for these formats."""
    arguments = ["md3", "detect", "img", "x", "-o", "out", *(word for format in formats for word in ("-f", format))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"schema": "md3-run/1", "starts": [{"arguments": arguments}]}))
    return folder / "run.json"


def write_listed(folder: Path, format: str, *names: str) -> None:
    """A format's folder with its list of files."""
    write(folder, *names)
    write_marker(folder, format, files_below(folder))


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_documents_go_and_all_else_stays(tmp_path: Path) -> None:
    run_info = write_run(tmp_path, ["coco", "html"])
    write_listed(tmp_path / "overlay", "overlay", "a/b.PNG")
    write_listed(tmp_path / "yolo", "yolo", "data.yaml", "labels/a.txt")
    write_listed(tmp_path / "report_pages", "html", "1.html")
    write(tmp_path, "coco.json", "report.html")
    foreign = ["coco.txt", "overlay/a/notes.md", "overlay/a/mine.png", "pictures/a.jpg", "records.jsonl", "voc/a.xml"]
    write(tmp_path, *foreign)
    remove_leftovers(run_info, [])
    assert names_in(tmp_path) == sorted(["run.json", *foreign])
    assert not (tmp_path / "yolo").exists()


def test_what_will_be_replaced_stays_until_then(tmp_path: Path) -> None:
    run_info = write_run(tmp_path, ["coco", "csv"])
    write(tmp_path, "coco.json", "records.csv")
    write_listed(tmp_path / "overlay", "overlay", "a.jpg")
    write_listed(tmp_path / "voc", "voc", "a.xml")
    remove_leftovers(run_info, [tmp_path / "coco.json", tmp_path / "overlay"])
    assert names_in(tmp_path) == ["coco.json", "overlay/.md3", "overlay/a.jpg", "run.json"]


def test_documents_that_no_start_was_asked_for_stay(tmp_path: Path) -> None:
    run_info = write_run(tmp_path, ["csv"])
    write(tmp_path, "coco.json", "report.html", "txt/thesis.txt", "overlay/mine.png")
    before = names_in(tmp_path)
    remove_leftovers(run_info, [])
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("content", ['{"tool": "another"}', "[]", '{"schema": 7}', "{", "[" * 10_000, ""])
def test_under_a_foreign_run_json_nothing_goes(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    write(tmp_path, "coco.json", "report.html", "txt/thesis.txt", "overlay/mine.png")
    before = names_in(tmp_path)
    remove_leftovers(tmp_path / "run.json", [])
    assert names_in(tmp_path) == before


def test_an_older_run_is_known_by_its_run_json(tmp_path: Path) -> None:
    run_info = write_run(tmp_path, ["overlay", "voc"])
    write(tmp_path, "overlay/a.png", "voc/a.xml", "voc/notes.md", "txt/a.txt")
    adopt_older(run_info, [(name, tmp_path / name) for name in ("overlay", "voc", "txt")])
    assert has_marker(tmp_path / "overlay")
    assert not has_marker(tmp_path / "voc"), "something else is in it"
    assert not has_marker(tmp_path / "txt"), "no start was asked for it"
    remove_leftovers(run_info, [])
    assert names_in(tmp_path) == ["run.json", "txt/a.txt", "voc/a.xml", "voc/notes.md"]


def test_only_a_run_folder_is_touched(tmp_path: Path) -> None:
    write(tmp_path, "coco.json", "records.jsonl.run.json")
    remove_leftovers(tmp_path / "run.json", [])
    remove_leftovers(tmp_path / "records.jsonl.run.json", [])
    assert names_in(tmp_path) == ["coco.json", "records.jsonl.run.json"]


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    run_info = write_run(tmp_path / "run", ["overlay"])
    write(tmp_path, "elsewhere/a.jpg")
    (tmp_path / "run/overlay").symlink_to(tmp_path / "elsewhere")
    remove_leftovers(run_info, [])
    assert names_in(tmp_path / "elsewhere") == ["a.jpg"]
