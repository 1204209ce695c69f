"""Ids of requests: what they depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from md3cli.records import ID_SCHEME, Request, RunIdentity, Task, counted, request_id

CAR = Request(Task.DETECT, "car")
RUN = RunIdentity("checkpoint@7ef7")


def test_weights_under_another_name_give_the_same_ids() -> None:
    moved = replace(RUN, model="copy@of@7ef7")
    assert request_id("a.jpg", CAR, moved) == request_id("a.jpg", CAR, RUN)


@pytest.mark.parametrize(
    "other",
    [
        replace(RUN, model="checkpoint@81c0"),
        replace(RUN, dtype="fp32"),
        replace(RUN, quant="none"),
        replace(RUN, adapter="lora"),
        replace(RUN, background="white"),
    ],
)
def test_what_can_change_an_answer_changes_the_id(other: RunIdentity) -> None:
    assert request_id("a.jpg", CAR, other) != request_id("a.jpg", CAR, RUN)


def test_repeats_have_ids_of_their_own() -> None:
    assert request_id("a.jpg", CAR, RUN, repeat=1) != request_id("a.jpg", CAR, RUN)


def test_ids_of_another_version_have_another_scheme() -> None:
    """A change of these ids would append every record of a resumed run again: raise ID_SCHEME with it."""
    question = Request(Task.QUERY, "ä?", spatial_refs=((0.5, 0.25),))
    ids = [request_id("a.jpg", CAR, RunIdentity("tiny@0")), request_id(None, question, RunIdentity("tiny@0"), 2)]
    assert (ID_SCHEME, ids) == (1, ["745cf6632dd56a4caf83da21f25dbea0", "0caebdc854f6d50ab600be8b70596726"])


def test_a_count_of_things_is_said_as_a_person_says_it() -> None:
    said = [counted(count, "point was", "points were") for count in (0, 1, 2, 1204)]
    assert said == ["0 points were", "1 point was", "2 points were", "1,204 points were"]
