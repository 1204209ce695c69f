"""A compiled step is its eager twin: traced over parts, loaded from bytes, and used for the sizes it is meant for."""

from __future__ import annotations

import copy
import json
import random
import threading

import pytest
import torch
from golden_cases import GoldenCase, assert_answer, load_case
from torch import Tensor

from md3cli.model.engine import compiled, kernels
from md3cli.model.engine.compiled import CompiledSteps, FlatStep, Part, Parts, calling, facts, flat_inputs, in_parts
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.passes import decode_step
from md3cli.model.engine.ready import Example, Search
from md3cli.model.network.moondream import Moondream3
from md3cli.records import Job


@pytest.fixture(params=["plain", "packed"])
def model(request: pytest.FixtureRequest) -> Moondream3:
    model = copy.deepcopy(load_case("a").model)
    if request.param == "packed":
        kernels.optimise(model)
    return model


def run_eager(model: Moondream3, count: int) -> list[Tensor]:
    example = Example.of(model, count)
    events = example.run(lambda *given, **how: decode_step(model, *given, **how), model.config.text.max_context)
    return [events, *example.rows, example.next_ND, *example.cache.keys, *example.cache.values]


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 7])
def test_a_network_in_parts_computes_the_same_and_is_put_together_again(model: Moondream3, count: int) -> None:
    expected = run_eager(model, count)
    modules, names = list(model.modules()), [name for name, _ in model.named_parameters()]
    products = [block.attn.tau.products for block in model.text.blocks]
    with in_parts(model) as parts, calling(parts):
        assert len(list(model.text.modules())) < len(modules)
        found = run_eager(model, count)
        assert all(parts.widths)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert [name for name, _ in model.named_parameters()] == names
    assert [block.attn.tau.products for block in model.text.blocks] == products


def test_networks_in_two_threads_call_their_own_parts() -> None:
    compiled._define_operator()
    ours, others = Parts(), Parts()
    part, _ = Part(ours, lambda x: x + 1), Part(others, lambda x: x + 2)
    ours.widths[:] = others.widths[:] = [3]
    is_inside, may_leave = threading.Event(), threading.Event()

    def run() -> None:
        with calling(others):
            is_inside.set()
            may_leave.wait()

    thread = threading.Thread(target=run)
    try:
        with calling(ours):
            thread.start()
            is_inside.wait()
            assert part(torch.zeros(1, 3)).tolist() == [[1.0, 1.0, 1.0]]
    finally:
        may_leave.set()
        thread.join()


@torch.inference_mode()
def test_a_network_is_put_together_after_an_error(model: Moondream3) -> None:
    modules = list(model.modules())
    with pytest.raises(ZeroDivisionError), in_parts(model):
        raise ZeroDivisionError
    assert list(map(id, model.modules())) == list(map(id, modules))


@torch.inference_mode()
def test_a_flat_step_is_a_decode_step(model: Moondream3) -> None:
    context = model.config.text.max_context
    example = Example.of(model, 3)
    events = FlatStep(model, context)(*flat_inputs(example.cache, example.rows, example.next_ND))
    found = [events, *example.rows, example.next_ND, *example.cache.keys, *example.cache.values]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, run_eager(model, 3), strict=True))


@torch.inference_mode()
def test_facts_are_equal_for_equal_code_and_can_be_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_case("a").model

    def of(model: Moondream3, context: int = 256) -> str:
        with in_parts(model) as parts:
            return json.dumps(facts(model, parts, context), sort_keys=True)

    other_values = copy.deepcopy(model)
    other_values.text.wte.data.zero_()
    assert of(model) == of(other_values)
    packed = copy.deepcopy(model)
    kernels.optimise(packed)
    found = {of(model), of(model, 128), of(load_case("b").model), of(copy.deepcopy(model).double()), of(packed)}
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    found.add(of(model))
    monkeypatch.setattr(compiled, "_source_digest", lambda: "other")
    found.add(of(model))
    monkeypatch.setattr(compiled, "_machine", lambda: ["another processor"])
    found.add(of(model))
    assert len(found) == 8


def test_a_form_is_taken_for_its_sizes_and_greedy_rows() -> None:
    model, calls = load_case("a").model, []
    steps = CompiledSteps(lambda *_, **__: calls.append("eager"), 256)  # type: ignore[arg-type, return-value]
    for form, sizes in (("one", (1, 1)), ("several", (2, 4))):
        steps.forms[sizes] = lambda *_, form=form, **__: calls.append(form)  # type: ignore[misc]
    example = Example.of(model, 5)
    for count in range(1, 6):
        steps(example.cache, example.rows, example.next_ND[:count], 256, is_sampled=False)
    assert calls == ["one", "several", "several", "several", "eager"]
    calls.clear()
    steps(example.cache, example.rows, example.next_ND[:1], 256, is_sampled=True)
    steps(example.cache, example.rows, example.next_ND[:1], 255, is_sampled=False)
    example.cache.capacity = 4096
    steps(example.cache, example.rows, example.next_ND[:1], 256, is_sampled=False)
    assert calls == ["eager"] * 3


# -- with a compiler -------------------------------------------------------------------------------


def mixed_jobs(case: GoldenCase, count: int, seed: int) -> list[Job]:
    keys = [key for key in range(len(case.requests)) if case.is_certain(key)]
    return [case.job(key) for key in random.Random(seed).choices(keys, k=count)]


@pytest.fixture(scope="module")
def compiled_engine() -> tuple[GoldenCase, Engine]:
    """An engine of three slots over packed weights, whose steps are compiled whether it pays or not."""
    case = load_case("c")
    model = copy.deepcopy(case.model)
    kernels.optimise(model)
    engine = case.engine(3, model)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr("md3cli.model.engine.ready.LEAST_GAIN", -1e9)
        engine.passes.decode = Search(model, 3, engine.max_context, None).steps(engine.passes.decode)
    return case, engine


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_steps_answer_like_eager_ones_and_nothing_is_compiled_later(
    compiled_engine: tuple[GoldenCase, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, engine = compiled_engine
    assert isinstance(engine.passes.decode, CompiledSteps)
    assert list(engine.passes.decode.forms) == [(1, 1), (2, 3)]
    monkeypatch.setattr(engine.passes.decode, "eager", pytest.fail)  # no greedy step is eager
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", pytest.fail)
    for jobs in (mixed_jobs(case, 60, seed=2), *([job] for job in mixed_jobs(case, 10, seed=3))):
        waiting = [job.key for job in jobs]
        for answer in engine.run(jobs):
            assert_answer(answer, case.expected[answer.key])
            waiting.remove(answer.key)
        assert not waiting


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_form_for_several_rows_takes_any_number_and_any_capacity(
    compiled_engine: tuple[GoldenCase, Engine],
) -> None:
    case, engine = compiled_engine
    steps = engine.passes.decode
    assert isinstance(steps, CompiledSteps)
    with torch.inference_mode():
        for count in (2, 5, 33):
            for room in (16, 160):
                found, expected = (Example.of(engine.model, count) for _ in range(2))
                for example in (found, expected):
                    example.cache.fit(case.model.config.prefix_len + room)
                events = found.run(steps.forms[2, 3], engine.max_context)
                plain = expected.run(steps.eager, engine.max_context)
                assert torch.equal(events[:, :6], plain[:, :6])
                near = [(events, plain), (found.next_ND, expected.next_ND)]
                near += zip(found.cache.values, expected.cache.values, strict=True)
                assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in near)
                assert all(torch.equal(*pair) for pair in zip(found.rows, expected.rows, strict=True))
