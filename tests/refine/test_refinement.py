"""What is shown of what the model said: names, thresholds and doubles, against definitions written out."""

from __future__ import annotations

import copy
import json
import random
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from finished_runs import record, write_records
from hypothesis import example, given
from hypothesis import strategies as st

from md3cli.refine.collection import Collection, read
from md3cli.refine.labels import Label, Labels, labels_with
from md3cli.refine.refinement import SHARED_NAME_NMS, RefinedStream, Refinement, iou, name_of, refined

Box = dict[str, Any]
PROMPTS = ("car", "automobile", "dog")
LABELS = labels_with(["vehicle=car", "vehicle=automobile", "dog"], Labels())


def box(x: float, y: float, side: float, score: float | None = 0.5, label: str = "car") -> Box:
    found: Box = {"label": label, "x_min": x, "y_min": y, "x_max": x + side, "y_max": y + side}
    return found if score is None else found | {"score": score}


def detected(prompt: str, *boxes: Box, image: str = "a.png", **fields: Any) -> dict[str, Any]:
    return record(image, "detect", prompt, objects=[dict(one, label=prompt) for one in boxes], **fields)


def shown(records: list[dict[str, Any]], refinement: Refinement) -> list[list[tuple[float, float | None]]]:
    """(x_min, score) of what each record shows."""
    kept = refined(records, refinement)
    return [[(one["x_min"], one.get("score")) for one in of_record["objects"]] for of_record in kept]


# -- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "key", "thing"),
    [
        ("detect", "objects", box(0, 0, 1)),
        ("point", "points", {"label": "car", "x": 0.5, "y": 0.5, "score": 0.5}),
        ("segment", "segments", {"label": "car", "svg_path": "", "bbox": {}, "score": 0.5}),
    ],
)
def test_what_is_found_gets_the_name_of_its_prompt(task: str, key: str, thing: Box) -> None:
    asked = record("a.png", task, "car", **{key: [thing]})
    before = copy.deepcopy(asked)
    (one,) = refined([asked], Refinement(LABELS))
    assert one == asked | {key: [thing | {"label": "vehicle"}]}
    assert asked == before
    (other,) = refined([asked | {"prompt": "cat"}], Refinement(LABELS))
    assert other[key][0]["label"] == "car"  # as it was asked; not in the file


def test_names_of_records_without_objects() -> None:
    assert name_of(detected("car"), LABELS) == "vehicle"
    assert name_of(detected("cat"), LABELS) == "cat"
    assert name_of(record("a.png", "caption", caption="x"), LABELS) is None
    assert name_of(record("a.png", "query", "car", answer="x"), LABELS) is None


# -- thresholds ------------------------------------------------------------------------------------------


@given(scores=st.lists(st.integers(1, 999).map(lambda n: n / 1000), max_size=9), least=st.integers(0, 1000))
@example(scores=[0.5, 0.499, 0.501], least=500)
def test_what_is_as_sure_as_the_threshold_stays(scores: list[float], least: int) -> None:
    asked = detected("dog", *(box(n / 10, 0, 0.05, score) for n, score in enumerate(scores)))
    (one,) = refined([asked], Refinement(min_score=least / 1000))
    assert [found["score"] for found in one["objects"]] == [score for score in scores if score >= least / 1000]


def test_a_record_whose_objects_are_all_below_stays_with_none() -> None:
    asked = [
        detected("dog", box(0, 0, 0.5, 0.2)),
        record("a.png", "point", "dog", points=[{"x": 0, "y": 0, "score": 0}]),
    ]
    kept = refined(asked, Refinement(min_score=0.3))
    assert [kept[0]["objects"], kept[1]["points"]] == [[], []]
    assert kept[0] | {"objects": 0} == asked[0] | {"objects": 0}


