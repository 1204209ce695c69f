"""A device that works behind the host, made of the CPU: for tests of what is read when.

What is brought to the host holds NaN until somebody waits for a milestone behind it, and every step writes its events
to one buffer, as a CUDA graph does. Whoever reads too early, or reads the buffer instead of its copy, reads wrong.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor

from md3cli.model.engine import flight
from md3cli.model.engine.stepper import Stepper


@dataclass
class LateDevice:
    """The copies that are on their way, in order; `num_waits` counts milestones that were waited for."""

    num_waits: int = 0
    most_under_way: int = 0
    _coming: deque[tuple[Tensor, Tensor]] = field(default_factory=deque)
    _num_begun: int = 0
    _num_arrived: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> LateDevice:
        """Be the device of every engine that is made from now on."""
        monkeypatch.setattr(flight, "start_download", self.start_download)
        monkeypatch.setattr(flight, "milestone", self.milestone)
        run, buffers = Stepper._run, WeakKeyDictionary[Stepper, Tensor]()

        def into_one_buffer(stepper: Stepper, *arguments: object) -> Tensor:
            events = run(stepper, *arguments)  # type: ignore[arg-type]
            buffer = buffers.setdefault(stepper, torch.empty(len(stepper.rows.mode), events.shape[1]))
            buffer.fill_(torch.nan)
            return buffer[: len(events)].copy_(events)

        monkeypatch.setattr(Stepper, "_run", into_one_buffer)
        return self

    def start_download(self, tensor: Tensor) -> Tensor:
        """Put a copy in line, behind what was launched and before what will be."""
        host = torch.full_like(tensor, torch.nan)
        self._coming.append((host, tensor.clone()))
        self._num_begun += 1
        self.most_under_way = max(self.most_under_way, len(self._coming))
        return host

    def milestone(self, device: torch.device) -> Callable[[], None]:
        """Return what lets everything arrive that is in line now."""
        number = self._num_begun

        def wait() -> None:
            self.num_waits += 1
            while self._num_arrived < number:
                host, values = self._coming.popleft()
                host.copy_(values)
                self._num_arrived += 1

        return wait
