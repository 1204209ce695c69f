"""The little world the embedded model knows: scenes of one to eight coloured shapes, as plain values.

Vocabulary, outlines and the random layout of a scene. `world_draw` turns a `Scene` into a picture and
exact ground truth, `world_text` into captions and questions. The world is unambiguous on purpose:
kinds differ by outline and not by aspect ratio (a crop does not keep it), colours differ by hue or
are black and white, and no two shapes stand at the same horizontal position, so that "from left to
right" is one order.

Lengths are fractions of the picture's short side, positions fractions of its width and height, angles
degrees, clockwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KINDS = ("circle", "square", "triangle", "star", "cross", "heart", "moon", "diamond")
NEW_KIND = "arrow"  # drawn on request; the embedded model has never seen one (finetune_lora.py shows it some)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "yellow": (246, 214, 28),
    "green": (26, 150, 52),
    "cyan": (36, 208, 224),
    "blue": (32, 66, 208),
    "purple": (146, 40, 178),
    "black": (18, 18, 20),
    "white": (246, 246, 244),
}
BACKGROUNDS = ("plain", "gradient", "striped", "checked", "speckled")

MIN_SIDE, MAX_WIDTH, MAX_HEIGHT = 100, 900, 600
MAX_SHAPES = 8
NUM_SHAPES_WEIGHTS = np.array([12, 15, 17, 16, 13, 11, 9, 7]) / 100
MIN_DIAMETER = 0.18  # of the short side: about one patch of the tiny model's crops
MAX_DIAMETER = (0.50, 0.46, 0.42, 0.38, 0.35, 0.32, 0.30, 0.28)  # by number of shapes
MIN_GAP_X = 0.045  # of the width, between two centres
MIN_DISTANCE = 0.72  # of the sum of two radii: the bounding circles of two shapes may overlap this far
COLOUR_JITTER = 12

Outline = NDArray[np.float64]  # [vertices, 2], x right, y down


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape; later shapes of a scene are drawn over earlier ones."""

    kind: str
    colour: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    diameter: float
    rotation: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True, slots=True)
class Background:
    """Two close, dull colours and how they are mixed."""

    style: str
    first_rgb: tuple[int, int, int]
    second_rgb: tuple[int, int, int]
    period: float
    angle: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that decides a picture; `noise_seed` feeds the speckles alone."""

    width: int
    height: int
    background: Background
    shapes: tuple[Shape, ...]
    noise_seed: int


def _arc(radius: float, centre_x: float, start: float, stop: float, num_points: int) -> list[tuple[float, float]]:
    angles = np.radians(np.linspace(start, stop, num_points))
    return [(centre_x + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _heart(num_points: int) -> list[tuple[float, float]]:
    """The familiar heart curve x = 16 sin³t, y = 13 cos t − 5 cos 2t − 2 cos 3t − cos 4t, point down."""
    points = []
    for t in np.linspace(0, 2 * math.pi, num_points, endpoint=False):
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 16.5, (-y - 2.5) / 16.5))
    return points


def _moon(num_points: int) -> list[tuple[float, float]]:
    """A crescent open to the right: a disc of radius 1 without a disc of radius 0.8 centred at 0.6."""
    meet_x = (1 - 0.8**2 + 0.6**2) / (2 * 0.6)
    outer = math.degrees(math.acos(meet_x))
    inner = math.degrees(math.atan2(math.sqrt(1 - meet_x**2), meet_x - 0.6))
    half = num_points // 2
    return _arc(1.0, 0.0, outer, 360 - outer, half + 1) + _arc(0.8, 0.6, 360 - inner, inner, half + 1)[1:-1]


def outline(kind: str, smooth_points: int = 64) -> Outline:
    """A kind's outline around (0, 0) within radius 1, upright; curves get `smooth_points` vertices."""
    square, arm = math.sqrt(0.5), 0.34
    points: list[tuple[float, float]]
    if kind == "circle":
        points = _arc(1.0, 0.0, -90, 270, smooth_points + 1)[:-1]
    elif kind == "square":
        points = [(-square, -square), (square, -square), (square, square), (-square, square)]
    elif kind == "triangle":
        points = [(0, -1), (math.sqrt(0.75), 0.5), (-math.sqrt(0.75), 0.5)]
    elif kind == "star":
        radii = (1.0, 0.45) * 5
        angles = [math.radians(36 * i - 90) for i in range(10)]
        points = [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
    elif kind == "cross":
        quarter = [(-arm, -0.94), (arm, -0.94), (arm, -arm)]
        points = [p for turn in range(4) for p in _quarter_turns(quarter, turn)]
    elif kind == "heart":
        points = _heart(smooth_points)
    elif kind == "moon":
        points = _moon(smooth_points)
    elif kind == "diamond":
        points = [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]
    elif kind == NEW_KIND:
        right = [(0, -1), (0.78, -0.1), (0.26, -0.1), (0.26, 0.94)]
        points = right + [(-x, y) for x, y in right[:0:-1]]
    else:
        raise ValueError(f"unknown kind {kind!r}")
    return np.array(points, dtype=np.float64)


def _quarter_turns(points: list[tuple[float, float]], turns: int) -> list[tuple[float, float]]:
    for _ in range(turns):
        points = [(-y, x) for x, y in points]
    return points


def placed_outline(shape: Shape, width: int, height: int, smooth_points: int = 64) -> Outline:
    """A shape's whole outline in pixels of a `width` x `height` picture, hidden parts included."""
    angle, radius = math.radians(shape.rotation), shape.diameter * min(width, height) / 2
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    points = outline(shape.kind, smooth_points) @ turn * radius
    return np.asarray(points + np.array([shape.x * width, shape.y * height]))


def sample_scene(rng: np.random.Generator, all_kinds: tuple[str, ...] = KINDS) -> Scene:
    """Draw a scene at random; layouts that do not fit are drawn again, with smaller shapes every time."""
    width, height = _sample_size(rng)
    count = int(rng.choice(np.arange(1, MAX_SHAPES + 1), p=NUM_SHAPES_WEIGHTS))
    kinds = _sample_palette(rng, all_kinds)
    colours = _sample_palette(rng, tuple(COLOURS))
    background = _sample_background(rng)
    diameters = np.exp(rng.uniform(math.log(MIN_DIAMETER), math.log(MAX_DIAMETER[count - 1]), count))
    while (places := _place(rng, diameters, width, height)) is None:
        diameters = np.maximum(MIN_DIAMETER, diameters * 0.95)
    shapes = []
    for (x, y), diameter in zip(places, diameters, strict=True):
        colour = str(rng.choice(colours))
        rgb = np.clip(np.array(COLOURS[colour]) + rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3), 0, 255)
        rotation = float(rng.uniform(-20, 20)) if rng.random() < 0.5 else 0.0
        red, green, blue = (int(v) for v in rgb)
        shapes.append(Shape(str(rng.choice(kinds)), colour, (red, green, blue), x, y, float(diameter), rotation))
    return Scene(width, height, background, tuple(shapes), int(rng.integers(2**31)))