def test_a_labels_own_limits_win_over_the_options() -> None:
    labels = Labels((Label(name="vehicle", prompts=("car", "automobile"), min_score=0.1), LABELS.labels[1]))
    records = [detected("car", box(0, 0, 0.1, 0.2)), detected("dog", box(0.5, 0, 0.1, 0.2), box(0.7, 0, 0.1, 0.6))]
    assert shown(records, Refinement(labels, min_score=0.5)) == [[(0, 0.2)], [(0.7, 0.6)]]
    zero = Labels((Label(name="dog", prompts=("dog",), min_score=0.0),))
    assert shown(records[1:], Refinement(zero, min_score=0.5)) == [[(0.5, 0.2), (0.7, 0.6)]]


def test_what_has_no_score_is_shown() -> None:
    assert shown([detected("dog", box(0, 0, 1, None))], Refinement(min_score=1.0)) == [[(0, None)]]


def test_captions_answers_and_failures_go_through_as_they_are() -> None:
    records = [
        record("a.png", "caption", caption="car"),
        record("a.png", "query", "car", answer="car"),
        record("a.png", "detect", "car", error={"type": "io", "message": "", "retry": True}),
    ]
    assert refined(records, Refinement(LABELS, 0.9, 0.1)) == records


# -- doubles ---------------------------------------------------------------------------------------------


def overlap(one: Box, other: Box) -> float:
    """IoU by its definition, without the cut of `iou`."""
    sides = [
        max(0.0, min(one[f"{axis}_max"], other[f"{axis}_max"]) - max(one[f"{axis}_min"], other[f"{axis}_min"]))
        for axis in "xy"
    ]
    areas = [(found["x_max"] - found["x_min"]) * (found["y_max"] - found["y_min"]) for found in (one, other)]
    shared = sides[0] * sides[1]
    return shared / (sum(areas) - shared) if sum(areas) > shared else 0.0


def brute_force(records: list[dict[str, Any]], labels: Labels, limit: float) -> list[list[int]]:
    """Indices of what stays: again and again the surest box that is left is kept, and what it doubles goes."""
    kept: list[list[int]] = [[] for _ in records]
    for name in {labels.name_of(one["prompt"]) for one in records}:
        left = [
            (-found["score"], labels.prompts.index(one["prompt"]), index, place, found)
            for place, one in enumerate(records)
            for index, found in enumerate(one["objects"])
            if labels.name_of(one["prompt"]) == name
        ]
        while left:
            best = min(left, key=lambda box: box[:3])
            kept[best[3]].append(best[2])
            left = [other for other in left if other is not best and not overlap(best[4], other[4]) > limit]
    return [sorted(indices) for indices in kept]


tenths = st.integers(0, 6).map(lambda n: n / 10)
boxes = st.builds(box, tenths, tenths, st.integers(1, 4).map(lambda n: n / 10), st.sampled_from([0.2, 0.5, 0.7, 0.9]))
pictures = st.tuples(*(st.lists(boxes, max_size=5) for _ in PROMPTS))


@given(found=pictures, limit=st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.99]))
def test_doubles_are_those_of_the_definition(found: tuple[list[Box], ...], limit: float) -> None:
    records = [detected(prompt, *some) for prompt, some in zip(PROMPTS, found, strict=True)]
    kept = brute_force(records, LABELS, limit)
    expected = [
        [one["objects"][n] | {"label": LABELS.name_of(one["prompt"])} for n in some]
        for one, some in zip(records, kept, strict=True)
    ]
    assert [one["objects"] for one in refined(records, Refinement(LABELS, nms=limit))] == expected


@given(found=pictures, order=st.permutations(range(3)))
def test_the_order_of_the_records_does_not_matter(found: tuple[list[Box], ...], order: list[int]) -> None:
    records = [detected(prompt, *some) for prompt, some in zip(PROMPTS, found, strict=True)]
    straight = refined(records, Refinement(LABELS))
    turned = refined([records[n] for n in order], Refinement(LABELS))
    assert [turned[order.index(n)] for n in range(3)] == straight


