"""Which names are the same picture or label, and that `md3 eval` and `--coco-ids-from` say the same."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from md3cli.cli import app
from md3cli.errors import InputError
from md3cli.finished.names import ImageNames, match_images, match_labels

ACCENTED = "Crème brûlée.png"
ALIKE = [
    ("a.png", "val2017/a.png"),
    ("val2017/a.png", "a.png"),
    ("./a.png", "a.png"),
    ("a.png", "./a.png"),
    ("sub/a.png", "sub\\a.png"),
    ("sub\\a.png", "data/sub/a.png"),
    ("a b.png", "a%20b.png"),
    ("https://host/set/a%20b.png", "a b.png"),
    (unicodedata.normalize("NFD", ACCENTED), ACCENTED),
    (ACCENTED, unicodedata.normalize("NFD", ACCENTED)),
    ("sub//a.png", "sub/a.png"),
    (" a.png", "a.png "),
    ("train/a.png", "val/a.png"),  # nothing else matches: the last part
]
MIXED = [
    (["a.png", "sub/a.png"], ["a.png"], {"a.png": "a.png"}, 0),
    (["a.png"], ["x/a.png", "a.png"], {"a.png": "a.png"}, 0),
    (["b.png", "a.png"], ["b.png", "x/a.png", "y/a.png"], {"b.png": "b.png"}, 1),
    (["b.png", "x/a.png", "y/a.png"], ["b.png", "a.png"], {"b.png": "b.png"}, 2),
    (["b.png", "x/a.png"], ["b.png", "y/a.png"], {"b.png": "b.png"}, 0),  # two folders: two pictures
    (["b.png", "a%2Fc.png"], ["b.png", "a%2Fc.png", "a/c.png"], {"b.png": "b.png", "a%2Fc.png": "a%2Fc.png"}, 0),
]


@pytest.mark.parametrize(("ours", "theirs"), ALIKE)
def test_one_picture_under_two_names(ours: str, theirs: str) -> None:
    assert match_images([ours], [theirs]).found == {ours: theirs}


@pytest.mark.parametrize(("asked", "known", "found", "num_ambiguous"), MIXED)
def test_a_looser_way_never_chooses(
    asked: list[str], known: list[str], found: dict[str, str], num_ambiguous: int
) -> None:
    matches = match_images(asked, known)
    assert matches.found == found
    assert len(matches.ambiguous) == num_ambiguous


def test_no_name_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match="no image of the records"):
        match_images(["a.png"], ["b.png"])
    with pytest.raises(InputError, match="fits several"):
        match_images(["a.png"], ["x/a.png", "y/a.png"])
    assert match_images([], ["b.png"]).found == {}


def test_labels_whatever_their_case_and_blanks() -> None:
    assert match_labels([" traffic  Light", "CAFÉ"], ["Traffic light", unicodedata.normalize("NFD", "café")]).found == {
        " traffic  Light": "Traffic light",
        "CAFÉ": unicodedata.normalize("NFD", "café"),
    }
    matches = match_labels(["Car", "car", "CAR"], ["Car", "car"])
    assert matches.found == {"Car": "Car", "car": "car"}
    assert matches.ambiguous == ("CAR",)


def _record(image: str, label: str) -> dict[str, object]:
    found = {"label": label, "x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6, "score": 0.9}
    shape = {"schema": "md3/1", "id": f"{image}-{label}", "image": image, "width": 100, "height": 50, "task": "detect"}
    rest = {"sha256": "0" * 64, "finish_reason": "stop", "model": "tiny@0", "meta": {}, "error": None}
    return {**shape, "prompt": label, "objects": [found], **rest}


def _write(folder: Path, records: list[dict[str, object]], images: list[str], category: str) -> tuple[str, str]:
    lines, truth = folder / "r.jsonl", folder / "gt.json"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    entries = [{"id": 1001 + n, "file_name": name, "width": 100, "height": 50} for n, name in enumerate(images)]
    place = {"bbox": [10, 10, 40, 20], "area": 800, "iscrowd": 0}
    annotations = [{"id": n + 1, "image_id": 1001 + n, "category_id": 51, **place} for n in range(len(images))]
    categories = [{"id": 51, "name": category}]
    truth.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": categories}))
    return str(lines), str(truth)


@pytest.mark.parametrize(("ours", "theirs"), ALIKE)
def test_eval_and_the_export_match_alike(tmp_path: Path, ours: str, theirs: str) -> None:
    lines, truth = _write(tmp_path, [_record(ours, "circle")], [theirs], "Circle")
    scored = CliRunner().invoke(app, ["eval", lines, "--gt", truth, "--json"])
    assert json.loads(scored.stdout)["sections"][0]["scores"]["AP"] == pytest.approx(1.0)
    words = ["export", lines, "-f", "coco", "--coco-results", "--coco-ids-from", truth]
    (result,) = json.loads(CliRunner().invoke(app, words).stdout)
    assert (result["image_id"], result["category_id"]) == (1001, 51)


def test_an_export_without_a_match_is_an_error_and_a_new_category_a_note(tmp_path: Path) -> None:
    lines, truth = _write(tmp_path, [_record("a.png", "square")], ["b.png"], "circle")
    words = ["export", lines, "-f", "coco", "--coco-results", "--coco-ids-from", truth]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 1
    assert "no image of the records" in refused.stderr
    lines, truth = _write(tmp_path, [_record("a.png", "square")], ["a.png"], "circle")
    noted = CliRunner().invoke(app, words)
    assert noted.exit_code == 0
    assert "no category for these labels" in noted.stderr
    assert "square (52)" in noted.stderr


def test_two_images_of_one_name_are_never_chosen_from(tmp_path: Path) -> None:
    lines, truth = _write(tmp_path, [_record("a.png", "circle")], ["a.png", "a.png"], "circle")
    for words in (["export", lines, "-f", "coco", "--coco-ids-from", truth], ["eval", lines, "--gt", truth]):
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code == 1
        assert "a.png" in refused.stderr


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("a.png", ["a.png", "sub/a.png"], "a.png"),
        ("./a.png", ["a.png"], "a.png"),
        ("sub\\a.png", ["sub/a.png"], "sub/a.png"),
        ("c d.png", ["c%20d.png"], "c%20d.png"),
        ("a.png", ["sub/a.png"], "sub/a.png"),
        ("set/sub/a.png", ["sub/a.png"], "sub/a.png"),
        ("a.png", ["x/a.png", "y/a.png"], None),
        ("x/a.png", ["y/a.png"], None),
        ("x/a.jpg", ["x/a"], "x/a"),
        ("a.jpg", ["x/a"], "x/a"),
        ("a.jpg", ["a.png"], None),
        ("", ["a.png"], None),
    ],
)
def test_one_name_is_found_as_many_are(name: str, known: list[str], found: str | None) -> None:
    assert ImageNames(known).find(name) == found
    if name.count("/") == 0 or found is not None:  # else the last part alone matches where nothing else does
        try:
            assert match_images([name], known).found.get(name) == found
        except InputError:
            assert found is None
