"""A picture's bytes without what the model does not look at: texts, profiles, times, further frames.

Pillow refuses a sound picture for what stands beside its pixels (a text of more than 1 MiB, a wrong checksum of a
text, half a profile, frames of an animation in disorder). So it does not get to see that. Kept are the parts that
make pixels and those that may say which way is up. Comes in and goes out: the bytes of a picture.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_TURNING_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_LONGEST_TEXT = 1 << 19  # bytes, packed or not: below Pillow's limit; one that says which way is up has some 100
_WEBP_METADATA = {b"EXIF", b"XMP ", b"ICCP"}


def without_metadata(data: bytes) -> bytes:
    """Leave out what Pillow may stumble over in a PNG or WebP; `data` itself where there is nothing."""
    if data.startswith(_PNG):
        return _bare_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _without_half_a_chunk(data)
    return data


def bare_jpeg(data: bytes) -> bytes:
    """Leave out the segments of a JPEG's header that make no pixels, and those that do but are too short for it."""
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
    """A WebP up to the metadata in which it was cut off."""
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
    """Start and end of each whole chunk, up to the last one or the first that makes no sense."""
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
    """Whether a chunk may hold an orientation, is sound, and small."""
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
    """Whether the text of a zTXt or iTXt chunk is too long, or cannot be unpacked."""
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
