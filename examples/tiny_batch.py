"""Samples and their tasks as tensors: all tasks of one picture share that picture's prefix.

Tasks are packed into rows of one length behind their picture's prefix. Positions restart after the
prefix for every task and a block mask keeps tasks apart, so that a batch computes exactly what its
tasks would compute alone, with little padding and few, large matrix products.

Shape suffixes: B pictures, R rows, T positions of a row, P prefix length, G grid cells, N crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from tiny_pool import Sample
from tiny_tasks import NO_TARGET, TokenStream
from torch import Tensor
from world import COLOURS, KINDS
from world_draw import Picture

from md3cli.images.crops import Tiling

ROW_LENGTH = 96  # positions; the longest task must fit
# Sizes come in steps, because every new shape of a bfloat16 product costs a compilation on CPU.
ROWS_STEP = 4
CROPS_STEP = 8
NUM_CELL_VALUES = 6  # offset x, y in cells; log2 of width, height; position x, y in cells
KIND_INDEX = {kind: i for i, kind in enumerate(KINDS)}
COLOUR_INDEX = {colour: i for i, colour in enumerate(COLOURS)}


@dataclass(frozen=True, slots=True)
class DenseTargets:
    """What each cell of the grid shows, [B, G]: labels are -1 where no shape is seen.

    `values` [B, G, 6]: from the cell's centre to the shape's, log2 of its width and height, and the
    shape's centre in the picture; distances in cells.
    """

    kind: Tensor
    colour: Tensor
    rank: Tensor
    is_centre: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class TaskRows:
    """Rows of packed tasks, padded at the end."""

    pictures: Tensor  # [R], which picture's prefix a row attends to
    ids: Tensor  # [R, T]
    values: Tensor  # [R, T, 2], NaN for tokens
    positions: Tensor  # [R, T]
    mask: Tensor  # bool [R, 1, T, P + T]
    targets: Tensor  # [R, T], -100 for none
    weights: Tensor  # [R, T]
    coords: Tensor  # [R, T], NaN for none
    sizes: Tensor  # [R, T, 2], NaN for none


@dataclass(frozen=True, slots=True)
class Batch:
    """A training batch."""

    crops: Tensor  # uint8 [N, S, S, 3], picture after picture; the last few may be unused
    tilings: tuple[Tiling, ...]
    rows: TaskRows
    dense: DenseTargets

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`."""
        rows, dense = TaskRows(*_moved(self.rows, device)), DenseTargets(*_moved(self.dense, device))
        return Batch(self.crops.to(device), self.tilings, rows, dense)


def _moved(tensors: TaskRows | DenseTargets, device: torch.device) -> list[Tensor]:
    return [getattr(tensors, field.name).to(device) for field in fields(tensors)]


