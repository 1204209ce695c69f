"""Overlays of runs that draw while they go on: the same as an export's, after kills, too."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from program import Program, clean_environment, make_pictures, start

from md3cli.exporters import overlay
from md3cli.exporters.early import EarlyDrawings

pytestmark = pytest.mark.process
PATIENCE_S = 140.0  # of a child with the lowest priority


def pixels(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.png"))}


def temps(out: Path) -> list[str]:
    return [path.name for path in out.iterdir() if ".tmp-" in path.name]


def test_a_run_takes_what_was_drawn_while_it_went_on(
    md3: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = make_pictures(tmp_path / "pictures", 12, side=120)
    monkeypatch.setattr("md3cli.exporters.early.UNTIL_WORTH_IT", 0)
    late: list[str] = []
    stop, draw = EarlyDrawings.stop, overlay.drawn_file

    def stop_later(early: EarlyDrawings) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while early.num_children and len(os.listdir(early.folder)) < 11 and time.monotonic() < deadline:
            time.sleep(0.05)
        stop(early)

    def noted(group: overlay.ImageGroup, *args: object) -> bytes | None:
        late.append(group.name)
        return draw(group, *args)  # type: ignore[arg-type]  # handed on

    monkeypatch.setattr(EarlyDrawings, "stop", stop_later)
    monkeypatch.setattr(overlay, "drawn_file", noted)
    result = md3("detect", pictures, "car", "dog", "-o", "out/", "-f", "overlay", "--min-score", "0.1")
    assert result.exit_code == 0, result.stderr
    assert late == ["p11.png"]  # the last: nothing came behind it
    assert temps(Path("out")) == []
    assert md3("export", "out/", "--format", "overlay", "-o", "made").exit_code == 0
    assert len(late) == 13
    assert pixels(Path("out/overlay")) == pixels(Path("made"))
    assert len(pixels(Path("made"))) == 12


def test_a_killed_run_leaves_drawings_that_the_next_start_removes(md3: Program, tmp_path: Path) -> None:
    # The child that draws has the lowest priority: on a busy machine it takes long to start, and the run takes longer.
    pictures = make_pictures(tmp_path / "pictures", 300, side=120)
    line = ("detect", pictures, "car", "-o", tmp_path / "out", "-f", "overlay", "--batch-size", "1")
    with start(*line, step_s=0.5, cwd=tmp_path, env=clean_environment(tmp_path / "home")) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not list(tmp_path.glob("out/.overlay.tmp-*/*")) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert temps(tmp_path / "out")
    assert not (tmp_path / "out/overlay").exists()
    assert md3(*line).exit_code == 0
    assert temps(tmp_path / "out") == []
    assert md3("export", "out/", "--format", "overlay", "-o", "made").exit_code == 0
    made = pixels(Path("made"))
    assert pixels(Path("out/overlay")) == made
    assert len(made) == 300
    with Image.open(Path("out/overlay/p0.png")) as image:
        assert image.size == (120, 120)


def test_an_addition_draws_at_its_end(md3: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures have records already, of which an early drawing would know nothing."""
    pictures = make_pictures(tmp_path / "pictures", 3, side=120)
    assert md3("detect", pictures, "car", "-o", "out/", "-f", "overlay").exit_code == 0
    monkeypatch.setattr(EarlyDrawings, "add", lambda self, records: pytest.fail("drawn early"))
    assert md3("detect", pictures, "dog", "-o", "out/", "-f", "overlay", "--add").exit_code == 0
    assert md3("export", "out/", "--format", "overlay", "-o", "made").exit_code == 0
    assert pixels(Path("out/overlay")) == pixels(Path("made"))
