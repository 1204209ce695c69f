"""A model that answers at once and always the same: for tests of everything around the model.

Answers finish out of order on purpose, several a step, as those of a real engine do.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from md3cli.config import ModelOptions
from md3cli.images.crops import CropConfig
from md3cli.records import Answer, Job, Request, RowFailure, RunIdentity, Task

CROP_CONFIG = CropConfig(crop_size=28, patch_size=14, overlap_margin=0, max_crops=4)


@dataclass
class StubEngine:
    """Takes `batch_size` requests at a time and answers them last first, `step_s` a step."""

    batch_size: int = 4
    step_s: float = 0.0
    device: str = "cpu"
    encoding_bytes: int = 100_000
    num_answered: int = 0
    num_steps: int = 0
    seen: list[tuple[str | None, Request]] = field(default_factory=list)
    _waiting: deque[Job] = field(default_factory=deque)

    @property
    def wants_more(self) -> bool:
        return len(self._waiting) < 2 * self.batch_size

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def add(self, job: Job) -> None:
        self._waiting.append(job)

    def step(self) -> Sequence[Answer]:
        time.sleep(self.step_s)
        batch = [self._waiting.popleft() for _ in range(min(self.batch_size, len(self._waiting)))]
        self.num_answered += len(batch)
        self.num_steps += 1
        self.seen += [(job.image and job.image.sha256, job.request) for job in batch]
        return [answer(job) for job in reversed(batch)]

    def stage_seconds(self) -> Mapping[str, float]:
        return {"vision": 0.2, "prefill": 0.1, "decode": 0.7}


def answer(job: Job) -> Answer:
    """What the stub says; the prompt `fail me` fails, `5 things` finds five, and `say: yes` is answered with `yes`."""
    key, picture, request = job.key, job.image, job.request
    if request.prompt == "fail me":
        return Answer(key, failure=RowFailure("model", "asked to fail"))
    asked = str(request).replace(", tiles=None, region=None", "")  # as it was before these
    text = hashlib.sha256(f"{picture and picture.sha256} {asked}".encode()).hexdigest()[:12]
    box = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.75}
    found = {"label": request.prompt, **box, "score": 0.9}
    _, has_said, said = (request.prompt or "").partition("say: ")
    count = re.fullmatch(r"(\d+) things", request.prompt or "")
    many = [found | {"x_max": 0.5 + 0.01 * place} for place in range(int(count[1]))] if count else [found]
    result = {
        Task.CAPTION: {"caption": f"a picture {text}"},
        Task.QUERY: {"answer": said if has_said else text},
        Task.DETECT: {"objects": many},
        Task.POINT: {"points": [{"label": request.prompt, "x": 0.25, "y": 0.5, "score": 0.8}]},
        Task.SEGMENT: {
            "segments": [{"label": request.prompt, "svg_path": "M 0 0 L 1 0 L 1 1 z", "bbox": box, "score": 0.7}]
        },
    }[request.task]
    return Answer(key, result, "stop", 10, 3)


@dataclass
class StubModel:
    """Found at once; `engine` is made by the first `load`."""

    options: ModelOptions = field(default_factory=ModelOptions)
    step_s: float = 0.0
    batch_size: int = 4
    engine: StubEngine | None = None

    @property
    def identity(self) -> RunIdentity:
        options = self.options
        return RunIdentity(
            f"stub@{options.model}", options.dtype, options.quant, options.adapter or "", options.background
        )

    @property
    def crop_config(self) -> CropConfig:
        return CROP_CONFIG

    def refusal_of(self, request: Request) -> str | None:
        return None

    def load(self) -> StubEngine:
        assert self.engine is None, "loaded twice"
        self.engine = StubEngine(self.options.batch_size or self.batch_size, self.step_s)
        return self.engine
