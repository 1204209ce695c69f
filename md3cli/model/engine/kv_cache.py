"""Keys and values of generations in flight, and the book of which slot holds whose.

A slot holds one generation, contiguous: its picture's prefix at positions 0 … prefix_len-1, then prompt and answer.
Every picture is a prefix of one length, so generations are near-equal in length, contiguous slots waste little, and
attention reads plain tensors. A slot keeps its prefix after its generation is done, until another picture takes it:
the next question about the picture finds it there, or copies it.

`SlotTable` is bookkeeping without tensors, `KVCache` stores, and three `SlotStore`s serve the three kinds of forward
pass. Nothing here runs the network.

Shape suffixes: S slots, H heads, C capacity (positions), K head width, B rows of a pass, T new positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from md3cli.model.engine.flight import Seat
from md3cli.model.engine.generation import AnyImage, Generation
from md3cli.model.engine.machine import is_out_of_memory, shortage
from md3cli.model.network.config import HEAD_DIM, ModelConfig
from md3cli.model.network.moondream import prefix_mask
from md3cli.model.network.text import SlotStore


@dataclass(slots=True)
class Placement:
    """A slot for each generation, and what must be done, in this order, before their prompts can be run."""

    slots: list[int] = field(default_factory=list)
    to_prefill: list[tuple[int, str]] = field(default_factory=list)  # (slot, picture)
    to_copy: list[tuple[int, int]] = field(default_factory=list)  # (from, to)
    num_found: int = 0  # prefixes that were in place already


class SlotTable:
    """The book of slots: who is in each and who is next, the positions in use, the picture whose prefix it holds."""

    def __init__(self, num_slots: int) -> None:
        self.generations: list[Generation | None] = [None] * num_slots
        self.held: list[str | None] = [None] * num_slots
        self.end: list[int] = [0] * num_slots  # next position of each slot, as the host counts its launches
        self._num_launched = [0] * num_slots  # decisions of each slot's generation

    @property
    def free(self) -> list[int]:
        return [slot for slot, generation in enumerate(self.generations) if generation is None]

    @property
    def active(self) -> list[int]:
        return [slot for slot, generation in enumerate(self.generations) if generation is not None]

    def next_batch(self, waiting: Sequence[Generation], num_pictures: int) -> list[Generation]:
        """Return the first of `waiting` that are to get slots now, once enough are free to make a batch worth while.

        What would begin a pass of `num_pictures` new pictures without filling it is left for later, where others are
        filled. All wait on until they have their slots: an error on the way there loses none of them.
        """
        num_free, num_slots = len(self.free), len(self.generations)
        if not (num_free == num_slots or num_free >= min(len(waiting), num_slots // 4)):
            return []
        batch = list(islice(waiting, num_free))
        new = list(dict.fromkeys(picture.sha256 for picture in self.lacking(batch)))
        num_filling = len(new) // num_pictures * num_pictures
        if num_filling in (0, len(new)):
            return batch
        keys = [generation.image_key for generation in batch]
        return batch[: keys.index(new[num_filling])]

    def lacking(self, generations: Iterable[Generation]) -> list[AnyImage]:
        """Return the pictures of `generations` whose prefix no slot holds."""
        pictures = (generation.job.image for generation in generations)
        return [picture for picture in pictures if picture is not None and picture.sha256 not in self.held]

    def sit(self, slot: int, generation: Generation) -> None:
        """Give a slot to a generation whose prompt, and with it its first decision, is launched next."""
        self.generations[slot] = generation
        self.end[slot], self._num_launched[slot] = generation.prompt_end, 1

    def launch(self, slot: int) -> Seat:
        """Count a step of the slot's generation, and return the generation's place in it."""
        generation = self.generations[slot]
        assert generation is not None
        self.end[slot] += 1
        self._num_launched[slot] += 1
        return Seat(slot, slot, generation, self.end[slot])

    def may_go_on(self, slot: int) -> bool:
        """Return False where the decisions launched for a slot's generation are the most it can take."""
        generation = self.generations[slot]
        most = generation.most_decisions if generation is not None else 0
        return most is None or self._num_launched[slot] < most

    def leave(self, slot: int, prefix_len: int) -> None:
        """Free the slot of a generation that is done; nothing behind the prefix is in use any more."""
        self.generations[slot] = None
        self.end[slot] = prefix_len

    def place(self, batch: Sequence[Generation], wanted: Collection[str | None]) -> Placement:
        """Choose free slots for `batch`: where the prefix is already, else one that nobody wants first.

        `wanted` are the pictures of all generations known. Afterwards `held` is what the slots hold
        once the placement's work is done; the caller seats the generations.
        """
        placement = Placement()
        spare = deque(sorted(self.free, key=lambda slot: (self.held[slot] in wanted, slot)))
        kept: dict[int, int] = {}  # who finds its prefix in a free slot takes it before anyone overwrites it
        for index, generation in enumerate(batch):
            key = generation.image_key
            slot = next((s for s in spare if key is not None and self.held[s] == key), None)
            if slot is not None:
                spare.remove(slot)
                kept[index] = slot
        placement.num_found = len(kept)
        for index, generation in enumerate(batch):
            slot = kept.get(index)
            if slot is None:
                slot = spare.popleft()
                self._fill(slot, generation.image_key, placement)
            placement.slots.append(slot)
        return placement

    def _fill(self, slot: int, key: str | None, placement: Placement) -> None:
        if key is not None and key in self.held:
            placement.to_copy.append((self.held.index(key), slot))
        elif key is not None:
            placement.to_prefill.append((slot, key))
        self.held[slot] = key


