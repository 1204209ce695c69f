"""Who sits where: the engine's book of slots, and which picture's prefix each of them holds.

Pure bookkeeping, no tensors. A slot keeps its picture's prefix after its sequence is done, until
another picture takes it: the next question about the same picture finds it there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from md3cli.model.tasks import Sequence


@dataclass(slots=True)
class Placement:
    """A slot for each sequence, and what must be done, in this order, before their prompts can be run."""

    slots: list[int] = field(default_factory=list)
    to_prefill: list[tuple[int, str]] = field(default_factory=list)  # (slot, picture)
    to_copy: list[tuple[int, int]] = field(default_factory=list)  # (from, to)
    num_found: int = 0  # prefixes that were in place already


class SlotTable:
    """Sequences by slot, positions in use, prefixes held."""

    def __init__(self, num_slots: int) -> None:
        self.sequences: list[Sequence | None] = [None] * num_slots
        self.held: list[str | None] = [None] * num_slots
        self.end: list[int] = [0] * num_slots  # next position of each slot, as the host counts

    @property
    def free(self) -> list[int]:
        return [slot for slot, sequence in enumerate(self.sequences) if sequence is None]

    @property
    def active(self) -> list[int]:
        return [slot for slot, sequence in enumerate(self.sequences) if sequence is not None]

    def leave(self, slot: int, prefix_len: int) -> None:
        """The sequence in `slot` is done; nothing behind the prefix is in use any more."""
        self.sequences[slot] = None
        self.end[slot] = prefix_len

    def place(self, batch: Seq[Sequence], wanted: Collection[str | None]) -> Placement:
        """Choose free slots for `batch`: where the prefix is already, else one that nobody wants first.

        `wanted` are the pictures of all sequences known. Afterwards `held` is what the slots hold
        once the placement's work is done; sequences are seated by the caller.
        """
        placement = Placement()
        spare = deque(sorted(self.free, key=lambda slot: (self.held[slot] in wanted, slot)))
        kept: dict[int, int] = {}  # who finds its prefix in a free slot takes it before anyone overwrites it
        for index, sequence in enumerate(batch):
            key = sequence.image_key
            slot = next((s for s in spare if key is not None and self.held[s] == key), None)
            if slot is not None:
                spare.remove(slot)
                kept[index] = slot
        placement.num_found = len(kept)
        for index, sequence in enumerate(batch):
            slot = kept.get(index)
            if slot is None:
                slot = spare.popleft()
                self._fill(slot, sequence.image_key, placement)
            placement.slots.append(slot)
        return placement

    def _fill(self, slot: int, key: str | None, placement: Placement) -> None:
        if key is not None and key in self.held:
            placement.to_copy.append((self.held.index(key), slot))
        elif key is not None:
            placement.to_prefill.append((slot, key))
        self.held[slot] = key
