"""What records say against labels: each kind of finding, how sure it is, and what there is no finding of."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import plant
from truths import box, instances, record, segment

from md3cli.errors import InputError
from md3cli.evaluate import load_truth
from md3cli.evaluate.audit import Audit, audit, likeness, overlaps
from md3cli.evaluate.located import final_records
from md3cli.refine.labels import Labels
from md3cli.refine.refinement import iou

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def audited(tmp_path: Path) -> Any:
    """Audit COCO objects (see truths.instances) by records."""

    def run(records: list[Any], objects: list[Any], **more: Any) -> Audit:
        (tmp_path / "gt.json").write_text(json.dumps(instances(objects, **more)))
        return audit(final_records(records), load_truth(tmp_path / "gt.json"), Labels())

    return run


def told(result: Audit) -> list[tuple[str, str]]:
    return [(finding.kind, finding.shown.label) for finding in result.findings]


def test_labels_that_the_records_agree_with_give_no_finding(audited: Any) -> None:
    records = [record("a.png", "detect", "car", objects=[box(10, 10, 40, 40)])]
    result = audited(records, [("a.png", "car", [11, 10, 40, 41])])
    assert (result.findings, result.num_images, result.num_annotations) == ((), 1, 1)


def test_a_missing_label_is_as_sure_as_what_was_found(audited: Any) -> None:
    records = [record("a.png", "detect", "car", objects=[box(10, 10, 40, 40, 0.8), box(100, 10, 40, 40, 0.6)])]
    result = audited(records, [("a.png", "car", [10, 10, 40, 40])])
    (finding,) = result.findings
    assert (finding.kind, finding.score, finding.annotation) == ("missing", 0.6, None)
    line = finding.to_json()
    assert line["box"] == {"x_min": 0.5, "y_min": 0.1, "x_max": 0.7, "y_max": 0.5}
    assert line["found"] == {
        "label": "car", "box": line["box"], "score": 0.6, "record": records[0]["id"], "index": 1,
    }  # fmt: skip
    assert [*line][:7] == ["schema", "id", "kind", "image", "label", "box", "score"]


def test_a_doubtful_label_is_less_sure_where_the_records_hesitate(audited: Any) -> None:
    sure, unsure = box(100, 10, 40, 40, 0.9), box(100, 10, 40, 40, 0.3)
    records = [
        record("a.png", "detect", "car", objects=[sure]),
        record("b.png", "detect", "car", objects=[unsure]),
    ]
    labels = [(image, "car", place) for image in ("a.png", "b.png") for place in ([100, 10, 40, 40], [10, 50, 40, 40])]
    result = audited(records, labels)
    assert told(result) == [("doubtful", "car")] * 2
    assert [finding.image for finding in result.findings] == ["a.png", "b.png"]
    assert result.findings[0].annotation.facts == {"id": 2}
    # Of four labels two are found (Laplace: 3 of 6); the lowest score of a car there, and the mean.
    assert result.findings[0].score == pytest.approx(0.5 * 0.9 * 0.9)
    assert result.findings[1].score == pytest.approx(0.5 * 0.3 * 0.3)


def test_a_name_that_is_never_found_is_hardly_doubtful(audited: Any) -> None:
    images = [f"{n}.png" for n in range(20)]
    records = [record(image, "detect", name, objects=[]) for image in images for name in ("car", "dog")]
    records[1] |= {"objects": [{"label": "dog", **box(10, 10, 40, 40)}]}
    result = audited(records, [(image, name, [10, 10, 40, 40]) for image in images for name in ("car", "dog")])
    assert max(finding.score for finding in result.findings if finding.shown.label == "car") < 0.06


@pytest.mark.parametrize(("shift", "kinds"), [(4, []), (12, ["moved"]), (24, ["moved"]), (50, ["moved"])])
def test_a_label_beside_its_object_is_moved(audited: Any, shift: int, kinds: list[str]) -> None:
    records = [record("a.png", "detect", "car", objects=[box(10, 10, 40, 40, 0.9)])]
    result = audited(records, [("a.png", "car", [10 + shift, 10, 40, 40])])
    assert [finding.kind for finding in result.findings] == kinds
    for finding in result.findings:
        assert finding.score <= 0.9
        assert finding.overlap == pytest.approx(max(40 - shift, 0) / (40 + shift))


def test_a_label_far_from_an_object_is_no_moved_one(audited: Any) -> None:
    records = [record("a.png", "detect", "car", objects=[box(10, 10, 40, 40, 0.9)])]
    assert sorted(told(audited(records, [("a.png", "car", [150, 10, 40, 40])]))) == [
        ("doubtful", "car"),
        ("missing", "car"),
    ]


def test_a_label_of_another_name_is_misnamed(audited: Any) -> None:
    records = [
        record("a.png", "detect", "car", objects=[]),
        record("a.png", "detect", "dog", objects=[box(10, 10, 40, 40, 0.9)]),
    ]
    (finding,) = audited(records, [("a.png", "car", [10, 10, 40, 36])]).findings
    assert (finding.kind, finding.annotation.label, finding.found.label) == ("misnamed", "car", "dog")
    assert finding.score == pytest.approx(0.9 * math.sqrt(0.9))


def test_an_object_on_a_label_that_is_right_is_hardly_missing(audited: Any) -> None:
    """A model that sees a dog in what it also sees as the car that it is says little about the labels."""
    records = [
        record("a.png", "detect", "car", objects=[box(10, 10, 40, 40, 0.9)]),
        record("a.png", "detect", "dog", objects=[box(10, 10, 40, 36, 0.9)]),
    ]
    (finding,) = audited(records, [("a.png", "car", [10, 10, 40, 40])]).findings
    assert (finding.kind, finding.score) == ("missing", pytest.approx(0.9 * 0.1))


def test_what_was_not_asked_or_failed_gives_no_finding(audited: Any) -> None:
    records = [
        record("a.png", "detect", "car", objects=[]),
        record("b.png", "detect", "car", error="decode"),
        record("c.png", "detect", "cat", objects=[box(10, 10, 40, 40)]),  # no class of the labels
        record("strange.png", "detect", "car", objects=[box(10, 10, 40, 40)]),
    ]
    result = audited(
        records, [(image, name, [0, 0, 20, 20]) for image in ("a.png", "b.png") for name in ("car", "dog")]
    )
    assert [(finding.image, *pair) for finding, pair in zip(result.findings, told(result), strict=True)] == [
        ("a.png", "doubtful", "car")
    ]
    notes = " ".join(result.notes)
    assert "1 of 4 records failed" in notes
    assert "strange.png" in notes
    assert "cat" in notes


def test_a_list_that_was_cut_off_makes_nothing_doubtful(audited: Any) -> None:
    cut = record("a.png", "detect", "car", objects=[box(10, 10, 40, 40)]) | {"finish_reason": "length"}
    assert audited([cut], [("a.png", "car", [150, 60, 30, 30]), ("a.png", "car", [10, 10, 40, 40])]).findings == ()


def test_crowds_are_neither_doubtful_nor_do_they_lack_boxes(audited: Any) -> None:
    records = [record("a.png", "detect", "car", objects=[box(10, 10, 10, 10), box(30, 10, 10, 10)])]
    assert audited(records, [("a.png", "car", [0, 0, 100, 50], {"iscrowd": 1})]).findings == ()


def test_a_second_label_of_one_thing_is_doubtful_a_second_box_is_nothing(audited: Any) -> None:
    records = [record("a.png", "detect", "car", objects=[box(10, 10, 40, 40, 0.9)])]
    twice = [("a.png", "car", [10, 10, 40, 40])] * 2
    (finding,) = audited(records, twice).findings
    assert (finding.kind, finding.score) == ("doubtful", pytest.approx(0.5 * 0.9 * 0.9 * 0.1))
    doubled = [record("a.png", "detect", "car", objects=[box(10, 10, 40, 40, 0.9), box(10, 10, 40, 41, 0.8)])]
    assert audited(doubled, twice[:1]).findings == ()
    unlabelled = audited(doubled, [], images=["a.png"])
    assert [finding.score for finding in unlabelled.findings] == [0.9]


def test_boxes_of_segments_count(audited: Any) -> None:
    records = [record("a.png", "segment", "car", segments=[segment("M 0 0 L 1 0 L 1 1 Z", 10, 10, 40, 40)])]
    assert audited(records, [("a.png", "car", [10, 10, 40, 40])]).findings == ()


def test_records_without_scores_count_as_sure(audited: Any) -> None:
    records = [record("a.png", "detect", "car", objects=[box(10, 10, 40, 40, None)])]
    result = audited(records, [], images=["a.png"])
    assert [finding.score for finding in result.findings] == [1.0]
    assert result.findings[0].to_json()["found"]["score"] is None
    assert "no scores" in result.notes[0]


def test_boxes_without_a_size_of_their_picture_are_told(audited: Any, tmp_path: Path) -> None:
    sizeless = record("a.png", "detect", "car", objects=[box(10, 10, 40, 40)]) | {"width": None, "height": None}
    document = instances([("a.png", "car", [100, 50, 40, 40])])
    document["images"][0] |= {"width": None, "height": None}
    (tmp_path / "gt.json").write_text(json.dumps(document))
    result = audit([sizeless], load_truth(tmp_path / "gt.json"), Labels())
    assert (result.findings, result.notes[0]) == ((), "1 image has no size in records and ground truth: a.png")


def test_records_about_parts_of_pictures_are_left_out(audited: Any) -> None:
    region = {"x_min": 0.1, "y_min": 0.1, "x_max": 0.5, "y_max": 0.5, "label": "road", "of": "r", "index": 0}
    part = record("a.png", "detect", "car", objects=[]) | {"region": region}
    result = audited([record("a.png", "detect", "dog", objects=[]), part], [("a.png", "car", [10, 10, 40, 40])])
    assert result.findings == ()
    assert "1 of 2 records are about parts" in result.notes[0]


def test_other_pictures_and_other_records_are_one_error(audited: Any) -> None:
    with pytest.raises(InputError, match="no image of the records is in the ground truth"):
        audited([record("b.png", "detect", "car", objects=[])], [("a.png", "car", [0, 0, 5, 5])])
    with pytest.raises(InputError, match="here are query"):
        audited([record("a.png", "query", "car?", answer="yes")], [("a.png", "car", [0, 0, 5, 5])])


def test_a_finding_keeps_its_id_as_long_as_it_says_the_same(audited: Any) -> None:
    records = [record("a.png", "detect", "car", objects=[box(10, 10, 40, 40), box(100, 10, 40, 40)])]
    first = audited(records, [], images=["a.png"])
    again = audited(records, [("a.png", "car", [100, 10, 40, 40])])
    assert len({finding.id for finding in first.findings}) == 2
    assert {finding.id for finding in again.findings} < {finding.id for finding in first.findings}


def test_overlaps_are_what_two_boxes_alone_overlap() -> None:
    found = [(0.1, 0.1, 0.5, 0.5), (0.3, 0.3, 0.9, 0.6), (0.2, 0.2, 0.2, 0.4)]
    there = [(0.1, 0.1, 0.5, 0.5), (0.4, 0.2, 0.6, 0.9)]
    assert overlaps(found, there) == pytest.approx(np.array([[iou(one, other) for other in there] for one in found]))
    assert overlaps(found[:1], [(0.0, 0.0, 1.0, 1.0)], [True]) == pytest.approx(np.array([[1.0]]))
    assert overlaps([], there).shape == (0, 2)
    assert likeness((0, 0, 0.1, 0.1), (0.1, 0.1, 0.2, 0.2)) == pytest.approx(1.0)
    assert likeness((0, 0, 0.1, 0.1), (0.2, 0.0, 0.3, 0.1)) == 0.0


def _found(annotations: list[Any], images: list[Any], names: dict[int, str]) -> list[Any]:
    """Records of a model that finds every box, 1 pixel off, of pictures that all classes were asked of."""
    by_key: dict[Any, list[Any]] = {(image["file_name"], name): [] for image in images for name in names.values()}
    files = {image["id"]: image["file_name"] for image in images}
    for one in annotations:
        x, y, width, height = one["bbox"]
        by_key[files[one["image_id"]], names[one["category_id"]]].append(box(x + 1, y, width, height, 0.9))
    return [record(image, "detect", name, objects=objects) for (image, name), objects in by_key.items()]


def test_planted_faults_come_first(tmp_path: Path) -> None:
    places = [(5, 5, 30, 30), (60, 40, 40, 50), (120, 10, 50, 40)]
    objects = [
        (f"{n}.png", ("car", "dog")[(n + k) % 2], list(place)) for n in range(20) for k, place in enumerate(places)
    ]
    clean = instances(objects)
    names = {category["id"]: category["name"] for category in clean["categories"]}
    records = _found(clean["annotations"], clean["images"], names)
    planted = plant(clean, seed=1, num_each=5)
    (tmp_path / "gt.json").write_text(json.dumps(planted.document))
    result = audit(final_records(records), load_truth(tmp_path / "gt.json"), Labels())
    found, false = planted.tally(result.findings[:20])
    assert found.total() >= 17, (found, false)


@pytest.mark.slow
def test_planted_faults_in_held_out_scenes_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 faults at least 0.85 among the first 200 findings, with at most 30 false alarms; three draws of faults."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    importlib.import_module("shapes").write_collection(1000, 300, tmp_path / "scenes")
    clean = json.loads((tmp_path / "scenes/instances.json").read_text())
    names = [category["name"] for category in clean["categories"]]
    asked = [sys.executable, "-m", "md3cli", "detect", "scenes", *names, "--model", "tiny", "--no-cache"]
    subprocess.run([*asked, "-o", "records.jsonl"], cwd=tmp_path, check=True, capture_output=True)
    records = final_records(json.loads(line) for line in (tmp_path / "records.jsonl").open())
    for seed in range(3):
        planted = plant(clean, seed=seed, num_each=50)
        (tmp_path / "gt.json").write_text(json.dumps(planted.document))
        result = audit(records, load_truth(tmp_path / "gt.json"), Labels())
        found, false = planted.tally(result.findings[:200])
        print(f"seed {seed}: found {found.total()} of 200 {dict(found)}, false alarms {false.total()} {dict(false)}")
        assert found.total() >= 0.85 * 200
        assert false.total() <= 30
