"""What a pass of prompts is given: the plain path's embeddings, rows as they start, padding that says nothing.

And answers from a list: probabilities of whole choices, the same alone and in company.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from golden_cases import GoldenCase, assert_answer, load_case

from md3cli.model.engine import plain
from md3cli.model.engine.generation import Generation
from md3cli.model.engine.kv_cache import KVCache, PrefixStore
from md3cli.model.engine.passes import Group, Passes, PromptInputs, embed_prompts, run_prefixes
from md3cli.model.engine.state import Mode
from md3cli.model.network.text import PassKind
from md3cli.records import Job, Request, Task

CPU = torch.device("cpu")
POINT, BOX = (0.25, 0.5), (0.1, 0.2, 0.6, 0.8)
QUERY = Request(Task.QUERY, "What is it?", reasoning=False)
REQUESTS = (
    Request(Task.CAPTION),
    replace(QUERY, spatial_refs=(POINT, BOX, BOX)),
    replace(QUERY, temperature=0.75, top_p=0.5, seed=2**64 - 1),  # asked without a picture
    Request(Task.POINT, "a rather long name of a thing", spatial_refs=(POINT,), max_objects=7),
    Request(Task.QUERY, "Why?", max_tokens=9),
    Request(Task.SEGMENT, "it", spatial_refs=(BOX, POINT)),
)
SLOTS = [4, 0, 5, 2, 3, 1]


def generations(case: GoldenCase) -> list[Generation]:
    jobs = [Job(i, None if r.temperature else case.images[0], r) for i, r in enumerate(REQUESTS)]
    return [Generation.of(job, case.prompts, case.model.config, 4096) for job in jobs]


def sent(case: GoldenCase, passes: Passes, max_tokens: int = 10_000) -> list[tuple[Group, PromptInputs]]:
    groups = passes.group(generations(case), SLOTS, max_tokens)
    _, inputs = passes.send([], groups, num_slots=8)
    return list(zip(groups, inputs, strict=True))


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("max_tokens", [1, 24, 10_000])
@torch.inference_mode()
def test_embeddings_of_a_group_are_those_of_the_plain_path(name: str, max_tokens: int) -> None:
    case = load_case(name)
    num_checked = 0
    for group, inputs in sent(case, Passes(case.model), max_tokens):
        for generation, x_TD in zip(group.generations, embed_prompts(case.model, inputs), strict=True):
            expected = plain.prompt_embeddings(case.model, generation.prompt)
            assert x_TD.shape[0] == group.width
            assert torch.allclose(x_TD[: len(expected)], expected, rtol=0, atol=1e-6)
            placeholder = plain.prompt_embeddings(case.model, replace(generation.prompt, coords=(), sizes=()))
            assert torch.equal(expected, placeholder) == (not generation.job.request.spatial_refs)
            num_checked += 1
    assert num_checked == len(REQUESTS)


def test_groups_keep_to_the_limit_and_to_similar_lengths() -> None:
    case = load_case("a")
    batch = generations(case)
    groups = Passes(case.model).group(batch, SLOTS, max_tokens=24)
    assert len(groups) > 2
    assert all(len(group.slots) == 1 or len(group.slots) * group.width <= 24 for group in groups)
    widths = [len(generation.prompt.ids) for group in groups for generation in group.generations]
    assert widths == sorted(widths)
    seated = {id(s): slot for group in groups for s, slot in zip(group.generations, group.slots, strict=True)}
    assert seated == {id(s): slot for s, slot in zip(batch, SLOTS, strict=True)}


def test_no_prompt_changes_its_kind_of_pass_for_its_companions() -> None:
    """Tiles of products, and with them the order of their sums, follow from the kind of pass."""
    case = load_case("a")
    prefix_len = case.model.config.prefix_len
    questions = [replace(QUERY, prompt="a " * count) for count in (1, 8, prefix_len, 2 * prefix_len)]
    jobs = [Job(i, case.images[0], request) for i, request in enumerate(questions)]
    batch = [Generation.of(job, case.prompts, case.model.config, 4096) for job in jobs]
    passes = Passes(case.model)
    together = passes.group(batch, SLOTS, max_tokens=10_000)
    kinds = set()
    for group in together:
        for generation, slot in zip(group.generations, group.slots, strict=True):
            (alone,) = passes.group([generation], [slot], max_tokens=10_000)
            kind = PassKind.of(alone.width, prefix_len)
            assert PassKind.of(group.width, prefix_len) is kind
            kinds.add(kind)
    assert len(together) == 2
    assert kinds == {PassKind.PROMPT, PassKind.PREFIX}


def test_rows_start_as_their_requests_say() -> None:
    case = load_case("a")
    ((group, inputs),) = sent(case, Passes(case.model))
    rows, order = inputs.rows(), [generation.job.key for generation in group.generations]
    requests, prefix = [REQUESTS[key] for key in order], case.model.config.prefix_len
    modes = [Mode.TEXT, Mode.TEXT, Mode.TEXT, Mode.X, Mode.REASON, Mode.SEGMENT]
    assert rows.mode.tolist() == [modes[key] for key in order]
    assert rows.is_point.tolist() == [key == 3 for key in order]
    assert rows.limit.tolist() == [7 if r.task is Task.POINT else r.max_tokens for r in requests]
    starts = [0 if r.temperature else prefix for r in requests]
    lengths = [len(generation.prompt.ids) for generation in group.generations]
    assert inputs.ints.start.tolist() == starts
    assert inputs.ints.last.tolist() == [length - 1 for length in lengths]
    assert rows.position.tolist() == [start + length for start, length in zip(starts, lengths, strict=True)]
    assert rows.seed.tolist() == [-1 if r.temperature else 0 for r in requests]  # as a signed number of 64 bits
    assert rows.temperature.tolist() == [r.temperature for r in requests]
    assert rows.top_p.tolist() == pytest.approx([r.top_p for r in requests])
    assert inputs.ints.slots.tolist() == list(group.slots)
    assert rows.is_first.all()
    assert not rows.emitted.any()
    assert not rows.draws.any()


def test_a_prefix_leaves_in_its_slot_what_the_whole_network_would() -> None:
    """`run_prefixes` computes nothing of the last layer but its keys and values."""
    case = load_case("a")
    model, image = case.model, case.images[0]
    embeddings = plain.encode_image(model, image)[None]
    found, expected = (KVCache(model.config, 2, 40, dtype=model.dtype, device=CPU) for _ in range(2))
    slots = torch.tensor([1])
    with torch.inference_mode():
        run_prefixes(model, found, slots, embeddings)
        x = model.prefix_embeddings(embeddings)
        model.text(x, torch.arange(x.shape[1])[None], None, PrefixStore(expected, slots))
    for one, other in zip((*found.keys, *found.values), (*expected.keys, *expected.values), strict=True):
        assert torch.equal(one, other)


# -- choices ---------------------------------------------------------------------------------------

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
