"""From a picture file's bytes to upright 8-bit RGB pixels, by Pillow, without trusting the bytes.

An allow list decided by content, a limit on pixels checked from the header, the first frame only,
EXIF orientation, deep samples scaled, alpha dropped or laid on a colour. Knows nothing of files,
crops or processes. Comes in: bytes. Goes out: a Pillow RGB image, or `ImageError`.

Follows the advice of Pillow's security manual: name the formats, limit the size, refuse truncated
pictures, decode where a crash does no harm (decode.py sees to the last).
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from md3cli.errors import ImageError, UsageError
from md3cli.jpeg import load_jpeg
from md3cli.records import MESSAGE_LIMIT_CHARS, printable

Colour = tuple[int, int, int]
OnHeader = Callable[[int], None]

HUGE_PIXELS = 50_000_000  # above this, memory counts: pixels are copied in bands, and decode.py lets in one at a time
TOO_LITTLE_MEMORY = "the picture needs more memory than a decoder may use"
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF")  # JPEG's opener also gives MPO


@cache
def start_pillow() -> tuple[str, ...]:
    """Load Pillow's decoders and set its limits; the names of the formats read here.

    Pillow's own pixel limit is switched off for the whole process, on purpose: it refuses honest
    200-megapixel photographs, and every road into a decoder here checks a limit of its own. Its
    limits on text chunks stay.
    """
    Image.init()  # without it WEBP, AVIF and TIFF are missing from Image.OPEN
    Image.MAX_IMAGE_PIXELS = None
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in _WANTED if name in Image.OPEN)


def parse_background(background: str | None) -> Colour | None:
    """The colour named by `--background`; None and "none" keep the original's way, alpha dropped.

    Raises:
        UsageError: it is no colour.
    """
    if background is None or background == "none":
        return None
    try:
        red, green, blue = ImageColor.getrgb(background)[:3]
    except ValueError as error:
        message = f"background {background!r} is not a colour; use none, a name (white) or #rrggbb"
        raise UsageError(printable(message)) from error
    return red, green, blue


def check_kind(data: bytes) -> None:
    """Raise ImageError unless `data` begins as a picture of a format read here; no pixel is decoded."""
    formats = start_pillow()
    try:
        Image.open(io.BytesIO(data), formats=formats).close()
    except UnidentifiedImageError as error:
        raise _refusal(data, formats) from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, RuntimeError, struct.error, ...
        raise ImageError("decode", "the picture's header is damaged") from error


def decode_rgb(data: bytes, max_pixels: int, background: Colour | None, on_header: OnHeader | None) -> Image.Image:
    """The first frame of the picture in `data`, upright, mode RGB.

    Args:
        background: laid under transparent pictures; None drops alpha as PIL's convert("RGB") does.
        on_header: called with the number of pixels before any of them is allocated; may block.

    Raises:
        ImageError: decode, too_large, unsupported or not_an_image.
    """
    try:
        return _decode(data, max_pixels, background, on_header)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("too_large", TOO_LITTLE_MEMORY) from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, RuntimeError, struct.error, ...
        reason = printable(" ".join(str(error).split()) or type(error).__name__)[: MESSAGE_LIMIT_CHARS - 40]
        raise ImageError("decode", f"the picture is damaged: {reason}") from error


def _decode(data: bytes, max_pixels: int, background: Colour | None, on_header: OnHeader | None) -> Image.Image:
    formats = start_pillow()
    warnings.filterwarnings("ignore", module=r"PIL\.|md3cli\.pixels")  # broken EXIF and the like; again for each
    try:  # picture, because whoever calls may have put the filters back
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        raise _refusal(data, formats) from error
    num_pixels = image.width * image.height
    if num_pixels > max_pixels:
        size = f"{image.width} x {image.height} pixels, more than the {max_pixels:,} of --max-pixels"
        raise ImageError("too_large", f"the picture has {size}")
    if on_header is not None:
        on_header(num_pixels)
    if image.format in ("JPEG", "MPO"):
        load_jpeg(image, data)
    else:
        image.load()
    turn = _turn(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    if num_pixels > HUGE_PIXELS:
        return _in_bands(image, turn, background)
    return _to_rgb(image if turn is None else image.transpose(turn), background)


# --- the right way up -----------------------------------------------------------------------------

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How to turn `image` as its EXIF (or XMP) orientation says; a broken one is ignored.

    Ask after load(): TIFF turns itself there, and PNG may keep its EXIF behind the pixels.
    """
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001 - EXIF is hostile input and not worth losing a picture for
        return None


_SIDEWAYS = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
}
_LAST_ROW_FIRST = {
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
}
_BAND_ROWS = 64


