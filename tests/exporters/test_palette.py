"""The palette: hues and distances are computed, for all readers and for those who miss a kind of cone."""

from __future__ import annotations

import colorsys
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import md3cli
from md3cli.exporters.palette import COLOURS, DASHES, Colour, palette, style_at

TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
# What is left of linear RGB where a kind of cone is missing (Machado, Oliveira and Fernandes 2009, severity 1).
MISSING = {
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour: Colour) -> np.ndarray:
    """Linear light of sRGB (IEC 61966-2-1)."""
    channels = np.array(colour) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    """CIELAB of linear light, white D65."""
    xyz = TO_XYZ @ light / TO_XYZ.sum(axis=1)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def ciede2000(one: np.ndarray, other: np.ndarray) -> float:
    """CIEDE2000 as Sharma, Wu and Dalal (2005) write it."""
    (l1, a1, b1), (l2, a2, b2) = one, other
    mean_c7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    g = 0.5 * (1 - np.sqrt(mean_c7 / (mean_c7 + 25.0**7)))
    a1, a2 = (1 + g) * a1, (1 + g) * a2
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.degrees(np.arctan2(b1, a1)) % 360, np.degrees(np.arctan2(b2, a2)) % 360
    is_grey = c1 * c2 == 0
    turn = 0.0 if is_grey else (h2 - h1 + 180) % 360 - 180
    big_h = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn) / 2)
    mean_l, mean_c = (l1 + l2) / 2, (c1 + c2) / 2
    mean_h = h1 + h2 if is_grey else (h1 + h2) / 2 + (0 if abs(h1 - h2) <= 180 else 180 if h1 + h2 < 360 else -180)
    t = (
        1
        - 0.17 * np.cos(np.radians(mean_h - 30))
        + 0.24 * np.cos(np.radians(2 * mean_h))
        + 0.32 * np.cos(np.radians(3 * mean_h + 6))
        - 0.20 * np.cos(np.radians(4 * mean_h - 63))
    )
    rotation = (
        -np.sin(np.radians(60 * np.exp(-(((mean_h - 275) / 25) ** 2)))) * 2 * np.sqrt(mean_c**7 / (mean_c**7 + 25.0**7))
    )
    light = (l2 - l1) / (1 + 0.015 * (mean_l - 50) ** 2 / np.sqrt(20 + (mean_l - 50) ** 2))
    chroma, hue = (c2 - c1) / (1 + 0.045 * mean_c), big_h / (1 + 0.015 * mean_c * t)
    return float(np.sqrt(light**2 + chroma**2 + hue**2 + rotation * chroma * hue))


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [  # from the table of test data of Sharma, Wu and Dalal (2005)
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
        ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
        ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((50, 2.5, 0), (56, -27, -3), 31.9030),
        ((50, 2.5, 0), (58, 24, 15), 19.4535),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((63.0109, -31.0961, -5.8663), (62.8187, -29.7946, -4.0864), 1.2630),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
        ((90.8027, -2.0831, 1.4410), (91.1528, -1.6435, 0.0447), 1.4441),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_distances_are_those_that_are_published(
    one: tuple[float, ...], other: tuple[float, ...], distance: float
) -> None:
    assert ciede2000(np.array(one), np.array(other)) == pytest.approx(distance, abs=1e-4)
    assert ciede2000(np.array(other), np.array(one)) == pytest.approx(distance, abs=1e-4)


def hues(colour: Colour) -> tuple[float, float]:
    """Degrees of hue in HSV and in CIELAB."""
    _, a, b = lab(linear(colour))
    return colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))[0] * 360, float(np.degrees(np.arctan2(b, a)))


def test_the_first_eight_lie_30_degrees_of_hue_apart() -> None:
    for one, other in combinations(COLOURS[:8], 2):
        for hue, other_hue in zip(hues(one), hues(other), strict=True):
            assert abs((hue - other_hue + 180) % 360 - 180) >= 30, (one.hex, other.hex)


def test_all_twelve_are_20_apart() -> None:
    assert len(COLOURS) == 12
    for one, other in combinations(COLOURS, 2):
        assert ciede2000(lab(linear(one)), lab(linear(other))) >= 20, (one.hex, other.hex)


@pytest.mark.parametrize("cone", MISSING)
def test_who_misses_a_cone_tells_labels_apart_by_colour_or_by_dash(cone: str) -> None:
    seen = [lab(np.clip(MISSING[cone] @ linear(colour), 0, 1)) for colour in COLOURS]
    for first in range(0, 36, 12):
        styles = [style_at(first + place) for place in range(12)]
        for one, other in combinations(styles, 2):
            is_far = ciede2000(seen[one.colour_place], seen[other.colour_place]) >= 10
            assert is_far or one.dash != other.dash, (one, other)


def test_a_place_has_its_style_and_36_differ() -> None:
    styles = list(palette(str(n) for n in range(40)).values())
    assert [style.dash_place for style in styles[:16]] == [0] * 4 + [1] * 4 + [2] * 4 + [1] * 4
    assert [style.colour for style in styles[:12]] == [style.colour for style in styles[12:24]] == list(COLOURS)
    assert len(set(styles[:36])) == 36 == len(COLOURS) * len(DASHES)
    assert styles[36:] == styles[:4]


def test_the_order_given_decides() -> None:
    assert list(palette(["star", "circle", "star"])) == ["star", "circle"]
    assert palette(["star", "circle"])["star"] == palette(["circle"])["circle"] == style_at(0)


def test_the_names_plates_are_read_easily() -> None:
    for colour in COLOURS:
        luminance = float(TO_XYZ[1] @ linear(colour))
        contrast = 1.05 / (luminance + 0.05) if colour.is_dark else (luminance + 0.05) / 0.05
        assert contrast >= 4.5, colour.hex  # WCAG 2, level AA


def test_the_style_sheet_of_the_report_has_the_same_colours() -> None:
    sheet = (Path(md3cli.__file__).parent / "report" / "report.css").read_text()
    named = dict(re.findall(r"--c(\d+): (#[0-9a-f]{6});", sheet))
    assert named == {str(place): colour.hex for place, colour in enumerate(COLOURS)}
    for place in range(12):
        assert f".c{place} {{ --k: var(--c{place}); }}" in sheet
    for place in range(1, len(DASHES)):
        assert f".shape.d{place} rect" in sheet
