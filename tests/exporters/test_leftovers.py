"""What goes, and what stays, when a run starts over in a run folder."""

from __future__ import annotations

from pathlib import Path

from md3cli.exporters.leftovers import remove_leftovers


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_documents_go_and_all_else_stays(tmp_path: Path) -> None:
    foreign = ["coco.txt", "overlay/a/notes.md", "pictures/a.jpg", "records.jsonl", "voc/a.jpg"]
    write(tmp_path, "run.json", *foreign)
    write(tmp_path, "coco.json", "report.html", "report_pages/1.html", "overlay/a/b.PNG", "voc/a.xml", "yolo/data.yaml")
    remove_leftovers(tmp_path / "run.json", [])
    assert names_in(tmp_path) == sorted(["run.json", *foreign])
    assert not (tmp_path / "yolo").exists()


def test_what_will_be_replaced_stays_until_then(tmp_path: Path) -> None:
    write(tmp_path, "run.json", "coco.json", "records.csv", "overlay/a.jpg", "voc/a.xml")
    remove_leftovers(tmp_path / "run.json", [tmp_path / "coco.json", tmp_path / "overlay"])
    assert names_in(tmp_path) == ["coco.json", "overlay/a.jpg", "run.json"]


def test_only_a_run_folder_is_touched(tmp_path: Path) -> None:
    write(tmp_path, "coco.json", "records.jsonl.run.json")
    remove_leftovers(tmp_path / "run.json", [])
    remove_leftovers(tmp_path / "records.jsonl.run.json", [])
    assert names_in(tmp_path) == ["coco.json", "records.jsonl.run.json"]


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/a.jpg", "run/run.json")
    (tmp_path / "run/overlay").symlink_to(tmp_path / "elsewhere")
    remove_leftovers(tmp_path / "run/run.json", [])
    assert names_in(tmp_path / "elsewhere") == ["a.jpg"]
