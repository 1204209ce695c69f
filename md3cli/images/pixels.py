"""From a picture file's bytes to upright 8-bit RGB pixels, by Pillow, without trusting the bytes.

The content decides the format, among those of a list; the header must keep the limit on pixels. The first frame counts,
turned as its EXIF says, deep samples scaled, alpha dropped or laid on a colour. This follows the advice of Pillow's
security manual: name the formats, limit the size, refuse truncated pictures, decode where a crash does no harm (pool.py
sees to the last). Knows nothing of files, crops or processes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from md3cli.errors import ImageError
from md3cli.images.formats import bare_jpeg, is_apples_png, refusal, without_metadata
from md3cli.images.jpeg import load_jpeg
from md3cli.records import MESSAGE_LIMIT_CHARS, printable

Colour = tuple[int, int, int]
OnHeader = Callable[[int], None]

HUGE_PIXELS = 50_000_000  # above this, memory counts: pixels are copied in bands, and pool.py lets in one at a time
TOO_LITTLE_MEMORY = "the picture needs more memory than a decoder may use"
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF")  # JPEG's opener also gives MPO


@cache
def start_pillow() -> tuple[str, ...]:
    """Load Pillow's decoders, set its limits, and return the names of the formats read here."""
    Image.init()  # without it WEBP, AVIF and TIFF are missing from Image.OPEN
    # Pillow's own limit refuses honest 200-megapixel photographs, and every road into a decoder here checks a limit of
    # its own. Pillow's limits on text chunks stay.
    Image.MAX_IMAGE_PIXELS = None
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in _WANTED if name in Image.OPEN)


def check_kind(data: bytes) -> tuple[int, int]:
    """Check that `data` begins as a picture of a format read here; no pixel is decoded.

    Returns:
        Width and height in pixels as the header says them, before the picture is turned upright.

    Raises:
        ImageError: it does not.
    """
    try:
        with _open(without_metadata(data), start_pillow())[0] as image:
            return image.size
    except ImageError:
        raise
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, RuntimeError, struct.error, ...
        raise ImageError("decode", "the picture's header is damaged") from error


def decode_rgb(data: bytes, max_pixels: int, background: Colour | None, on_header: OnHeader | None) -> Image.Image:
    """Return the first frame of the picture in `data`, upright, mode RGB.

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
    # Broken EXIF and the like; again for each picture, because whoever calls may have put the filters back.
    warnings.filterwarnings("ignore", module=r"PIL\.|md3cli\.images\.pixels")
    opened, data = _open(without_metadata(data), formats)
    image: Image.Image = opened
    if image.format == "TIFF":
        _refuse_deep_planes(image)
    num_pixels = image.width * image.height
    if num_pixels > max_pixels:
        size = f"{image.width} x {image.height} pixels, more than the {max_pixels:,} of --max-pixels"
        raise ImageError("too_large", f"the picture has {size}")
    if on_header is not None:
        on_header(num_pixels)
    if image.format in ("JPEG", "MPO"):
        load_jpeg(opened, data)
    else:
        image.load()
    turn = _turn(image)
    if background is not None and image.format == "PNG":
        image = _with_transparent_colour(image, data)
    if _is_deep(image):
        image = _to_8_bits(image)
    if num_pixels > HUGE_PIXELS:
        return _in_bands(image, turn, background)
    return _to_rgb(image if turn is None else image.transpose(turn), background)


def _open(data: bytes, formats: tuple[str, ...]) -> tuple[ImageFile, bytes]:
    """Open the picture; return it with the bytes that were opened."""
    if is_apples_png(data):  # Pillow would read its blue as red
        raise refusal(data, formats)
    for attempt in (data, bare_jpeg(data)) if data.startswith(b"\xff\xd8") else (data,):
        with suppress(UnidentifiedImageError, KeyError):  # KeyError: a TIFF packed in a way that Pillow cannot name
            return Image.open(io.BytesIO(attempt), formats=formats), attempt
    raise refusal(data, formats)


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
    """Return how to turn `image`, whose pixels are loaded, as its EXIF (or XMP) says; a broken one is ignored."""
    # Before load() it would be wrong: TIFF turns itself there, and PNG may keep its EXIF behind the pixels.
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
    """Return what `_to_rgb` of the turned picture gives, band by band, and close `image`."""
    # 7 bytes a pixel instead of 8 to 12: Pillow stores RGB in 4, and two copies of 200 megapixels pass 1.5 GB.
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
_COLOURS_TAG = 262
_SAMPLE_FORMAT_TAG = 339
_UNSIGNED, _SIGNED = (1,), (2,)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits, or of signed ones, to 8 bits; Pillow's own conversion clips or wraps it.

    16-bit samples lose their low byte. Other integers and floats carry no range, so the values tell: 0-1 (floats)
    is stretched to 0-255, 0-255 stays, 0-65535 loses its low byte, anything else is stretched from its smallest to
    its largest value. Where a TIFF's 0 is white, the samples are turned round within that range.
    """
    tags = getattr(image, "tag_v2", {})
    is_zero_white = bool(tags) and tags.get(_COLOURS_TAG, 0) == 0
    samples = np.asarray(image)
    if image.mode.startswith("I;16"):
        bits = tags.get(_BITS_PER_SAMPLE_TAG, (16,))[0]  # TIFF knows 12 bits too
        eight = (samples >> (bits - 8)).astype(np.uint8)
        return Image.fromarray(255 - eight if is_zero_white else eight)
    if image.mode == "I" and tags.get(_SAMPLE_FORMAT_TAG, _UNSIGNED) == _UNSIGNED:
        samples = samples.view(np.uint32)  # PNG has none of them
    elif image.mode == "L":
        samples = samples.view(np.int8)
    finite = np.nan_to_num(samples.astype(np.float32), copy=False, posinf=0.0, neginf=0.0)
    return Image.fromarray(_stretch(finite, is_integer=image.mode != "F", is_zero_white=is_zero_white))


