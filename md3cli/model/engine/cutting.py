"""Pictures that threads of a pool have cut on the engine's device, beside the engine's own work.

A whole photograph is ten times its crops, and waits in a decoder's memory until it is cut. So it goes to the device as
soon as it is decoded, whatever the engine does at that moment, and its crops come back; from then on it is a picture
like any other. Each lane has a stream of its own, before the engine's in the device's order, and one buffer of pinned
memory: a few lanes keep ahead of any decoders. On other devices than CUDA the same calls copy plainly.

Knows nothing of decoders, and of what becomes of the crops.
"""

from __future__ import annotations

import contextlib
from queue import SimpleQueue

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from md3cli.errors import EngineError
from md3cli.images.crops import CropConfig, Crops, cut_crops, select_tiling
from md3cli.model.engine.machine import is_out_of_memory, milestone, send_staged, staging, start_download
from md3cli.model.engine.resize import MAX_SIDE, PictureCutter

NUM_LANES = 2
MOST_BYTES = 128 << 20  # of pixels: 44 megapixels; beside the weights there may be no room for more
FIRST_BUFFER_BYTES = 8 << 20


class DeviceCutter:
    """Cuts pictures on `device`: a `images.crops.Cutter`. Whoever loads asks `PictureCutter.fault` first."""

    longest_side = MAX_SIDE

    def __init__(self, device: torch.device, config: CropConfig) -> None:
        self.device, self.config = device, config
        self._lanes: SimpleQueue[_Lane] = SimpleQueue()
        for _ in range(NUM_LANES):
            self._lanes.put(_Lane(device, config))

    def crops_of(self, pixels: np.ndarray) -> Crops:
        """Return what `cut_crops` gives for an upright picture, uint8 [H, W, 3]; waits for a free lane.

        Pillow cuts what is too large for a device, and where the device has no memory at the moment.

        Raises:
            EngineError: the device has failed.
        """
        if pixels.nbytes <= MOST_BYTES:
            lane = self._lanes.get()
            try:
                return lane.crops_of(pixels)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise EngineError(f"the model failed on {self.device}: {error}") from error
            finally:
                self._lanes.put(lane)
        return cut_crops(Image.fromarray(pixels), self.config)


class _Lane:
    """One picture at a time, from the host and back."""

    def __init__(self, device: torch.device, config: CropConfig) -> None:
        self._device = device
        self._cutter = PictureCutter(device, config)
        # The engine's kernels are long, and these are short: they go first.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @torch.inference_mode()
    def crops_of(self, pixels: np.ndarray) -> Crops:
        height, width = pixels.shape[:2]
        size, tiling = self._cutter.config.crop_size, select_tiling(width, height, self._cutter.config)
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            cut = self._cutter.cut(send_staged(self._staged(pixels), self._device), tiling)
            arriving = start_download(cut)
            if (wait := milestone(self._device)) is not None:
                wait()
        crops = np.empty((tiling.num_crops, size, size, 3), np.uint8)
        crops[:] = arriving.numpy()  # the only tile of an untiled picture is its global crop
        return Crops(crops, tiling)

    def _staged(self, pixels: np.ndarray) -> Tensor:
        """Return a copy of `pixels` in this lane's buffer."""
        if self._buffer.numel() < pixels.size:
            self._buffer = staging((max(pixels.size, FIRST_BUFFER_BYTES),), torch.uint8, self._device)
        staged = self._buffer[: pixels.size].view(pixels.shape)
        # numpy copies in this thread; torch would start threads of its own for each thread that comes here.
        np.copyto(staged.numpy(), pixels)
        return staged