def _sample_size(rng: np.random.Generator) -> tuple[int, int]:
    """Log-uniform short side and aspect ratio (1:2 to 2:1), cut to the limits."""
    short = math.exp(rng.uniform(math.log(MIN_SIDE), math.log(MAX_HEIGHT)))
    aspect = math.exp(rng.uniform(-math.log(2), math.log(2)))
    width, height = (short * aspect, short) if aspect >= 1 else (short, short / aspect)
    return (
        int(np.clip(round(width), MIN_SIDE, MAX_WIDTH)),
        int(np.clip(round(height), MIN_SIDE, MAX_HEIGHT)),
    )


def _sample_palette(rng: np.random.Generator, words: tuple[str, ...]) -> list[str]:
    """Half of the scenes use every word; the others two to four, so that there is something to count."""
    if rng.random() < 0.5:
        return list(words)
    return [str(word) for word in rng.choice(words, int(rng.integers(2, 5)), replace=False)]


def _sample_background(rng: np.random.Generator) -> Background:
    """Dull colours of middle lightness: every shape colour stands out from them."""
    style = str(rng.choice(BACKGROUNDS, p=(0.3, 0.25, 0.15, 0.15, 0.15)))
    lightness, tint = rng.uniform(112, 188), rng.uniform(-14, 14, 3)
    first = np.clip(lightness + tint, 0, 255)
    second = np.clip(first + rng.choice((-1, 1)) * rng.uniform(14, 30) + rng.uniform(-6, 6, 3), 90, 205)
    to_rgb = [(int(a), int(b), int(c)) for a, b, c in (first, second)]
    return Background(style, to_rgb[0], to_rgb[1], float(rng.uniform(0.08, 0.25)), float(rng.uniform(0, 360)))


def _place(
    rng: np.random.Generator, diameters: NDArray[np.float64], width: int, height: int
) -> list[tuple[float, float]] | None:
    """Centres, one per diameter, inside the picture and apart from one another; None after too many tries."""
    short = min(width, height)
    places: list[tuple[float, float]] = []
    for diameter in diameters:
        radius_px = diameter * short / 2
        for _ in range(40):
            x = rng.uniform(radius_px / width, 1 - radius_px / width)
            y = rng.uniform(radius_px / height, 1 - radius_px / height)
            if all(
                abs(x - other_x) >= MIN_GAP_X
                and math.hypot((x - other_x) * width, (y - other_y) * height)
                >= MIN_DISTANCE * (diameter + other) * short / 2
                for (other_x, other_y), other in zip(places, diameters, strict=False)
            ):
                places.append((float(x), float(y)))
                break
        else:
            return None
    return places
