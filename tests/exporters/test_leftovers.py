"""What goes, and what stays, when a run starts over in a run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from md3cli.exporters.files import adopt_older, remove_leftovers
from md3cli.finished.guards import files_below, has_marker, write_marker


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
