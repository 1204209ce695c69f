"""Crops and redacted pictures of a run as typed: which are written, what is refused, and what stays hidden later."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from program import Program, make_pictures, records_of

LAST = "p10.png"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = make_pictures(tmp_path / "pictures", 11)
    (folder / "p3.png").write_bytes(b"broken")
    return folder


def written(out: Path) -> set[str]:
    return {path.name for path in out.rglob("*.png")}


def left_out(out: Path) -> list[str]:
    with (out / "left_out.csv").open(newline="") as file:
        return [row["image"] for row in csv.DictReader(file)]


def black(path: Path) -> int:
    """How many pixels are black; a stub's picture has none."""
    return int((np.asarray(Image.open(path)) == 0).all(axis=2).sum())


def test_a_run_writes_crops_and_redacted_pictures(md3: Program, pictures: Path) -> None:
    result = md3("detect", pictures, "car", "dog", "-o", "out/", "-f", "crops", "-f", "redacted")
    assert result.exit_code == 3, result.stderr
    assert written(Path("out/redacted")) == {f"p{i}.png" for i in range(11)} - {"p3.png"}
    assert left_out(Path("out/redacted")) == ["p3.png"]
    assert black(Path("out/redacted/p10.png")) > 0
    assert len(list(Path("out/crops/car").iterdir())) == len(list(Path("out/crops/dog").iterdir())) == 10
    inside = md3("detect", "out", "car", "--dry-run")
    assert "of md3's own files" in inside.stderr
    assert md3("export", "out", "-f", "redacted", "-o", "again").exit_code == 0
    for name in written(Path("again")):
        assert Path("again", name).read_bytes() == Path("out/redacted", name).read_bytes()


def test_a_least_score_leaves_objects_bare_in_the_command_that_has_it(
    md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("detect", pictures, "car", "-o", "out/", "-f", "redacted", "--fail-on", "none")
    assert md3(*line, "--min-score", "0.95").exit_code == 0  # the stub is sure by 0.9
    assert black(Path("out/redacted", LAST)) == 0
    resumed = md3(*line)
    assert resumed.exit_code == 0
    assert "covered whatever its score" in resumed.stderr
    assert black(Path("out/redacted", LAST)) > 0
    monkeypatch.setenv("MD3_MIN_SCORE", "0.95")  # of a file of settings or the environment, so not typed
    assert md3(*line).exit_code == 0
    assert black(Path("out/redacted", LAST)) > 0
    assert md3("export", "out", "-f", "redacted", "-o", "kept").exit_code == 0
    assert black(Path("kept", LAST)) > 0
    assert md3("export", "out", "-f", "redacted", "-o", "typed", "--min-score", "0.95").exit_code == 0
    assert black(Path("typed", LAST)) == 0


@pytest.mark.parametrize(
    "asked",
    [
        ["point", "pictures", "nose"],
        ["caption", "pictures"],
        ["run", "pictures", "--task", "detect:a", "--task", "point:b"],
    ],
)
def test_what_cannot_be_covered_is_refused_before_the_model_is_loaded(
    md3: Program, pictures: Path, asked: list[str]
) -> None:
    result = md3(*asked, "-o", "out/", "-f", "redacted")
    assert result.exit_code == 2
    assert "cover" in result.stderr
    assert md3.models == []
    assert not Path("out").exists()
    assert (
        md3("run", "pictures", "--task", "detect:a", "--task", "point:b", "-o", "out/", "--fail-on", "none").exit_code
        == 0
    )
    assert md3("export", "out", "-f", "redacted", "-o", "red").exit_code == 2
    assert md3("export", "out", "-f", "redacted", "-o", "red", "--label", "a").exit_code == 0
    assert len(written(Path("red"))) == 10


def test_of_an_interrupted_run_only_whole_pictures_are_written(md3: Program, pictures: Path) -> None:
    assert md3("detect", pictures, "car", "dog", "-o", "out/", "--fail-on", "none").exit_code == 0
    journal = Path("out/records.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # p0, p1, half of p2, torn
    result = md3("export", "out", "-f", "redacted", "-o", "red")
    assert result.exit_code == 0, result.stderr
    assert written(Path("red")) == {"p0.png", "p1.png"}
    assert left_out(Path("red")) == ["p2.png"]
    journal.write_bytes(lines[0])
    assert md3("export", "out", "-f", "redacted", "-o", "red", "--overwrite").exit_code == 0
    assert written(Path("red")) == set()  # `dog` has no record at all, and run.json knows of it


def test_options_as_typed(md3: Program, pictures: Path) -> None:
    assert md3("detect", pictures, "car", "-o", "out/", "--fail-on", "none").exit_code == 0
    looks = md3("export", "out", "-f", "redacted", "-o", "looks", "--redact", "pixelate", "--image", "p1.png")
    assert "pixelate is for looks" in looks.stderr
    assert written(Path("looks")) == {"p1.png"}
    for pad in ("0", "10%", "50%"):
        assert md3("export", "out", "-f", "redacted", "-o", f"pad{pad}", "--pad", pad).exit_code == 0
    assert black(Path("pad0", LAST)) < black(Path("pad10%", LAST)) < black(Path("pad50%", LAST))
    assert md3("export", "out", "-f", "redacted", "-o", "plain").exit_code == 0
    assert black(Path("plain", LAST)) == black(Path("pad10%", LAST))
    record = next(one for one in records_of(Path("out/records.jsonl")) if one["image"] == LAST)
    box = record["objects"][0]
    for pad, room in (("0", 0.0), ("10%", 0.1)):
        assert md3("export", "out", "-f", "crops", "-o", f"crops{pad}", "--pad", pad).exit_code == 0
        with Path(f"crops{pad}/crops.csv").open(newline="") as file:
            row = next(row for row in csv.DictReader(file) if row["image"] == LAST)
        width = (box["x_max"] - box["x_min"]) * record["width"]
        assert int(row["x_max"]) - int(row["x_min"]) == pytest.approx(width * (1 + 2 * room), abs=2)
    assert md3("export", "out", "-f", "redacted", "-o", "x", "--label", "cart").exit_code == 2
    assert md3("export", "out", "-f", "crops", "-o", "x", "--redact", "blur").exit_code == 2


def test_all_of_a_labels_file_that_is_typed_must_be_asked(md3: Program, pictures: Path) -> None:
    md3("detect", pictures, "car", "-o", "out/")
    Path("labels.txt").write_text("car\nplate\n")
    refused = md3("export", "out", "-f", "redacted", "-o", "shown", "--labels", "labels.txt")
    assert refused.exit_code == 2
    assert "no record asks for plate" in refused.stderr
    assert not Path("shown").exists()
    assert (
        md3("export", "out", "-f", "redacted", "-o", "shown", "--labels", "labels.txt", "--label", "car").exit_code == 0
    )
    assert len(written(Path("shown"))) == 10
