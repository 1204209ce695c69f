"""The best threshold of each label: what is promised is what `md3 eval` then measures, and nothing better is there."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from truths import box, instances, points, record, segment, write_records

from md3cli.errors import InputError
from md3cli.evaluate import evaluate, load_truth
from md3cli.evaluate.thresholds import Step, best_min_score, best_thresholds
from md3cli.refine.collection import Collection
from md3cli.refine.labels import Label, Labels, read_labels, toml_of
from md3cli.refine.refinement import Refinement

EXAMPLES = Path(__file__).parents[2] / "examples"
SQUARE = "M 0 0 H 1 V 1 H 0 Z"


class Case:
    """Records and a ground truth on disk."""

    def __init__(self, folder, records, truth):
        self.path = write_records(folder / "records.jsonl", records)
        (folder / "truth.json").write_text(json.dumps(truth))
        self.truths = [load_truth(folder / "truth.json")]

    def collection(self, labels=None, **thresholds):
        chosen = Refinement(labels or Labels(), has_file=labels is not None, **thresholds)
        return Collection.of([self.path], chosen=chosen)

    def best(self, labels=None, **thresholds):
        return best_thresholds(self.collection(labels, **thresholds), self.truths)

    def f1(self, section, labels=None, **thresholds):
        """F1 by category, as `md3 eval` measures it."""
        sections = evaluate(self.collection(labels, **thresholds), self.truths).sections
        by_name = next(found.by_name for found in sections if found.name == section)
        return {category: scores["F1"] for category, scores in by_name.items()}


def scores_of(best):
    return {one.name: one.min_score for one in best.thresholds}


# ---- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "num_objects", "expected"),
    [
        ([(0.9, True), (0.5, False)], 1, 0.7),  # the middle of what lies between
        ([(0.9, True), (0.5, True)], 2, 0.25),  # all is right: half of the lowest
        ([(0.9, True), (0.899, False)], 1, 0.9),  # nothing lies between, and what equals it is shown
        ([(0.5, False), (0.9, True), (0.5, True)], 2, 0.25),  # equal scores are shown together: F1 0.8 against 0.67
        ([(0.9, True), (0.8, None), (0.5, False)], 1, 0.7),  # what is not judged makes no difference
        ([(0.9, True), (0.6, False), (0.5, True), (0.1, False)], 3, 0.3),
        (
            [(0.9, True), (0.8, False), (0.7, False), (0.6, True), (0.1, False)],
            2,
            0.35,
        ),  # F1 is 2/3 above 0.8, too: less wide
        ([(1.0, True)], 1, 0.5),
        ([(0.0, True)], 1, 0.0),
        ([(0.00012, True), (0.00011, False)], 1, 0.00012),  # finer than three decimals
        ([(0.9, False)], 1, None),
        ([(0.9, None)], 1, None),
    ],
)
def test_the_middle_of_the_widest_best_range_is_chosen(steps, num_objects, expected):
    found = [Step(score, int(verdict is True), int(verdict is not None)) for score, verdict in steps]
    assert best_min_score(found, num_objects) == expected


def test_of_several_best_ranges_the_widest_is_taken():
    # F1 is 2/3 with the first alone (1 of 1, 1 of 2) and with all four (2 of 4, 2 of 2).
    ladder = [(0.9, 1), (0.85, 0), (0.8, 0), (0.4, 1)]
    assert best_min_score([Step(score, right, 1) for score, right in ladder], 2) == 0.2
    ladder = [(0.9, 1), (0.5, 0), (0.45, 0), (0.1, 1)]
    assert best_min_score([Step(score, right, 1) for score, right in ladder], 2) == 0.7


# ---- what is promised is what is measured --------------------------------------------------------

_scores = st.integers(1, 999).map(lambda thousandths: thousandths / 1000)
_places = st.tuples(st.integers(0, 12), st.integers(0, 6)).map(lambda at: (at[0] * 10, at[1] * 10))


@st.composite
def runs(draw):
    """Records of two prompts of one name over three pictures, and objects with crowds among them."""
    there, records = [], []
    for image in ("a.jpg", "b.jpg", "c.jpg"):
        for x, y in draw(st.lists(_places, max_size=4)):
            there.append((image, "car", [x, y, 40, 30], {"iscrowd": int(draw(st.integers(0, 5)) == 0)}))
        for prompt in ("saloon", "estate"):
            found = draw(st.lists(st.tuples(_places, _scores), max_size=4))
            records.append(record(image, "detect", prompt, objects=[box(*at, 40, 30, score) for at, score in found]))
            at_points = draw(st.lists(st.tuples(_places, _scores), max_size=4))
            placed = [points((x + 20, y + 15))[0] | {"score": score} for (x, y), score in at_points]
            records.append(record(image, "point", prompt, points=placed))
    return records, instances(there, images=["a.jpg", "b.jpg", "c.jpg"])


CAR = Labels((Label(name="car", prompts=("saloon", "estate")),))


@pytest.mark.parametrize(("task", "section"), [("detect", "boxes"), ("point", "points")])
@given(run=runs(), nms=st.sampled_from([None, 1.0, 0.3]))
@settings(max_examples=25, deadline=None)
def test_no_other_threshold_has_a_better_f1(tmp_path_factory, task, section, run, nms):
    records, truth = run
    case = Case(tmp_path_factory.mktemp("case"), [one for one in records if one["task"] == task], truth)
    labels, best = case.best(CAR, nms=nms)
    (car,) = best.thresholds
    if car.why is None:
        assert case.f1(section, labels, nms=nms)["car"] == pytest.approx(car.f1, abs=1e-12)
        assert labels.labels[0].min_score == car.min_score
    scores = sorted({thing["score"] for one in records for thing in one.get("objects", one.get("points", ()))})
    for score in [0.0, *scores]:
        other = case.f1(section, CAR, min_score=score, nms=nms)["car"]
        assert (other or 0.0) <= (car.f1 or 0.0) + 1e-12


def test_f1_of_each_label_is_that_of_eval_with_the_file(tmp_path):
    rng = random.Random(5)
    there, records = [], []
    for n in range(30):
        for category in ("car", "dog"):
            found = []
            for _ in range(rng.randint(0, 3)):
                bbox = [rng.randint(0, 120), rng.randint(0, 50), rng.randint(20, 60), rng.randint(20, 45)]
                there.append((f"{n}.jpg", category, bbox))
                found.append(box(*bbox, score=round(rng.betavariate(4, 2), 3)))
            found += [box(150, 60, 30, 30, round(rng.betavariate(2, 4), 3)) for _ in range(rng.randint(0, 2))]
            records.append(record(f"{n}.jpg", "detect", category, objects=found))
    case = Case(tmp_path, records, instances(there, images=[f"{n}.jpg" for n in range(30)]))
    labels, best = case.best()
    (tmp_path / "best.toml").write_text(toml_of(labels))
    measured = case.f1("boxes", read_labels(tmp_path / "best.toml"))
    assert measured == {one.name: pytest.approx(one.f1, abs=1e-12) for one in best.thresholds}
    assert {one.name: one.f1_before for one in best.thresholds} == pytest.approx(case.f1("boxes"))
    assert all(one.f1 > one.f1_before + 0.02 for one in best.thresholds)  # the noise can be told from what is there
    assert (best.f1, best.f1_before) == (pytest.approx(0.92, abs=0.05), pytest.approx(0.8, abs=0.1))


def test_masks_are_judged_by_their_shape(tmp_path):
    there = [(f"{n}.jpg", "car", [0, 0, 40, 40]) for n in range(3)]
    good = [record(f"{n}.jpg", "segment", "car", segments=[segment(SQUARE, 0, 0, 40, 40, 0.8)]) for n in (0, 1)]
    thin = segment("M 0 0 L .2 0 L 0 .2 Z", 0, 0, 40, 40, 0.6)
    case = Case(tmp_path, [*good, record("2.jpg", "segment", "car", segments=[thin])], instances(there))
    _, best = case.best()
    assert scores_of(best) == {"car": 0.7}
    assert best.f1 == pytest.approx(0.8)


# ---- what it looks at ----------------------------------------------------------------------------

TWO = [("a.jpg", "car", [0, 0, 40, 40]), ("a.jpg", "car", [100, 0, 40, 40])]
FOUND = [box(0, 0, 40, 40, 0.9), box(100, 0, 40, 40, 0.4), box(150, 60, 30, 30, 0.2)]


def test_a_lower_threshold_than_the_one_in_force_can_be_found(tmp_path):
    case = Case(tmp_path, [record("a.jpg", "detect", "car", objects=FOUND)], instances(TWO))
    strict = Labels((Label(name="car", prompts=("car",), min_score=0.8),))
    for arguments in ({"labels": strict}, {"min_score": 0.8}):
        _, best = case.best(**arguments)
        assert scores_of(best) == {"car": 0.3}
        assert (best.f1, best.f1_before) == (1.0, pytest.approx(2 / 3))


def test_doubles_are_gone_before_a_threshold_is_chosen(tmp_path):
    double = record("a.jpg", "detect", "saloon", objects=[box(1, 1, 40, 40, 0.6)])
    records = [record("a.jpg", "detect", "estate", objects=FOUND[:2]), double]
    case = Case(tmp_path, records, instances(TWO))
    _, best = case.best(CAR)
    assert (scores_of(best), best.f1) == ({"car": 0.2}, 1.0)
    _, best = case.best(CAR, nms=1.0)
    assert (scores_of(best), best.f1) == ({"car": 0.2}, pytest.approx(0.8))
    assert best.notes == ("chosen with --nms 1, which the file does not hold",)


def test_boxes_choose_where_a_name_has_points_as_well(tmp_path):
    at_points = [thing | {"score": 0.05} for thing in points((20, 20))]
    records = [record("a.jpg", "point", "car", points=at_points), record("a.jpg", "detect", "car", objects=FOUND)]
    _, best = Case(tmp_path, records, instances(TWO)).best()
    assert scores_of(best) == {"car": 0.3}
    assert best.notes == ("detect alone chose the min_score of what point was asked, too: car",)


# ---- what is kept --------------------------------------------------------------------------------


def test_the_file_keeps_names_prompts_order_and_limits(tmp_path):
    labels = Labels(
        (
            Label(name="dog", prompts=("hound",), min_score=0.11, id=9),
            Label(name="car", prompts=("saloon", "estate"), min_score=0.8, nms=0.6, max_objects=7, id=4),
            Label(name='bus "2" \x7f \n é😀', prompts=("a\\b",), min_score=0.22, id=5),
        )
    )
    records = [
        record("a.jpg", "detect", "saloon", objects=FOUND),
        record("a.jpg", "detect", "hound", objects=[]),
        record("a.jpg", "detect", "zebra", objects=[box(0, 0, 9, 9)]),
    ]
    best, found = Case(tmp_path, records, instances([*TWO, ("a.jpg", "dog", [0, 0, 9, 9])])).best(labels)
    (tmp_path / "best.toml").write_text(toml_of(best), encoding="utf-8")
    assert read_labels(tmp_path / "best.toml") == best
    dog, car, bus, zebra = best.labels
    assert (dog, bus) == (labels.labels[0], labels.labels[2])
    assert car == Label(name="car", prompts=("saloon", "estate"), min_score=0.3, nms=0.6, max_objects=7, id=4)
    assert (zebra.prompts, zebra.min_score, zebra.id) == (("zebra",), None, 10)
    reasons = {one.name: one.why for one in found.thresholds}
    assert reasons == {
        "dog": "never found",
        "car": None,
        labels.names[2]: "not asked here",
        "zebra": "not in the ground truth",
    }


def test_why_a_label_gets_no_threshold(tmp_path):
    records = [
        record("a.jpg", "detect", "car", objects=[box(150, 60, 30, 30)]),
        record("a.jpg", "detect", "dog", objects=[box(0, 0, 40, 40)]),
        record("a.jpg", "detect", " car ", objects=[]),
        record("a.jpg", "caption", length="short", caption="a car"),
    ]
    best, found = Case(tmp_path, records, instances(TWO)).best()
    assert [(one.name, one.min_score, one.why) for one in found.thresholds] == [
        ("car", None, "never found where it is"),
        ("dog", None, "in none of these pictures"),
    ]
    assert best.names == ("car", "dog")
    assert (found.f1, found.f1_before) == (0.0, 0.0)


def test_labels_that_no_file_can_hold_are_left_out_and_told(tmp_path):
    records = [record("a.jpg", "detect", " car", objects=FOUND), record("b.jpg", "detect", "car", objects=FOUND)]
    best, found = Case(tmp_path, records, instances(TWO, images=["a.jpg", "b.jpg"])).best()
    assert best.names == ("car",)
    (told,) = [one for one in found.thresholds if one.name == " car"]
    assert told.why.startswith("blanks around it")


def test_without_a_file_labels_come_as_they_were_asked(tmp_path):
    found = [thing | {"label": "car"} for thing in FOUND]
    records = [
        record("a.jpg", "detect", "dog", objects=[]),
        record("a.jpg", "detect", "saloon", objects=found),
        record("a.jpg", "detect", "estate", objects=[]),
    ]
    best, _ = Case(tmp_path, records, instances(TWO)).best()
    assert [(label.name, label.prompts) for label in best.labels] == [
        ("dog", ("dog",)),
        ("car", ("saloon",)),
        ("estate", ("estate",)),
    ]


def test_one_named_prompt_has_no_doubles_of_others(tmp_path):
    twice = [thing | {"label": "car"} for thing in (box(0, 0, 40, 40, 0.9), box(1, 0, 40, 40, 0.8))]
    case = Case(tmp_path, [record("a.jpg", "detect", "saloon", objects=twice)], instances(TWO))
    assert case.f1("boxes")["car"] == pytest.approx(0.5)
    labels, _ = case.best()
    assert case.f1("boxes", labels)["car"] == pytest.approx(2 / 3)


def test_objects_without_scores_are_always_shown(tmp_path):
    bare = {key: value for key, value in FOUND[0].items() if key != "score"}
    case = Case(tmp_path, [record("a.jpg", "detect", "car", objects=[bare, *FOUND[1:]])], instances(TWO))
    labels, best = case.best()
    assert (scores_of(best), best.f1) == ({"car": 0.3}, 1.0)
    assert case.f1("boxes", labels)["car"] == 1.0


def test_captions_alone_choose_nothing(tmp_path):
    truth = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}
    truth["annotations"].append({"id": 1, "image_id": 1, "caption": "a car"})
    case = Case(tmp_path, [record("a.jpg", "caption", length="short", caption="a car")], truth)
    with pytest.raises(InputError, match="COCO instances"):
        case.best()


# ---- on the little world -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.process
def test_several_prompts_find_more_and_chosen_thresholds_hold_on_other_scenes(tmp_path, monkeypatch):
    """`tiny`, 60 scenes to choose on and 60 others, through the real commands; see examples/benchmarks.md."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    bench = importlib.import_module("bench_labels")
    bench.ask(tmp_path, 5000, 60)
    single, _, doubled, several, chosen = bench.results(tmp_path)
    assert several["AP"] >= single["AP"] > doubled["AP"]
    assert several["recall"] > single["recall"]
    assert chosen["F1"] > several["F1"] + 0.01
