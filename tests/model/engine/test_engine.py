"""The engine's savings and limits: the same answers with less work, whatever shares the batch."""

from __future__ import annotations

import random
import weakref
from collections.abc import Container
from dataclasses import replace

import pytest
import torch
from golden_cases import GoldenCase, assert_answer, load_case

from md3cli.errors import EngineError
from md3cli.images.crops import Tiling
from md3cli.model.engine import choices as choices_module
from md3cli.model.engine import engine as engine_module
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.generation import EncodedImage
from md3cli.model.engine.kv_cache import KVCache
from md3cli.model.engine.machine import Sizes
from md3cli.model.engine.passes import Passes
from md3cli.model.engine.state import Mode
from md3cli.model.network.config import ModelConfig
from md3cli.records import Answer, Job, Request, Task


def answers_by_key(engine: Engine, jobs: list[Job]) -> dict[int, Answer]:
    return {answer.key: answer for answer in engine.run(jobs)}


def fail_now_and_then(engine: Engine, at_calls: Container[int]) -> None:
    """Let these calls of the engine's decode step run out of memory."""
    decode, calls = engine._decode, 0

    def failing() -> None:
        nonlocal calls
        calls += 1
        if calls in at_calls:
            raise torch.OutOfMemoryError("out of memory (made up)")
        decode()

    engine._decode = failing  # type: ignore[method-assign]


def certain_keys(case: GoldenCase) -> list[int]:
    return [key for key in range(len(case.requests)) if case.is_certain(key)]


def test_a_picture_is_encoded_once_and_its_prefix_shared() -> None:
    case = load_case("a")
    keys = [key for key in certain_keys(case) if case.image_indices[key] == 0]
    assert len(keys) > 4
    engine = case.engine(batch_size=2)
    for answer in engine.run(case.job(key) for key in keys):
        assert_answer(answer, case.expected[answer.key])
    assert engine.encoder.num_images == 1
    assert engine.stats.num_prefixes == 1
    assert engine.stats.num_prefixes_shared == len(keys) - 1


def test_an_untiled_picture_goes_through_the_encoder_once() -> None:
    case = load_case("a")
    index = next(i for i, facts in enumerate(case.image_facts) if facts["tiling"] == [1, 1])
    key = next(key for key in certain_keys(case) if case.image_indices[key] == index)
    engine = case.engine(batch_size=1)
    (answer,) = engine.run([case.job(key)])
    assert_answer(answer, case.expected[key])
    assert engine.encoder.num_crops == 1


@pytest.mark.process
def test_the_same_picture_later_in_a_run_is_not_encoded_again() -> None:
    case = load_case("c")
    first = [key for key in certain_keys(case) if case.image_indices[key] == 0]
    others = [key for key in certain_keys(case) if case.image_indices[key] not in (0, None)]
    engine = case.engine(batch_size=2)
    answers_by_key(engine, [case.job(key) for key in first[:1] + others])
    num_images = engine.encoder.num_images
    (answer,) = engine.run([case.job(first[1])])
    assert_answer(answer, case.expected[first[1]])
    assert engine.encoder.num_images == num_images


def test_an_encoded_image_answers_like_the_picture() -> None:
    case = load_case("b")
    key = next(key for key in certain_keys(case) if case.image_indices[key] == 0)
    image = case.images[0]
    engine = case.engine(batch_size=1)
    (embeddings,) = engine.encoder.encode([image])
    encoded = EncodedImage(embeddings.clone(), image.width, image.height, "given")
    (answer,) = case.engine(batch_size=1).run([Job(key, encoded, case.requests[key])])
    assert_answer(answer, case.expected[key])