GROWTH = 16  # positions; capacity is a multiple of it, so that shapes repeat
GROWTH_SHARE = 8  # capacity grows by at least this part of itself, so that resizing is rare


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is >= value."""
    return -(-value // multiple) * multiple


class SlotsTooLargeError(MemoryError):
    """Memory does not hold so many slots of so many positions; it may hold fewer."""


class SlotsTooShortError(RuntimeError):
    """A generation needs more positions than slots of a fixed size have."""


class KVCache:
    """Slots of keys and values for every layer.

    `is_fixed`: everything lies in one tensor that never moves, as a CUDA graph needs it, and a slot that becomes too
    short is an error. Else a tensor for each layer's keys, and one for its values, that grow and shrink. `places` are
    each layer's heads and device (`Moondream3.cache_places`), where they are not the config's and `device`.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        is_fixed: bool = False,
        places: Sequence[tuple[int, torch.device]] | None = None,
    ) -> None:
        self.num_slots, self.is_fixed = num_slots, is_fixed
        self.capacity = self._least_capacity = round_up(capacity, GROWTH)
        num_layers = config.text.n_layers
        whole = (num_layers, 2, num_slots, config.text.n_heads, self.capacity, HEAD_DIM)
        self._whole = torch.zeros(whole, dtype=dtype, device=device) if is_fixed else None
        if self._whole is not None:
            self.keys, self.values = list(self._whole[:, 0]), list(self._whole[:, 1])
        else:
            places = places or [(config.text.n_heads, device)] * num_layers
            shapes = [((num_slots, heads, self.capacity, HEAD_DIM), place) for heads, place in places]
            self.keys = [torch.zeros(shape, dtype=dtype, device=place) for shape, place in shapes]
            self.values = [torch.zeros(shape, dtype=dtype, device=place) for shape, place in shapes]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def fit(self, num_positions: int) -> None:
        """Make every slot hold `num_positions`; give room back when less than half of it is needed.

        Capacity never falls below what the cache was made with.

        Raises:
            SlotsTooShortError: the cache is fixed, and holds fewer.
            SlotsTooLargeError: memory does not hold them; the cache is of no use any more.
        """
        needed = max(round_up(num_positions, GROWTH), self._least_capacity)
        if self._whole is not None and needed > self.capacity:
            raise SlotsTooShortError(f"slots of {self.capacity} positions, and {num_positions} are needed")
        if not self.capacity < needed and not needed <= self.capacity // 2:
            return
        if needed > self.capacity:
            needed = max(needed, round_up(self.capacity + self.capacity // GROWTH_SHARE, GROWTH))
        try:
            self._resize(needed)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise SlotsTooLargeError(shortage(error)) from error
        self.capacity = needed

    def _resize(self, capacity: int) -> None:
        kept = min(capacity, self.capacity)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):  # layer by layer: never twice in memory
                new = old.new_zeros((*old.shape[:2], capacity, HEAD_DIM))
                new[:, :, :kept] = old[:, :, :kept]
                tensors[layer] = new

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        if self._whole is not None:  # one kernel instead of one for each tensor
            self._whole[:, :, target, :, :length] = self._whole[:, :, source, :, :length]
            return
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def clear(self, slot: int) -> None:
        """Forget what a slot holds."""
        if self._whole is not None:
            self._whole[:, :, slot].zero_()
            return
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()


class PrefixStore(SlotStore):
    """Prefill of image prefixes: rows start at position 0 and attend to nothing but themselves.

    Slot -1 marks a row that fills up a pass over a fixed cache.
    """

    attends_new = True

    def __init__(self, cache: KVCache, slots_B: Tensor) -> None:
        super().__init__(cache.keys, cache.values)
        self._slots_B, self._may_pad = slots_B, cache.is_fixed

    def slots(self) -> Tensor:
        return self._slots_B

    def mask(self) -> Tensor | None:
        return None

    def attended(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        return k_BHTK, v_BHTK

    def _write(self, stored_SHCK: Tensor, new_BHTK: Tensor) -> None:
        slots_B = self._slots_B
        if self._may_pad:
            is_real_B = slots_B >= 0
            slots_B, new_BHTK = slots_B[is_real_B], new_BHTK[is_real_B]
        stored_SHCK[slots_B.to(stored_SHCK.device), :, : new_BHTK.shape[2]] = new_BHTK


class PictureStore(PrefixStore):
    """Prefill of one picture's prefix and of the beginning of a prompt behind it, which attends to both."""

    num_prefix: int

    def __init__(self, cache: KVCache, slots_1: Tensor, num_prefix: int, length: int) -> None:
        super().__init__(cache, slots_1)
        self.num_prefix, self._length = num_prefix, length

    def mask(self) -> Tensor:
        return prefix_mask(self._length, self.num_prefix, self._slots_B.device)[None, None]


class PromptStore(SlotStore):
    """Prefill of prompts: each row writes behind what its slot holds and attends to all of it.

    Over a fixed cache a long prompt may be several rows of one slot, slot -1 marks a row that fills up a pass, and
    padding behind a prompt may reach behind the slot's end: neither is stored.
    `position_BT` are the absolute positions of the new entries, `length` bounds what the plain path attends to.
    """

    def __init__(self, cache: KVCache, slots_B: Tensor, position_BT: Tensor, length: int) -> None:
        super().__init__(cache.keys, cache.values)
        self._slots_B, self.position_BT, self.length = slots_B, position_BT, length
        self._may_pad, self._capacity = cache.is_fixed, cache.capacity
        self._mask: Tensor | None = None  # made when first asked for: kernels need none

    def slots(self) -> Tensor:
        return self._slots_B

    def mask(self) -> Tensor:
        if self._mask is None:
            self._mask = up_to(self.position_BT, self.length)
        return self._mask

    def _write(self, stored_SHCK: Tensor, new_BHTK: Tensor) -> None:
        slots_BT, new_BTHK = self._slots_B[:, None].expand_as(self.position_BT), new_BHTK.transpose(1, 2)
        if self._may_pad:
            is_stored_BT = (slots_BT >= 0) & (self.position_BT < self._capacity)
            stored_SHCK[slots_BT[is_stored_BT], :, self.position_BT[is_stored_BT]] = new_BTHK[is_stored_BT]
        else:
            place = stored_SHCK.device
            stored_SHCK[slots_BT.to(place), :, self.position_BT.to(place)] = new_BTHK

    def attended(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        slots_B = self._slots_B.clamp(min=0) if self._may_pad else self._slots_B
        keys, values = (t[layer][:, :, : self.length] for t in (self.keys, self.values))
        slots_B = slots_B.to(keys.device)
        return keys.index_select(0, slots_B), values.index_select(0, slots_B)


class DecodeStore(SlotStore):
    """One decode step of slots 0 … n-1: one new position each, read in place; rows that are not `live_N` are idle.

    The plain path attends to all of the capacity (under a mask): a shorter view would not be contiguous, and
    the matrix products of a CPU copy such views whole, at every step. There an idle row writes at its position, which
    lies right behind the prefix; kernels skip it.
    """

    def __init__(self, cache: KVCache, position_N: Tensor, live_N: Tensor) -> None:
        super().__init__(cache.keys, cache.values)
        self.position_N, self.live_N, self.capacity = position_N, live_N, cache.capacity
        # Made when first asked for: each path needs its own.
        self._rows_N: Tensor | None = None
        self._slots_N: Tensor | None = None
        self._mask: Tensor | None = None

    def slots(self) -> Tensor:
        if self._slots_N is None:
            self._slots_N = torch.where(self.live_N, self._rows(), -1)
        return self._slots_N

    def mask(self) -> Tensor:
        if self._mask is None:
            self._mask = up_to(self.position_N[:, None], self.capacity)
        return self._mask

    def _rows(self) -> Tensor:
        if self._rows_N is None:
            self._rows_N = torch.arange(self.position_N.shape[0], device=self.position_N.device)
        return self._rows_N

    def _write(self, stored_SHCK: Tensor, new_NH1K: Tensor) -> None:
        place = stored_SHCK.device
        stored_SHCK[self._rows().to(place), :, self.position_N.to(place)] = new_NH1K[:, :, 0]

    def attended(self, layer: int, k_NH1K: Tensor, v_NH1K: Tensor) -> tuple[Tensor, Tensor]:
        num_rows = self.position_N.shape[0]
        return self.keys[layer][:num_rows], self.values[layer][:num_rows]


def up_to(position_BT: Tensor, length: int) -> Tensor:
    """Return the mask [B, 1, T, length] under which each new position sees itself and all before it."""
    return (torch.arange(length, device=position_BT.device) <= position_BT[:, :, None])[:, None]
