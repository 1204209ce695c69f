"""What a picture file is by its bytes: which parts of it Pillow gets to see, and why a file is refused.

Pillow sees the parts that make pixels and those that say which way is up. It would refuse a sound picture for what
stands beside them: a text of more than 1 MiB, a text's wrong checksum, half a profile, frames in disorder. A refusal is
the `ImageError` of a record: another format, a kind that is not read here, a damaged header, or no picture at all.

`pixels.py` alone imports this file; the two stay apart because this one knows bytes and no pixels, and both together
have 580 lines.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress

from PIL import Image, TiffImagePlugin

from md3cli.errors import ImageError

_PNG = b"\x89PNG\r\n\x1a\n"
_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_TURNING_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_LONGEST_TEXT = 1 << 19  # bytes, packed or not: below Pillow's limit; one that says which way is up has some 100
_WEBP_METADATA = {b"EXIF", b"XMP ", b"ICCP"}


def without_metadata(data: bytes) -> bytes:
    """Leave out what Pillow may stumble over in a PNG or WebP; return `data` itself where there is nothing such."""
    if data.startswith(_PNG):
        return _bare_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _without_half_a_chunk(data)
    return data


def bare_jpeg(data: bytes) -> bytes:
    """Leave out the segments of a JPEG's header that make no pixels, and those that are too short for what they say."""
    kept, at = [b"\xff\xd8"], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        body = data[at + 4 : end]
        is_wanted = body.startswith((b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"))
        is_wanted |= (body.startswith(b"JFIF\0") and len(body) >= 14) or (body.startswith(b"Adobe") and len(body) >= 12)
        if is_wanted or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[at:end])
        at = max(end, at + 4)
    return b"".join([*kept, data[at:]])


def _without_half_a_chunk(data: bytes) -> bytes:
    """Return a WebP up to the metadata in which it was cut off."""
    start = 12
    while start + 8 <= len(data):
        num_bytes = int.from_bytes(data[start + 4 : start + 8], "little")
        if start + 8 + num_bytes > len(data) and data[start : start + 4] in _WEBP_METADATA:
            return data[:4] + (start - 8).to_bytes(4, "little") + data[8:start]
        start += 8 + num_bytes + num_bytes % 2
    return data


def _bare_png(data: bytes) -> bytes:
    kept, end = [(0, 8)], 8  # from, to
    for start, end in _chunks(data):
        is_critical = not data[start + 4] & 0x20
        if is_critical or data[start + 4 : start + 8] in _PIXELS or _is_about_turning(data, start, end):
            if kept[-1][1] == start:
                start = kept.pop()[0]
            kept.append((start, end))
    half = data[end + 4 : end + 8]
    is_cut_in_text = end < len(data) and half.isalpha() and bool(half[0] & 0x20)
    if kept == [(0, end)] and not is_cut_in_text:
        return data
    if not is_cut_in_text:
        kept.append((end, len(data)))
    view = memoryview(data)
    return b"".join(view[start:end] for start, end in kept)


def _chunks(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and end of each whole chunk, up to the last one or the first that makes no sense."""
    start = len(_PNG)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        kind = data[start + 4 : start + 8]
        if end > len(data) or not kind.isalpha():
            return
        yield start, end
        if kind == b"IEND":
            return
        start = end


def _is_about_turning(data: bytes, start: int, end: int) -> bool:
    kind = data[start + 4 : start + 8]
    if kind not in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") or end - start > _LONGEST_TEXT:
        return False
    body = data[start + 8 : end - 4]
    if kind != b"eXIf" and not body.startswith(_TURNING_TEXTS):
        return False
    if kind in (b"zTXt", b"iTXt") and _is_long_unpacked(kind, body):
        return False
    return zlib.crc32(body, zlib.crc32(kind)).to_bytes(4) == data[end - 4 : end]


def _is_long_unpacked(kind: bytes, body: bytes) -> bool:
    """Return whether the text of a zTXt or iTXt chunk is too long, or cannot be unpacked."""
    _, _, rest = body.partition(b"\0")
    if kind == b"zTXt":
        packed = rest[1:]
    elif rest[:1] == b"\0":
        return False
    else:
        packed = rest[2:].split(b"\0", 2)[-1]
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, _LONGEST_TEXT)
    except zlib.error:
        return True
    return bool(unpacking.unconsumed_tail)


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
    """Return whether this is a PNG as Xcode rewrites it: blue before red, and without a checksum."""
    return data[:4] == b"\x89PNG" and data[12:16] == b"CgBI"


def _unread_kind(data: bytes) -> str | None:
    """Return what sort of TIFF, JPEG or PNG this is; None where its header is damaged, or the sort is read here."""
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
    """Return whether Pillow knows the samples, so that the header must be damaged elsewhere."""
    samples = tags.get(339, (1,))
    samples = samples[:1] if len(set(samples)) == 1 else samples
    key = (tags.prefix, _number(tags, 262, 0), samples, _number(tags, 266, 1), bits, tags.get(338, ()))
    return key in TiffImagePlugin.OPEN_INFO


def _number(tags: TiffImagePlugin.ImageFileDirectory_v2, tag: int, default: int = -1) -> int:
    value = tags.get(tag, default)
    return value if isinstance(value, int) else -1


def _holds_its_pixels(tags: TiffImagePlugin.ImageFileDirectory_v2, num_bytes: int) -> bool:
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
