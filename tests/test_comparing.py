"""The comparison with the reference can fail: it finds every wrong decision, and lets only near-ties through."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import pytest
import torch
from reference.cases import draw_image, draw_requests
from reference.comparing import FLOAT32, Margins, assert_agrees, expected_result, num_sure
from reference.random_models import draw_network
from reference.sequence import Encoded, Model, Sequence
from reference.skills import Answer, answer
from reference.writing import TOKENIZER
from tokenizers import Tokenizer

SEEDS = (2, 22)  # small models, and no near-tie in their answers


@contextmanager
def one_wrong_decision(number: int) -> Iterator[None]:
    """Within it, the reference's decision `number` of an answer is its second best."""
    decide, decide_coord_or_eos = Sequence.decide, Sequence.decide_coord_or_eos

    def decide_wrongly(self: Sequence, kind: str, logits: torch.Tensor, banned: tuple = ()) -> int:
        best = decide(self, kind, logits, banned)
        if len(self.trace) - 1 != number:
            return best
        self.trace.pop()
        return decide(self, kind, logits, [*banned, best])

    def decide_coord_or_eos_wrongly(self: Sequence) -> int:
        best = decide_coord_or_eos(self)
        if len(self.trace) - 1 != number:
            return best
        return self.model.ids["eos_id"] + self.model.ids["coord_id"] - best

    with (
        patch.object(Sequence, "decide", decide_wrongly),
        patch.object(Sequence, "decide_coord_or_eos", decide_coord_or_eos_wrongly),
    ):
        yield


@cache
def asked(seed: int) -> tuple[Model, Encoded, list[tuple[dict, Answer]]]:
    """A model, a picture and the right answers to every skill."""
    model = Model(draw_network(seed), Tokenizer.from_file(str(TOKENIZER)))
    rng = random.Random(seed)
    with torch.no_grad():
        encoded = model.encode_image(draw_image(rng, model.network.config))
    return model, encoded, [(request, answer(model, request, encoded)) for request in draw_requests(rng)]


@cache
def wrong_results(seed: int) -> list[list[dict]]:
    """Of each request a record's keys for every decision: taken wrongly, and all behind it going on from there."""
    model, encoded, requests = asked(seed)
    results: list[list[dict]] = []
    for request, right in requests:
        results.append([])
        for number in range(len(right["trace"])):
            with one_wrong_decision(number):
                results[-1].append(expected_result(request, answer(model, request, encoded)))
    return results


def agrees(seed: int, request: dict, right: Answer, result: dict, margins: Margins) -> bool:
    try:
        assert_agrees(asked(seed)[0], request, right, result, margins)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("seed", SEEDS)
def test_right_answers_agree(seed: int) -> None:
    for request, right in asked(seed)[2]:
        assert agrees(seed, request, right, expected_result(request, right), FLOAT32)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_wrong_decision_that_shows_is_found(seed: int) -> None:
    num_found = 0
    for (request, right), results in zip(asked(seed)[2], wrong_results(seed), strict=True):
        assert num_sure(right, FLOAT32) == len(right["trace"])
        for number, result in enumerate(results):
            if result != expected_result(request, right):
                assert not agrees(seed, request, right, result, FLOAT32), (request, number)
                num_found += 1
    assert num_found > 40


@pytest.mark.parametrize("kind", ["choice", "experts"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_margin_as_wide_as_the_arithmetic_asks_is_no_excuse(seed: int, kind: str) -> None:
    """The closest call of an answer is found where its margin is just enough, and let through where just not."""
    key, num_shown = {"choice": "margin", "experts": "moe_margin"}[kind], 0
    for (request, right), results in zip(asked(seed)[2], wrong_results(seed), strict=True):
        margins = [decision[key] for decision in right["trace"]]
        result = results[margins.index(min(margins))]
        if result == expected_result(request, right):
            continue
        least = {"choice": 0.0, "experts": 0.0}
        just_sure = Margins(**least | {kind: min(margins)})
        just_unsure = Margins(**least | {kind: math.nextafter(min(margins), math.inf)})
        assert not agrees(seed, request, right, result, just_sure), request
        assert agrees(seed, request, right, result, just_unsure), request
        num_shown += 1
    assert num_shown > 2


@pytest.mark.parametrize("seed", SEEDS)
def test_what_comes_before_a_near_tie_is_compared(seed: int) -> None:
    """Texts that begin otherwise and other objects are found although the last decision is open; segments are not."""
    num_found = 0
    for (request, right), results in zip(asked(seed)[2], wrong_results(seed), strict=True):
        *before, last = right["trace"]
        unsure = right | {"trace": [*before, last | {"margin": 0.0}]}
        assert agrees(seed, request, unsure, expected_result(request, right), FLOAT32)
        num_found += sum(not agrees(seed, request, unsure, result, FLOAT32) for result in results[:-1])
    assert num_found > 20
