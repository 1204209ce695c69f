"""The decode step as a graph: captured at the start, replayed ever after, its state at fixed places.

There is no CUDA here: `Recorded` stands in the place of a graph, keeps what it was made of, and calls that at a replay,
into one buffer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_cases import assert_answer, load_case
from late_device import LateDevice
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from md3cli.errors import EngineError
from md3cli.model.engine import engine as engine_module
from md3cli.model.engine import stepper as stepper_module
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.state import Mode
from md3cli.model.network.layers import MoeMlp
from md3cli.records import Job, Request, Task

DELAYS = (0, 1, 2)


class Recorded:
    """A function as a graph would be: run when it is made, and at each replay into the same tensor."""

    made: list[Recorded] = []  # noqa: RUF012  # of the test that runs

    def __init__(self, run: Callable[[], Tensor], device: torch.device) -> None:
        self._run, self.num_replays = run, 0
        self._result = run().clone()
        self.made.append(self)

    def replay(self) -> Tensor:
        self.num_replays += 1
        return self._result.copy_(self._run())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Graphs are `Recorded`, on a late device, for they overwrite their events; these are all that were made."""
    LateDevice().install(monkeypatch)
    monkeypatch.setattr(stepper_module, "FixedGraph", Recorded)
    monkeypatch.setattr(Recorded, "made", [])
    return Recorded.made


def captured(batch_size: int, delay: int) -> Engine:
    engine = load_case("a").engine(batch_size, delay=delay, is_planned=True)
    engine.capture()
    return engine


def run_all(engine: Engine) -> None:
    """The certain requests of case a, greedy, and as many sampled ones beside them."""
    case = load_case("a")
    keys = [key for key in range(len(case.requests)) if case.is_certain(key)]
    sampled = Request(Task.CAPTION, temperature=1.0, max_tokens=4)
    jobs = [job for key in keys for job in (case.job(key), Job(1000 + key, case.images[key % 3], sampled))]
    answers = list(engine.run(jobs))
    assert len(answers) == len(jobs)
    for answer in answers:
        if answer.key < 1000:
            assert_answer(answer, case.expected[answer.key])


@pytest.mark.process
@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize(("batch_size", "num_graphs"), [(5, 3), (16, 2)])
def test_graphs_are_captured_at_the_start_and_none_afterwards(
    batch_size: int, num_graphs: int, delay: int, graphs: list[Recorded]
) -> None:
    engine = captured(batch_size, delay)
    assert engine.stats.num_captures == len(graphs) == num_graphs
    run_all(engine)
    assert engine.stats.num_captures == len(graphs) == num_graphs
    assert sum(graph.num_replays for graph in graphs[:2]) == engine.stats.num_steps
    assert all(graph.num_replays for graph in graphs)  # a greedy and a sampled step, a picture with its prompt
    assert [graph.num_replays for graph in graphs[2:]] == [engine.stats.num_prefixes] * (num_graphs - 2)


@pytest.mark.process
@pytest.mark.parametrize("delay", DELAYS)
def test_graphs_are_captured_again_where_slots_are_made_anew(
    delay: int, graphs: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "SLOT_POSITIONS", 96)
    engine = captured(5, delay)
    long = Job(2000, None, Request(Task.QUERY, "word " * 60, reasoning=False, max_tokens=2))
    (answer,) = engine.run([long])
    assert answer.failure is None
    assert engine.batch_size == 1
    assert engine.stats.num_captures == len(graphs) == 6
    run_all(engine)
    assert engine.stats.num_captures == len(graphs) == 6
    assert not any(graph.num_replays for graph in graphs[:3])