def _stretch(samples: np.ndarray, *, is_integer: bool, is_zero_white: bool) -> np.ndarray:
    low, high = float(samples.min()), float(samples.max())
    is_unit, is_ranged = low >= 0 and high <= 1 and not is_integer, low >= 0 and high <= 65535
    if is_zero_white:
        top = 1 if is_unit else 255 if is_ranged and high <= 255 else 65535 if is_ranged else low + high
        samples = np.float32(top) - samples
    if is_unit:
        samples *= 255
    elif not is_ranged:
        samples -= np.float32(low)
        samples *= np.float32(255 / max(high - low, 1e-30))
    elif high > 255:
        np.floor(samples / 256, out=samples)
    eight: np.ndarray = np.rint(samples).clip(0, 255).astype(np.uint8)
    return eight


def _is_deep(image: Image.Image) -> bool:
    """Return whether Pillow would clip or wrap the samples."""
    is_signed = image.mode == "L" and getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT_TAG) == _SIGNED
    return is_signed or image.mode.startswith(("I", "F"))


_PLANES_TAG = 284


def _refuse_deep_planes(image: Image.Image) -> None:
    """Refuse separate planes of 16 bits, which Pillow reads as if they had 8, without a word."""
    tags = getattr(image, "tag_v2", {})
    bits, is_unpacked = max(tags.get(_BITS_PER_SAMPLE_TAG, (1,))), getattr(image, "tile", [("",)])[0][0] == "raw"
    if tags.get(_PLANES_TAG) == 2 and bits > 8 and is_unpacked:
        kind = f"a TIFF of {bits}-bit samples in separate planes"
        raise ImageError("unsupported", f"{kind}; this kind is not read here, convert it to 8-bit RGB or grey")


_DEPTH_OFFSET = 24  # of the bits a sample in a PNG


def _with_transparent_colour(image: Image.Image, data: bytes) -> Image.Image:
    """Make alpha of a PNG's transparent colour where Pillow would compare it with samples that Pillow has scaled."""
    key, depth = image.info.get("transparency"), data[_DEPTH_OFFSET]
    if image.mode == "L" and isinstance(key, int):
        most = 2**depth - 1
        image.info["transparency"] = (key & most) * 255 // most
    elif image.mode == "I;16" and isinstance(key, int):
        samples = np.asarray(image)
        image = Image.merge("LA", (Image.fromarray((samples >> 8).astype(np.uint8)), _opaque_where(samples != key)))
    elif image.mode == "RGB" and isinstance(key, tuple) and depth == 16:
        high, low = np.asarray(image), np.asarray(_low_bytes(data))
        wanted = np.array(key)
        is_other = ((high != wanted >> 8) | (low != wanted & 0xFF)).any(axis=2)
        image = image.copy()
        del image.info["transparency"]
        image.putalpha(_opaque_where(is_other))
    elif image.mode == "RGB" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value & 0xFF for value in key)
    return image


def _opaque_where(is_opaque: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(is_opaque, 255, 0).astype(np.uint8))


def _low_bytes(data: bytes) -> Image.Image:
    """Return the low bytes of a PNG's 16-bit colours, which Pillow drops: it keeps them of a little-endian picture."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        image.load()
        return image


def _to_rgb(image: Image.Image, background: Colour | None) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")  # Pillow converts it to nothing else
    if background is not None and image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*background, 255))
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image if image.mode == "RGB" else image.convert("RGB")
