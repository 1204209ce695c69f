"""Random pictures and requests for a model's config; every skill, awkward shapes and words included."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw

from reference.network import Config

WORDS = ["red square", "sign", "car", "person", "café", "日本語", "small box", " two  spaces ", "x", "blue\ntriangle"]
QUESTIONS = ["What is shown in the image?", "How many objects are there?", "Why", " naïve?  ", "日本 or 二?", "1 + 1 ="]
MODES = ["RGB", "RGB", "RGB", "L", "LA", "RGBA", "P", "1", "CMYK"]


def draw_size(rng: random.Random, config: Config) -> tuple[int, int]:
    """Width and height: around the crop's side, several crops wide, a sliver, or a single pixel."""
    side = config["vision"]["crop_size"]
    kind = rng.choice(["near", "near", "large", "large", "sliver", "strip", "dot"])
    if kind == "near":
        return rng.randint(side // 2, 2 * side), rng.randint(side // 2, 2 * side)
    if kind == "large":
        return rng.randint(side, 6 * side), rng.randint(side, 6 * side)
    if kind == "dot":
        return rng.randint(1, 2), rng.randint(1, 2)
    long = rng.randint(4 * side, 9 * side)
    short = rng.randint(1, 5) if kind == "sliver" else rng.randint(side, side + side // 2)
    return (long, short) if rng.random() < 0.5 else (short, long)


def draw_image(rng: random.Random, config: Config) -> Image.Image:
    """Noise over a gradient with a few shapes, in any mode PIL may hand to the model."""
    width, height = draw_size(rng, config)
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 96, (height, width, 3))
    slope = np.linspace(0, 159, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    image = Image.fromarray((noise + slope).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 3)):
        x, y = rng.randrange(width), rng.randrange(height)
        corner = (x + rng.randint(0, width), y + rng.randint(0, height))
        draw.rectangle(((x, y), corner), fill=tuple(rng.randrange(256) for _ in range(3)))
    mode = rng.choice(MODES)
    if mode == "RGBA":
        image.putalpha(rng.randrange(256))
    return image.convert(mode)


def draw_refs(rng: random.Random) -> list[list[float]]:
    refs: list[list[float]] = []
    for _ in range(rng.randint(1, 3)):
        x, y = sorted(rng.random() for _ in range(2)), sorted(rng.random() for _ in range(2))
        refs.append([x[0], y[0], x[1], y[1]] if rng.random() < 0.5 else [x[0], y[0]])
    return refs


def draw_requests(rng: random.Random) -> list[dict]:
    """Requests for one picture: every skill once, with and without what it may carry."""
    words = rng.sample(WORDS, 4)
    questions = rng.sample(QUESTIONS, 4)
    tokens = [rng.choice([1, 2, 7, 12, 20]) for _ in range(6)]
    return [
        {"skill": "caption", "length": rng.choice(["short", "normal", "long"]), "max_tokens": tokens[0]},
        {"skill": "query", "question": questions[0], "reasoning": False, "max_tokens": tokens[1]},
        {"skill": "query", "question": questions[1], "reasoning": True, "max_tokens": tokens[2]},
        {
            "skill": "query",
            "question": questions[2],
            "reasoning": rng.random() < 0.5,
            "spatial_refs": draw_refs(rng),
            "max_tokens": tokens[3],
        },
        {"skill": "detect", "object": words[0], "max_objects": rng.randint(1, 6)},
        {"skill": "point", "object": words[1], "max_objects": rng.randint(1, 6)},
        {"skill": "point", "object": words[2], "spatial_refs": draw_refs(rng), "max_objects": 3},
        {"skill": "segment", "object": words[3], "max_tokens": tokens[4]},
    ]


def draw_text_only(rng: random.Random) -> dict:
    return {
        "skill": "query",
        "question": rng.choice(QUESTIONS),
        "reasoning": rng.random() < 0.5,
        "max_tokens": rng.choice([1, 8, 20]),
    }
