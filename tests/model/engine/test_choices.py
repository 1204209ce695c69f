"""Answers from a list: probabilities of whole choices, the same alone and in company."""

from __future__ import annotations

import math

import pytest
import torch
from golden_cases import GoldenCase, assert_answer, load_case

from md3cli.model.engine import plain
from md3cli.records import Job, Request, Task

CHOICES = ("yes", "no", "a red square")


def plain_scores(case: GoldenCase, image_index: int | None, request: Request) -> list[float]:
    """Feed each choice token by token through the plain path and multiply."""
    image = None if image_index is None else case.images[image_index]
    ids = case.model.config.tokenizer
    totals = []
    for choice in request.choices:
        with torch.inference_mode():
            sequence = plain.PlainGeneration(case.model, image)
            sequence.feed_prompt(case.prompts.build(request, has_image=image is not None))
            if request.reasoning:
                plain.reason(sequence, request.max_tokens)
                sequence.feed_token(ids.answer_id)
            total = 0.0
            for token in [*case.tokenizer.encode(choice), ids.eos_id]:
                total += sequence.logits().log_softmax(0)[token].item()
                sequence.feed_token(token)
        totals.append(total)
    return [math.exp(t - torch.tensor(totals).logsumexp(0).item()) for t in totals]


@pytest.mark.process
@pytest.mark.parametrize("reasoning", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_equal_the_plain_path(reasoning: bool, batch_size: int) -> None:
    case = load_case("a")
    request = Request(Task.QUERY, "What is it?", reasoning=reasoning, max_tokens=12, choices=CHOICES)
    others = [key for key in range(len(case.requests)) if case.is_certain(key)][:8]
    jobs = [Job(100 + i, case.images[i], request) for i in range(3)]
    mixed = [job for pair in zip(jobs, [case.job(key) for key in others[:3]], strict=True) for job in pair]
    answers = {a.key: a for a in case.engine(batch_size).run([*mixed, *(case.job(key) for key in others[3:])])}
    for key in others:
        assert_answer(answers[key], case.expected[key])
    for index in range(3):
        result = answers[100 + index].result
        assert result is not None
        expected = plain_scores(case, index, request)
        assert result["answer"] == CHOICES[expected.index(max(expected))]
        assert list(result["choices"]) == list(CHOICES)
        for found, wanted in zip(result["choices"].values(), expected, strict=True):
            assert abs(found - wanted) <= 0.002
        assert ("reasoning" in result) == reasoning


@pytest.mark.parametrize("choices", [("yes",), ("yes", "yes"), ("yes", "")])
def test_choices_that_are_none_are_refused(choices: tuple[str, ...]) -> None:
    case = load_case("a")
    request = Request(Task.QUERY, "What is it?", choices=choices)
    (answer,) = case.engine(1).run([Job(0, case.images[0], request)])
    assert answer.failure is not None
    assert answer.failure.type == "bad_request"


def test_other_tasks_take_no_choices() -> None:
    case = load_case("a")
    (answer,) = case.engine(1).run([Job(0, case.images[0], Request(Task.CAPTION, choices=CHOICES))])
    assert answer.failure is not None


def test_a_text_only_query_can_choose() -> None:
    case = load_case("a")
    request = Request(Task.QUERY, "Which?", reasoning=False, choices=CHOICES)
    (answer,) = case.engine(1).run([Job(0, None, request)])
    assert answer.result is not None
    expected = plain_scores(case, None, request)
    assert abs(answer.result["choices"][CHOICES[0]] - expected[0]) <= 0.002
