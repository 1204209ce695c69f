"""What a file is that cannot be opened as a picture: another format, a kind that is not read here, damaged, or nothing.

Comes in: the file's bytes. Goes out: the `ImageError` of its record, with words that say what was found.
"""

from __future__ import annotations

import io
import re
from contextlib import suppress

from PIL import Image, TiffImagePlugin

from md3cli.errors import ImageError

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
    "MNG": rb"\x8aMNG|\x8bJNG",
}
_UNMARKED = ("DIB", "PCX", "TGA", "XBM", "IM", "SPIDER")  # no magic number to speak of: Pillow reads their headers


def refusal(data: bytes, formats: tuple[str, ...]) -> ImageError:
    """Say why none of `formats` opens `data`: a damaged header, another format or kind, or no picture at all."""
    is_heif = _HEIF.match(data) is not None
    if is_heif and "HEIF" not in formats:
        return ImageError("unsupported", "HEIF pictures need an optional part: pip install 'md3cli[heif]'")
    kind = _unread_kind(data)
    if kind is not None:
        return ImageError("unsupported", f"{kind}; this kind is not read here, convert it to 8-bit RGB or grey")
    if is_heif or _KNOWN.match(data):
        return ImageError("decode", "the picture is damaged: its header cannot be read")
    foreign = next((name for name, magic in _FOREIGN.items() if re.match(magic, data, re.DOTALL)), None)
    if foreign is None:
        with suppress(Exception):  # their parsers raise anything
            foreign = Image.open(io.BytesIO(data), formats=_UNMARKED).format
    if foreign is None:
        return ImageError("not_an_image", "the content is no known picture format")
    return ImageError("unsupported", f"{foreign} is not among the formats read here: {', '.join(formats)}")


# --- kinds of the formats read here that are not -------------------------------------------------

_SAMPLE_FORMATS = {
    1: "unsigned",
    2: "signed",
    3: "floating point",
    4: "untyped",
    5: "complex",
    6: "complex floating point",
}
_COLOURS = {0: "grey, 0 is white", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIELab"}
_COLOURS |= {9: "ICCLab", 10: "ITULab", 32803: "a camera's raw data", 32844: "LogL", 32845: "LogLuv"}
_COLOURS |= {34892: "a camera's raw data"}
_PACKINGS = {
    6: "old JPEG",
    7: "JPEG",
    34712: "JPEG 2000",
    34887: "LERC",
    34933: "PNG",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_PACKINGS |= {34676: "SGI LogLuv", 34677: "SGI LogLuv", 32809: "ThunderScan", 33003: "JPEG 2000", 33005: "JPEG 2000"}
_BITS = {1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32, 64, 128}
_JPEG_FRAMES = {0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical", 0xF7: "JPEG-LS"}
_JPEG_FRAMES |= {0xCB: "lossless", 0xCD: "hierarchical", 0xCE: "hierarchical", 0xCF: "hierarchical"}


def is_apples_png(data: bytes) -> bool:
    """Return whether this is a PNG as Xcode rewrites it: blue before red, without a checksum."""
    return data[:4] == b"\x89PNG" and data[12:16] == b"CgBI"


def _unread_kind(data: bytes) -> str | None:
    """What sort of TIFF, JPEG or PNG this is, where it is whole as far as its header tells, and of a sort not read."""
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        with suppress(Exception):  # its parser raises anything
            return _unread_tiff(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _unread_jpeg(data)
    if is_apples_png(data):
        return "a PNG in Apple's own form (CgBI)"
    return None


def _unread_tiff(data: bytes) -> str | None:
    header = data[:16] if data[2:3] == b"+" or data[3:4] == b"+" else data[:8]
    tags, file = TiffImagePlugin.ImageFileDirectory_v2(header), io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    if not (_number(tags, 256) > 0 and _number(tags, 257) > 0 and _holds_its_pixels(tags, len(data))):
        return None
    bands, packing = _number(tags, 277, 1), _number(tags, 259, 1)
    bits, colour = tags.get(258, (1,)), _COLOURS.get(_number(tags, 262, 0))
    samples = {_SAMPLE_FORMATS.get(number) for number in tags.get(339, (1,))}
    if colour is None or None in samples or not set(bits) <= _BITS or not 0 < bands <= 1000:
        return None
    is_packing_read = packing in TiffImagePlugin.COMPRESSION_INFO
    if is_packing_read and _is_read(tags, bits):
        return None
    packed = "" if is_packing_read else f", packed with {_PACKINGS.get(packing, f'method {packing}')}"
    words = " and ".join(f"{number}-bit" for number in sorted(set(bits)))
    noun = "band" if bands == 1 else "bands"
    order = "big-endian" if data[:1] == b"M" else "little-endian"
    sort = f"{words} {' and '.join(sorted(map(str, samples)))} samples, {order}{packed}"
    return f"a TIFF of {bands} {noun} ({colour}) of {sort}"


def _is_read(tags: TiffImagePlugin.ImageFileDirectory_v2, bits: tuple[int, ...]) -> bool:
    """Whether Pillow knows the samples, so that the header must be damaged elsewhere."""
    samples = tags.get(339, (1,))
    samples = samples[:1] if len(set(samples)) == 1 else samples
    key = (tags.prefix, _number(tags, 262, 0), samples, _number(tags, 266, 1), bits, tags.get(338, ()))
    return key in TiffImagePlugin.OPEN_INFO


def _number(tags: TiffImagePlugin.ImageFileDirectory_v2, tag: int, default: int = -1) -> int:
    value = tags.get(tag, default)
    return value if isinstance(value, int) else -1


def _holds_its_pixels(tags: TiffImagePlugin.ImageFileDirectory_v2, num_bytes: int) -> bool:
    """Whether all strips or tiles lie within the file."""
    offsets, counts = (tags.get(273), tags.get(279)) if 273 in tags else (tags.get(324), tags.get(325))
    if not offsets or not counts or len(offsets) != len(counts):
        return False
    return all(0 < offset <= offset + count <= num_bytes for offset, count in zip(offsets, counts, strict=True))


def _unread_jpeg(data: bytes) -> str | None:
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker in _JPEG_FRAMES:
            return f"a JPEG of another kind ({_JPEG_FRAMES[marker]}) of {data[at + 4]}-bit samples"
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, bands = data[at + 4], data[at + 9]
            is_odd = (bits == 12 or bands == 2) and length == 8 + 3 * bands
            return f"a JPEG of {bands} {'band' if bands == 1 else 'bands'} of {bits}-bit samples" if is_odd else None
        at += 2 + length if length >= 2 else len(data)
    return None
