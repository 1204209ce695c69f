"""Results that are read behind the launches: the same answers, whatever happens meanwhile."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from golden_cases import GoldenCase, assert_answer, load_case
from late_device import LateDevice

from md3cli.model.engine import engine as engine_module
from md3cli.model.engine.engine import Engine, Sizes
from md3cli.model.engine.flight import InFlight, Launch, Seat
from md3cli.model.engine.generation import EncodedImage, Generation
from md3cli.model.engine.kv_cache import SlotTable
from md3cli.model.engine.passes import ShapePlan
from md3cli.model.engine.state import Event
from md3cli.model.engine.stepper import Stepper
from md3cli.records import Answer, Job, Request, Task

pytestmark = pytest.mark.process

DELAYS = (0, 1, 2)
every_loop = pytest.mark.parametrize(
    ("delay", "is_planned"),
    [
        pytest.param(delay, planned, id=f"{delay}{' planned' * planned}")
        for planned in (False, True)
        for delay in DELAYS
    ],
)
NAN = "the model computed NaN or infinity in float32: are its weights damaged?"


# -- what is asked ---------------------------------------------------------------------------------

WHICH = Request(Task.QUERY, "Which?", reasoning=False)
MIXED = (
    replace(WHICH, choices=("yes", "no", "a red square")),
    replace(WHICH, reasoning=True, max_tokens=8, choices=("left", "right")),
    replace(WHICH, reasoning=True, max_tokens=3, choices=("up", "down, or beside it")),
    replace(WHICH, reasoning=True, max_tokens=6),
    replace(WHICH, spatial_refs=((0.25, 0.5), (0.1, 0.2, 0.6, 0.8)), max_tokens=12),
    replace(WHICH, prompt="What is it, and where, and what is beside it?", max_tokens=12),
    replace(WHICH, temperature=1.0, seed=3, max_tokens=12),
    replace(WHICH, temperature=1.5, seed=2**70 + 1, reasoning=True, max_tokens=5),
    Request(Task.CAPTION, length="short", max_tokens=7),
    Request(Task.CAPTION, max_tokens=1),
    Request(Task.POINT, "square", spatial_refs=((0.5, 0.5),), max_objects=3),
    Request(Task.DETECT, "cat", max_objects=2),
    Request(Task.SEGMENT, "cat", max_tokens=24),
)


@cache
def mixed_jobs(name: str) -> list[Job]:
    """A job of every kind, most of them with a picture, one behind another that it shares its slot with."""
    case = load_case(name)
    jobs = [Job(i, case.images[i % 3], request) for i, request in enumerate(MIXED)]
    texts = [request for request in MIXED if request.task is Task.QUERY and not request.spatial_refs]
    jobs += [Job(100 + i, None, request) for i, request in enumerate(texts)]
    random.Random(1).shuffle(jobs)
    return jobs


@cache
def alone(name: str, key: int) -> Answer:
    """What a job of `mixed_jobs` is answered with when nothing else is in flight and nothing is read late."""
    (job,) = (job for job in mixed_jobs(name) if job.key == key)
    (answer,) = load_case(name).engine(1, delay=0, is_planned=False).run([job])
    assert answer.failure is None
    return answer


def assert_as_alone(name: str, found: list[Answer]) -> None:
    """Each job is answered once, and as it is alone."""
    assert sorted(answer.key for answer in found) == sorted(job.key for job in mixed_jobs(name))
    for answer in found:
        assert_same(answer, alone(name, answer.key))


def assert_same(found: Answer, expected: Answer) -> None:
    assert replace(found, result=None) == replace(expected, result=None)
    assert is_same(found.result, expected.result), (found.result, expected.result)


def is_same(found: Any, expected: Any) -> bool:
    """Equal but for probabilities, which other sums may round otherwise."""
    if isinstance(found, dict) and found.keys() == expected.keys():
        return all(
            found[name] == pytest.approx(expected[name], abs=2e-3)
            if name in ("score", "choices")
            else is_same(found[name], expected[name])
            for name in found
        )
    if isinstance(found, list) and len(found) == len(expected):
        return all(map(is_same, found, expected))
    return bool(found == expected)


def certain_keys(case: GoldenCase) -> list[int]:
    return [key for key in range(len(case.requests)) if case.is_certain(key)]


# -- company ---------------------------------------------------------------------------------------


@every_loop
@pytest.mark.parametrize("batch_size", [2, 5, 32])
def test_a_mixed_batch_answers_as_each_alone(
    batch_size: int, delay: int, is_planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that is late: at any delay only what was waited for has arrived."""
    device = LateDevice().install(monkeypatch)
    engine = load_case("a").engine(batch_size, delay=delay, is_planned=is_planned)
    assert_as_alone("a", list(engine.run(mixed_jobs("a"))))
    assert device.most_under_way == 1 + delay
    assert not engine._in_flight
    assert not engine.has_work


