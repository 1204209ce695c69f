"""The experts' products with other tiles than the table's: what a card's row of `tiles.BY_CARD` is filled from.

Each candidate is timed on the inputs of a full pass; the table's own tile is among them. A tile that a
card has no shared memory for is noted. Figures have no prediction: they are there to choose by.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from gpu.triton_cases import ExpertInputs, normal, random_weight
from md3cli.model.kernels.tiles import Product, Tile, WeightForm, tile_of
from md3cli.model.kernels.weights import KernelWeight
from md3cli.model.network.text import PassKind

from .child import Run
from .timing import flusher, median_ms

OPS = torch.ops.md3
FAILURES = (OutOfResources, PTXASError, RuntimeError)  # of a card with less shared memory, or fewer registers
STEP_ROWS, PICTURES = 64, 16
CANDIDATES: dict[tuple[Product, PassKind], tuple[Tile, ...]] = {
    (Product.UP_GATE, PassKind.STEP): (Tile(16, 64, 128, 4, 3), Tile(16, 32, 256, 4, 3), Tile(16, 16, 256, 4, 4)),
    (Product.DOWN, PassKind.STEP): (Tile(16, 32, 128, 4, 4), Tile(16, 128, 128, 4, 3), Tile(16, 32, 256, 4, 3)),
    (Product.UP_GATE, PassKind.PREFIX): (
        Tile(128, 64, 64, 8, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(64, 128, 64, 4, 3),
    ),
    (Product.DOWN, PassKind.PREFIX): (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 4),
        Tile(64, 256, 64, 8, 3),
    ),
}
FORMS = {PassKind.STEP: (WeightForm.PLAIN, WeightForm.FP8), PassKind.PREFIX: (WeightForm.PLAIN,)}


def tiles(run: Run) -> Iterator[tuple[Product, PassKind, WeightForm, Tile]]:
    """Every tile to time, the table's own first."""
    for (product, kind), others in CANDIDATES.items():
        for form in FORMS[kind]:
            own = tile_of(product, kind, form, torch.bfloat16, run.device)
            for tile in dict.fromkeys((own, *others)):
                yield product, kind, form, tile


@torch.inference_mode()
def compare_tiles(run: Run) -> None:
    """Microseconds of each product with each tile."""
    flush = flusher(run.device)
    for product, kind, form, tile in tiles(run):
        rows = rows_of(run, kind)
        shape = f"{tile.rows}x{tile.columns}x{tile.depth}, {tile.warps} warps, {tile.stages} stages"
        name = f"{product} {form.name.lower()} bfloat16, {rows} rows, tile {shape}"
        with run.if_it_fits(name):
            try:
                ms = time_tile(run, product, form, tile, rows, flush)
            except FAILURES as error:
                run.note(name, str(error).splitlines()[0])
                continue
            run.figure(name, 1e3 * ms, "us")


def rows_of(run: Run, kind: PassKind) -> int:
    return STEP_ROWS if kind is PassKind.STEP else PICTURES * run.config.prefix_len


def time_tile(
    run: Run,
    product: Product,
    form: WeightForm,
    tile: Tile,
    rows: int,
    flush: Callable[[], object] | None,
    repeats: int = 20,
) -> float:
    """Median milliseconds of one product; the plan is made for the tile's rows."""
    moe, dim, dtype = run.config.text.moe, run.config.text.dim, torch.bfloat16
    assert moe is not None
    inputs = ExpertInputs.random(dim, moe, rows, tile.rows, dtype, run.device)
    pair_token, _, _, *blocks = inputs.plan
    inner, experts = moe.expert_inner_dim, moe.num_experts
    is_first = product is Product.UP_GATE
    outputs, width = (2 * inner, dim) if is_first else (dim, inner)
    weight: KernelWeight = random_weight(form, (experts, outputs, width), dtype, run.device)
    x = inputs.x_ND if is_first else normal(len(pair_token), inner, dtype=dtype, device=run.device)

    def step() -> object:
        if is_first:
            return OPS.up_gate(x, *weight.arguments, pair_token, *blocks, tile.as_list())
        return OPS.down(x, *weight.arguments, *blocks, tile.as_list())

    return median_ms(step, run.device, repeats, between=flush)


@torch.inference_mode()
def compile_tile(run: Run, product: Product, form: WeightForm, tile: Tile) -> None:
    """Run a candidate once, so that timing does not wait for the compiler."""
    with contextlib.suppress(*FAILURES):  # told where it is timed
        time_tile(run, product, form, tile, STEP_ROWS, None, repeats=1)
