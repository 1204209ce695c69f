"""Tile sizes of the kernels: by kind of pass, weight form and width of the numbers; never by the rows at hand.

Rows of a tile decide how often a weight is read, and the tile decides the order of a sum: were it chosen by the
number of rows, a row's bits would depend on its companions. The three kinds of pass differ in rows by construction: a
step has one position of each sequence, a prefix a whole picture, a prompt something between. The sizes are those that
compile for sm_80 to sm_120 without local memory (tests/model/kernels/test_triton_compile.py prints registers and shared
memory); an H200 has timed those of the experts and tau. `BY_CARD` holds what a card prefers. Knows no kernel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import IntEnum, StrEnum

import torch

from md3cli.model.network.text import PassKind

RESIZED_VALUES = 128  # of a row of a picture that one program resizes, one for each thread
TAPS_STEP = 4  # inputs of a resized value that are loaded together; tables of weights are filled up to a multiple


class Product(StrEnum):
    """The products that are tiled: both matrices of the experts, one dense matrix, and tau's (whose columns are 2H)."""

    UP_GATE = "up_gate"
    DOWN = "down"
    DENSE = "dense"
    TAU = "tau"


class WeightForm(IntEnum):
    """How a weight is stored; the numbers are those of `expert_kernels`."""

    PLAIN = 0
    FP8 = 1
    INT8 = 2
    INT4 = 3


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows, columns and depth of one tile; warps of its program; stages that loads run ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def as_list(self) -> list[int]:
        """Return the five numbers as an operator's argument."""
        return [self.rows, self.columns, self.depth, self.warps, self.stages]

    @classmethod
    def of_list(cls, numbers: list[int]) -> Tile:
        """Undo `as_list`."""
        return cls(*numbers)


_HALF = {
    (Product.UP_GATE, PassKind.STEP): Tile(16, 32, 128, 4, 4),
    (Product.DOWN, PassKind.STEP): Tile(16, 64, 128, 4, 4),
    (Product.DENSE, PassKind.STEP): Tile(16, 32, 128, 4, 4),
    (Product.TAU, PassKind.STEP): Tile(16, 64, 128, 4, 2),
    # Of 64 prompts an expert gets 160 rows: five tiles of 32 each read its weights, and took 2.6 times as long (H200).
    (Product.UP_GATE, PassKind.PROMPT): Tile(64, 64, 64, 4, 3),
    (Product.DOWN, PassKind.PROMPT): Tile(64, 128, 64, 4, 3),
    (Product.DENSE, PassKind.PROMPT): Tile(64, 64, 64, 4, 3),
    (Product.TAU, PassKind.PROMPT): Tile(16, 64, 128, 4, 2),
    (Product.UP_GATE, PassKind.PREFIX): Tile(128, 64, 64, 8, 3),
    (Product.DOWN, PassKind.PREFIX): Tile(128, 128, 64, 8, 3),
    (Product.DENSE, PassKind.PREFIX): Tile(128, 128, 64, 8, 3),
    (Product.TAU, PassKind.PREFIX): Tile(64, 64, 64, 4, 3),
}
# A group of 4-bit codes is unpacked in registers, beside both accumulators; a tile's depth is that group. A step takes
# two groups in a turn (`expert_kernels._few_rows_in_4_bits`), of which stages - 1 turns are under way.
_INT4 = _HALF | {
    (Product.UP_GATE, PassKind.STEP): Tile(16, 32, 128, 4, 4),
    (Product.DOWN, PassKind.STEP): Tile(16, 32, 128, 4, 4),  # of 64 columns Triton 3.9 keeps 16 bytes in local memory
    (Product.UP_GATE, PassKind.PROMPT): Tile(32, 32, 128, 8, 3),
    (Product.DOWN, PassKind.PROMPT): Tile(32, 64, 128, 8, 3),
    (Product.UP_GATE, PassKind.PREFIX): Tile(64, 32, 128, 8, 2),
    (Product.DOWN, PassKind.PREFIX): Tile(64, 128, 128, 8, 3),
    (Product.DENSE, PassKind.PREFIX): Tile(64, 128, 128, 8, 3),
}
# float32 is for checking answers: plain arithmetic, small tiles that stay in registers.
_SINGLE = {
    (product, kind): Tile(16, 32, 32, 4, 2) if kind is not PassKind.PREFIX else Tile(32, 32, 32, 4, 2)
    for product in Product
    for kind in PassKind
}
BY_CARD: dict[tuple[int, int], dict[tuple[Product, PassKind, WeightForm], Tile]] = {
    # H100, H200: a tile of 128 x 128 reads one byte of the L2 cache for 64 operations, which the cache's 6 TB/s hold to
    # half of the matrix units' rate; twice the columns (both halves of up_gate count) make it 85 (4 and 2 %
    # faster on an H200).
    (9, 0): {
        (Product.UP_GATE, PassKind.PREFIX, WeightForm.PLAIN): Tile(128, 128, 64, 8, 3),
        (Product.DOWN, PassKind.PREFIX, WeightForm.PLAIN): Tile(128, 256, 64, 8, 3),
        # Twice as fast and more than the usual ones, whose smaller tiles older cards' registers ask for (H200).
        # up_gate's have since got twice the warps, and half the columns, so that Triton 3.9 spills nothing: not timed.
        (Product.UP_GATE, PassKind.PROMPT, WeightForm.INT4): Tile(64, 64, 128, 8, 2),
        (Product.DOWN, PassKind.PROMPT, WeightForm.INT4): Tile(64, 64, 128, 4, 3),
        (Product.UP_GATE, PassKind.PREFIX, WeightForm.INT4): Tile(128, 32, 128, 8, 2),
        (Product.DOWN, PassKind.PREFIX, WeightForm.INT4): Tile(128, 128, 128, 8, 2),
    },
}


@functools.cache  # asked at every launch
def tile_of(product: Product, kind: PassKind, form: WeightForm, dtype: torch.dtype, device: torch.device) -> Tile:
    """Return the tile of a product on a device."""
    return tile_for(product, kind, form, dtype, capability_of(device))


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Return a card's compute capability; None on the CPU, where the interpreter runs the kernels."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def tile_for(
    product: Product, kind: PassKind, form: WeightForm, dtype: torch.dtype, capability: tuple[int, int] | None
) -> Tile:
    """Return the tile of a product on a card of this compute capability; None is the interpreter."""
    if dtype is torch.float32:
        return _SINGLE[product, kind]
    usual = _INT4 if form is WeightForm.INT4 else _HALF
    of_card = BY_CARD.get(capability, {}) if capability is not None else {}
    return of_card.get((product, kind, form), usual[product, kind])
