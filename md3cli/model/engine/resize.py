"""Crops of a decoded picture, cut on the device that encodes them: byte for byte those of `images.crops.cut_crops`.

Pillow resizes 8-bit pictures in whole numbers: Lanczos weights with 22 bits behind the point, sums of 32 bits, one
rounding to 8 bits after each axis. So a GPU can give Pillow's bytes, and a decoder need not cut. The weights are
computed here in float64 as Pillow's C code does (Resample.c: precompute_coeffs, normalize_coeffs_8bpc), once for each
pair of an old and a new length. One kernel resizes along one axis (`kernels/resize_kernels.py`); `plain_resize_axis` is
its plain twin, and what other devices than CUDA run.

Knows nothing of files, of memory shared with decoders, and of what becomes of the crops.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from md3cli.images.crops import CropConfig, Tiling, cut_crops, select_tiling
from md3cli.model.engine.machine import upload
from md3cli.model.kernels.tiles import TAPS_STEP

LOBES = 3.0  # of Lanczos' filter, on each side
FRACTION_BITS = 22  # of a weight: 32 less 8 for a pixel's value and 2 for what the sum of weights may exceed 1 by
NEAR_HALF = 1e-6  # in units of the last bit; numpy's sine differs from the C library's by 1e-8 of them
# The longest side that is cut here, a JPEG's longest. A table of weights has 6 numbers for each pixel of the longer of
# both lengths: 1.6 MB. A row of 2^28 pixels would need 13 GB in float64.
MAX_SIDE = 65_535
TABLE_BYTES = 64 << 20  # of tables kept on the device: those of 160 sizes of 12 megapixels
WIDTH_FIRST_UP_TO = 100  # times as tall as wide; `images.crops` says why
# Sizes of the noise that is compared with Pillow: many tiles, one, more rows than columns of tiles, a portrait that
# begins with its height, single pixels, a short sum (fewer than `TAPS_STEP` inputs).
TRIAL_SIZES = ((1203, 817), (479, 641), (613, 1499), (3, 401), (1, 1), (2, 150), (389, 2))

ResizeAxis = Callable[[Tensor, Tensor, int], Tensor]


def can_cut(width: int, height: int) -> bool:
    """Return True for a picture whose sides are not too long to be cut here."""
    return min(width, height) > 0 and max(width, height) <= MAX_SIDE


class PictureCutter:
    """Cuts pictures that lie on `device`; whoever loads asks `fault` first. For one thread and one CUDA stream."""

    def __init__(self, device: torch.device, config: CropConfig) -> None:
        self.device, self.config = device, config
        self._resize_axis: ResizeAxis = plain_resize_axis
        if device.type == "cuda":
            from md3cli.model.kernels.forms import OPS

            self._resize_axis = OPS.resize_axis
        self._tables: OrderedDict[tuple[int, int], Tensor] = OrderedDict()  # by old and new length
        self._table_bytes = 0

    @torch.inference_mode()
    def fault(self) -> str | None:
        """Compare pictures of noise with Pillow; say in one line what differs, None where every byte is equal.

        Also compiles the kernel, and waits for the device. Pillow's build on this machine may compute weights with
        other instructions than ours does: then pictures have to be cut by Pillow, as they are elsewhere.
        """
        noise = np.random.default_rng(seed=0)
        for width, height in TRIAL_SIZES:
            pixels = noise.integers(0, 256, (height, width, 3), np.uint8)
            wanted = cut_crops(Image.fromarray(pixels), self.config)
            found = self.cut(upload(torch.from_numpy(pixels), self.device), wanted.tiling).cpu().numpy()
            if num_different := int(np.count_nonzero(found != wanted.pixels[: len(found)])):
                return (
                    f"of a picture of {width} x {height} pixels, {num_different:,} of {found.size:,} values differ "
                    "from Pillow's"
                )
        return None

    @torch.inference_mode()
    def cut(self, pixels: Tensor, tiling: Tiling) -> Tensor:
        """Return the distinct crops of a picture, uint8 [N, S, S, 3] on the device, as the encoder wants them.

        That is the global crop and then the tiles in row-major order; of a picture with one tile, which equals
        the global crop, the global crop alone.

        Args:
            pixels: the upright picture, uint8 [H, W, 3], contiguous, on the device; sides within `can_cut`. The device
                reads it later: it must stay as it is until the stream has come past this call.
            tiling: `select_tiling`'s for its size.
        """
        assert pixels.dtype is torch.uint8, pixels.dtype
        height, width = pixels.shape[:2]
        assert can_cut(width, height), f"{width} x {height}"
        assert tiling == select_tiling(width, height, self.config), tiling
        size, window, margin = self.config.crop_size, self.config.window_px, self.config.margin_px
        whole_crop = self.resize(pixels, size, size)
        if tiling == (1, 1):
            return whole_crop[None]
        tiled = self.resize(pixels, tiling.cols * window + 2 * margin, tiling.rows * window + 2 * margin)
        crops = pixels.new_empty(1 + tiling.rows * tiling.cols, size, size, 3)
        crops[0].copy_(whole_crop)
        tiles = tiled.unfold(0, size, window).unfold(1, size, window)  # [rows, cols, 3, S, S], nothing is moved yet
        crops[1:].view(*tiling, size, size, 3).copy_(tiles.permute(0, 1, 3, 4, 2))
        return crops

    def resize(self, pixels: Tensor, width: int, height: int) -> Tensor:
        """Return [H, W, 3] resized to [height, width, 3], the axes in the order of `images.crops`."""
        old_height, old_width = pixels.shape[:2]
        is_height_first = old_height > WIDTH_FIRST_UP_TO * old_width and old_height > height
        for axis in (0, 1) if is_height_first else (1, 0):
            old, new = pixels.shape[axis], (height, width)[axis]
            if old != new:
                pixels = self._resize_axis(pixels, self._table(old, new), axis)
        return pixels

    def _table(self, old: int, new: int) -> Tensor:
        table = self._tables.get((old, new))
        if table is None:
            table = upload(torch.from_numpy(weight_table(old, new)), self.device)
            self._tables[old, new] = table
            self._table_bytes += table.nbytes
            while self._table_bytes > TABLE_BYTES and len(self._tables) > 1:
                # Kernels in line may still read it: its memory goes to what the same stream does after them.
                self._table_bytes -= self._tables.popitem(last=False)[1].nbytes
        self._tables.move_to_end((old, new))
        return table


# -- weights ---------------------------------------------------------------------------------------


def weight_table(old: int, new: int) -> np.ndarray:
    """Return how an axis of `old` pixels becomes one of `new`: int32 [1 + T, new].

    Row 0 holds the first input of each output, the rows below the weights of that input and of those after it, in
    units of 2^-22. All T inputs of an output exist: where Pillow has fewer, zeros stand before or after its weights.
    """
    scale = old / new
    widening = max(scale, 1.0)
    support = LOBES * widening
    centre = (np.arange(new) + 0.5) * scale
    # Casts cut off what stands behind the point, as C's do; they come before the limits, as there.
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), old)
    num_taps = int((end - first).max())
    padded = -(-num_taps // TAPS_STEP) * TAPS_STEP
    num_taps = padded if padded <= old else num_taps
    start = np.minimum(first, old - num_taps)
    at = start[:, None] + np.arange(num_taps)
    is_used = (at >= first[:, None]) & (at < end[:, None])
    weight = np.where(is_used, _lanczos((at - centre[:, None] + 0.5) * (1.0 / widening)), 0.0)
    scaled = weight / weight.sum(axis=1, keepdims=True) * (1 << FRACTION_BITS)
    for i in np.flatnonzero((np.abs(np.abs(scaled) % 1 - 0.5) < NEAR_HALF).any(axis=1)):
        exact = list(_weights_in_order(int(first[i]), int(end[i]), float(centre[i]), 1.0 / widening))
        scaled[i, first[i] - start[i] : end[i] - start[i]] = exact
    rounded = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32)
    return np.ascontiguousarray(np.vstack([start.astype(np.int32), rounded.T]))


def _lanczos(x: np.ndarray) -> np.ndarray:
    is_inside = (x >= -LOBES) & (x < LOBES)
    return np.where(is_inside, _sinc(x) * _sinc(x / LOBES), 0.0)


def _sinc(x: np.ndarray) -> np.ndarray:
    angle = np.where(x == 0.0, 1.0, x * math.pi)
    return np.where(x == 0.0, 1.0, np.sin(angle) / angle)


def _weights_in_order(first: int, end: int, centre: float, narrowing: float) -> Iterator[float]:
    """Yield the weights of one output with the C library's sine, added up one by one as Pillow does."""

    def sinc(x: float) -> float:
        return 1.0 if x == 0.0 else math.sin(x * math.pi) / (x * math.pi)

    weights, total = [], 0.0
    for at in range(first, end):
        x = (at - centre + 0.5) * narrowing
        weights.append(sinc(x) * sinc(x / LOBES) if -LOBES <= x < LOBES else 0.0)
        total += weights[-1]
    yield from (weight / total * (1 << FRACTION_BITS) for weight in weights)


# -- one axis --------------------------------------------------------------------------------------


def plain_resize_axis(pixels: Tensor, table: Tensor, axis: int) -> Tensor:
    """Resize uint8 [H, W, 3] along axis 0 or 1 by a `weight_table`, in the arithmetic of the kernel."""
    first, weights = table[0], table[1:]
    shape = [1, 1, 1]
    shape[axis] = -1
    # 32 bits hold every sum: the absolute values of an output's weights add up to less than 1.6 (`test_resize.py`
    # looks), and 255 * 1.6 * 2^22 is 80 % of 2^31.
    total = torch.full((), 1 << (FRACTION_BITS - 1), dtype=torch.int32, device=pixels.device)
    for tap, weight in enumerate(weights):
        total = total + pixels.index_select(axis, first + tap).int() * weight.view(shape)
    return (total >> FRACTION_BITS).clamp_(0, 255).to(torch.uint8)
