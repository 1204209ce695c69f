"""One palette for overlays, reports and labelling tools: a label's colour and dash follow from its place in the order.

Twelve colours, found by search: the first eight lie at least 30 degrees of hue apart (HSV and CIELAB), any two of the
twelve at least 20 (CIEDE2000), and the four that share a dash at least 10 for readers who miss red, green or blue.
Colour and dash together tell 36 labels apart; from the 37th on both come again, and the written name alone tells.
Pure data; knows nothing of pictures, pages or formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Colour(NamedTuple):
    """8-bit sRGB."""

    red: int
    green: int
    blue: int

    @property
    def hex(self) -> str:
        return f"#{self.red:02x}{self.green:02x}{self.blue:02x}"

    @property
    def is_dark(self) -> bool:
        """Return whether white text reads better on it than black (WCAG 2 relative luminance)."""
        linear = [(channel / 255) ** 2.2 for channel in self]
        return bool(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.179)


COLOURS = tuple(
    Colour(*bytes.fromhex(code))
    for code in (
        *("0099f8", "e77c35", "c60195", "03ebbb"),  # blue, orange, magenta, mint
        *("0b7b02", "f84261", "9d74f3", "cac205"),  # green, rose, violet, yellow
        *("8b4c32", "128790", "131bde", "bcb5c5"),  # brown, teal, navy, grey
    )
)
# Lengths of stroke and gap, in widths of the line; without any the line is solid.
DASHES: tuple[tuple[float, float] | None, ...] = (None, (5.0, 3.0), (1.5, 1.5))
LABELS_PER_DASH = 4


class Style(NamedTuple):
    """How a label is drawn: the places of its colour in COLOURS and of its dash in DASHES."""

    colour_place: int
    dash_place: int

    @property
    def colour(self) -> Colour:
        return COLOURS[self.colour_place]

    @property
    def dash(self) -> tuple[float, float] | None:
        return DASHES[self.dash_place]


def style_at(place: int) -> Style:
    """Return the style of the label at `place` (from 0); each round of twelve shifts the dashes by one."""
    rounds, colour = divmod(place, len(COLOURS))
    return Style(colour, (colour // LABELS_PER_DASH + rounds) % len(DASHES))


def palette(labels: Iterable[str]) -> Mapping[str, Style]:
    """Return a style for each label, in the order given; a label that comes twice counts once."""
    return {label: style_at(place) for place, label in enumerate(dict.fromkeys(labels))}
