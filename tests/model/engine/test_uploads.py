"""Crops on their way to the device: those of all pictures, in order, each once."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from md3cli.images.crops import CropConfig, PreparedImage, cut_crops
from md3cli.model.engine.uploads import num_distinct_crops, send_crops

CFG = CropConfig(crop_size=42, patch_size=6, overlap_margin=2, max_crops=12)


def test_distinct_crops_of_all_pictures_go_in_one_block() -> None:
    images = []
    for width, height in ((300, 200), (30, 20), (64, 48), (90, 700), (1, 1)):
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        images.append(PreparedImage(*cut_crops(Image.fromarray(pixels), CFG), width, height, f"{width}"))
    block = send_crops(images, torch.device("cpu"))
    wanted = [image.crops if image.tiling != (1, 1) else image.crops[:1] for image in images]
    np.testing.assert_array_equal(block.numpy(), np.concatenate(wanted))
    assert [num_distinct_crops(image.tiling) for image in images] == [len(crops) for crops in wanted]
