"""Run `md3 bench` on a CUDA device that is not there, and print what it found; every time and every byte is made up.

    PYTHONPATH=. python tests/support/fake_bench.py FREE_GB

Needs a CUDA build of torch (and its triton), no GPU: tensors are fake (`fake_cuda.py`). FREE_GB are free beside the
weights of the mini model. A tensor on the wrong device fails as it would on a GPU.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from fake_cuda import DEVICE, Counter, FakeDevice
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from md3cli.bench import bench, stages
from md3cli.bench.bench import ModelSource, run_bench
from md3cli.model.engine.state import Event, Finish, Mode
from md3cli.model.weights.random_weights import CONFIGS, random_model

ANSWER_TOKENS = 3  # of a query
ANSWERS: dict[str, Any] = {
    "synchronize": None,
    "empty_cache": None,
    "reset_peak_memory_stats": None,
    "max_memory_allocated": 3_000,
    "max_memory_reserved": 4_000,
    "memory_reserved": 4_000,
    "get_device_name": "a GPU that is not there",
}


class Rows:
    """Events of rows that write text and all end with their last token; they are in step with one another."""

    def __init__(self) -> None:
        self.num_reads = 0

    def tolist(self, events: Tensor) -> list[list[float]]:
        self.num_reads += 1
        finish = Finish.LENGTH if self.num_reads % ANSWER_TOKENS == 0 else Finish.NO
        return [list(Event(int(Mode.TEXT), 100, 1, 1, 1, int(finish), 0.5, 0.5, 0.5, 0.5))] * len(events)


def one_run(run: Any, *rest: Any, **settings: Any) -> float:
    """A time for something that is run once."""
    run()
    return 0.5


def main() -> None:
    free = int(float(sys.argv[1]) * 1e9)
    rows = Rows()
    with ExitStack() as stack, torch.inference_mode():
        stack.enter_context(FakeDevice(Counter()).active())
        stack.enter_context(patch.object(FakeTensor, "tolist", lambda events: rows.tolist(events)))
        for name, answer in ANSWERS.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda device=None, answer=answer: answer))
        stack.enter_context(patch.object(torch.cuda, "mem_get_info", lambda device=None: (free, free + 10_000)))
        stack.enter_context(patch.object(bench, "busy_seconds", one_run))
        stack.enter_context(patch.object(stages, "best_seconds", one_run))
        source = ModelSource(DEVICE, lambda: random_model(CONFIGS["mini"], dtype=torch.bfloat16, device=DEVICE))
        found = run_bench(source, workloads=("query",), batch_size=None, has_baseline=False, num_workers=1)
    print(json.dumps(found.as_dict()))


if __name__ == "__main__":
    main()
