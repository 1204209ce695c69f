"""From bytes to upright 8-bit RGB: orientation, deep samples, colours, alpha."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from corpus import any_tiff, chunk, encode, picture, png, tiff, turned_exif
from PIL import Image

from md3cli.errors import ImageError
from md3cli.images import pixels
from md3cli.images.pixels import decode_rgb


def rgb(data: bytes, background: tuple[int, int, int] | None = None) -> np.ndarray:
    return np.asarray(decode_rgb(data, 2**28, background, None))


# --- orientation ----------------------------------------------------------------------------------

LYING = {  # how a camera stores the picture for each orientation value: the inverse of turning it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


KINDS = [(fmt, mode) for fmt in ("PNG", "TIFF") for mode in ("RGB", "L", "I;16", "P", "RGBA")]
KINDS += [("JPEG", "RGB"), ("JPEG", "L"), ("WEBP", "RGB"), ("WEBP", "RGBA"), ("AVIF", "RGB"), ("AVIF", "RGBA")]


@pytest.mark.process
@pytest.mark.parametrize(("fmt", "mode"), KINDS)
@pytest.mark.parametrize("orientation", LYING)
def test_pictures_are_turned_upright(fmt, mode, orientation):
    options = {"lossless": True, "exact": True} if fmt == "WEBP" else {"quality": 95} if fmt in ("JPEG", "AVIF") else {}
    upright = picture(mode, size=(48, 32))
    stored = encode(upright.transpose(LYING[orientation]), fmt, exif=turned_exif(orientation), **options)
    expected = rgb(encode(upright, "PNG"))
    tolerance = 0 if fmt in ("PNG", "TIFF", "WEBP") else 12  # lossy: a wrong turn is off by 40 on average
    got = rgb(stored)
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).mean() <= tolerance


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("orientation", [1, *LYING])
@pytest.mark.parametrize("background", [None, (9, 99, 199)])
def test_huge_pictures_are_copied_in_bands_to_the_same_pixels(monkeypatch, mode, orientation, background):
    data = encode(picture(mode), "TIFF" if mode == "CMYK" else "PNG", exif=turned_exif(orientation))
    expected = rgb(data, background)
    monkeypatch.setattr(pixels, "HUGE_PIXELS", 0)
    monkeypatch.setattr(pixels, "_BAND_ROWS", 5)
    np.testing.assert_array_equal(rgb(data, background), expected)


def test_orientation_behind_the_pixels_of_a_png_counts():
    whole = encode(picture(), "PNG")
    end = whole.index(b"IEND") - 4
    late = whole[:end] + chunk(b"eXIf", turned_exif(6)[6:]) + whole[end:]
    assert rgb(late).shape == (37, 23, 3)


def test_broken_exif_is_ignored_in_silence():
    data = encode(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rgb(data).shape == (23, 37, 3)


# --- deep samples ---------------------------------------------------------------------------------

RAMP = np.array([[0, 1, 255, 256], [257, 4096, 32768, 65535]])


def saved(samples: np.ndarray, fmt: str = "TIFF") -> bytes:
    return encode(Image.fromarray(samples), fmt)


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bits_lose_their_low_byte(fmt, order):
    grey = rgb(saved(RAMP.astype(order), fmt))
    np.testing.assert_array_equal(grey[..., 0], RAMP >> 8)
    np.testing.assert_array_equal(grey[..., 2], RAMP >> 8)


def test_16_bit_colours_lose_their_low_byte():
    colours = (np.arange(2 * 6).reshape(2, 6) * 5000).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colours)
    np.testing.assert_array_equal(rgb(png(2, 2, rows, depth=16)).reshape(2, 6), colours >> 8)


def test_12_bits_lose_their_low_4_bits():
    packed = bytes([0xFF, 0xF0, 0x10, 0x80, 0x00, 0x00])  # 0xfff 0x010 | 0x800 0x000
    np.testing.assert_array_equal(rgb(tiff(2, 2, 12, packed))[..., 0], [[255, 1], [128, 0]])


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.float32([[0, 0.5, 1.0]]), [0, 128, 255]),
        (np.float32([[0, 100, 255]]), [0, 100, 255]),
        (np.float32([[0, 256, 65535]]), [0, 1, 255]),
        (np.float32([[-1, 0, 1]]), [0, 128, 255]),
        (np.float32([[0, 1e6, 2e6]]), [0, 128, 255]),
        (np.float32([[np.nan, np.inf, 1.0]]), [0, 0, 255]),
        (np.float32([[-3e38, 0, 3e38]]), [0, 128, 255]),
        (np.float32([[-7, -7, -7]]), [0, 0, 0]),
        (np.int32([[0, 1, 255]]), [0, 1, 255]),
        (np.int32([[0, 256, 65535]]), [0, 1, 255]),
        (np.int32([[-100, 0, 100]]), [0, 128, 255]),
        (np.int32([[0, 2**30, 2**31 - 1]]), [0, 128, 255]),
    ],
)
def test_samples_without_a_range_are_scaled_by_their_values(samples, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(rgb(saved(samples))[0, :, 1].astype(int), expected, atol=1)


@pytest.mark.parametrize(
    ("samples", "sample_format", "order", "is_zero_white", "expected"),
    [
        (np.array([0, 60000, 65535], "<u2"), 1, "<", True, [255, 21, 0]),
        (np.array([0, 60000, 65535], "<u2"), 1, "<", False, [0, 234, 255]),
        (np.array([0, 60000, 65535], ">u2"), 1, ">", False, [0, 234, 255]),
        (np.array([250, 0, 255], "u1"), 1, "<", True, [5, 255, 0]),
        (np.array([0, 0.9, 1], "<f4"), 3, "<", True, [255, 26, 0]),
        (np.array([0, 0.9, 1], ">f4"), 3, ">", True, [255, 26, 0]),
        (np.array([0, 100, 255], "<f4"), 3, "<", True, [255, 155, 0]),
        (np.array([0, 300, 65535], "<f4"), 3, "<", True, [255, 254, 0]),
        (np.array([-10, 0, 10], "<f4"), 3, "<", True, [255, 128, 0]),
        (np.array([0, 2_000_000_000, 4_000_000_000], "<u4"), 1, "<", False, [0, 128, 255]),
        (np.array([0, 256, 65535], "<u4"), 1, "<", False, [0, 1, 255]),
        (np.array([-100, 0, 100], "<i2"), 2, "<", False, [0, 128, 255]),
        (np.array([-100, 0, 100], ">i4"), 2, ">", False, [0, 128, 255]),
        (np.array([-128, 0, 127], "i1"), 2, "<", False, [0, 128, 255]),
        (np.array([0, 5, 127], "i1"), 2, "<", False, [0, 5, 127]),
    ],
)
def test_samples_of_a_tiff_are_what_its_tags_say(samples, sample_format, order, is_zero_white, expected):
    data = any_tiff(samples[None], {262: (0 if is_zero_white else 1,), 339: (sample_format,)}, order)
    np.testing.assert_allclose(rgb(data)[0, :, 1].astype(int), expected, atol=1)


@pytest.mark.parametrize(("bits", "sample", "expected"), [(1, 0x80, 0), (2, 0x40, 170), (4, 0x10, 238)])
def test_few_bits_whose_zero_is_white_are_turned_round(bits, sample, expected):
    tags = {258: (bits,), 262: (0,)}
    assert rgb(any_tiff(np.array([[sample]], np.uint8), tags))[0, 0].tolist() == [expected] * 3


def test_premultiplied_grey_is_read():
    samples = np.array([[[100, 255], [50, 128]]], np.uint8)
    np.testing.assert_allclose(rgb(any_tiff(samples, {262: (1,), 338: (1,)}))[0, :, 0], [100, 100], atol=1)


def test_what_a_tiff_is_that_is_not_read_is_said():
    samples = np.zeros((4, 4, 3), ">f4")
    with pytest.raises(ImageError, match=r"3 bands \(RGB\) of 32-bit floating point samples, big-endian") as caught:
        rgb(any_tiff(samples, {262: (2,), 339: (3,) * 3}, ">"))
    assert caught.value.type == "unsupported"
    whole = any_tiff(samples, {262: (2,), 339: (3,) * 3, 279: (10**6,)}, ">")
    with pytest.raises(ImageError) as caught:
        rgb(whole)
    assert caught.value.type == "decode", "its pixels are not all there"


# --- colours --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "CMYK", "YCbCr", "LAB", "P", "PA", "LA", "RGBA"])
def test_colours_are_what_pillow_makes_of_them(mode):
    data = encode(picture(mode), "TIFF")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(rgb(data), expected)


def test_alpha_is_dropped_and_not_blended():
    rgba = picture("RGBA")
    for fmt, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        np.testing.assert_array_equal(rgb(encode(rgba, fmt, **options)), np.asarray(rgba)[..., :3])


def test_the_colours_of_a_transparent_palette_are_kept():
    palette = picture().quantize(16)
    data = encode(palette, "PNG", transparency=bytes(16))
    np.testing.assert_array_equal(rgb(data), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("data", [
    encode(Image.new("RGBA", (3, 2), (10, 20, 30, 0)), "PNG"),
    encode(Image.new("LA", (3, 2), (10, 0)), "PNG"),
    encode(Image.new("RGB", (3, 2), (10, 20, 30)), "PNG", transparency=(10, 20, 30)),
    encode(Image.new("L", (3, 2), 10), "PNG", transparency=10),
    encode(picture(size=(3, 2)).quantize(2), "PNG", transparency=bytes(2)),
    encode(Image.new("P", (3, 2), 1), "GIF", transparency=1),
    encode(Image.new("RGBA", (3, 2), (10, 20, 30, 0)), "WEBP", lossless=True),
    encode(Image.new("RGBA", (3, 2), (10, 20, 30, 0)), "AVIF"),
], ids=["RGBA", "LA", "RGB colour", "L grey", "P png", "P gif", "webp", "avif"])  # fmt: skip
def test_transparent_pictures_are_laid_on_the_background(data):
    np.testing.assert_array_equal(rgb(data, background=(255, 0, 7)), np.full((2, 3, 3), (255, 0, 7)))


GROUND = [9, 99, 199]
DEEP = [0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFE]


@pytest.mark.parametrize(("depth", "colour", "row", "key", "expected"), [
    (16, 2, struct.pack(">6H", *DEEP), (0xFFFF,) * 3, [GROUND, [255] * 3]),
    (16, 0, struct.pack(">2H", 1000, 1001), (1000,), [GROUND, [3] * 3]),
    (8, 0, b"\5\6", (5,), [GROUND, [6] * 3]),
    (4, 0, b"\xf3", (15,), [GROUND, [51] * 3]),
    (2, 0, b"\x60", (1,), [GROUND, [170] * 3]),
    (1, 0, b"\x40", (0,), [GROUND, [255] * 3]),
    (8, 2, b"\1\2\3\1\2\4", (1, 2, 3), [GROUND, [1, 2, 4]]),
    (16, 4, struct.pack(">4H", 30000, 0, 30000, 65535), None, [GROUND, [117] * 3]),
    (16, 6, struct.pack(">8H", 256, 512, 768, 0, 256, 512, 768, 65535), None, [GROUND, [1, 2, 3]]),
])  # fmt: skip
def test_transparent_colours_of_every_depth_are_compared_in_full(depth, colour, row, key, expected):
    extra = b"" if key is None else chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    data = png(2, 1, b"\0" + row, depth=depth, colour=colour, extra=extra)
    assert rgb(data, background=tuple(GROUND))[0].tolist() == expected


def test_half_transparent_pixels_are_mixed_with_the_background():
    half = encode(Image.new("RGBA", (1, 1), (0, 100, 200, 128)), "PNG")
    assert np.abs(rgb(half, background=(255, 255, 255))[0, 0] - np.array([127, 177, 227])).max() <= 1


def test_opaque_pictures_do_not_see_the_background():
    data = encode(picture(), "PNG")
    np.testing.assert_array_equal(rgb(data, background=(255, 0, 0)), rgb(data))


# --- formats ---


def test_heif_is_decoded_where_its_extra_is_installed_and_named_where_not():
    heif = b"\0\0\0\x18ftypheic" + bytes(100)
    expected = "decode"
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        expected = "unsupported"
    with pytest.raises(ImageError) as caught:
        rgb(heif)
    assert caught.value.type == expected


# --- which way is up, among texts ---


TURNED_XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + TURNED_XMP),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(TURNED_XMP)),
        chunk(b"eXIf", turned_exif(6)[6:]),
    ],
)
def test_the_orientation_of_a_png_is_kept_though_other_texts_are_left_out(extra):
    data = encode(picture(), "PNG")
    long = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(5 << 20)))
    assert rgb(data[:33] + long + extra + long + data[33:]).shape == (37, 23, 3)
