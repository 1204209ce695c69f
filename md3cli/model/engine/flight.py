"""Launches whose results are still on their way: a device works behind the host, and the host reads behind the device.

Every launch that decides something, a batch of prompts or a step, notes who sat where when it was launched. Its
results are absorbed by that list and never by the table of now: meanwhile a row may have ended, and its slot may have
another generation. Apart from the engine, which decides what to launch; knows nothing of slots' contents or of answers.
Idea: results of one step are read while the next one runs, as SGLang's and TensorRT-LLM's schedulers do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from md3cli.model.engine.generation import Generation
from md3cli.model.engine.machine import milestone, start_download
from md3cli.model.engine.state import Event


@dataclass(frozen=True, slots=True)
class Seat:
    """A generation's place in one launch: its row of the events, its slot, and where its next input goes after it."""

    row: int
    slot: int
    generation: Generation
    end: int


@dataclass(frozen=True, slots=True)
class Launch:
    """Events [N, len(Event)] that are coming to the host, `wait` until they are there, and who they are for."""

    events: Tensor
    wait: Callable[[], None] | None
    seats: Sequence[Seat]
    is_step: bool

    def read(self) -> list[tuple[Seat, Event]]:
        """Return each seat's event, once they have arrived."""
        if self.wait is not None:
            self.wait()
        values = self.events.tolist()
        return [(seat, Event(*values[seat.row])) for seat in self.seats]


class InFlight:
    """The launches whose events nobody has read, in order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launches: deque[Launch] = deque()

    def __len__(self) -> int:
        return len(self._launches)

    def add(self, events: Tensor, seats: Sequence[Seat], *, is_step: bool) -> None:
        """Begin to bring events to the host; the device may overwrite them with its next launch."""
        host = start_download(events)
        self._launches.append(Launch(host, milestone(self._device), seats, is_step))

    def arrivals(self, most_left: int) -> Iterator[Launch]:
        """Yield the oldest launches until no more than `most_left` are under way."""
        while len(self._launches) > most_left:
            yield self._launches.popleft()

    def drop(self) -> None:
        """Forget all launches, once the device is done with them."""
        if self._device.type == "cuda" and self._launches:
            torch.cuda.synchronize(self._device)
        self._launches.clear()
