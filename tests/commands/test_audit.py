"""`md3 audit` as typed: lines, a table, a page; what is refused and told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from terminal import terminal
from truths import box, instances, record, write_records
from typer.testing import CliRunner, Result

from md3cli.cli import app
from md3cli.finished.run_json import seal_of


def md3(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["audit", *map(str, arguments)], prog_name="md3")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records and labels of one picture that differ in a car (missing), a dog (doubtful) and a name."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    Image.new("RGB", (200, 100)).save("pictures/a.png")
    records = [
        record("a.png", "detect", "car", objects=[box(10, 10, 40, 40, 0.9), box(10, 60, 30, 30, 0.2)]),
        record("a.png", "detect", "dog", objects=[box(100, 10, 40, 40, 0.8)]),
    ]
    write_records(Path("r.jsonl"), records)
    root = str(tmp_path / "pictures")
    Path("r.jsonl.run.json").write_text(json.dumps({"schema": "md3-run/1", "root": root, "seal": seal_of(root)}))
    objects = [("a.png", "car", [100, 10, 40, 38]), ("a.png", "dog", [150, 60, 30, 30])]
    Path("gt.json").write_text(json.dumps(instances(objects)))
    return tmp_path


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_findings_are_printed_the_surest_first(folder: Path) -> None:
    done = md3("r.jsonl", "--gt", "gt.json")
    assert done.exit_code == 0, done.output
    found = lines(done.stdout)
    assert [one["kind"] for one in found] == ["missing", "misnamed", "missing", "doubtful"]
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
    assert done.stderr.startswith("labels in 1 image: 2; findings: 2 missing, 1 doubtful, 1 misnamed\n")
    written = md3("r.jsonl", "--gt", "gt.json", "-o", "f.jsonl")
    assert Path("f.jsonl").read_text() == done.stdout
    assert "f.jsonl: 4 findings" in written.stderr


def test_a_selection_and_thresholds_count(folder: Path) -> None:
    assert len(lines(md3("r.jsonl", "--gt", "gt.json", "--min-score", 0.5).stdout)) == 3
    assert [one["label"] for one in lines(md3("r.jsonl", "--gt", "gt.json", "--label", "dog").stdout)] == ["dog", "dog"]
    nothing = md3("r.jsonl", "--gt", "gt.json", "--image", "x*")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "nothing is selected" in nothing.stderr


def test_the_index_is_that_of_the_record_as_written(folder: Path) -> None:
    write_records(
        Path("r.jsonl"), [record("a.png", "detect", "car", objects=[box(0, 0, 9, 9, 0.1), box(50, 5, 40, 40)])]
    )
    (found,) = lines(md3("r.jsonl", "--gt", "gt.json", "--min-score", 0.5).stdout)
    assert found["found"]["index"] == 1


def test_a_terminal_gets_a_table(folder: Path) -> None:
    with terminal(COLUMNS="80", NO_COLOR="1") as stream:
        app(["audit", "r.jsonl", "--gt", "gt.json"], standalone_mode=False)
    text = re.sub(r"\x1b\[\d*m", "", stream.getvalue())
    assert max(map(len, text.splitlines())) <= 80
    assert "misnamed" in text
    assert "car, found as dog" in text


def test_a_page_shows_both_boxes_of_a_finding(folder: Path) -> None:
    done = md3("r.jsonl", "--gt", "gt.json", "-o", "page.html")
    assert done.exit_code == 0, done.output
    assert "page.html: 1 images, 4 findings" in done.stderr
    text = Path("page.html").read_text()
    assert "car, found as dog" in text
    again = md3("r.jsonl", "--gt", "gt.json", "-o", "page.html")
    assert (again.exit_code, "overwrite" in again.stderr) == (2, True)
    assert md3("r.jsonl", "--gt", "gt.json", "-o", "page.html", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["r.jsonl"], 2, "no labels to look at; give --gt FILE"),
        (["r.jsonl", "--gt", "gt.json", "-o", "f.csv"], 2, "findings are .jsonl, or a page"),
        (["r.jsonl", "--gt", "gt.json", "-o", "r.jsonl"], 2, "r.jsonl"),
        (["r.jsonl", "--gt", "gone.json"], 1, "gone.json"),
        (["r.jsonl", "--gt", "captions.json"], 2, "captions.json has no boxes"),
        (["r.jsonl", "--gt", "others.json"], 1, "no image of the records is in the ground truth"),
    ],
)
def test_what_cannot_be_audited_is_one_error(folder: Path, arguments: list[str], status: int, why: str) -> None:
    image = {"id": 1, "file_name": "a.png"}
    captions = {"images": [image], "annotations": [{"id": 1, "image_id": 1, "caption": "a car"}]}
    Path("captions.json").write_text(json.dumps(captions))
    Path("others.json").write_text(json.dumps(instances([("b.png", "car", [1, 1, 5, 5])])))
    done = md3(*arguments)
    assert done.exit_code == status, done.output
    assert why in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1
