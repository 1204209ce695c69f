"""The decode step as an engine takes it: its time, what it asks of the host, and the bits of its eager twin.

On CUDA an engine's step is one graph over fixed buffers; what is timed, looked at and compared here is that graph,
in an engine whose rows are in the middle of their answers.
"""

from __future__ import annotations

import time
import warnings

import torch
from torch import Tensor

from md3cli.bench.runs import Workload, make_engine, make_images, make_jobs
from md3cli.bench.stages import decode_bytes
from md3cli.images.crops import Tiling
from md3cli.model.engine.state import Rows
from md3cli.model.network.moondream import Moondream3
from md3cli.records import Task

from .child import Run
from .limits import Limits
from .timing import median_ms, repeats

ANSWER_TOKENS = 400  # more than is ever stepped
LOOKED_AT = 16  # steps
SYNC_SIGN = "called a synchronizing CUDA operation"  # as torch warns of one; it also warns that it may miss some
TWIN_STEPS = 8
ROOM = 96  # positions behind the prefix
ONE_CROP = Tiling(1, 1)


class RunningEngine:
    """An engine of `slots` slots with `rows` captions under way, all about one picture.

    Raises:
        MemoryError: the device holds fewer slots.
    """

    def __init__(self, model: Moondream3, slots: int, rows: int) -> None:
        self.model, self.slots, self.rows = model, slots, rows
        self.engine = make_engine(model, slots)
        if self.engine.batch_size < slots:
            raise MemoryError(f"out of memory: it holds {self.engine.batch_size} slots of {slots}")
        workload = Workload((ONE_CROP,), Task.CAPTION, rows, max_tokens=ANSWER_TOKENS, max_objects=1)
        for job in make_jobs(workload, make_images(model, workload, seed=0)):
            self.engine.add(job)
        self.engine.cache.fit(model.config.prefix_len + ROOM)  # slots that grow do so before a step, not in it
        for _ in range(3):  # all are admitted by the first, and their first steps are behind them
            self.engine.step()

    @property
    def context(self) -> int:
        """Positions that the next step reads of each row."""
        return int(self.engine._stepper.rows.position.max()) + 1

    @property
    def name(self) -> str:
        """What its figures are called."""
        of_slots = f" of {self.slots}" if self.slots != self.rows else ""
        return f"decode step, {plural(self.rows, 'row')}{of_slots}"

    def step(self) -> Tensor:
        """One step of the device, nothing read; the events' place."""
        return self.engine._stepper.step(self.slots, self.engine.max_context, is_sampled=False)


def measure_step(run: Run, running: RunningEngine, form: str, limits: Limits) -> float:
    """A step's time on the device beside the time to read what it needs, and through the engine; milliseconds.

    Rows move on by a position a step: what is read is that of the middle of the timed ones.
    """
    name, count = f"{running.name}, {form}", repeats(run.device)
    engine_ms = _milliseconds_of_engine(running, count)
    context = running.context + count // 2
    ms = median_ms(running.step, run.device, count)
    run.figure(name, ms, "ms")
    run.figure(f"{name}: through the engine", engine_ms, "ms")
    if form == "bf16":  # of codes the bytes are others
        floor_ms = 1e3 * decode_bytes(running.model, running.rows, context) / limits.copy
        run.figure(f"{name}: over its read time", ms / floor_ms, "ratio")
    return ms


def _milliseconds_of_engine(running: RunningEngine, count: int) -> float:
    """Time of a step with everything that the host does for it, results read and absorbed."""
    started = time.perf_counter()
    for _ in range(count):
        running.engine.step()
    return 1e3 * (time.perf_counter() - started) / count


def report_syncs(run: Run, running: RunningEngine, form: str) -> None:
    """How often torch makes the host wait in some of the engine's steps; waiting for results is the engine's own."""
    if not run.is_cuda:
        run.note("host syncs", "needs CUDA")
        return
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(LOOKED_AT):
                running.engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = [str(warning.message) for warning in found if SYNC_SIGN in str(warning.message)]
    run.figure(f"host syncs, {LOOKED_AT} steps of {running.rows} rows, {form}", len(said), "count")
    if said:
        run.fail(f"a step makes the host wait: {said[0].splitlines()[0]}")


@torch.inference_mode()
def report_twin(run: Run, running: RunningEngine, form: str) -> None:
    """The same steps by the graph and launched one by one: events, next inputs and rows must have the same bits.

    Without a graph (a CPU) the eager step is compared with itself.
    """
    stepper = running.engine._stepper
    rows, inputs = Rows(*(column.clone() for column in stepper.rows)), stepper.next_SD.clone()
    by_graph = [_copied(running) for _ in range(TWIN_STEPS)]
    stepper.rows.put(slice(None), rows)
    stepper.next_SD.copy_(inputs)
    graphs, stepper._graphs = stepper._graphs, {}
    try:
        one_by_one = [_copied(running) for _ in range(TWIN_STEPS)]
    finally:
        stepper._graphs = graphs
    num_other = sum(not all(map(same_bits, *pair)) for pair in zip(by_graph, one_by_one, strict=True))
    run.figure(f"steps with other bits than launched one by one, {form}", num_other, "count")
    if num_other:
        run.fail(f"{num_other} of {TWIN_STEPS} steps by the graph have other bits than their twins")


def _copied(running: RunningEngine) -> list[Tensor]:
    """Take a step; copies of all that it writes, what it gave idle rows aside."""
    stepper, some = running.engine._stepper, slice(0, running.rows)
    events = running.step()[some].clone()
    return [events, stepper.next_SD[some].clone(), *(column[some].clone() for column in stepper.rows)]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal byte for byte, NaN and the zero's sign included."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def plural(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' if count > 1 else ''}"