Held = dict[int, torch.Tensor]  # key -> keys and values [layers * 2, heads, positions, width]


def held_when_choosing(engine: Engine, jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> tuple[Held, list[Answer]]:
    """What the slot of each job holds before the place of its answer, at the moment when it chooses."""
    choose, held = engine._choose, Held()

    def watching(choosing: list[Seat]) -> None:
        for seat in choosing:
            end = seat.end if seat.generation.reasons else seat.end - 1
            held[seat.generation.job.key] = torch.stack(
                [tensor[seat.slot, :, :end] for tensor in (*engine.cache.keys, *engine.cache.values)]
            )
        choose(choosing)

    monkeypatch.setattr(engine, "_choose", watching)
    return held, list(engine.run(jobs))


@every_loop
def test_a_row_that_waits_for_its_choice_is_left_alone(
    delay: int, is_planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is idle on the device and stepped over while its neighbours go on, once for each launch under way."""
    case, jobs = load_case("a"), mixed_jobs("a")
    choosing = {job.key for job in jobs if job.request.choices}
    engine = case.engine(32, delay=delay, is_planned=is_planned)
    held, answers = held_when_choosing(engine, jobs, monkeypatch)
    assert held.keys() == choosing
    assert_as_alone("a", answers)
    for job in jobs:
        if job.key in choosing:
            expected, _ = held_when_choosing(case.engine(1, delay=0), [job], monkeypatch)
            assert held[job.key].shape == expected[job.key].shape
            assert torch.allclose(held[job.key], expected[job.key], atol=1e-3)


# -- the end of the context, and slots that are too short ------------------------------------------


def leaving_room(case: GoldenCase, request: Request, room: int, max_context: int) -> Request:
    """The request with a prompt so long that behind it `room` positions of the context are left, or one or two more."""
    while True:
        longer = replace(request, prompt=f"{request.prompt} a")
        prompt = case.prompts.build(longer, has_image=True)
        if case.model.config.prefix_len + len(prompt.ids) > max_context - room:
            return request
        request = longer


def long_jobs(case: GoldenCase, max_context: int) -> list[Job]:
    """Jobs that fill the context; some have no room to choose when they have thought."""
    endless = [Request(Task.CAPTION, max_tokens=10_000)] * 3
    endless += [
        leaving_room(case, replace(WHICH, max_tokens=10_000), room, max_context) for room in (1, 1, 2, 3, 4, 5, 6, 20)
    ]
    thinks = replace(WHICH, reasoning=True, choices=("yes", "no, or a red square"))
    longest = max(map(len, case.prompts.encode_choices(thinks)))
    for room in range(longest, longest + 12):
        # Whoever has thought for n tokens writes that it answers at n, and its choice behind that.
        endless.append(replace(leaving_room(case, thinks, room, max_context), max_tokens=2 + room % 4 * 3))
    return [Job(key, case.images[key % 3], request) for key, request in enumerate(endless)]


@every_loop
def test_rows_fill_the_context_while_others_come_and_go(delay: int, is_planned: bool) -> None:
    case = load_case("a")
    max_context = 96  # a multiple of what slots grow by: behind it there is nothing
    jobs = long_jobs(case, max_context)
    expected = {}
    for job in jobs:
        (expected[job.key],) = case.engine(1, max_context=max_context, delay=0).run([job])
    assert all(answer.failure is None for answer in expected.values())
    have_chosen = ["choices" in (expected[job.key].result or {}) for job in jobs if job.request.choices]
    assert set(have_chosen) == {False, True}
    assert [answer.finish_reason for answer in expected.values()].count("length") > have_chosen.count(False) + 2
    for batch_size in (3, 8):
        engine = case.engine(batch_size, max_context=max_context, delay=delay, is_planned=is_planned)
        answers = list(engine.run(jobs))
        assert sorted(answer.key for answer in answers) == sorted(expected)
        for answer in answers:
            assert_same(answer, expected[answer.key])
        assert engine.stats.batch_sizes == [batch_size]


@every_loop
def test_a_row_past_the_context_does_not_make_slots_longer(
    delay: int, is_planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host counts steps that were launched before it heard that a row is over; others are admitted meanwhile."""
    monkeypatch.setattr(Engine, "_start_again", lambda engine: pytest.fail("rows were started again"))
    case, max_context = load_case("a"), 96
    room = 4
    full = Job(0, case.images[0], leaving_room(case, replace(WHICH, max_tokens=10_000), room, max_context))
    for num_tokens in range(1, 2 + room):
        short = [Job(i, case.images[0], Request(Task.CAPTION, max_tokens=num_tokens)) for i in (1, 2)]
        engine = case.engine(2, max_context=max_context, delay=delay, is_planned=is_planned)
        answers = {answer.key: answer for answer in engine.run([full, *short])}
        assert [answers[key].finish_reason for key in range(3)] == ["length"] * 3
        assert [answers[key].output_tokens for key in range(3)] == [room + 1, num_tokens, num_tokens]
        assert engine.cache.capacity <= max_context + 16


@every_loop
def test_slots_of_a_fixed_size_are_made_as_long_as_the_context(
    delay: int, is_planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And as many as the same memory holds; rows that grow to fit do without."""
    case = load_case("b")
    monkeypatch.setattr(engine_module, "SLOT_POSITIONS", 96)
    keys = certain_keys(case)
    long = Job(1000, None, Request(Task.QUERY, "word " * 60, reasoning=False, max_tokens=2))
    jobs = [case.job(key) for key in keys]
    jobs.insert(len(jobs) // 2, long)
    engine = case.engine(8, delay=delay, is_planned=is_planned)
    answers = list(engine.run(jobs))
    assert sorted(answer.key for answer in answers) == sorted([*keys, 1000])
    for answer in answers:
        if answer.key == 1000:
            assert answer.failure is None
        else:
            assert_answer(answer, case.expected[answer.key])
    assert engine.stats.batch_sizes == ([8, 3] if is_planned else [8])
    assert engine.cache.capacity == (256 if is_planned else engine.cache.capacity)


# -- rows that break, and memory that runs out -----------------------------------------------------


def broken_picture(case: GoldenCase, name: str) -> EncodedImage:
    """A picture whose numbers are not finite, as float16 makes them of a model whose own are too large for it."""
    shape = (case.model.config.vision.num_patches, case.model.config.text.dim)
    return EncodedImage(torch.full(shape, torch.nan), 64, 48, name)


@every_loop
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_row_that_breaks_ends_by_itself_and_its_slot_serves_the_next(
    batch_size: int, delay: int, is_planned: bool
) -> None:
    """It is stepped over until the host hears of it, and every other request sits where one broke."""
    case, jobs = load_case("a"), mixed_jobs("a")
    bad = [Job(1000 + job.key, broken_picture(case, f"bad {job.key % 2}"), job.request) for job in jobs]
    engine = case.engine(batch_size, delay=delay, is_planned=is_planned)
    answers = list(engine.run(job for pair in zip(bad, jobs, strict=True) for job in pair))
    failed = [answer for answer in answers if answer.key >= 1000]
    assert sorted(answer.key for answer in failed) == sorted(job.key for job in bad)
    assert {(answer.failure.type, answer.failure.message) for answer in failed if answer.failure} == {("model", NAN)}
    assert all(answer.failure for answer in failed)
    assert_as_alone("a", [answer for answer in answers if answer.key < 1000])


def fail_once(owner: object, name: str, at_call: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let one call of a function run out of memory; returns what grows by one when it has."""
    call, failed = getattr(owner, name), list[int]()
    num_calls = 0

    def failing(*arguments: Any, **more: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == at_call:
            failed.append(num_calls)
            raise torch.OutOfMemoryError("out of memory (made up)")
        return call(*arguments, **more)

    monkeypatch.setattr(owner, name, failing)
    return failed


PLACES = {  # whose, and the name of what runs out of memory, where in a run of `mixed_jobs`
    "first step": ("stepper", "_run", 1),
    "step": ("stepper", "_run", 4),
    "prefix": ("passes", "prefill_prefixes", 2),
    "first prompts": ("engine", "_prefill_group", 1),
    "prompts": ("engine", "_prefill_group", 6),
    "encoding": ("engine", "_admit", 3),
    "choices": ("choices", "choice_probabilities", 1),
    "later choices": ("choices", "choice_probabilities", 2),
    "reading": ("flight", "read", 5),
}


@every_loop
@pytest.mark.parametrize("place", PLACES)
def test_memory_that_runs_out_loses_no_row_and_answers_none_twice(
    place: str, delay: int, is_planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is under way then is forgotten, and its rows start again."""
    LateDevice().install(monkeypatch)
    whose, name, at_call = PLACES[place]
    engine = load_case("a").engine(6, delay=delay, is_planned=is_planned)
    owners = {"stepper": Stepper, "passes": engine.passes, "engine": engine, "choices": engine_module, "flight": Launch}
    if is_planned and place == "prefix":
        monkeypatch.setattr(engine.passes, "plan", ShapePlan(4, 64))
    failed = fail_once(owners[whose], name, at_call, monkeypatch)
    answers = list(engine.run(mixed_jobs("a")))
    assert failed
    assert_as_alone("a", answers)
    assert engine.stats.batch_sizes == [6, 3]
    assert not engine.has_work


@pytest.mark.parametrize("delay", DELAYS)
def test_smaller_passes_start_rows_again_as_a_smaller_batch_does(delay: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of CUDA, with launches under way each time."""
    monkeypatch.setattr(Sizes, "smaller", lambda self, *rest, as_is=Sizes.smaller: as_is(self, *rest[:2], "cuda"))
    LateDevice().install(monkeypatch)
    engine = load_case("a").engine(6, delay=delay, is_planned=True, prefill_tokens=104)
    run, num_calls, fails_at = Stepper._run, 0, range(3, 30, 4)

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls in fails_at:
            raise torch.OutOfMemoryError("out of memory (made up)")
        return run(*arguments)

    monkeypatch.setattr(Stepper, "_run", failing)
    assert_as_alone("a", list(engine.run(mixed_jobs("a"))))
    assert num_calls > fails_at[-1]
    assert engine.stats.num_smaller_passes == len(fails_at)
    assert engine.stats.batch_sizes == [6]


INTERRUPTED = {  # whose call does its work and is then ended by Ctrl-C
    "admission": ("engine", "_prefill_group"),
    "step": ("stepper", "_run"),
    "reading": ("launch", "read"),
    "absorbing": ("engine", "_absorb"),
}


@pytest.mark.parametrize("place", INTERRUPTED)
@pytest.mark.parametrize("delay", DELAYS)
def test_an_engine_interrupted_in_a_step_goes_on(place: str, delay: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook, and the next question: decisions that were lost are taken again."""
    LateDevice().install(monkeypatch)
    whose, name = INTERRUPTED[place]
    engine = load_case("a").engine(5, delay=delay, is_planned=delay == 1)
    owner = {"engine": engine, "stepper": Stepper, "launch": Launch}[whose]
    call, num_calls, interrupted_at = getattr(owner, name), 0, (1, 4, 6)

    def interrupted(*arguments: Any) -> Any:
        nonlocal num_calls
        result = call(*arguments)
        num_calls += 1
        if num_calls in interrupted_at:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)
    for job in mixed_jobs("a"):
        engine.add(job)
    answers: list[Answer] = []

    def go_on() -> None:
        while engine.has_work:
            answers.extend(engine.step())

    for _ in interrupted_at:
        with pytest.raises(KeyboardInterrupt):
            go_on()
    go_on()
    assert_as_alone("a", answers)
    assert engine.stats.batch_sizes == [5]


# -- generations that nobody wants any more --------------------------------------------------------


@every_loop
@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_row_cancelled_in_flight_leaves_its_slot_to_the_next(
    batch_size: int, delay: int, is_planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was launched for it says nothing to whoever sits there by then."""
    LateDevice().install(monkeypatch)
    case, jobs, rng = load_case("a"), mixed_jobs("a"), random.Random(delay)
    unwanted = Request(Task.QUERY, "Why?", reasoning=True, max_tokens=40)
    doomed = [Job(1000 + i, case.images[i % 3] if i % 4 else None, unwanted) for i in range(len(jobs))]
    engine = case.engine(batch_size, delay=delay, is_planned=is_planned)
    for pair in zip(doomed, jobs, strict=True):
        for job in pair:
            engine.add(job)
    answers, to_cancel, num_seated = [], {job.key for job in doomed}, 0
    while engine.has_work:
        answers += engine.step()
        for seated in [generation for generation in engine._slots.generations if generation is not None]:
            if seated.job.key in to_cancel and rng.random() < 0.5:
                assert engine.cancel(seated.job.key)
                assert not engine.cancel(seated.job.key)
                to_cancel.remove(seated.job.key)
                num_seated += 1
    assert num_seated > 5
    assert {answer.key for answer in answers if answer.key >= 1000} == to_cancel
    assert_as_alone("a", [answer for answer in answers if answer.key < 1000])


# -- no more steps than rows can take --------------------------------------------------------------


@every_loop
def test_captions_of_full_length_take_as_many_steps_as_tokens(delay: int, is_planned: bool) -> None:
    """Each row's first token is decided with its prompt; nothing is launched for rows that are over for certain."""
    case = load_case("a")
    for num_tokens in range(1, 5):
        request = Request(Task.CAPTION, max_tokens=num_tokens)
        engine = case.engine(2, delay=delay, is_planned=is_planned)
        (first, second) = engine.run([Job(i, case.images[0], request) for i in range(2)])
        assert first.output_tokens == second.output_tokens == num_tokens
        assert engine.stats.num_steps == num_tokens - 1
        assert engine.stats.num_decisions == 2 * num_tokens


@every_loop
def test_a_choice_alone_takes_no_step(delay: int, is_planned: bool) -> None:
    case = load_case("a")
    engine = case.engine(2, delay=delay, is_planned=is_planned)
    request = replace(WHICH, choices=("yes", "no"))
    answers = list(engine.run([Job(i, case.images[i % 3], request) for i in range(6)]))
    assert len(answers) == 6
    assert engine.stats.num_steps == 0


def test_what_may_go_on_is_bounded_by_what_was_launched() -> None:
    case = load_case("a")
    table = SlotTable(2)
    caption = Job(0, case.images[0], Request(Task.CAPTION, max_tokens=3))
    generation = Generation.of(caption, case.prompts, case.model.config, 256)
    assert not table.may_go_on(0)
    table.sit(0, generation)
    for _ in range(2):
        assert table.may_go_on(0)
        table.launch(0)
    assert not table.may_go_on(0)
    assert table.end[0] == generation.prompt_end + 2


# -- the queue itself ------------------------------------------------------------------------------


def seats_of(case: GoldenCase, num_rows: int) -> list[Seat]:
    jobs = [Job(i, None, WHICH) for i in range(num_rows)]
    made = [Generation.of(job, case.prompts, case.model.config, 256) for job in jobs]
    return [Seat(row, row, generation, generation.prompt_end) for row, generation in enumerate(made)]


def events(value: float, num_rows: int = 2) -> torch.Tensor:
    return torch.full((num_rows, len(Event._fields)), value)


def test_launches_arrive_in_order_and_each_is_handed_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = LateDevice().install(monkeypatch)
    queue, seats, buffer = InFlight(torch.device("cpu")), seats_of(load_case("a"), 2), events(0.0)
    for number in range(3):
        buffer.fill_(number)
        queue.add(buffer, seats[: 1 + number % 2], is_step=number > 0)
    buffer.fill_(9.0)
    assert len(queue) == 3
    found = [(launch.is_step, [event.token for _, event in launch.read()]) for launch in queue.arrivals(1)]
    assert found == [(False, [0.0]), (True, [1.0, 1.0])]
    assert device.num_waits == 2
    (last,) = queue.arrivals(0)
    assert [(seat.slot, event.token) for seat, event in last.read()] == [(0, 2.0)]
    assert not queue


def test_launches_that_are_dropped_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    LateDevice().install(monkeypatch)
    queue, seats = InFlight(torch.device("cpu")), seats_of(load_case("a"), 1)
    queue.add(events(1.0), seats, is_step=True)
    queue.drop()
    assert list(queue.arrivals(0)) == []


def test_what_a_late_device_has_not_sent_reads_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the tests above: reading without waiting would be seen."""
    LateDevice().install(monkeypatch)
    queue, seats = InFlight(torch.device("cpu")), seats_of(load_case("a"), 1)
    queue.add(events(1.0), seats, is_step=True)
    (launch,) = queue.arrivals(0)
    assert launch.events.isnan().all()
    launch.read()
    assert (launch.events == 1.0).all()
