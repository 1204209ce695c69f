"""Compiled passes: a fixed number of graphs, no recompilation in mixed batches, the same answers."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from golden_cases import GoldenCase, assert_answer, load_case
from torch._dynamo.testing import CompileCounter

from md3cli.model.engine import kernels
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.load import compile_engine, missing_compiler
from md3cli.records import Job

CPU = torch.device("cpu")


def compilable_engine(case: GoldenCase, batch_size: int) -> Engine:
    model = copy.deepcopy(case.model)
    kernels.optimise(model, for_compiling=True)
    return case.engine(batch_size, model)


def mixed_jobs(case: GoldenCase, count: int, seed: int) -> list[Job]:
    keys = [key for key in range(len(case.requests)) if case.is_certain(key)]
    return [case.job(key) for key in random.Random(seed).choices(keys, k=count)]


def run_and_check(case: GoldenCase, engine: Engine, jobs: list[Job]) -> None:
    waiting = [job.key for job in jobs]
    for answer in engine.run(jobs):
        assert_answer(answer, case.expected[answer.key])
        waiting.remove(answer.key)
    assert not waiting


@pytest.mark.process
def test_no_recompilation_over_mixed_batches() -> None:
    torch._dynamo.reset()
    case = load_case("a")
    engine = compilable_engine(case, batch_size=4)
    counter = CompileCounter()
    engine.compile(backend=counter)  # type: ignore[arg-type]
    run_and_check(case, engine, mixed_jobs(case, 40, seed=0))
    num_graphs = counter.frame_count
    assert 4 <= num_graphs <= 12  # vision, prefix, prompts by width, decode; each in one piece
    num_steps = engine.stats.num_steps
    run_and_check(case, engine, mixed_jobs(case, 120, seed=1))
    assert engine.stats.num_steps - num_steps > 100
    assert counter.frame_count == num_graphs


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_generated_code_answers_like_eager() -> None:
    torch._dynamo.reset()
    case = load_case("c")
    engine = compilable_engine(case, batch_size=3)
    engine.compile()
    run_and_check(case, engine, mixed_jobs(case, 60, seed=2))


def test_without_a_compiler_it_warns_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    assert missing_compiler(CPU) is not None
    case = load_case("a")
    engine = case.engine(2)
    with pytest.warns(UserWarning, match="nothing is compiled"):
        compile_engine(engine, None)
    assert not engine.passes.is_compiled
    run_and_check(case, engine, mixed_jobs(case, 3, seed=3))
