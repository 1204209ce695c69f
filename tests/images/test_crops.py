"""The door for pictures: tiling, crops, opening, limits."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from corpus import encode, picture, png
from golden_cases import prepare_as_recorded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from md3cli.errors import ImageError, UsageError
from md3cli.images.crops import CropConfig, ImageLimits, _resize, cut_crops, prepare_image, read_image, select_tiling
from md3cli.records import ImageItem

GOLDEN = Path(__file__).parents[1] / "golden"
REAL = CropConfig(crop_size=378, patch_size=14, overlap_margin=4, max_crops=12)
SMALL = CropConfig(crop_size=42, patch_size=6, overlap_margin=2, max_crops=12)
LIMITS = ImageLimits()


def item(path: Path) -> ImageItem:
    return ImageItem(name=path.name, path=str(path))


def error_of(path: Path | str, limits: ImageLimits = LIMITS) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read_image(ImageItem(name="x", path=str(path)), limits)
    return caught.value


# --- tiling ---------------------------------------------------------------------------------------

TILINGS = json.loads((GOLDEN / "units.json").read_text())["tiling"]["cases"]


@pytest.mark.parametrize("case", TILINGS, ids=lambda case: f"{case['width']}x{case['height']}")
def test_tiling_equals_the_reference(case):
    assert select_tiling(case["width"], case["height"], REAL) == tuple(case["tiling_rows_cols"])


configs = st.builds(
    CropConfig,
    crop_size=st.integers(5, 30).map(lambda grid: grid * 14),
    patch_size=st.just(14),
    overlap_margin=st.integers(0, 2),
    max_crops=st.integers(1, 20),
)
sides = st.integers(1, 3000) | st.integers(1, 2**28)


@given(sides, sides, configs)
def test_tiling_stays_within_max_crops_unless_a_side_is_one(width, height, cfg):
    rows, cols = select_tiling(width, height, cfg)
    assert rows >= 1
    assert cols >= 1
    assert rows * cols <= cfg.max_crops or min(rows, cols) == 1


@given(sides, sides, configs)
def test_a_picture_no_larger_than_a_crop_on_one_side_is_one_tile(width, height, cfg):
    is_small = min(width, height) <= cfg.window_px + 2 * cfg.margin_px
    assert not is_small or select_tiling(width, height, cfg) == (1, 1)


@given(sides, sides, configs)
def test_more_rows_are_given_to_the_taller_side(width, height, cfg):
    rows, cols = select_tiling(width, height, cfg)
    assert rows >= cols or height <= width
    assert cols >= rows or width <= height


# --- crops ----------------------------------------------------------------------------------------


def golden_images():
    for case in "abc":
        folder = GOLDEN / f"case-{case}"
        vision = json.loads((folder / "checkpoint" / "config.json").read_text())["config"]["vision"]
        names = ("crop_size", "enc_patch_size", "overlap_margin", "max_crops")
        cfg = CropConfig(*(vision[name] for name in names))
        for expected in json.loads((folder / "expected.json").read_text())["images"]:
            yield pytest.param(
                folder / "images" / Path(expected["file"]).name, cfg, expected, id=f"{case}-{expected['file']}"
            )


@pytest.mark.parametrize(("path", "cfg", "expected"), list(golden_images()))
def test_crops_equal_the_golden_ones_bit_for_bit(path, cfg, expected):
    got = prepare_as_recorded(path, cfg)
    assert (got.width, got.height, list(got.tiling)) == (expected["width"], expected["height"], expected["tiling"])
    assert [hashlib.sha256(crop.tobytes()).hexdigest() for crop in got.crops] == expected["crop_sha256"]
    assert hashlib.sha256(got.crops.tobytes()).hexdigest() == expected["crops_sha256"]
    assert got.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.process
@given(st.integers(1, 400), st.integers(1, 400))
def test_tiles_are_windows_of_one_resized_picture(width, height):
    image = picture(size=(width, height))
    crops, (rows, cols) = cut_crops(image, SMALL)
    assert crops.shape == (1 + rows * cols, 42, 42, 3)
    margin, window = 12, 18
    size = (cols * window + 2 * margin, rows * window + 2 * margin)
    whole = _resize(image, *size)
    tiles = iter(crops[1:])
    for top in range(0, rows * window, window):
        for left in range(0, cols * window, window):
            np.testing.assert_array_equal(next(tiles), whole[top : top + 42, left : left + 42])


@pytest.mark.process
@pytest.mark.parametrize(
    ("size", "tiling"),
    [((1, 1), (1, 1)), ((5000, 1), (1, 1)), ((1, 5000), (1, 1)), ((8000, 500), (1, 13)), ((500, 8000), (13, 1))],
)
def test_extreme_shapes_are_cut(size, tiling):
    crops, got = cut_crops(picture(size=size), REAL)
    assert (got, crops.shape) == (tiling, (1 + max(tiling), 378, 378, 3))


def test_the_only_tile_is_the_global_crop():
    crops, _ = cut_crops(picture(size=(300, 200)), REAL)
    np.testing.assert_array_equal(crops[0], crops[1])


RESIZED_BY_PILLOW_12 = "5d593b4c098132ebf3269e4d04dba76fe42981e48c52ac03c032169b024f52d3"
SIZES = [
    (480, 640),
    (1080, 1920),
    (378, 378),
    (378, 900),
    (900, 378),
    (8, 800),
    (8, 801),
    (1, 100),
    (1, 101),
    (3000, 1),
]
SIZES += [(int(width), int(height)) for width, height in np.random.default_rng(3).integers(1, 1000, (60, 2))]


@pytest.mark.process
def test_resized_pictures_have_the_bytes_of_one_call_of_pillow_12():
    """The digest was taken once, with `image.resize(target, LANCZOS)` of Pillow 12.3 in place of `_resize`."""
    digest = hashlib.sha256()
    for number, (width, height) in enumerate(SIZES):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        for target in ((378, 378), (644, 910), (1176, 644)):
            digest.update(_resize(Image.fromarray(noise), *target).tobytes())
    assert digest.hexdigest() == RESIZED_BY_PILLOW_12


# --- opening --------------------------------------------------------------------------------------


def test_a_member_of_an_archive_is_read_and_hashed_alone(tmp_path):
    first, second = encode(picture(), "PNG"), encode(picture(size=(5, 7)), "PNG")
    path = tmp_path / "two.tar"
    path.write_bytes(first + second)
    got = read_image(ImageItem("b.png", str(path), offset=len(first), size=len(second)), LIMITS)
    assert got.image.size == (5, 7)
    assert got.sha256 == hashlib.sha256(second).hexdigest()


def test_an_archive_that_ends_early_is_damaged(tmp_path):
    path = tmp_path / "one.tar"
    path.write_bytes(encode(picture(), "PNG"))
    with pytest.raises(ImageError, match="the archive ends after") as caught:
        read_image(ImageItem("b.png", str(path), offset=10, size=10_000), LIMITS)
    assert caught.value.type == "decode"


def test_limits_are_inclusive_and_named_in_the_message(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(picture(size=(10, 10)), "PNG"))
    num_bytes = path.stat().st_size
    assert read_image(item(path), ImageLimits(max_pixels=100, max_file_size=num_bytes)).image.size == (10, 10)
    assert "--max-pixels" in str(error_of(path, ImageLimits(max_pixels=99)))
    error = error_of(path, ImageLimits(max_file_size=num_bytes - 1))
    assert (error.type, "--max-file-size" in str(error)) == ("too_large", True)


def test_the_header_is_reported_before_pixels_and_not_for_refused_pictures(tmp_path):
    path, seen = tmp_path / "a.png", []
    path.write_bytes(png(50, 40, b""))  # no pixels at all: decoding fails, but later
    with pytest.raises(ImageError, match="damaged"):
        read_image(item(path), LIMITS, on_header=seen.append)
    assert seen == [2000]
    with pytest.raises(ImageError, match="max-pixels"):
        read_image(item(path), ImageLimits(max_pixels=1999), on_header=seen.append)
    assert seen == [2000]


def test_no_file_descriptor_is_left_open(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path, tmp_path / "a.jpg", tmp_path / "fifo", tmp_path / "absent"):
        error_of(path)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_running_out_of_memory_is_too_large(monkeypatch, tmp_path):
    (tmp_path / "a.png").write_bytes(encode(picture(), "PNG"))

    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr("md3cli.images.crops.cut_crops", refuse)
    with pytest.raises(ImageError, match="memory") as caught:
        prepare_image(item(tmp_path / "a.png"), REAL, LIMITS, None)
    assert caught.value.type == "too_large"


@pytest.mark.process
def test_importing_the_door_and_the_pool_does_not_import_torch():
    code = "import sys, md3cli.images.pool; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_background_is_named_by_colour_or_none(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.new("RGBA", (1, 1), (1, 2, 3, 0)), "PNG"))
    for name, pixel in ((None, (1, 2, 3)), ("none", (1, 2, 3)), ("white", (255,) * 3), ("#102030", (16, 32, 48))):
        assert read_image(item(path), LIMITS, name).image.getpixel((0, 0)) == pixel
    with pytest.raises(UsageError, match="not a colour"):
        read_image(item(path), LIMITS, "off\x1b[31m")


# --- the examples ---------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parents[2] / "examples" / "images"


@pytest.mark.process
def test_every_example_is_small_can_be_read_and_has_its_licence_stated():
    paths = [path for path in sorted(EXAMPLES.iterdir()) if path.name != "LICENSES.md"]
    assert len(paths) >= 12
    licences = (EXAMPLES / "LICENSES.md").read_text()
    for path in paths:
        assert path.stat().st_size <= 400_000, path.name
        assert f"| `{path.name}` |" in licences
        assert prepare_image(item(path), REAL, LIMITS, None).crops.shape[1:] == (378, 378, 3)
    assert len({path.suffix for path in paths}) >= 7


def test_the_lying_example_is_upright():
    assert read_image(item(EXAMPLES / "flower-lying.jpg"), LIMITS).image.size == (640, 427)
