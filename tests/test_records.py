"""Ids of requests: what they depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from md3cli.records import Request, RunIdentity, Task, request_id

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