def test_of_equal_scores_the_first_asked_stays() -> None:
    records = [detected("automobile", box(0, 0, 0.5)), detected("car", box(0.01, 0, 0.5), box(0.02, 0, 0.5))]
    assert shown(records, Refinement(LABELS)) == [[], [(0.01, 0.5)]]  # as the labels list them, not as they stand
    turned = labels_with(["vehicle=automobile", "vehicle=car"], Labels())
    assert shown(records, Refinement(turned)) == [[(0, 0.5)], []]


def test_an_overlap_of_exactly_the_limit_stays() -> None:
    one, other = box(0, 0, 0.5, 0.9), {**box(0, 0, 0.5, 0.8), "x_max": 0.25}  # IoU 1/2
    assert iou((0, 0, 0.5, 0.5), (0, 0, 0.25, 0.5)) == 0.5
    assert shown([detected("dog", one, other)], Refinement(LABELS, nms=0.5)) == [[(0, 0.9), (0, 0.8)]]
    assert shown([detected("dog", one, other)], Refinement(LABELS, nms=0.499)) == [[(0, 0.9)]]


@pytest.mark.parametrize(
    ("nms", "own", "num_cars", "num_dogs"),
    [
        (None, None, 1, 2),  # by default where several prompts share a name
        (1.0, None, 2, 2),
        (0.5, None, 1, 1),
        (1.0, 0.5, 1, 2),  # the file's own wins
        (0.5, 1.0, 2, 1),
        (None, 1.0, 2, 2),
    ],
)
def test_where_doubles_are_looked_for(nms: float | None, own: float | None, num_cars: int, num_dogs: int) -> None:
    labels = Labels((Label(name="vehicle", prompts=("car", "automobile"), nms=own), LABELS.labels[1]))
    twice = [box(0, 0, 0.5, 0.9), box(0, 0, 0.5, 0.8)]
    records = [detected("car", twice[0]), detected("automobile", twice[1]), detected("dog", *twice)]
    cars, autos, dogs = shown(records, Refinement(labels, nms=nms))
    assert (len(cars) + len(autos), len(dogs)) == (num_cars, num_dogs)


def test_the_default_is_that_of_the_contract() -> None:
    def num_shown(share: float) -> int:
        """Of two boxes, one of which is the other's left part, with this IoU."""
        part = {**box(0, 0, 0.5, 0.5), "x_max": 0.5 * share}
        records = [detected("car", box(0, 0, 0.5, 0.9)), detected("automobile", part)]
        return sum(map(len, shown(records, Refinement(LABELS))))

    assert (SHARED_NAME_NMS, num_shown(0.69), num_shown(0.71)) == (0.7, 2, 1)


def test_boxes_of_points_masks_and_other_pictures_are_not_compared() -> None:
    segment = {"svg_path": "", "bbox": box(0, 0, 0.5), "score": 0.9}
    records = [
        record("a.png", "segment", "car", segments=[segment, segment]),
        detected("car", box(0, 0, 0.5, 0.9), sha256="1"),
        detected("automobile", box(0, 0, 0.5, 0.8), sha256="2"),
    ]
    kept = refined(records, Refinement(LABELS, nms=0.1))
    assert [len(kept[0]["segments"]), len(kept[1]["objects"]), len(kept[2]["objects"])] == [2, 1, 1]


def test_boxes_are_compared_as_the_model_gave_them() -> None:
    """Unclamped: cut to the picture the two would be one and the same."""
    inside, outside = box(0.5, 0, 0.5, 0.9), {**box(0.5, 0, 0.5, 0.8), "x_max": 2.0}
    assert shown([detected("dog", inside, outside)], Refinement(nms=0.7)) == [[(0.5, 0.9), (0.5, 0.8)]]


def test_doubles_are_found_before_thresholds_hide() -> None:
    """On what the model said: a sure box that its own threshold hides still has doubles of its name."""
    records = [detected("dog", box(0, 0, 0.5, 0.4), box(0, 0, 0.5, 0.3))]
    assert shown(records, Refinement(min_score=0.3, nms=0.5)) == [[(0, 0.4)]]