@pytest.mark.parametrize("max_crops", [1, 2, 7, 64])
def test_micro_batches_of_any_size_give_the_same_embeddings(max_crops: int) -> None:
    case = load_case("a")
    plain, small = case.engine(1).encoder, case.engine(1).encoder
    small.max_crops = max_crops
    for one, other in zip(plain.encode(case.images), small.encode(case.images), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_features_are_let_go_picture_by_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all pictures of a large batch would not fit beside the slots, and smaller passes would not help."""
    case = load_case("a")
    engine = case.engine(batch_size=1)
    encoder = engine.encoder
    encoder.max_crops = 4
    encode_rows, gather, num_held, most = encoder.encode_rows, case.model.vision.gather, 0, 0

    def encoding(rows: torch.Tensor) -> torch.Tensor:
        nonlocal num_held, most
        num_held += len(rows)
        most = max(most, num_held)
        return encode_rows(rows)

    def gathering(features: torch.Tensor, tiling: Tiling) -> torch.Tensor:
        nonlocal num_held
        num_held -= len(features) * (features.shape[1] if tiling != (1, 1) else 1)
        return gather(features, tiling)

    encoder.encode_rows = encoding
    monkeypatch.setattr(case.model.vision, "gather", gathering)
    encoder.encode([replace(image, sha256=f"{image.sha256} {i}") for i in range(5) for image in case.images])
    assert num_held == 0
    assert most <= encoder.max_crops + max(len(image.crops) for image in case.images)


@pytest.mark.process
def test_rows_started_again_after_running_out_of_memory_answer_the_same() -> None:
    case = load_case("a")
    keys = certain_keys(case)
    engine = case.engine(batch_size=8)
    fail_now_and_then(engine, at_calls=(3, 9))
    answers = answers_by_key(engine, [case.job(key) for key in keys])
    assert engine.stats.batch_sizes == [8, 4, 2]
    assert sorted(answers) == keys
    for key, answer in answers.items():
        assert_answer(answer, case.expected[key])


def test_a_request_that_fits_nowhere_is_one_failure_and_the_others_go_on() -> None:
    case = load_case("a")
    engine = case.engine(batch_size=4)
    keys = certain_keys(case)[:6]
    culprit = case.images[2].sha256
    encode = engine.encoder.encode

    def fail_for_culprit(images: list) -> list:
        if any(image.sha256 == culprit for image in images):
            raise torch.OutOfMemoryError("out of memory (made up)")
        return encode(images)

    engine.encoder.encode = fail_for_culprit  # type: ignore[method-assign, assignment]
    bad = Job(1000, case.images[2], Request(Task.CAPTION))
    answers = answers_by_key(engine, [*(case.job(key) for key in keys[:3]), bad, *(case.job(k) for k in keys[3:])])
    failed = [key for key, answer in answers.items() if answer.failure is not None]
    assert failed == [1000]
    assert answers[1000].failure is not None
    assert answers[1000].failure.type == "model"
    assert engine.stats.batch_sizes == [4, 2, 1, 4]  # the others did not have to go on one by one


def test_a_process_makes_nothing_smaller_than_those_it_shares_the_network_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that began a pass again alone would add its sums to another layer's of the others."""
    case = load_case("a")
    engine = case.engine(batch_size=4)
    monkeypatch.setattr(case.model, "is_shared", True)
    fail_now_and_then(engine, at_calls=(2,))
    with pytest.raises(EngineError, match=r"the model failed on cpu: out of memory \(made up\)"):
        answers_by_key(engine, [case.job(key) for key in certain_keys(case)[:3]])

    def full(*_rest: object, **_more: object) -> KVCache:
        raise torch.OutOfMemoryError("out of memory (made up)")

    monkeypatch.setattr(engine_module, "KVCache", full)
    with pytest.raises(EngineError, match=r"cpu has no memory for 4 slots: out of memory"):
        case.engine(batch_size=4)


def test_a_generation_that_fills_the_context_ends_with_length() -> None:
    case = load_case("b")
    config = case.model.config
    endless = Request(Task.CAPTION, max_tokens=10_000)
    room = 5
    engine = case.engine(batch_size=2)
    prompt_len = len(case.prompts.build(endless, has_image=True).ids)
    engine.max_context = config.prefix_len + prompt_len + room
    jobs = [Job(i, image, endless) for i, image in enumerate(case.images)]
    for answer in engine.run(jobs):
        assert answer.failure is None
        if answer.finish_reason == "length":
            assert answer.output_tokens == room + 1  # the last one is chosen and has no room to be fed


def test_a_prompt_past_the_context_is_refused_alone() -> None:
    case = load_case("a")
    long = Request(Task.QUERY, "word " * 400, reasoning=False)
    keys = certain_keys(case)[:3]
    answers = answers_by_key(case.engine(2), [Job(99, case.images[0], long), *(case.job(key) for key in keys)])
    failure = answers[99].failure
    assert failure is not None
    assert failure.type == "bad_request"
    assert "--max-context" in failure.message
    for key in keys:
        assert_answer(answers[key], case.expected[key])


def test_requests_that_make_no_sense_fail_alone() -> None:
    case = load_case("a")
    bad = [
        Request(Task.DETECT, ""),
        Request(Task.QUERY, "   "),
        Request(Task.QUERY, "where?", spatial_refs=((0.5, 1.5),)),
        Request(Task.CAPTION, length="endless"),
    ]
    answers = answers_by_key(case.engine(2), [Job(i, case.images[0], request) for i, request in enumerate(bad)])
    assert all(answers[i].failure is not None and answers[i].failure.type == "bad_request" for i in range(len(bad)))


@pytest.mark.process
def test_sampled_answers_depend_on_the_seed_alone() -> None:
    case = load_case("a")
    base = Request(Task.CAPTION, temperature=1.5, max_tokens=20)
    jobs = [Job(i, case.images[i % 3], replace(base, seed=i // 3)) for i in range(12)]
    alone = {job.key: next(case.engine(1).run([job])).result for job in jobs}
    shuffled = jobs.copy()
    random.Random(0).shuffle(shuffled)
    greedy = [Job(100 + key, case.job(key).image, case.requests[key]) for key in certain_keys(case)[:5]]
    together = answers_by_key(case.engine(7), [*greedy, *shuffled])
    for job in jobs:
        assert together[job.key].result == alone[job.key]
    for job in greedy:
        assert_answer(together[job.key], case.expected[job.key - 100])
    assert len({str(alone[i]) for i in (0, 3, 6, 9)}) > 1  # other seeds, other words


def test_a_source_with_nothing_ready_does_not_hold_up_the_rest() -> None:
    case = load_case("a")
    keys = certain_keys(case)[:4]

    def hesitant():
        for key in keys:
            yield None
            yield case.job(key)
            yield None

    answers = {answer.key: answer for answer in case.engine(2).run(hesitant())}
    assert sorted(answers) == sorted(keys)


@pytest.mark.process
def test_scores_are_probabilities_and_only_objects_carry_them() -> None:
    case = load_case("b")
    for answer in case.engine(16).run(case.job(key) for key in range(len(case.requests))):
        assert answer.result is not None
        found = answer.result.get("objects") or answer.result.get("points") or answer.result.get("segments") or []
        for item in found:
            assert 0.001 <= item["score"] <= 0.999
            assert item["score"] == round(item["score"], 3)


@pytest.mark.process
def test_a_mixed_batch_in_several_groups_answers_as_each_alone() -> None:
    case = load_case("a")
    ask = Request(Task.QUERY, "Which?", reasoning=False)
    requests = [
        replace(ask, choices=("yes", "no", "a red square")),
        replace(ask, spatial_refs=((0.25, 0.5), (0.1, 0.2, 0.6, 0.8)), max_tokens=12),
        replace(ask, prompt="What is it, and where, and what is beside it?", max_tokens=12),
        replace(ask, temperature=1.0, seed=3, max_tokens=12),
        replace(ask, reasoning=True, max_tokens=8, choices=("left", "right")),
        Request(Task.POINT, "square", spatial_refs=((0.5, 0.5),), max_objects=3),
    ]
    jobs = [Job(i, case.images[i % 3], request) for i, request in enumerate(requests)]
    jobs += [Job(10 + i, None, request) for i, request in enumerate(requests) if not request.spatial_refs]
    together = case.engine(len(jobs))
    together.prefill_tokens = 40  # less than two of the longer prompts
    found = answers_by_key(together, jobs)
    assert together.stats.num_steps < sum(answer.output_tokens for answer in found.values())
    for job in jobs:
        (alone,) = case.engine(1).run([job])
        assert replace(found[job.key], result=None) == replace(alone, result=None)
        assert found[job.key].result is not None
        assert alone.result is not None
        for name, value in alone.result.items():
            assert found[job.key].result[name] == (pytest.approx(value, abs=2e-3) if name == "choices" else value)  # type: ignore[index]


def test_rows_that_ended_stand_right_behind_the_prefix() -> None:
    case = load_case("a")
    engine = case.engine(batch_size=5)
    chosen = Job(1000, None, Request(Task.QUERY, "Which?", reasoning=True, max_tokens=5, choices=("yes", "no")))
    answers_by_key(engine, [*(case.job(key) for key in certain_keys(case)[:12]), chosen])
    rows = engine._stepper.rows.pick(slice(0, 5))
    assert rows.mode.tolist() == [int(Mode.IDLE)] * 5
    assert set(rows.position.tolist()) <= {0, case.model.config.prefix_len}  # 0: never used
    assert case.model.config.prefix_len in rows.position.tolist()


NAN = "the model computed NaN or infinity in float32: are its weights damaged?"


@pytest.mark.process
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_picture_that_becomes_nan_fails_and_its_slot_serves_the_next(temperature: float) -> None:
    """As float16 does where a model's numbers are too large for it."""
    case = load_case("a")
    shape = (case.model.config.vision.num_patches, case.model.config.text.dim)
    bad = EncodedImage(torch.full(shape, torch.nan), 64, 48, "bad")
    requests = [
        Request(Task.DETECT, "cat", temperature=temperature),
        Request(Task.CAPTION, temperature=temperature),
        Request(Task.QUERY, "Which?", reasoning=False, choices=("yes", "no"), temperature=temperature),
    ]
    keys = [key for key in certain_keys(case) if case.image_indices[key] is None or case.requests[key].max_tokens > 3]
    engine = case.engine(batch_size=1)  # every request sits where one that became NaN sat
    failing = (Job(1000 + number, bad, request) for number, request in enumerate(requests * len(keys)))
    answers = answers_by_key(engine, [job for key in keys for job in (next(failing), case.job(key))])
    assert any(case.image_indices[key] is None for key in keys)
    for key in keys:
        assert_answer(answers[key], case.expected[key])
    failures = [answer.failure for key, answer in answers.items() if key >= 1000]
    assert {(failure.type, failure.message) for failure in failures if failure} == {("model", NAN)}
    assert all(failures)


def test_choices_without_a_number_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    case = load_case("a")
    log_softmax = choices_module._log_softmax
    monkeypatch.setattr(choices_module, "_log_softmax", lambda *both: log_softmax(*both) * torch.nan)
    request = Request(Task.QUERY, "Which?", reasoning=False, choices=("yes", "no"))
    (answer,) = case.engine(batch_size=1).run([Job(0, None, request)])
    assert answer.failure is not None
    assert answer.failure.message == NAN


PLANNED = Sizes(batch_size=8, prefill_tokens=4096, max_crops=9)
PREFIX_LEN = 730


def shrunk(device_type: str) -> list[tuple[int, int, int]]:
    sizes, found = PLANNED, []
    while (smaller := sizes.smaller(PLANNED, PREFIX_LEN, device_type)) is not None:
        sizes = smaller
        found.append(tuple(sizes))
    return found


def test_on_cuda_passes_shrink_before_the_batch() -> None:
    passes = [(2048, 4), (1024, 2), (730, 1)]
    assert shrunk("cuda") == [
        *((8, *size) for size in passes),
        *((batch, *size) for batch in (4, 2, 1) for size in [(4096, 9), *passes]),
    ]


def test_elsewhere_the_batch_shrinks_first() -> None:
    assert shrunk("cpu") == [(4, 4096, 9), (2, 4096, 9), (1, 4096, 9), (1, 4096, 4), (1, 4096, 2), (1, 4096, 1)]


@pytest.mark.process
def test_smaller_passes_answer_the_same_and_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of CUDA, on the CPU."""
    monkeypatch.setattr(Sizes, "smaller", lambda self, *rest, as_is=Sizes.smaller: as_is(self, *rest[:2], "cuda"))
    case = load_case("a")
    keys = certain_keys(case)
    engine = case.engine(batch_size=8)
    engine.prefill_tokens = 4 * case.model.config.prefix_len
    num_crops = engine.encoder.max_crops
    fail_now_and_then(engine, at_calls=(3, 9))
    answers = answers_by_key(engine, [case.job(key) for key in keys])
    assert sorted(answers) == keys
    for key, answer in answers.items():
        assert_answer(answer, case.expected[key])
    assert engine.stats.batch_sizes == [8]
    assert engine.stats.num_smaller_passes == 2
    assert engine.prefill_tokens == case.model.config.prefix_len
    assert engine.encoder.max_crops == num_crops // 4


@pytest.mark.process
@pytest.mark.parametrize("num_fitting", [2, 0])
def test_slots_that_do_not_fit_are_made_fewer_at_once(num_fitting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of CUDA: smaller passes leave slots as large, and each of those tries would start all rows again."""
    monkeypatch.setattr(Sizes, "smaller", lambda self, *rest, as_is=Sizes.smaller: as_is(self, *rest[:2], "cuda"))
    resize = KVCache._resize

    def resize_few(cache: KVCache, capacity: int) -> None:
        if cache.num_slots > num_fitting and capacity > 1000:
            raise torch.OutOfMemoryError("out of memory (made up)")
        resize(cache, capacity)

    monkeypatch.setattr(KVCache, "_resize", resize_few)
    case = load_case("a")
    keys = certain_keys(case)
    engine = case.engine(batch_size=8)
    engine.max_context = 4096
    planned = (engine.prefill_tokens, engine.encoder.max_crops)
    long = Job(1000, None, Request(Task.QUERY, "word " * 400, reasoning=False, max_tokens=2))
    answers = answers_by_key(engine, [*(case.job(key) for key in keys[:4]), long, *(case.job(k) for k in keys[4:])])
    assert (answers.pop(1000).failure is None) == (num_fitting > 0)
    for key, answer in answers.items():
        assert_answer(answer, case.expected[key])
    assert engine.stats.batch_sizes == ([8, 4, 2] if num_fitting else [8, 4, 2, 1, 8])
    assert engine.stats.num_smaller_passes == 0
    assert (engine.prefill_tokens, engine.encoder.max_crops) == planned


def test_what_ran_out_of_memory_is_let_go_before_less_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error's own frames hold the cache: while they live there is no room for another one."""
    case = load_case("a")
    engine = case.engine(batch_size=4)
    old, allocate, was_free = weakref.ref(engine.cache), engine._allocate, []

    def pass_that_fails(cache: KVCache, *arguments: object, **more: object) -> None:
        raise torch.OutOfMemoryError("out of memory (made up)")

    def watched(batch_size: int) -> None:
        was_free.append(old() is None)
        engine.passes = Passes(case.model)
        allocate(batch_size)

    engine.passes.decode = pass_that_fails  # type: ignore[method-assign, assignment]
    engine._allocate = watched  # type: ignore[method-assign]
    key = certain_keys(case)[0]
    (answer,) = engine.run([case.job(key)])
    assert_answer(answer, case.expected[key])
    assert was_free == [True]


@pytest.mark.process
@pytest.mark.parametrize("num_free", [5, 1, 0])
def test_slots_that_others_took_the_memory_of_are_done_without(num_free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process on the card may be quicker, when an engine is made and when it starts again."""
    case = load_case("a")
    engine = case.engine(batch_size=8)

    def cache(config: ModelConfig, num_slots: int, *rest: object, **more: object) -> KVCache:
        if num_slots > num_free:
            raise torch.OutOfMemoryError("out of memory (made up)")
        return KVCache(config, num_slots, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_module, "KVCache", cache)
    fail_now_and_then(engine, at_calls=(2,))
    if num_free == 0:
        with pytest.raises(EngineError, match=r"cpu has no memory for 1 slots: out of memory"):
            case.engine(batch_size=8)
        return
    assert case.engine(batch_size=8).batch_size == (4 if num_free == 5 else 1)
    keys = certain_keys(case)[:10]
    for key, answer in answers_by_key(engine, [case.job(key) for key in keys]).items():
        assert_answer(answer, case.expected[key])
    assert engine.batch_size == (4 if num_free == 5 else 1)


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("is_planned", [False, True])
def test_what_is_cancelled_is_not_answered_and_its_slot_serves_the_next(delay: int, is_planned: bool) -> None:
    """In flight and waiting; launches under way when a row is cancelled are absorbed without it."""
    case = load_case("a")
    keys = certain_keys(case)
    engine = case.engine(3, delay=delay, is_planned=is_planned)
    endless = Request(Task.CAPTION, max_tokens=1000)
    for key in (1000, 1001, 1002, 1003):
        engine.add(Job(key, case.images[0], endless))
    for _ in range(4):
        assert engine.step() == []
    assert all(engine.cancel(key) for key in (1001, 1003, 1000))  # two in flight, and one that waits
    assert not engine.cancel(1001)
    answers = answers_by_key(engine, [case.job(key) for key in keys])
    assert sorted(answers) == [*keys, 1002]
    for key in keys:
        assert_answer(answers[key], case.expected[key])
