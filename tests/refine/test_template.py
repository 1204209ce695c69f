"""Prompts that are filled from rows: known again once they were filled, and the names that they keep."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import UsageError
from md3cli.refine.labels import Label, Labels, labels_of_tables
from md3cli.refine.refinement import Refinement, name_of
from md3cli.refine.template import Template

TEXTS = st.text(alphabet="ab {}", max_size=4)
VALUES = st.text(alphabet="ab {}", min_size=1, max_size=4)


@given(st.lists(TEXTS, min_size=1, max_size=4), st.data())
def test_what_was_filled_is_known_again(texts: list[str], data: st.DataObject) -> None:
    names = tuple(f"n{number}" for number in range(len(texts) - 1))
    template = Template(tuple(texts), names)
    values = {name: data.draw(VALUES) for name in names}
    assert template.may_be(template.filled(values))


@pytest.mark.parametrize(
    ("prompt", "template", "expected"),
    [
        ("red car", "{color} car", True),
        (" car", "{color} car", False),
        ("red car!", "{color} car", False),
        ("a red, red car", "a {x}, {y} car", True),
        ("a red car", "a {x}, {y} car", False),
        ("star", "star", True),
        ("stars", "star", False),
        ("x", "{a}{b}", False),
        ("xy", "{a}{b}", True),
    ],
)
def test_what_a_prompt_may_have_come_of(prompt: str, template: str, expected: bool) -> None:
    assert Template.parse(template).may_be(prompt) is expected


def test_a_long_prompt_takes_no_longer_than_it_is() -> None:
    template = Template.parse("{a}" + "x{b}" * 1000 + "y")
    began = time.process_time()  # what else the machine does is left out
    assert not template.may_be("x" * 1_000_000)
    assert time.process_time() - began < 2


def test_labels_of_templates() -> None:
    typed = Labels(
        (
            Label(name="thing", prompts=("{color} car", "a car"), min_score=0.5),
            Label(name="{stem}", prompts=("{stem}",)),
            Label(name="{{x}}", prompts=("{{x}}",)),
        )
    )
    labels = typed.as_templates()
    assert labels.labels == (
        Label(name="thing", prompts=("a car",), min_score=0.5, templates=("{color} car",)),
        Label(name="{x}", prompts=("{x}",)),
    )
    assert Refinement.from_json(Refinement(labels).to_json()).labels == labels
    assert labels.labels[0].is_shared
    with pytest.raises(UsageError, match="lone"):
        Labels((Label(name="thing", prompts=("{color",)),)).as_templates()


def test_templates_are_no_part_of_a_users_file() -> None:
    table = {"name": "thing", "prompts": [], "templates": ["{color} car"]}
    with pytest.raises(UsageError, match="unknown key 'templates'"):
        labels_of_tables([table], "labels.toml")
    assert labels_of_tables([table], "run.json", may_fill=True).names == ("thing",)
    for odd in (["{a.b}"], "{a}", [1], []):  # run.json may be anybody's
        with pytest.raises(UsageError):
            labels_of_tables([table | {"templates": odd}], "run.json", may_fill=True)


def test_later_labels_join_those_of_templates() -> None:
    first = Labels((Label(name="thing", prompts=(), templates=("{color} car",)),))
    file = Labels((Label(name="thing", prompts=("van",)), Label(name="dog", prompts=("dog",))))
    merged = file.followed_by(first)
    assert merged.labels[0] == Label(name="thing", prompts=("van",), templates=("{color} car",))
    assert file.followed_by(first).followed_by(first) == merged


def test_the_name_of_what_found_nothing() -> None:
    labels = Labels((Label(name="thing", prompts=(), templates=("{color} car",)),))
    record = {"task": "detect", "prompt": "red car", "objects": []}
    assert name_of(record, labels) == "thing"
    assert name_of(record | {"prompt": "red dog"}, labels) == "red dog"
    assert name_of(record | {"objects": [{"label": "auto"}]}, labels) == "auto"  # as it was asked
    assert name_of(record | {"prompt": None}, labels) is None
