"""Records about parts of pictures, in words."""

from __future__ import annotations

from typing import Any

import pytest

from md3cli.refine.labels import Labels, labels_with
from md3cli.refine.parts import PartText, part_name, part_text, says_of_part
from md3cli.refine.refinement import Refinement, named, refined
from md3cli.refine.selection import Selection
from md3cli.refine.stats import RecordStats

REGION = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6, "label": "car", "of": "a" * 32, "index": 1}


def record(task: str, prompt: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"id": "1", "image": "a.png", "task": task, "prompt": prompt, "error": None, "region": REGION} | fields


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (record("query", "What colour?", answer="red"), PartText("What colour?", "red")),
        (record("query", answer=""), PartText("answer", "")),
        (record("caption", length="normal", caption="A car."), PartText("caption", "A car.")),
        (record("caption", length="short", caption="A car."), PartText("caption short", "A car.")),
        (record("query", "What colour?", error={"type": "model"}), None),
        (record("query", "What colour?", answer="red", region=None), None),
        (record("detect", "wheel", objects=[]), None),
    ],
)
def test_only_words_about_a_part_are_its_text(asked: dict[str, Any], said: PartText | None) -> None:
    assert part_text(asked) == said


def test_people_count_from_one_and_annotations_have_their_ids() -> None:
    assert part_name(REGION) == "car 2"
    assert part_name(REGION | {"of": "7", "index": 0}) == "car #7"


def test_what_fails_about_a_part_is_not_asked_of_the_picture() -> None:
    assert says_of_part(record("query", "What colour?", error={"type": "model"}))


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        (["vehicle=car"], "vehicle"),
        (["car=automobile", "vehicle=car"], "car"),  # it is a name of its own, whatever another asks
        (["dog"], "car"),
    ],
)
def test_a_part_that_is_called_by_a_prompt_gets_its_name(typed: list[str], name: str) -> None:
    labels = labels_with(typed, Labels())
    answer = record("query", "What colour?", answer="red")
    assert named(answer, labels)["region"]["label"] == name
    assert refined([answer], Refinement(labels))[0]["region"] == REGION | {"label": name}
    assert answer["region"] == REGION


@pytest.mark.parametrize(
    ("typed", "is_taken"), [("car", True), ("automobile", True), ("What colour?", False), ("red", False)]
)
def test_a_label_takes_answers_about_its_objects(typed: str, is_taken: bool) -> None:
    labels = labels_with(["car=automobile", "car"], Labels())
    answer = record("query", "What colour?", answer="red")
    assert Selection(labels=(typed,)).takes(answer, labels) is is_taken


def test_a_label_takes_what_was_found_in_a_part_by_its_own_name() -> None:
    box = {key: REGION[key] for key in ("x_min", "y_min", "x_max", "y_max")}
    wheel = record("detect", "wheel", objects=[{"label": "wheel", **box}])
    assert Selection(labels=("wheel",)).takes(wheel, Labels())
    assert not Selection(labels=("car",)).takes(wheel, Labels())


def test_records_about_parts_are_counted_only_where_there_are_some() -> None:
    stats = RecordStats()
    stats.add(record("query", "How many?", answer="2", region=None))
    assert "regions" not in stats.to_json()
    stats.add(record("query", "What colour?", answer="red"))
    assert stats.to_json()["regions"] == 1
