"""Which records: each word alone, words together, samples, orders."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from finished_runs import failure, record, write_records
from hypothesis import given
from hypothesis import strategies as st

from md3cli.refine.collection import Collection, read
from md3cli.refine.labels import Labels, labels_with
from md3cli.refine.refinement import Refinement
from md3cli.refine.selection import Selection

LABELS = labels_with(["vehicle=car", "vehicle=truck", "dog"], Labels())


def thing(score: float, label: str = "car") -> dict[str, Any]:
    return {"label": label, "x_min": score, "y_min": 0.1, "x_max": score + 0.1, "y_max": 0.3, "score": score}


def found(task: str, score: float) -> dict[str, Any]:
    if task == "point":
        return {"points": [{"label": "dog", "x": 0.5, "y": 0.5, "score": score}]}
    box = {"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}
    return {"segments": [{"label": "dog", "svg_path": "", "bbox": box, "score": score}]}


RECORDS = {
    "cars": record("day/a.png", "detect", "car", objects=[thing(0.9), thing(0.3)]),
    "none": record("day/b.png", "detect", "car", objects=[]),
    "dogs": record("night/a.png", "detect", "dog", objects=[thing(0.5, "dog")]),
    "nose": record("night/c.png", "point", "dog", **found("point", 0.2)),
    "mask": record("night/c.png", "segment", "dog", **found("segment", 0.7)),
    "text": record("day/a.png", "caption", None, caption="a car", length="short"),
    "loop": record("day/b.png", "query", "what?", answer="a b " * 9, finish_reason="length"),
    "sorry": record("day/b.png", "query", "who?", answer="I'm sorry, but I cannot help with that."),
    "broken": failure("day/x.png", "detect", "car"),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [one | {"id": name} for name, one in RECORDS.items()]
    return write_records(tmp_path_factory.mktemp("run") / "records.jsonl", lines)


def taken(path: Path, refinement: Refinement | None = None, **words: Any) -> list[str]:
    collection = Collection.of([path], chosen=refinement or Refinement(LABELS))
    return [one["id"] for one in read(Collection(collection.sources, collection.refinement, Selection(**words)))]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ({}, "cars none dogs nose mask text loop sorry broken"),
        ({"tasks": ("point", "segment")}, "nose mask"),
        ({"labels": ("vehicle",)}, "cars none broken"),  # also of a record without objects
        ({"labels": ("car",)}, "none broken"),  # by their prompt, having no objects
        ({"labels": ("dog", "vehicle")}, "cars none dogs nose mask broken"),
        ({"labels": ("what?",)}, ""),
        ({"prompts": ("what?", "car")}, "cars none loop broken"),
        ({"images": ("day/*",)}, "cars none text loop sorry broken"),
        ({"images": ("a.png",)}, "cars dogs text"),
        ({"images": ("night/**", "x.png")}, "dogs nose mask broken"),
        ({"score_from": 0.5}, "cars dogs mask"),  # ends included
        ({"score_to": 0.3}, "cars nose"),
        ({"score_from": 0.5, "score_to": 0.5}, "dogs"),
        ({"score_from": 0.31, "score_to": 0.49}, ""),  # one object in the range, not one on either side
        ({"outcome": "ok"}, "cars none dogs nose mask text loop sorry"),
        ({"outcome": "failed"}, "broken"),
        ({"wrong": frozenset({"nose", "loop"})}, "nose loop"),
        ({"wrong": frozenset()}, ""),
        ({"qualities": ("loop",)}, "loop"),
        ({"qualities": ("cut",)}, "loop"),
        ({"qualities": ("refusal", "loop")}, "loop sorry"),
        ({"sort": "least-sure"}, "nose cars dogs mask none text loop sorry broken"),
        ({"sort": "most-sure"}, "mask dogs cars nose none text loop sorry broken"),
        ({"sort": "most-objects"}, "cars dogs nose mask none text loop sorry broken"),
        ({"limit": 2}, "cars none"),
        ({"limit": 0}, ""),
        ({"sample": 0}, ""),
        ({"sample": 99}, "cars none dogs nose mask text loop sorry broken"),
        ({"tasks": ("detect",), "outcome": "ok", "sort": "least-sure", "limit": 2}, "cars dogs"),
        ({"labels": ("dog",), "score_from": 0.4, "images": ("night/*",), "tasks": ("detect",)}, "dogs"),
        ({"labels": ("dog",), "outcome": "failed"}, ""),
    ],
)
def test_each_word_takes_what_it_says(path: Path, words: dict[str, Any], names: str) -> None:
    assert " ".join(taken(path, **words)) == names


def test_scores_are_those_of_the_model_and_sureness_is_what_is_shown(path: Path) -> None:
    refinement = Refinement(LABELS, min_score=0.6)
    assert taken(path, refinement, score_to=0.3) == ["cars", "nose"]  # though hidden
    assert taken(path, refinement, sort="least-sure", limit=2) == ["mask", "cars"]  # whose 0.3 is hidden


@given(num_records=st.integers(1, 40), sample=st.integers(0, 45), seed=st.integers(0, 3), shuffle=st.integers(0, 9))
def test_a_sample_does_not_depend_on_the_order_of_the_lines(
    tmp_path_factory: pytest.TempPathFactory, num_records: int, sample: int, seed: int, shuffle: int
) -> None:
    lines = [record(f"{n}.png", "caption", caption="x", id=f"{n:032x}") for n in range(num_records)]
    order = random.Random(shuffle).sample(range(num_records), num_records)
    folder = tmp_path_factory.getbasetemp()
    one = taken(write_records(folder / "one.jsonl", lines), sample=sample, seed=seed)
    other = taken(write_records(folder / "other.jsonl", [lines[n] for n in order]), sample=sample, seed=seed)
    assert sorted(one) == sorted(other)
    assert len(one) == min(sample, num_records)
    assert one == sorted(one)  # input order is kept
    assert other == [f"{n:032x}" for n in order if f"{n:032x}" in other]


def test_samples_of_other_seeds_differ_and_larger_ones_hold_smaller_ones(tmp_path: Path) -> None:
    lines = [record(f"{n}.png", "caption", caption="x", id=f"{n:032x}") for n in range(200)]
    path = write_records(tmp_path / "r.jsonl", lines)
    small, large, other = taken(path, sample=20), taken(path, sample=60), taken(path, sample=20, seed=1)
    assert set(small) < set(large)
    assert len(set(small) & set(other)) < 10
    assert len({int(name, 16) // 50 for name in large}) == 4  # from all over the file
