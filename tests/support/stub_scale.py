"""What worker processes load in the model's place; how it behaves comes in the environment, which they inherit.

STUB_STEP_SECONDS: how long a step takes. STUB_DEADLY: a prompt whose every step kills the process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from stub_engine import StubEngine, StubModel

from md3cli.config import ModelOptions
from md3cli.records import Answer

FINDER = "stub_scale:find"
STEP_SECONDS, DEADLY = "STUB_STEP_SECONDS", "STUB_DEADLY"
DEADLY_STATUS = 139


class MortalEngine(StubEngine):
    """Dies of one prompt, as a crashing library does."""

    deadly: str | None = None

    def step(self) -> Sequence[Answer]:
        if self.deadly and any(job.request.prompt == self.deadly for job in list(self._waiting)[: self.batch_size]):
            os._exit(DEADLY_STATUS)
        return super().step()


@dataclass
class MortalModel(StubModel):
    deadly: str | None = None

    def load(self) -> StubEngine:
        self.engine = MortalEngine(self.options.batch_size or self.batch_size, self.step_s)
        self.engine.deadly = self.deadly
        return self.engine


def find(options: ModelOptions) -> StubModel:
    """As `md3cli.run.model_handle.find_model`."""
    model = MortalModel(options, float(os.environ.get(STEP_SECONDS, "0")))
    model.deadly = os.environ.get(DEADLY)
    return model