def dense_targets(pictures: Sequence[Picture], grid: int) -> DenseTargets:
    """Labels of every grid cell; the cell that holds a shape's centre belongs to that shape."""
    shape = (len(pictures), grid * grid)
    kind, colour, rank = (np.full(shape, -1, dtype=np.int64) for _ in range(3))
    is_centre, values = np.zeros(shape, dtype=np.float32), np.zeros((*shape, NUM_CELL_VALUES), dtype=np.float32)
    for row, picture in enumerate(pictures):
        for cell, place in _cells(picture, grid, is_centre[row]).items():
            instance = picture.instances[place]
            left, top, right, bottom = instance.box_xyxy
            x, y = instance.centre_x * grid, instance.centre_y * grid
            kind[row, cell], colour[row, cell] = KIND_INDEX[instance.kind], COLOUR_INDEX[instance.colour]
            rank[row, cell] = place
            values[row, cell] = (
                *(x - cell % grid - 0.5, y - cell // grid - 0.5),
                *(np.log2(right - left), np.log2(bottom - top)),
                *(x, y),
            )
    return DenseTargets(*(torch.from_numpy(a) for a in (kind, colour, rank, is_centre, values)))


def _cells(picture: Picture, grid: int, is_centre: NDArray[np.float32]) -> dict[int, int]:
    """Cell -> place (from left to right) of the shape it shows; marks the centres' cells."""
    place_of = {instance.number: place for place, instance in enumerate(picture.instances)}
    rows, cols = (((np.arange(grid) + 0.5) / grid * side).astype(int) for side in picture.owners.shape)
    seen = picture.owners[np.ix_(rows, cols)].ravel()
    cells = {cell: place_of[int(owner)] for cell, owner in enumerate(seen) if owner >= 0}
    for place, instance in enumerate(picture.instances):
        cell = min(grid - 1, int(instance.centre_y * grid)) * grid + min(grid - 1, int(instance.centre_x * grid))
        cells[cell] = place
        is_centre[cell] = 1.0
    return cells


def fill_rows(streams: Sequence[TokenStream]) -> list[list[TokenStream]]:
    """Distribute one picture's tasks over rows: longest first, each into the first row with room for it."""
    rows: list[list[TokenStream]] = []
    for stream in sorted(streams, key=len, reverse=True):
        assert len(stream) <= ROW_LENGTH, f"a task of {len(stream)} positions"
        for row in rows:
            if sum(map(len, row)) + len(stream) <= ROW_LENGTH:
                row.append(stream)
                break
        else:
            rows.append([stream])
    return rows


def _padded(rows: Sequence[Sequence[TokenStream]], name: str, fill: float) -> Tensor:
    values = [[value for stream in row for value in getattr(stream, name)] for row in rows]
    width = (len(values[0][0]),) if isinstance(values[0][0], tuple) else ()
    out = np.full((len(rows), ROW_LENGTH, *width), fill, dtype=np.float32)
    for row, entries in enumerate(values):
        if entries:
            out[row, : len(entries)] = entries
    return torch.from_numpy(out)


def _layout(rows: Sequence[Sequence[TokenStream]], prefix_len: int) -> tuple[Tensor, Tensor]:
    """Positions [R, T] and mask [R, 1, T, P + T]; unused positions see themselves alone."""
    positions = np.zeros((len(rows), ROW_LENGTH), dtype=np.int64)
    mask = np.zeros((len(rows), ROW_LENGTH, prefix_len + ROW_LENGTH), dtype=bool)
    mask[:, np.arange(ROW_LENGTH), prefix_len + np.arange(ROW_LENGTH)] = True
    for number, row in enumerate(rows):
        start = 0
        for stream in row:
            stop = start + len(stream)
            positions[number, start:stop] = np.arange(len(stream)) + (prefix_len if stream.sees_image else 0)
            mask[number, start:stop, :prefix_len] = stream.sees_image
            mask[number, start:stop, prefix_len + start : prefix_len + stop] = np.tri(len(stream), dtype=bool)
            start = stop
    return torch.from_numpy(positions), torch.from_numpy(mask)[:, None]


def pack(samples: Sequence[Sample], tasks: Sequence[Sequence[TokenStream]], grid: int) -> Batch:
    """A batch of pictures, each with its own list of tasks."""
    filled = [(picture, row) for picture, streams in enumerate(tasks) for row in fill_rows(streams)]
    filled += [(0, [])] * (-len(filled) % ROWS_STEP)
    rows = [row for _, row in filled]
    positions, mask = _layout(rows, 1 + grid * grid)
    crops = np.concatenate([sample.crops for sample in samples])
    unused = np.zeros((-len(crops) % CROPS_STEP, *crops.shape[1:]), dtype=np.uint8)
    return Batch(
        crops=torch.from_numpy(np.concatenate([crops, unused])),
        tilings=tuple(sample.tiling for sample in samples),
        rows=TaskRows(
            pictures=torch.tensor([picture for picture, _ in filled]),
            ids=_padded(rows, "ids", 0).long(),
            values=_padded(rows, "values", np.nan),
            positions=positions,
            mask=mask,
            targets=_padded(rows, "targets", NO_TARGET).long(),
            weights=_padded(rows, "weights", 0),
            coords=_padded(rows, "coords", np.nan),
            sizes=_padded(rows, "sizes", np.nan),
        ),
        dense=dense_targets([sample.picture for sample in samples], grid),
    )
