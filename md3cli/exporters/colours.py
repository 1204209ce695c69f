"""A colour for each label, the same in every picture, format and run. Pure functions."""

from __future__ import annotations

import colorsys
import hashlib
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
        """True where white text reads better on it than black (WCAG 2 relative luminance)."""
        linear = [(channel / 255) ** 2.2 for channel in self]
        return bool(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.179)


def colour_of(label: str) -> Colour:
    """A strong colour drawn from the label's digest: 24 hues in three shades."""
    digest = hashlib.blake2b(label.encode("utf-8", "replace"), digest_size=2).digest()
    lightness, saturation = ((0.5, 0.95), (0.38, 0.9), (0.66, 0.95))[digest[1] % 3]
    channels = colorsys.hls_to_rgb(digest[0] % 24 / 24, lightness, saturation)
    return Colour(*(round(channel * 255) for channel in channels))
