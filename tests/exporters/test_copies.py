"""Pictures put where trainers find them: kinds they do not take, and files they would write anew."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
from finished_runs import CAR, Run, record
from PIL import Image

from md3cli.exporters import copies
from md3cli.exporters.grouping import ImageGroup


def test_the_kind_decides_not_the_suffix(run: Run) -> None:
    kinds = {"a.jpg": "GIF", "b.png": "AVIF", "c.jpg": "PNG", "d.webp": "JPEG", "e.gif": "GIF"}
    for name, kind in kinds.items():
        Image.new("RGB", (120, 80), "red").save(run.root / name, kind)
    run.write(record(name, "detect", "car", objects=[CAR]) for name in kinds)
    _, out = run.export("yolo", "out")
    found = {}
    for path in (out / "images").iterdir():
        with Image.open(path) as image:
            found[path.name] = image.format
    assert found == {"a.jpg": "PNG", "b.png": "PNG", "c.jpg": "PNG", "d.webp": "JPEG", "e.png": "PNG"}
    assert (out / "images/c.jpg").read_bytes() == (run.root / "c.jpg").read_bytes()


def test_a_jpeg_that_trainers_would_restore_is_never_linked(run: Run) -> None:
    """Ultralytics 8.3 writes to a JPEG that does not end in FF D9, and so to all names of that file."""
    for name in ("whole.jpg", "more.jpg", "cut.jpg", "a.png"):
        Image.new("RGB", (120, 80), "red").save(run.root / name)
    more, cut = run.root / "more.jpg", run.root / "cut.jpg"
    more.write_bytes(more.read_bytes() + b"\0")
    cut.write_bytes(cut.read_bytes()[:-2])
    names = ["whole.jpg", "more.jpg", "cut.jpg", "a.png"]
    run.write(record(name, "detect", "car", objects=[CAR]) for name in names)
    _, out = run.export("yolo", "out", is_linked=True)

    def is_linked(name: str) -> bool:
        copy: Path = out / "images" / name
        assert copy.read_bytes() == (run.root / name).read_bytes()
        return copy.samefile(run.root / name)

    assert [name for name in names if is_linked(name)] == ["whole.jpg", "a.png"]


@pytest.mark.parametrize("format", ["yolo", "voc", "hf", "coco", "labelme", "cvat"])
def test_links_that_the_disk_does_not_take_are_told(
    detect_run: Run, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    options = {"is_roboflow": format == "coco"}
    for is_linked in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", refused)
            report, _ = detect_run.export(format, f"out{is_linked}", is_linked=is_linked, **options)
        assert any("copied, not linked" in note for note in report.notes) == is_linked
    report, _ = detect_run.export(format, "links", is_linked=True, **options)
    assert not any("copied, not linked" in note for note in report.notes)


def refused(source: str, target: Path) -> None:
    """A hard link to another disk."""
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.mark.parametrize("format", ["yolo", "voc"])
def test_nothing_is_written_once_an_export_was_stopped(run: Run, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """A signal ends the main thread's work while others still put pictures into the folder that is removed."""
    names = [f"{number}.png" for number in range(20)]
    for name in names:
        Image.new("RGB", (120, 80), "red").save(run.root / name)
    run.write(
        record(name, "point", "car", points=[{"label": "car", "x": 0.5, "y": 0.5, "score": 0.8}]) for name in names
    )
    put, begun = copies._put, []

    def put_slowly(*arguments: Any, **options: Any) -> None:
        begun.append(arguments)
        if len(begun) > 1:
            time.sleep(0.2)
        put(*arguments, **options)

    def stop(group: ImageGroup) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(copies, "_put", put_slowly)
    monkeypatch.setattr(ImageGroup, "points", stop)
    before = sorted(run.folder.iterdir())
    with pytest.raises(KeyboardInterrupt):
        run.export(format, "out")
    num_begun = len(begun)
    time.sleep(0.5)
    assert (sorted(run.folder.iterdir()), len(begun)) == (before, num_begun)
    assert num_begun > 1