def _in_bands(image: Image.Image, turn: Image.Transpose | None, background: Colour | None) -> Image.Image:
    """What `_to_rgb` of the turned picture gives, in 7 bytes a pixel instead of 8 to 12. Closes `image`.

    Pillow stores RGB in 4 bytes; two such copies of a 200-megapixel photograph pass 1.5 GB.
    """
    if turn is None and image.mode == "RGB":
        return image
    width, height = image.size
    upright = np.empty((width, height, 3) if turn in _SIDEWAYS else (height, width, 3), np.uint8)
    for top in range(0, height, _BAND_ROWS):
        bottom = min(top + _BAND_ROWS, height)
        band = image.crop((0, top, width, bottom))
        pixels = np.asarray(_to_rgb(band if turn is None else band.transpose(turn), background))
        place = slice(height - bottom, height - top) if turn in _LAST_ROW_FIRST else slice(top, bottom)
        upright[(slice(None), place) if turn in _SIDEWAYS else place] = pixels
    image.close()
    return Image.fromarray(upright)


# --- 8 bits, RGB ----------------------------------------------------------------------------------

_BITS_PER_SAMPLE_TAG = 258


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as 8 bits, scaled; Pillow's own conversion would clip it to white or black.

    16-bit samples lose their low byte. 32-bit integers and floats carry no range, so the values tell:
    0-1 (floats) is stretched to 0-255, 0-255 stays, 0-65535 loses its low byte, anything else is
    stretched from its smallest to its largest value.
    """
    samples = np.asarray(image)
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE_TAG, (16,))[0]  # TIFF knows 12 bits too
        return Image.fromarray((samples >> (bits - 8)).astype(np.uint8))
    finite = np.nan_to_num(samples.astype(np.float32), copy=False, posinf=0.0, neginf=0.0)
    return Image.fromarray(_stretch(finite, is_integer=image.mode == "I"))


def _stretch(samples: np.ndarray, *, is_integer: bool) -> np.ndarray:
    low, high = float(samples.min()), float(samples.max())
    if low >= 0 and high <= 1 and not is_integer:
        samples *= 255
    elif low < 0 or high > 65535:
        samples -= np.float32(low)
        samples *= np.float32(255 / max(high - low, 1e-30))
    elif high > 255:
        np.floor(samples / 256, out=samples)
    eight: np.ndarray = np.rint(samples).clip(0, 255).astype(np.uint8)
    return eight


def _to_rgb(image: Image.Image, background: Colour | None) -> Image.Image:
    if background is not None and image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*background, 255))
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image if image.mode == "RGB" else image.convert("RGB")


# --- what a refused file is -----------------------------------------------------------------------

_KNOWN = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|II[*+]\0|MM\0[*+]|RIFF....WEBP|....ftypavi[fs]|BM....\0\0\0\0",
    re.DOTALL,
)
_HEIF = re.compile(rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)
_FOREIGN = {
    "PDF": rb"%PDF-",
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
    "SVG": rb"(?:\xef\xbb\xbf)?\s{0,99}(?:<svg\b|(?:<\?xml|<!DOCTYPE svg|<!--).{0,4000}?<svg\b)",
    "PSD": rb"8BPS",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "JPEG XR": rb"II\xbc",
    "ICO": rb"\0\0[\1\2]\0[^\0]",
    "ICNS": rb"icns",
    "DDS": rb"DDS ",
    "PNM": rb"P[1-7fFyY][\s#]",
    "QOI": rb"qoif",
    "BLP": rb"BLP[12]",
    "MSP": rb"DanM|LinS",
    "SGI": rb"\x01\xda[\0\1][\1\2]",
    "SUN": rb"\x59\xa6\x6a\x95",
    "DCX": rb"\xb1\x68\xde\x3a",
    "XPM": rb"/\* XPM \*/",
    "XCF": rb"gimp xcf",
    "WMF": rb"\xd7\xcd\xc6\x9a",
    "FITS": rb"SIMPLE  =",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "Radiance": rb"#\?RADIANCE",
    "DjVu": rb"AT&TFORM",
}
_UNMARKED = ("DIB", "PCX", "TGA", "XBM", "IM", "SPIDER")  # no magic number to speak of: Pillow reads their headers


def _refusal(data: bytes, formats: tuple[str, ...]) -> ImageError:
    """Why none of `formats` opens `data`: a damaged header, another format, or no picture at all."""
    is_heif = _HEIF.match(data) is not None
    if is_heif and "HEIF" not in formats:
        return ImageError("unsupported", "HEIF pictures need an optional part: pip install 'md3cli[heif]'")
    if is_heif or _KNOWN.match(data):
        return ImageError("decode", "the picture is damaged: its header cannot be read")
    foreign = next((name for name, magic in _FOREIGN.items() if re.match(magic, data, re.DOTALL)), None)
    if foreign is None:
        with suppress(Exception):  # their parsers raise anything
            foreign = Image.open(io.BytesIO(data), formats=_UNMARKED).format
    if foreign is None:
        return ImageError("not_an_image", "the content is no known picture format")
    return ImageError("unsupported", f"{foreign} is not among the formats read here: {', '.join(formats)}")
