"""Pictures and exact ground truth of scenes.

`draw_scene` paints a `world.Scene` with PIL (shapes antialiased by supersampling) and measures what
can be seen of every shape on the painted pixels: boxes and points are those of the visible part.
The same scene gives the same bytes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from world import KINDS, Background, Outline, Scene, placed_outline, sample_scene

MIN_VISIBLE = 0.65  # of a shape's pixels
MIN_ORDER_GAP = 0.03  # of the width, between the centres of two visible boxes

Mask = NDArray[np.bool_]
BoxXyxy = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Instance:
    """What can be seen of one shape. Positions are 0-1 of the picture, `outline` is the whole one in pixels.

    `point` is the visible pixel nearest to the middle of all visible pixels; `number` is the shape's
    place in the scene (drawing order) and its value in `Picture.owners`.
    """

    number: int
    kind: str
    colour: str
    box_xyxy: BoxXyxy
    point: tuple[float, float]
    num_pixels: int
    visible: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def centre_x(self) -> float:
        return (self.box_xyxy[0] + self.box_xyxy[2]) / 2

    @property
    def centre_y(self) -> float:
        return (self.box_xyxy[1] + self.box_xyxy[3]) / 2


@dataclass(frozen=True, slots=True)
class Picture:
    """A painted scene. `instances` from left to right; `owners` [height, width]: number of the shape seen, or -1."""

    scene: Scene
    image: Image.Image
    instances: tuple[Instance, ...]
    owners: NDArray[np.int8]

    def visible_mask(self, instance: Instance) -> Mask:
        """The pixels of one shape that nothing covers, [height, width]."""
        return np.asarray(self.owners == instance.number)


def make_picture(seed: int, index: int, kinds: tuple[str, ...] = KINDS) -> Picture:
    """Picture `index` of the collection `seed`; layouts that hide too much of a shape are drawn again."""
    rng = np.random.default_rng([seed, index])
    while True:
        scene = sample_scene(rng, kinds)
        stencils = [_Stencil(scene, number) for number in range(len(scene.shapes))]
        owners = np.full((scene.height, scene.width), -1, dtype=np.int8)
        for stencil in stencils:
            stencil.claim(owners)
        instances = sorted((s.measure(owners) for s in stencils), key=lambda instance: instance.centre_x)
        if _is_clear(instances):
            return Picture(scene, _paint(scene, stencils), tuple(instances), owners)


def instance_outline(picture: Picture, instance: Instance, smooth_points: int = 64) -> Outline:
    """The whole outline in pixels, hidden parts included."""
    scene = picture.scene
    return placed_outline(scene.shapes[instance.number], scene.width, scene.height, smooth_points)


def _is_clear(instances: list[Instance]) -> bool:
    gaps = [right.centre_x - left.centre_x for left, right in itertools.pairwise(instances)]
    return all(i.visible >= MIN_VISIBLE for i in instances) and all(gap >= MIN_ORDER_GAP for gap in gaps)


class _Stencil:
    """The antialiased coverage of one shape and where it lies."""

    def __init__(self, scene: Scene, number: int) -> None:
        self.number, self.shape = number, scene.shapes[number]
        self.width, self.height = scene.width, scene.height
        points = placed_outline(self.shape, scene.width, scene.height)
        self.left, self.top = (max(0, math.floor(v)) for v in points.min(axis=0))
        right, bottom = (math.ceil(v) + 1 for v in points.max(axis=0))
        size = (min(right, scene.width) - self.left, min(bottom, scene.height) - self.top)
        factor = 4 if max(size) <= 160 else 2
        canvas = Image.new("L", (size[0] * factor, size[1] * factor))
        local = (points - (self.left, self.top)) * factor - 0.5  # PIL puts pixel centres at whole numbers
        ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in local], fill=255)
        self.coverage = canvas.reduce(factor)
        self.solid = np.asarray(self.coverage) >= 128

    def _view(self, owners: NDArray[np.int8]) -> NDArray[np.int8]:
        height, width = self.solid.shape
        return owners[self.top : self.top + height, self.left : self.left + width]

    def claim(self, owners: NDArray[np.int8]) -> None:
        """Write this shape's number into `owners` wherever it covers a pixel."""
        self._view(owners)[self.solid] = self.number

    def measure(self, owners: NDArray[np.int8]) -> Instance:
        """What all later shapes have left of this one."""
        rows, cols = np.nonzero(self._view(owners) == self.number)
        total = max(1, int(self.solid.sum()))
        if not len(rows):
            return Instance(self.number, self.shape.kind, self.shape.colour, (0, 0, 0, 0), (0, 0), 0, 0.0)
        box = (
            (self.left + int(cols.min())) / self.width,
            (self.top + int(rows.min())) / self.height,
            (self.left + int(cols.max()) + 1) / self.width,
            (self.top + int(rows.max()) + 1) / self.height,
        )
        nearest = int(np.argmin((rows - rows.mean()) ** 2 + (cols - cols.mean()) ** 2))
        point = (
            (self.left + int(cols[nearest]) + 0.5) / self.width,
            (self.top + int(rows[nearest]) + 0.5) / self.height,
        )
        return Instance(self.number, self.shape.kind, self.shape.colour, box, point, len(rows), len(rows) / total)


def _paint(scene: Scene, stencils: list[_Stencil]) -> Image.Image:
    image = _paint_background(scene.background, scene.width, scene.height, scene.noise_seed)
    for stencil in stencils:
        image.paste(stencil.shape.rgb, (stencil.left, stencil.top), stencil.coverage)
    return image


def _paint_background(background: Background, width: int, height: int, noise_seed: int) -> Image.Image:
    first, second = (np.array(rgb, dtype=np.float32) for rgb in (background.first_rgb, background.second_rgb))
    if background.style == "plain":
        return Image.new("RGB", (width, height), background.first_rgb)
    if background.style == "speckled":
        cell = max(2, round(min(width, height) / 90))
        noise = np.random.default_rng(noise_seed).random((height // cell + 1, width // cell + 1, 1), dtype=np.float32)
        speckles = Image.fromarray((first + (second - first) * noise).astype(np.uint8))
        return speckles.resize((width, height), Image.Resampling.BILINEAR)
    mix = _mixture(background, width, height)
    table = (first + (second - first) * np.linspace(0, 1, 256, dtype=np.float32)[:, None]).astype(np.uint8)
    return Image.fromarray(table[mix])


def _mixture(background: Background, width: int, height: int) -> NDArray[np.uint8]:
    """Share of the second colour, 0-255, [height, width]."""
    angle, short = math.radians(background.angle), min(width, height)
    xs = np.arange(width, dtype=np.float32)[None, :]
    ys = np.arange(height, dtype=np.float32)[:, None]
    along = xs * math.cos(angle) + ys * math.sin(angle)
    if background.style == "gradient":
        low, high = float(along.min()), float(along.max())
        return np.asarray((along - low) * (255 / max(1.0, high - low)), dtype=np.uint8)
    period = background.period * short
    if background.style == "striped":
        return np.asarray(np.floor(along / period).astype(np.int32) % 2 * 255, dtype=np.uint8)
    cells = np.floor(xs / period).astype(np.int32) + np.floor(ys / period).astype(np.int32)  # checked
    return np.asarray(cells % 2 * 255, dtype=np.uint8)
