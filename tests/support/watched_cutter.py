"""A cutter in the place of a GPU's: it cuts as decode workers do, and tells what it was given."""

from __future__ import annotations

import numpy as np
from PIL import Image

from md3cli.images.crops import CropConfig, Crops, cut_crops


class WatchedCutter:
    """An `images.crops.Cutter`; `seen` holds the pixels of each picture, in order."""

    def __init__(self, config: CropConfig, longest_side: int = 65_535) -> None:
        self.config, self.longest_side = config, longest_side
        self.seen: list[np.ndarray] = []

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each picture."""
        return [(pixels.shape[1], pixels.shape[0]) for pixels in self.seen]

    def crops_of(self, pixels: np.ndarray) -> Crops:
        self.seen.append(pixels.copy())
        return cut_crops(Image.fromarray(pixels), self.config)
