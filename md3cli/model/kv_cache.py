"""Keys and values of sequences in flight: a fixed number of slots, contiguous in each.

A slot holds one sequence: the image's prefix at positions 0 … prefix_len-1, then prompt and answer.
Sequences are near-equal in length (every image is a prefix of one length), so contiguous slots waste
little and the attention reads plain tensors. Prefixes are shared by copying a slot's prefix into
another, or by reusing a slot whose last sequence asked about the same image: the engine keeps that
book, this file only stores.

The three stores below implement `text.KeyValueStore` for the three kinds of forward pass.

Shape suffixes: S slots, H heads, C capacity (positions), K head width, B rows of a pass, T new positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from md3cli.model.config import HEAD_DIM, ModelConfig

GROWTH = 16  # positions; capacity is a multiple of it, so that shapes repeat
GROWTH_SHARE = 8  # capacity grows by at least this part of itself, so that resizing is rare


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is >= value."""
    return -(-value // multiple) * multiple


class KVCache:
    """Slots of keys and values for every layer."""

    def __init__(
        self, config: ModelConfig, num_slots: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_slots = num_slots
        self.capacity = self._least_capacity = round_up(capacity, GROWTH)
        self._shape = (num_slots, config.text.n_heads, self.capacity, HEAD_DIM)
        layers = range(config.text.n_layers)
        self.keys = [torch.zeros(self._shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(self._shape, dtype=dtype, device=device) for _ in layers]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def fit(self, num_positions: int) -> None:
        """Make every slot hold `num_positions`; give room back when less than half of it is needed.

        Capacity never falls below what the cache was made with.
        """
        needed = max(round_up(num_positions, GROWTH), self._least_capacity)
        if not self.capacity < needed and not needed <= self.capacity // 2:
            return
        if needed > self.capacity:
            needed = max(needed, round_up(self.capacity + self.capacity // GROWTH_SHARE, GROWTH))
        kept = min(needed, self.capacity)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):  # layer by layer: never twice in memory
                new = old.new_zeros((*old.shape[:2], needed, HEAD_DIM))
                new[:, :, :kept] = old[:, :, :kept]
                tensors[layer] = new
        self.capacity = needed

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]


class PrefixStore:
    """Prefill of image prefixes: rows start at position 0 and attend to nothing but themselves."""

    def __init__(self, cache: KVCache, slots_B: Tensor) -> None:
        self.cache, self.slots_B = cache, slots_B

    def update(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        length = k_BHTK.shape[2]
        self.cache.keys[layer][self.slots_B, :, :length] = k_BHTK
        self.cache.values[layer][self.slots_B, :, :length] = v_BHTK
        return k_BHTK, v_BHTK


class PromptStore:
    """Prefill of prompts: each row writes behind what its slot holds and attends to all of it.

    `position_BT` are the absolute positions of the new entries, `length` bounds what is attended to.
    """

    def __init__(self, cache: KVCache, slots_B: Tensor, position_BT: Tensor, length: int) -> None:
        self.cache, self.slots_B, self.position_BT, self.length = cache, slots_B, position_BT, length

    def update(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self._write(self.cache.keys[layer], k_BHTK),
            self._write(self.cache.values[layer], v_BHTK),
        )

    def _write(self, stored_SHCK: Tensor, new_BHTK: Tensor) -> Tensor:
        stored_SHCK[self.slots_B[:, None], :, self.position_BT] = new_BHTK.transpose(1, 2)
        return stored_SHCK[:, :, : self.length].index_select(0, self.slots_B)


class DecodeStore:
    """One decode step of slots 0 … n-1: one new position each, read in place.

    All of the capacity is attended to (under a mask): a shorter view would not be contiguous, and
    the matrix products of a CPU copy such views whole, at every step.
    """

    def __init__(self, cache: KVCache, position_N: Tensor) -> None:
        self.cache, self.position_N = cache, position_N
        self.rows_N = torch.arange(position_N.shape[0], device=position_N.device)

    def update(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self._write(self.cache.keys[layer], k_BHTK),
            self._write(self.cache.values[layer], v_BHTK),
        )

    def _write(self, stored_SHCK: Tensor, new_NH1K: Tensor) -> Tensor:
        stored_SHCK[self.rows_N, :, self.position_N] = new_NH1K[:, :, 0]
        return stored_SHCK[: len(self.rows_N)]
