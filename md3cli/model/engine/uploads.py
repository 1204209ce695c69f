"""Pictures on their way to the device that encodes them: crops go up as they are, whole pictures are cut there.

Nothing here waits for a CUDA device. Crops of pictures that stand together go up in one piece of pinned memory, which
torch keeps for the next one of its power of two. A whole picture goes up from the memory where its decoder wrote it, on
a stream of its own, while the device still computes; two buffers on the device take turns, so that 64 photographs need
no more room there than two. On every other device the same calls copy plainly. Apart from encoder.py, which knows
nothing of streams and of memory shared with decoders.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from md3cli.images.arena import Arena
from md3cli.images.crops import PreparedImage, Tiling, UncutImage
from md3cli.model.engine.machine import staging
from md3cli.model.engine.resize import MAX_SIDE, PictureCutter

NUM_BUFFERS = 2

# Memory shared with decoders that CUDA was asked to pin, for the whole process; whether it did.
_is_pinned: weakref.WeakKeyDictionary[Arena, bool] = weakref.WeakKeyDictionary()


class Uploads:
    """Brings pictures to `device`; used by one thread. Without `cutter` all pictures have to be cut before."""

    def __init__(self, device: torch.device, cutter: PictureCutter | None = None) -> None:
        self.device, self.cutter = device, cutter
        self._lane: _CopyLane | None = None  # made for the first whole picture

    @property
    def longest_whole(self) -> int:
        """The longest side of a picture that may come whole; 0 where all have to be cut before."""
        return MAX_SIDE if self.cutter is not None else 0

    def crops_of(self, images: Sequence[PreparedImage | UncutImage]) -> Tensor:
        """Return the distinct crops of all pictures, in order, in one block on the device: uint8 [N, S, S, 3]."""
        counts = [num_distinct_crops(image.tiling) for image in images]
        side = self._side(images[0])
        block = torch.empty((sum(counts), side, side, 3), dtype=torch.uint8, device=self.device)
        first = 0
        for is_whole, group in groupby(images, key=lambda image: isinstance(image, UncutImage)):
            some = list(group)
            end = first + sum(num_distinct_crops(image.tiling) for image in some)
            (self._cut if is_whole else self._copy)(block[first:end], some)
            first = end
        return block

    def settle(self) -> None:
        """Let go of the pictures that have arrived, so that their decoders can write there again; waits for none."""
        if self._lane is not None:
            self._lane.settle()

    def _side(self, image: PreparedImage | UncutImage) -> int:
        if isinstance(image, PreparedImage):
            return int(image.crops.shape[1])
        assert self.cutter is not None, "a whole picture for an engine that cuts none"
        return self.cutter.config.crop_size

    def _copy(self, target: Tensor, images: Sequence[PreparedImage | UncutImage]) -> None:
        """Copy pictures that were cut before to `target`, in one piece."""
        is_cuda = self.device.type == "cuda"
        staged = staging(target.shape, target.dtype, self.device) if is_cuda else target
        for part, image in zip(_parts(staged, images), images, strict=True):
            assert isinstance(image, PreparedImage)
            part.copy_(torch.from_numpy(image.crops)[: len(part)])
        if is_cuda:
            target.copy_(staged, non_blocking=True)

    def _cut(self, target: Tensor, images: Sequence[PreparedImage | UncutImage]) -> None:
        """Cut whole pictures into `target`."""
        assert self.cutter is not None, "a whole picture for an engine that cuts none"
        for part, image in zip(_parts(target, images), images, strict=True):
            assert isinstance(image, UncutImage)
            assert image.pixels is not None
            pixels = torch.from_numpy(image.pixels)
            if self.device.type != "cuda":
                part.copy_(self.cutter.cut(pixels.to(self.device), image.tiling))
                continue
            self._lane = self._lane or _CopyLane(self.device)
            part.copy_(self.cutter.cut(self._lane.bring(pixels, image.arena), image.tiling))
            self._lane.is_read()


def _parts(block: Tensor, images: Sequence[PreparedImage | UncutImage]) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = block.split([num_distinct_crops(image.tiling) for image in images])
    return parts


class _CopyLane:
    """A stream that copies whole pictures to a CUDA device beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device)] * NUM_BUFFERS
        self._read: list[torch.cuda.Event | None] = [None] * NUM_BUFFERS  # when the last cut had read the buffer
        self._turn = 0
        # What is copied from, with what keeps it pinned, until the copy is over: torch knows only its own memory.
        self._under_way: deque[tuple[torch.cuda.Event, Tensor, Arena | None]] = deque()

    def bring(self, pixels: Tensor, arena: Arena | None) -> Tensor:
        """Copy `pixels`, which lie in `arena`, to the device; the current stream waits for them, the host does not.

        The result holds until the next but one call; `is_read` is called before the next.
        """
        if arena is None or not pin(arena, self._device):
            pixels, arena = staging(pixels.shape, pixels.dtype, self._device).copy_(pixels), None
        computing = torch.cuda.current_stream(self._device)
        if self._buffers[self._turn].numel() < pixels.numel():
            self._buffers[self._turn] = torch.empty(pixels.numel(), dtype=torch.uint8, device=self._device)
            self._stream.wait_stream(computing)  # which may still use what the memory was before
        elif (read := self._read[self._turn]) is not None:
            self._stream.wait_event(read)
        target = self._buffers[self._turn][: pixels.numel()].view(pixels.shape)
        with torch.cuda.stream(self._stream):
            target.copy_(pixels, non_blocking=True)
            arrived = self._stream.record_event()
        computing.wait_event(arrived)
        self._under_way.append((arrived, pixels, arena))
        return target

    def is_read(self) -> None:
        """Say that all that reads the last picture has been launched."""
        self._read[self._turn] = torch.cuda.current_stream(self._device).record_event()
        self._turn = (self._turn + 1) % NUM_BUFFERS

    def settle(self) -> None:
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()


def num_distinct_crops(tiling: Tiling) -> int:
    """Return how many crops of a picture go through the encoder: the only tile of an untiled one is its global crop."""
    return tiling.num_crops if tiling != (1, 1) else 1


def pin(arena: Arena, device: torch.device) -> bool:
    """Have CUDA pin an arena, once, until it goes; return whether it is pinned."""
    if arena not in _is_pinned:
        whole = torch.from_numpy(arena.whole())
        runtime = torch.cuda.cudart()
        _is_pinned[arena] = int(runtime.cudaHostRegister(whole.data_ptr(), whole.nbytes, 0)) == 0
        if _is_pinned[arena]:
            # The finaliser holds the memory, so that it is unmapped after CUDA has let it go.
            weakref.finalize(arena, _unpin, whole).atexit = False
        else:
            _forget_error(device)
    return _is_pinned[arena]


def _unpin(whole: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(whole.data_ptr())


def _forget_error(device: torch.device) -> None:
    """Have torch find, and so forget, the error that CUDA keeps of a refused call; else the next kernel had it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
