"""The polygons of SVG path data: what a segment's `svg_path` covers.

Knows the whole path grammar (SVG 1.1, section 8.3) with the standard's own rule for damage: what stands before the
first error is drawn, the rest is not. A model writes these paths, so nothing here raises. Polygons are closed and in
0-1 image coordinates, ready for a COCO file, a mask or a page; no text of the model is passed on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Point = tuple[float, float]
Polygon = list[Point]

NUMBER_LIMIT = 1e6  # a box has unit size: what is beyond this is damage, and sums stay finite
CURVE_STEPS = 16  # straight pieces for one curve: the error is under 0.2 % of the curve's extent

_TOKEN = re.compile(r"[\s,]*(?:([A-Za-z])|([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?))")
_NUMBERS_OF_COMMAND = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "A": 7, "Z": 0}


def segment_polygons(segment: Mapping[str, Any]) -> list[Polygon]:
    """Return the polygons of a record's segment, in 0-1 coordinates of the image.

    The path is in unit coordinates of the segment's box (Moondream 3 specification, section 11).
    """
    box = segment["bbox"]
    left, top = float(box["x_min"]), float(box["y_min"])
    width, height = float(box["x_max"]) - left, float(box["y_max"]) - top
    return [[(left + x * width, top + y * height) for x, y in polygon] for polygon in flatten(segment["svg_path"])]


def flatten(path: str) -> list[Polygon]:
    """Return the closed polygons of `path`, one for each subpath that has at least three points."""
    pen = _Pen()
    for command, numbers in _commands(path):
        if not pen.draw(command, numbers):
            break
    pen.finish()
    return [polygon for polygon in pen.polygons if len(polygon) >= 3]


def _commands(path: str) -> Iterator[tuple[str, list[float]]]:
    """Yield (command letter, its numbers), one for each repetition; end at the first error."""
    command, numbers, end = "", list[float](), 0
    while match := _TOKEN.match(path, end):
        end = match.end()
        if letter := match[1]:
            if numbers or letter.upper() not in _NUMBERS_OF_COMMAND:
                return  # the command before lacks numbers, or this is no command
            command = letter
            if letter in "Zz":
                yield letter, []
            continue
        numbers.append(float(match[2]))
        if not command or command in "Zz" or not abs(numbers[-1]) < NUMBER_LIMIT:
            return
        if len(numbers) == _NUMBERS_OF_COMMAND[command.upper()]:
            yield command, numbers
            numbers = []
            command = {"M": "L", "m": "l"}.get(command, command)  # further pairs of a move are lines


@dataclass
class _Pen:
    """Where the drawing stands."""

    polygons: list[Polygon] = field(default_factory=list)
    current: Polygon = field(default_factory=list)
    at: Point = (0.0, 0.0)
    start: Point = (0.0, 0.0)
    control: Point | None = None  # last control point, which S and T mirror
    previous: str = ""

    def draw(self, command: str, numbers: list[float]) -> bool:
        """Draw one command; False where the path is in error (it must begin with a move)."""
        kind = command.upper()
        if not self.previous and kind != "M":
            return False
        if kind not in "MZ" and not self.current:
            self.current = [self.at]  # a command after Z goes on from the subpath's start
        origin = self.at if command.islower() else (0.0, 0.0)
        _DRAW[kind](self, numbers, origin)
        self.previous = kind
        return True

    def finish(self) -> None:
        """Close the open subpath: a fill treats it as closed."""
        if self.current:
            self.polygons.append(self.current)
        self.current = []

    def line_to(self, point: Point) -> None:
        self.current.append(point)
        self.at = point

    def mirrored(self, after: str) -> Point:
        """Return the last control point mirrored at the pen, or the pen where the last command was another."""
        if self.control is None or self.previous not in after:
            return self.at
        return (2 * self.at[0] - self.control[0], 2 * self.at[1] - self.control[1])


def _pairs(numbers: list[float], origin: Point) -> list[Point]:
    return [(origin[0] + x, origin[1] + y) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]


def _move(pen: _Pen, numbers: list[float], origin: Point) -> None:
    pen.finish()
    pen.at = pen.start = _pairs(numbers, origin)[0]
    pen.current = [pen.at]


def _close(pen: _Pen, numbers: list[float], origin: Point) -> None:
    pen.finish()
    pen.at = pen.start


def _line(pen: _Pen, numbers: list[float], origin: Point) -> None:
    pen.line_to(_pairs(numbers, origin)[0])


def _horizontal(pen: _Pen, numbers: list[float], origin: Point) -> None:
    pen.line_to((origin[0] + numbers[0], pen.at[1]))


def _vertical(pen: _Pen, numbers: list[float], origin: Point) -> None:
    pen.line_to((pen.at[0], origin[1] + numbers[0]))


def _bezier(pen: _Pen, *controls: Point) -> None:
    """Draw a Bézier curve of any degree from the pen through `controls` (de Casteljau's way)."""
    points = (pen.at, *controls)
    for step in range(1, CURVE_STEPS + 1):
        t, left = step / CURVE_STEPS, list(points)
        while len(left) > 1:
            left = [(a + (c - a) * t, b + (d - b) * t) for (a, b), (c, d) in pairwise(left)]
        pen.line_to(left[0])
    pen.control = controls[-2]


def _cubic(pen: _Pen, numbers: list[float], origin: Point) -> None:
    _bezier(pen, *_pairs(numbers, origin))


def _smooth_cubic(pen: _Pen, numbers: list[float], origin: Point) -> None:
    _bezier(pen, pen.mirrored(after="CS"), *_pairs(numbers, origin))


def _quadratic(pen: _Pen, numbers: list[float], origin: Point) -> None:
    _bezier(pen, *_pairs(numbers, origin))


def _smooth_quadratic(pen: _Pen, numbers: list[float], origin: Point) -> None:
    _bezier(pen, pen.mirrored(after="QT"), *_pairs(numbers, origin))


def _arc(pen: _Pen, numbers: list[float], origin: Point) -> None:
    """Draw an elliptical arc: end points to centre as in SVG 1.1, appendix F.6.5 and F.6.6."""
    rx, ry, tilt = abs(numbers[0]), abs(numbers[1]), math.radians(numbers[2])
    is_large, is_sweep = numbers[3] != 0, numbers[4] != 0
    end = (origin[0] + numbers[5], origin[1] + numbers[6])
    if rx == 0 or ry == 0 or end == pen.at:
        pen.line_to(end)
        return
    cos, sin = math.cos(tilt), math.sin(tilt)
    half_x, half_y = (pen.at[0] - end[0]) / 2, (pen.at[1] - end[1]) / 2
    x, y = (cos * half_x + sin * half_y) / rx, (cos * half_y - sin * half_x) / ry  # on the unit circle
    reach = math.hypot(x, y)
    if reach > 1:  # the radii are too small to reach: grow them
        rx, ry, x, y, reach = rx * reach, ry * reach, x / reach, y / reach, 1.0
    lift = math.sqrt(max(0.0, 1 / reach**2 - 1)) * (1 if is_large != is_sweep else -1)
    cx, cy = lift * y, -lift * x
    first = math.atan2(y - cy, x - cx)
    turn = (math.atan2(-y - cy, -x - cx) - first) % (2 * math.pi)
    if not is_sweep:
        turn -= 2 * math.pi
    mid_x, mid_y = (pen.at[0] + end[0]) / 2, (pen.at[1] + end[1]) / 2
    for step in range(1, CURVE_STEPS):
        angle = first + turn * step / CURVE_STEPS
        u, v = rx * (cx + math.cos(angle)), ry * (cy + math.sin(angle))
        pen.line_to((mid_x + cos * u - sin * v, mid_y + sin * u + cos * v))
    pen.line_to(end)


_DRAW: dict[str, Callable[[_Pen, list[float], Point], None]] = {
    "M": _move,
    "Z": _close,
    "L": _line,
    "H": _horizontal,
    "V": _vertical,
    "C": _cubic,
    "S": _smooth_cubic,
    "Q": _quadratic,
    "T": _smooth_quadratic,
    "A": _arc,
}
