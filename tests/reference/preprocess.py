"""Tiling and crops of a picture, with PIL (specification, section 4)."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from reference.network import Config


def tiling_of(width: int, height: int, vision: dict) -> tuple[int, int]:
    """(rows, columns) of local tiles; may exceed `max_crops` for extreme shapes."""
    patch, margin = vision["enc_patch_size"], vision["overlap_margin"]
    most = vision["max_crops"]
    window = (vision["crop_size"] // patch - 2 * margin) * patch
    h, w = height - 2 * margin * patch, width - 2 * margin * patch
    if h <= window or w <= window:
        return 1, 1
    nh, nw = math.ceil(h / window), math.ceil(w / window)
    if nh * nw > most:
        ratio = math.sqrt(most / (nh * nw))
        return max(1, math.floor(nh * ratio)), max(1, math.floor(nw * ratio))
    rows = max(nh, math.floor(math.sqrt(most * h / w)))
    cols = max(nw, math.floor(math.sqrt(most * w / h)))
    if rows * cols > most:
        if cols > rows:
            cols = math.floor(most / rows)
        else:
            rows = math.floor(most / cols)
    return max(1, rows), max(1, cols)


def crops_of(image: Image.Image, config: Config) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 crops [1 + rows*cols, S, S, 3], global first, and the tiling."""
    vision = config["vision"]
    side, patch = vision["crop_size"], vision["enc_patch_size"]
    margin = vision["overlap_margin"] * patch
    window = side - 2 * margin
    picture = image.convert("RGB")
    rows, cols = tiling_of(picture.width, picture.height, vision)
    overall = resize(picture, side, side)
    enlarged = resize(picture, cols * window + 2 * margin, rows * window + 2 * margin)
    crops = [np.asarray(overall)]
    for row in range(rows):
        for col in range(cols):
            left, top = col * window, row * window
            crops.append(np.asarray(enlarged.crop((left, top, left + side, top + side))))
    return np.stack(crops), (rows, cols)


def resize(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resize the width, then the height; the height first where it shrinks and is more than 100 times the width.

    That is what one call of Pillow 12.2 or 12.3 does. Up to 12.1 the width always comes first; 13 has another rule.
    """
    is_thread = picture.height > 100 * picture.width and picture.height > height
    between = (picture.width, height) if is_thread else (width, picture.height)
    return picture.resize(between, Image.Resampling.LANCZOS).resize((width, height), Image.Resampling.LANCZOS)
