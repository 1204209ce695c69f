"""Products with other tiles than the table's: what a card's row of `tiles.BY_CARD` is filled from.

Each candidate is timed on the inputs of a full pass; the table's own tile is among them. A tile that a
card has no shared memory for is noted. Figures have no prediction: they are there to choose by.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from gpu.triton_cases import ExpertInputs, normal, random_weight
from md3cli.model.kernels.forms import OPS
from md3cli.model.kernels.tiles import Product, Tile, WeightForm, tile_of
from md3cli.model.network.text import PassKind

from .child import Run
from .timing import flusher, median_ms

FAILURES = (OutOfResources, PTXASError, RuntimeError)  # of a card with less shared memory, or fewer registers
STEP_TILES = {  # a question is whether one row, or 64, wants wider programs or more of them
    Product.UP_GATE: (
        Tile(16, 64, 128, 4, 3),
        Tile(16, 32, 256, 4, 3),
        Tile(16, 16, 256, 4, 4),
        Tile(16, 64, 128, 8, 4),
        Tile(16, 32, 128, 4, 6),
        Tile(16, 32, 128, 2, 4),
    ),
    Product.DOWN: (
        Tile(16, 32, 128, 4, 4),
        Tile(16, 128, 128, 4, 3),
        Tile(16, 32, 256, 4, 3),
        Tile(16, 64, 128, 8, 4),
        Tile(16, 128, 128, 8, 4),
        Tile(16, 32, 128, 2, 4),
    ),
    Product.DENSE: (
        Tile(16, 16, 128, 2, 4),
        Tile(16, 16, 128, 2, 6),
        Tile(16, 32, 128, 4, 6),
        Tile(16, 32, 128, 2, 4),
        Tile(16, 64, 128, 4, 4),
    ),
}
PREFIX_TILES = {
    Product.UP_GATE: (
        Tile(128, 64, 64, 8, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(64, 128, 64, 4, 3),
    ),
    Product.DOWN: (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 4),
        Tile(64, 256, 64, 8, 3),
    ),
}
# Forms of whose products the tiles are in question; 64 rows read all experts, one reads eight.
FORMS = {
    Product.UP_GATE: (WeightForm.PLAIN, WeightForm.FP8, WeightForm.INT4),
    Product.DOWN: (WeightForm.PLAIN, WeightForm.FP8, WeightForm.INT4),
    Product.DENSE: (WeightForm.INT4,),
}
STEP_ROWS = {WeightForm.PLAIN: (64,), WeightForm.FP8: (1, 64), WeightForm.INT4: (1, 64)}
PICTURES = 16


@dataclass(frozen=True)
class Candidate:
    """One product of one form at a number of rows, in one tile."""

    product: Product
    form: WeightForm
    rows: int
    tile: Tile

    def __str__(self) -> str:
        cut = self.tile
        shape = f"{cut.rows}x{cut.columns}x{cut.depth}, {cut.warps} warps, {cut.stages} stages"
        return f"{self.product} {self.form.name.lower()} bfloat16, {self.rows} rows, tile {shape}"


def candidates(run: Run) -> Iterator[Candidate]:
    """Every tile to time, for each product the table's own first."""
    for product, forms in FORMS.items():
        for form in forms:
            yield from _of_kind(run, product, form, PassKind.STEP, STEP_ROWS[form], STEP_TILES[product])
    rows = PICTURES * run.config.prefix_len
    for product, tiles in PREFIX_TILES.items():
        yield from _of_kind(run, product, WeightForm.PLAIN, PassKind.PREFIX, (rows,), tiles)


def _of_kind(
    run: Run, product: Product, form: WeightForm, kind: PassKind, rows: tuple[int, ...], tiles: tuple[Tile, ...]
) -> Iterator[Candidate]:
    own = tile_of(product, kind, form, torch.bfloat16, run.device)
    if form is WeightForm.INT4:  # whose depth is the group of 128, whatever the tile says
        tiles = tuple(tile for tile in tiles if tile.depth == own.depth)
    for tile in dict.fromkeys((own, *tiles)):
        for count in rows:
            yield Candidate(product, form, count, tile)


@torch.inference_mode()
def measure(run: Run) -> None:
    """Microseconds of each product with each tile."""
    flush = flusher(run.device)
    for candidate in candidates(run):
        name = str(candidate)
        with run.if_it_fits(name):
            try:
                ms = time_tile(run, candidate, flush)
            except FAILURES as error:
                run.note(name, str(error).splitlines()[0])
                continue
            run.figure(name, 1e3 * ms, "us")


def time_tile(run: Run, candidate: Candidate, flush: Callable[[], object] | None, repeats: int = 20) -> float:
    """Median milliseconds of one product; the plan is made for the tile's rows."""
    step = dense_step if candidate.product is Product.DENSE else experts_step
    return median_ms(step(run, candidate), run.device, repeats, between=flush)


def experts_step(run: Run, candidate: Candidate) -> Callable[[], Tensor]:
    """One of both products of the experts, over a plan of random routings."""
    moe, dim, tile = run.config.text.moe, run.config.text.dim, candidate.tile
    assert moe is not None
    inputs = ExpertInputs.random(dim, moe, candidate.rows, tile.rows, torch.bfloat16, run.device)
    pair_token, _, _, *blocks = inputs.plan
    inner, is_first = moe.expert_inner_dim, candidate.product is Product.UP_GATE
    outputs, width = (2 * inner, dim) if is_first else (dim, inner)
    weight = random_weight(candidate.form, (moe.num_experts, outputs, width), torch.bfloat16, run.device)
    if is_first:
        return partial(OPS.up_gate, inputs.x_ND, *weight.arguments, pair_token, *blocks, tile.as_list())
    y = normal(len(pair_token), inner, dtype=torch.bfloat16, device=run.device)
    return partial(OPS.down, y, *weight.arguments, *blocks, tile.as_list())


def dense_step(run: Run, candidate: Candidate) -> Callable[[], Tensor]:
    """The projection of q, k and v."""
    dim = run.config.text.dim
    weight = random_weight(candidate.form, (3 * dim, dim), torch.bfloat16, run.device)
    x = normal(candidate.rows, dim, dtype=torch.bfloat16, device=run.device)
    return partial(OPS.dense, x, *weight.arguments, None, candidate.tile.as_list())


@torch.inference_mode()
def compile_tile(run: Run, candidate: Candidate) -> None:
    """Run a candidate once, so that timing does not wait for the compiler."""
    with contextlib.suppress(*FAILURES):  # told where it is timed
        time_tile(run, candidate, None, repeats=1)