@pytest.mark.process
def test_a_step_that_cannot_be_captured_runs_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: Callable[[], Tensor], device: torch.device) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore\nlines")

    monkeypatch.setattr(stepper_module, "FixedGraph", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = captured(5, 1)
    lines = [str(warning.message) for warning in caught]
    assert len(set(lines)) == 2  # of steps, and of pictures with their prompts
    for line in lines:
        assert "\n" not in line
        assert "(operation not permitted when stream is capturing)" in line
    assert engine.stats.num_captures == 0
    run_all(engine)


@pytest.mark.process
def test_only_the_step_that_cannot_be_captured_is_launched(
    graphs: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, num_made = stepper_module.FixedGraph, 0

    def second_fails(run: Callable[[], Tensor], device: torch.device) -> object:
        nonlocal num_made
        num_made += 1
        if num_made == 2:
            raise RuntimeError("not in a capture")
        return make(run, device)

    monkeypatch.setattr(stepper_module, "FixedGraph", second_fails)
    with pytest.warns(UserWarning, match="cannot be captured") as caught:
        engine = captured(5, 1)
    assert len(caught) == 1
    assert engine.stats.num_captures == len(graphs) == 2
    run_all(engine)
    assert 0 < graphs[0].num_replays < engine.stats.num_steps


@pytest.mark.process
@pytest.mark.parametrize("num_fitting", [3, 0])
def test_graphs_that_do_not_fit_halve_the_batch(
    num_fitting: int, graphs: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = load_case("a")
    engine = case.engine(6, delay=1, is_planned=True)

    def tight(run: Callable[[], Tensor], device: torch.device) -> Recorded:
        if len(engine._stepper.rows.mode) - 1 > num_fitting:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More words")
        return Recorded(run, device)

    monkeypatch.setattr(stepper_module, "FixedGraph", tight)
    if not num_fitting:
        with pytest.raises(EngineError, match=r"no memory for 1 slots: CUDA out of memory"):
            engine.capture()
        return
    engine.capture()
    assert engine.stats.batch_sizes == [6, 3]
    assert engine.stats.num_captures == len(graphs) == 3
    run_all(engine)
    assert engine.stats.num_captures == 3


@pytest.mark.process
@pytest.mark.parametrize("delay", DELAYS)
def test_what_a_graph_points_at_stays_where_it_is(delay: int, graphs: list[Recorded]) -> None:
    """Rows, inputs, keys and values, over all steps and admissions of a run."""
    engine = captured(5, delay)
    stepper, cache = engine._stepper, engine.cache

    def places() -> list[int]:
        tensors = [*stepper.rows, stepper.next_SD, *cache.keys, *cache.values]
        return [tensor.data_ptr() for tensor in tensors]

    before, launch, num_seen = places(), engine._launch, 0

    def watched() -> None:
        nonlocal num_seen
        launch()
        num_seen += 1
        assert places() == before

    engine._launch = watched  # type: ignore[method-assign]
    run_all(engine)
    assert engine.stats.num_steps > 50
    assert num_seen > 50
    assert engine._stepper is stepper
    assert engine.cache is cache
    assert set(stepper.rows.mode.tolist()) == {int(Mode.IDLE)}


# -- what no step may do ---------------------------------------------------------------------------

# The host would wait for their values, or a tensor would be made on the host and sent: neither can be captured.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal"}
SENDS = {"lift_fresh", "_to_copy", "scalar_tensor", "_pin_memory"}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Lint(TorchDispatchMode):
    """Notes what is called that a captured step must not call; a mask as an index is as bad as `nonzero`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.num_counts = 0  # of rows by expert, which the plain experts need and kernels do not

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        self.num_counts += name == "bincount"
        is_dtype_alone = name == "_to_copy" and (kwargs or {}).get("device") is None
        if name in READS or (name in SENDS and not is_dtype_alone):
            self.found.append(name)
        if name in INDEXES and any(index is not None and index.dtype is torch.bool for index in args[1]):
            self.found.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_sampled", [False, True])
def test_a_step_asks_the_host_nothing_and_is_sent_nothing(is_sampled: bool) -> None:
    case = load_case("a")
    engine = case.engine(4, is_planned=True)
    tasks = (Task.CAPTION, Task.DETECT, Task.SEGMENT, Task.POINT)
    for key, task in enumerate(tasks):
        engine.add(Job(key, case.images[key % 3], Request(task, None if task is Task.CAPTION else "cat")))
    engine.step()
    with torch.inference_mode(), Lint() as lint:
        engine._stepper.step(4, engine.max_context, is_sampled=is_sampled)
    assert lint.found == []
    num_plain = sum(isinstance(module, MoeMlp) for module in case.model.modules())
    assert lint.num_counts == num_plain > 0


def test_the_lint_sees_what_it_is_for() -> None:
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    with Lint() as lint:
        x.masked_select(mask), x[mask], x[0].item(), torch.tensor([1.0]), mask.nonzero(), bool(x[1] > 0)
        x[mask] = 1.0
    assert {"masked_select", "index by a mask", "_local_scalar_dense", "lift_fresh", "nonzero"} <= set(lint.found)
    assert "index_put_ by a mask" in lint.found