@pytest.mark.parametrize("corners", [(0, 0, 0, 0), (0.5, 0.5, 0.4, 0.4), (float("nan"),) * 4, (0, 0, float("inf"), 1)])
def test_boxes_without_an_area_overlap_nothing(corners: tuple[float, float, float, float]) -> None:
    assert iou(corners, corners) == 0
    assert iou(corners, (0, 0, 1, 1)) == iou((0, 0, 1, 1), corners) == 0


# -- the choice, and records as a run makes them ---------------------------------------------------------


def test_the_choice_is_kept_as_run_json_has_it() -> None:
    chosen = Refinement(LABELS, 0.25, 1.0, has_file=True)
    assert Refinement.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen
    for odd in (None, [], {"min_score": True, "nms": float("nan")}, {"labels": [{"name": 1}], "min_score": 7}):
        assert Refinement.from_json(odd) == Refinement()


def test_what_is_typed_wins_and_the_rest_stays() -> None:
    earlier = Refinement(LABELS, 0.25, 0.5)
    assert Refinement().over(earlier) == earlier
    assert Refinement(min_score=0.0).over(earlier) == Refinement(LABELS, 0.0, 0.5)
    renamed = Refinement(labels_with(["animal=dog"], Labels()), has_file=True).over(earlier)
    assert renamed.labels.names == ("animal", "vehicle")  # of the file first, and what is not in it after it
    typed = Refinement(labels_with(["animal=dog"], Labels())).over(earlier)
    assert typed.labels.names == ("vehicle", "animal")


@given(found=st.lists(pictures, min_size=1, max_size=4), nms=st.sampled_from([None, 0.3, 1.0]))
def test_records_that_come_one_by_one_are_shown_the_same(found: list[tuple[list[Box], ...]], nms: float | None) -> None:
    records = [
        detected(prompt, *some, image=f"{place}.png")
        for place, of_picture in enumerate(found)
        for prompt, some in zip(PROMPTS, of_picture, strict=True)
    ]
    refinement = Refinement(LABELS, 0.3, nms)
    whole = [one for _, some in groupby(records, lambda one: one["image"]) for one in refined([*some], refinement)]
    stream, shown_one_by_one = RefinedStream(refinement), []
    for one in records:
        shown_one_by_one += stream.add([one])
    assert shown_one_by_one + stream.rest() == whole


@given(found=st.lists(pictures, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_shuffled_lines_show_the_same(
    tmp_path_factory: pytest.TempPathFactory, found: list[tuple[list[Box], ...]], seed: int
) -> None:
    """A file read with its records scattered shows of each record what the file in order shows; it stays as it is."""
    records = [
        detected(prompt, *some, image=f"{place}.png", id=f"{place}{prompt}")
        for place, of_picture in enumerate(found)
        for prompt, some in zip(PROMPTS, of_picture, strict=True)
    ]
    shuffled = random.Random(seed).sample(records, len(records))
    folder = tmp_path_factory.getbasetemp()
    paths = [write_records(folder / name, lines) for name, lines in (("a.jsonl", records), ("b.jsonl", shuffled))]
    before = [path.read_bytes() for path in paths]
    one, other = (
        {line["id"]: line for line in read(Collection.of([path], chosen=Refinement(LABELS, 0.3)))} for path in paths
    )
    assert one == other
    assert [path.read_bytes() for path in paths] == before


def test_a_failed_record_inside_a_picture_does_not_part_it(tmp_path: Path) -> None:
    failed = record("a.png", "detect", "truck", error={"type": "model", "message": "", "retry": True})
    lines = [detected("car", box(0, 0, 0.5, 0.9)), failed, detected("automobile", box(0, 0, 0.5, 0.8))]
    path = write_records(tmp_path / "r.jsonl", lines)
    found = [one.get("objects") for one in read(Collection.of([path], chosen=Refinement(LABELS)))]
    assert [found[0] and len(found[0]), found[1], found[2]] == [1, None, []]
