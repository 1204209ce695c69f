"""Crops on their way to the device that encodes them.

Nothing here waits for a CUDA device: crops of pictures that stand together go up in one piece of pinned memory, which
torch keeps for the next one of its power of two. Apart from encoder.py, which knows nothing of copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from md3cli.images.crops import PreparedImage, Tiling
from md3cli.model.engine.machine import send_staged, staging


def send_crops(images: Sequence[PreparedImage], device: torch.device) -> Tensor:
    """Return the distinct crops of all pictures, in order, in one block on `device`: uint8 [N, S, S, 3]."""
    counts = [num_distinct_crops(image.tiling) for image in images]
    staged = staging((sum(counts), *images[0].crops.shape[1:]), torch.uint8, device)
    for part, image in zip(staged.split(counts), images, strict=True):
        part.copy_(torch.from_numpy(image.crops)[: len(part)])
    return send_staged(staged, device)


def num_distinct_crops(tiling: Tiling) -> int:
    """Return how many crops of a picture go through the encoder: the only tile of an untiled one is its global crop."""
    return tiling.num_crops if tiling != (1, 1) else 1
