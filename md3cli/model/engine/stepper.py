"""The rows in flight on the device, and the step that takes a decision of each: launched, or replayed as a CUDA graph.

State lies in buffers that are made once and written in place, so that a graph finds it where it was captured. A step of
an engine on CUDA is one graph: its 300 to 600 kernels take 2.5 ms for one row, and the host 19 to 33 ms to launch them
one by one (H200). So is the pass of one picture and its prompt, where the plan has one (`passes.ShapePlan`): a single
question waits for its launches. What is eager is the same code, and its twin to the bit. Nothing in a graph asks the
host or is sent by it. Apart from the engine, which decides who sits where; knows nothing of generations.
Idea: a step over static buffers, captured once, is gpt-fast's.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from md3cli.model.engine.decisions import decide
from md3cli.model.engine.kv_cache import KVCache
from md3cli.model.engine.machine import is_out_of_memory, shortage
from md3cli.model.engine.passes import BLOCK, IDLE, NO_SLOT, Passes, ShapePlan
from md3cli.model.engine.state import Rows, idle_rows

CAPTURE_WARM_UPS = 2  # steps before a capture: kernels are compiled, libraries choose algorithms and workspaces


class Stepper:
    """Rows and inputs of `num_slots` slots, and one more for what padding decides."""

    def __init__(self, passes: Passes, cache: KVCache, num_slots: int) -> None:
        model = passes.model
        self._passes, self._cache, self._num_slots = passes, cache, num_slots
        self.rows = idle_rows(num_slots + 1, model.device)
        self.next_SD = torch.zeros(num_slots + 1, model.config.text.dim, dtype=model.dtype, device=model.device)
        self._graphs: dict[bool, FixedGraph] = {}  # of steps, by whether any row is sampled
        self._picture: FedGraph | None = None

    def seat(self, index: Tensor, rows: Rows, hidden_ND: Tensor, max_context: int, *, is_sampled: bool) -> Tensor:
        """Give slots `index` [N] the state of rows whose prompts have just been run, and take their first decisions.

        `hidden_ND` is what came of the prompts' last positions. Return the events [N, len(Event)].
        """
        self.rows.put(index, rows)
        return decide(
            self._passes.model, self.rows, self.next_SD, hidden_ND, max_context, is_sampled=is_sampled, index=index
        )

    def fall_idle(self, row: int, position: int) -> None:
        """Let a row end before it decides to, its next input going to `position`."""
        self.rows.mode[row] = IDLE
        self.rows.position[row] = position

    def step(self, num_rows: int, max_context: int, *, is_sampled: bool) -> Tensor:
        """Take the next decision of the first `num_rows` rows; return their events, which the next step may overwrite.

        A graph steps all slots, and knows the context it was captured with.
        """
        graph = self._graphs.get(is_sampled)
        return graph.replay() if graph is not None else self._run(num_rows, max_context, is_sampled)

    def prefill_picture(self, slots_1: Tensor, embeddings_1PD: Tensor, x_1TD: Tensor, last_1: Tensor) -> Tensor:
        """Do what `passes.run_picture` does; return the hidden state [1, D], which the next call may overwrite."""
        given = slots_1, embeddings_1PD, x_1TD, last_1
        if self._picture is not None:
            return self._picture.replay(*given)
        return self._passes.prefill_picture(self._cache, *given)

    def _run(self, num_rows: int, max_context: int, is_sampled: bool) -> Tensor:
        window = slice(0, num_rows)
        rows, next_ND = self.rows.pick(window), self.next_SD[window]
        return self._passes.decode(self._cache, rows, next_ND, max_context, is_sampled=is_sampled)

    def capture(self, max_context: int) -> int:
        """Capture what has one size while all rows are idle: a greedy step, a sampled one, a picture with its prompt.

        Return how many could be captured. Where one cannot a warning says so, and it is launched kernel by kernel.

        Raises:
            torch.OutOfMemoryError: there is no room for the graphs.
        """
        device, plan = self.next_SD.device, self._passes.plan
        for is_sampled in (False, True):
            with _warned("a decode step"):
                run = partial(self._run, self._num_slots, max_context, is_sampled)
                self._graphs[is_sampled] = FixedGraph(run, device)
        if plan is not None and plan.blocks_behind:
            with _warned("the pass of a picture and its prompt"):
                self._picture = FedGraph(partial(self._passes.prefill_picture, self._cache), self._no_picture(plan))
        return len(self._graphs) + (self._picture is not None)

    def _no_picture(self, plan: ShapePlan) -> list[Tensor]:
        """Return inputs of `prefill_picture` of the right sizes, for no slot."""
        config, like = self._passes.model.config, self.next_SD
        last_1 = torch.zeros(1, dtype=torch.int64, device=like.device)
        embeddings_1PD = like.new_zeros(1, config.vision.num_patches, config.text.dim)
        x_1TD = like.new_zeros(1, plan.blocks_behind * BLOCK, config.text.dim)
        return [torch.full_like(last_1, NO_SLOT), embeddings_1PD, x_1TD, last_1]


@contextlib.contextmanager
def _warned(what: str) -> Iterator[None]:
    """Say of what inside cannot be captured that it goes on without a graph."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        found = f"{what} cannot be captured as a CUDA graph ({shortage(error)})"
        warnings.warn(f"{found}: it is launched kernel by kernel, which is slower", stacklevel=4)


class FixedGraph:
    """A function of fixed buffers as one CUDA graph; its result lies at one place for ever."""

    def __init__(self, run: Callable[[], Tensor], device: torch.device) -> None:
        """Run the function a few times beside the current stream of `device`, then capture it."""
        self._device = device
        with torch.cuda.device(device):
            current, beside = torch.cuda.current_stream(), torch.cuda.Stream()
            beside.wait_stream(current)
            with torch.cuda.stream(beside):
                for _ in range(CAPTURE_WARM_UPS):
                    run()
            current.wait_stream(beside)
            self._graph = torch.cuda.CUDAGraph()
            # "thread_local": another thread may allocate pinned memory meanwhile, which would end any other capture.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._result = run()

    def replay(self) -> Tensor:
        """Launch the whole graph on the current stream of its device, which need not be the current device."""
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._result


class FedGraph:
    """A function of a few tensors as one CUDA graph: what it is given is copied to where the graph reads."""

    def __init__(self, run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        """Capture `run(*inputs)`; `inputs` are the graph's from now on."""
        self._inputs = inputs
        self._graph = FixedGraph(partial(run, *inputs), inputs[0].device)

    def replay(self, *given: Tensor) -> Tensor:
        """Launch the graph for other values of the same shapes; its result lies at one place for ever."""
        for target, value in zip(self._inputs, given, strict=True):
            target.copy_(value)
        return self._graph.replay()
