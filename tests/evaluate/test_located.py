"""Records of one name answer one question: matched together, judged one by one."""

from __future__ import annotations

import json

import pytest
from truths import box, instances, points, record, sections_of, segment, write_records

from md3cli.evaluate import evaluate, load_truth
from md3cli.evaluate.scores import Verdict
from md3cli.refine.collection import Collection
from md3cli.refine.labels import Label, Labels
from md3cli.refine.refinement import Refinement
from md3cli.refine.selection import Selection

CAR = Labels((Label(name="car", prompts=("saloon", "estate")),))
THERE = [("a.jpg", "car", [0, 0, 40, 40]), ("a.jpg", "car", [100, 0, 40, 40]), ("a.jpg", "car", [50, 50, 40, 40])]


def scored(tmp_path, records, truth, labels=CAR, **thresholds):
    """Score records under labels and thresholds as they are typed."""
    path = write_records(tmp_path / "records.jsonl", records)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    collection = Collection.of([path], chosen=Refinement(labels, has_file=True, **thresholds))
    return {section.name: section for section in evaluate(collection, [load_truth(tmp_path / "truth.json")]).sections}


def test_objects_of_all_prompts_of_a_name_are_matched_together(tmp_path):
    saloon = record("a.jpg", "detect", "saloon", objects=[box(0, 0, 40, 40, 0.9), box(150, 60, 30, 30, 0.2)])
    estate = record("a.jpg", "detect", "estate", objects=[box(100, 0, 40, 40, 0.8), box(2, 2, 40, 40, 0.7)])
    boxes = scored(tmp_path, [saloon, estate], instances(THERE), nms=1.0)["boxes"]
    assert boxes.counts == {"images": 1, "requests": 2, "failed": 0, "objects": 3, "predictions": 4}
    assert (boxes.scores["precision"], boxes.scores["recall"]) == (0.5, pytest.approx(2 / 3))
    assert list(boxes.by_name) == ["car"]
    first, second = boxes.verdicts[saloon["id"]], boxes.verdicts[estate["id"]]
    assert (first.objects, second.objects) == ((True, False), (True, False))  # the estate's second: a car twice
    assert first.missed == ((0.25, 0.5, 0.45, 0.9),)
    assert second.missed == ()


def test_doubles_across_prompts_are_gone_before_they_are_scored(tmp_path):
    saloon = record("a.jpg", "detect", "saloon", objects=[box(0, 0, 40, 40, 0.6)])
    estate = record("a.jpg", "detect", "estate", objects=[box(1, 1, 40, 40, 0.7)])
    boxes = scored(tmp_path, [saloon, estate], instances(THERE[:1]))["boxes"]
    assert (boxes.counts["predictions"], boxes.scores["precision"], boxes.scores["recall"]) == (1, 1.0, 1.0)
    assert boxes.verdicts[saloon["id"]].objects == ()
    assert all(verdict.is_right for verdict in boxes.verdicts.values())


def test_verdicts_count_the_objects_that_are_shown(tmp_path):
    objects = [box(150, 60, 30, 30, 0.1), box(0, 0, 40, 40, 0.9)]
    found = record("a.jpg", "detect", "saloon", objects=objects)
    boxes = scored(tmp_path, [found], instances(THERE[:1]), min_score=0.5)["boxes"]
    assert boxes.verdicts[found["id"]].objects == (True,)


def test_what_is_missed_stands_at_the_first_record_that_did_not_fail(tmp_path):
    failed = record("a.jpg", "detect", "saloon", error="model")
    estate = record("a.jpg", "detect", "estate", objects=[box(0, 0, 40, 40)])
    boxes = scored(tmp_path, [failed, estate], instances(THERE[:2]))["boxes"]
    assert (boxes.counts["requests"], boxes.counts["failed"], boxes.scores["recall"]) == (2, 1, 0.5)
    assert list(boxes.verdicts) == [estate["id"]]
    assert len(boxes.verdicts[estate["id"]].missed) == 1
    assert not boxes.verdicts[estate["id"]].is_right


def test_masks_and_points_of_a_name_are_pooled_too(tmp_path):
    square = "M 0 0 H 1 V 1 H 0 Z"
    records = [
        record("a.jpg", "segment", "saloon", segments=[segment(square, 0, 0, 40, 40)]),
        record("a.jpg", "segment", "estate", segments=[segment(square, 100, 0, 40, 40)]),
        record("a.jpg", "point", "saloon", points=points((10, 10), (199, 99))),
        record("a.jpg", "point", "estate", points=points((12, 12), (120, 20))),
    ]
    sections = scored(tmp_path, records, instances(THERE))
    assert sections["masks"].scores["recall"] == pytest.approx(2 / 3)
    assert sections["masks"].scores["precision"] == 1.0
    found = sections["points"].scores
    assert (found["hit_rate"], found["precision"], found["recall"]) == (0.75, 0.5, pytest.approx(2 / 3))
    marks = [sections["points"].verdicts[one["id"]].objects for one in records[2:]]
    assert marks == [(True, False), (False, True)]


def test_without_names_prompts_are_questions_of_their_own(tmp_path):
    records = [record("a.jpg", "detect", prompt, objects=[box(0, 0, 40, 40)]) for prompt in ("car", "saloon")]
    boxes = sections_of(tmp_path, records, instances(THERE[:1]))["boxes"]
    assert boxes.counts["requests"] == 1
    assert "1 label of the records is not in the ground truth and not scored: saloon" in boxes.notes


def test_a_name_that_the_prompts_were_asked_under_is_known_without_a_labels_file(tmp_path):
    found = [box(0, 0, 40, 40) | {"label": "car"}]
    records = [record("a.jpg", "detect", "saloon", objects=found), record("b.jpg", "detect", "saloon", objects=[])]
    truth = instances([*THERE[:1], ("b.jpg", "car", [0, 0, 40, 40])])
    boxes = sections_of(tmp_path, records, truth)["boxes"]
    assert (boxes.counts["requests"], boxes.scores["recall"]) == (2, 0.5)


def test_of_two_names_that_match_one_category_the_first_counts(tmp_path):
    labels = Labels((Label(name="Car", prompts=("saloon",)), Label(name="car", prompts=("estate",))))
    saloon = record("a.jpg", "detect", "saloon", objects=[])
    estate = record("a.jpg", "detect", "estate", objects=[box(0, 0, 40, 40)])
    truth = instances([("a.jpg", "CAR", [0, 0, 40, 40])], categories=("CAR",))
    boxes = scored(tmp_path, [saloon, estate], truth, labels)["boxes"]
    assert (boxes.counts["requests"], boxes.scores["recall"]) == (1, 0.0)


def test_a_selection_does_not_miss_what_another_prompt_of_the_name_found(tmp_path):
    saloon = record("a.jpg", "detect", "saloon", objects=[box(0, 0, 40, 40), box(150, 60, 30, 30)])
    estate = record("a.jpg", "detect", "estate", objects=[box(100, 0, 40, 40)])
    path = write_records(tmp_path / "records.jsonl", [saloon, estate])
    (tmp_path / "truth.json").write_text(json.dumps(instances(THERE[:2])))
    chosen = Refinement(CAR, has_file=True)
    selection = Selection(prompts=("saloon",))
    selected = Collection.of([path], chosen=chosen, selection=selection)
    (boxes,) = evaluate(selected, [load_truth(tmp_path / "truth.json")]).sections
    assert (boxes.counts["requests"], boxes.scores["recall"]) == (1, 0.5)
    assert boxes.verdicts == {saloon["id"]: Verdict(is_right=False, objects=(True, False), missed=())}
