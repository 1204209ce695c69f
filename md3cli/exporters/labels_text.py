"""The text of overlay labels: what the bundled font can show, and what stands in for the rest.

The font is DejaVu Sans Bold (licence beside it), cut down to Latin, Greek, Cyrillic, punctuation,
arrows and shapes. Any other character is shown by its code point, `[6C7D]`, so that two labels
never look alike and nothing vanishes.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from md3cli.records import printable

FONT_FILE = Path(__file__).with_name("DejaVuSans-Bold.ttf")
_PROBE_SIZE_PX = 12
_UNASSIGNED = "\uffff"  # no font has it: drawn as the glyph for "missing"


@lru_cache(maxsize=64)
def font_of(size_px: int) -> ImageFont.FreeTypeFont:
    """The bundled font."""
    return ImageFont.truetype(FONT_FILE, size_px, layout_engine=ImageFont.Layout.BASIC)


def shown(text: str) -> str:
    """`text` on one line, every character visible in the bundled font."""
    one_line = printable(" ".join(text.split()))
    return "".join(char if _is_in_font(char) else f"[{ord(char):04X}]" for char in one_line)


@lru_cache(maxsize=4096)
def _is_in_font(char: str) -> bool:
    font = font_of(_PROBE_SIZE_PX)
    return char == " " or bytes(font.getmask(char)) != bytes(font.getmask(_UNASSIGNED))


def fitted(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> str:
    """`text`, its end replaced by an ellipsis where it is wider than `width_px`."""
    if font.getlength(text) <= width_px:
        return text
    low, high = 0, len(text)
    while low < high:  # the longest beginning that fits
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle] + "…") <= width_px:
            low = middle
        else:
            high = middle - 1
    return text[:low] + "…"
