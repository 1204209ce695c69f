"""Writes the corpus: more than 300 good and hostile pictures, each with the one right outcome.

`write_corpus(folder)` gives a `Case` for each. The files are the same on every machine with the same
Pillow; nothing is downloaded. What a case expects is written by hand or follows from how its file is
made, never from what this package does with it.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, features

Size = tuple[int, int]
WIDE: Size = (37, 23)  # not square, so that a picture lying on its side is seen
TALL: Size = (23, 37)


@dataclass(frozen=True, slots=True)
class Case:
    """A path below the corpus (as os.fsdecode gives it) and what must come of it: a size, or an error type."""

    path: str
    size: Size | None = None
    error: str | None = None


def picture(mode: str = "RGB", size: Size = WIDE, seed: int = 0) -> Image.Image:
    """A picture with smooth colours, noise and (where the mode has alpha) a transparent part."""
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 4))
    noise[..., 0] += np.linspace(0, 190, width).astype(int)
    noise[..., 1] += np.linspace(0, 190, height).astype(int)[:, None]
    noise[..., 3] += 190 * (np.arange(width) % 2)
    rgba = Image.fromarray(noise.astype(np.uint8))
    if mode == "RGBA":
        return rgba
    if mode == "PA":
        return rgba.convert("LA").convert("PA")
    if mode.startswith("I;16"):
        deep = np.asarray(rgba.convert("L")).astype(">u2" if mode.endswith("B") else "<u2") * 257
        return Image.fromarray(deep)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        turned = ImageCms.profileToProfile(rgba.convert("RGB"), srgb, lab, outputMode="LAB")
        assert turned is not None
        return turned
    return rgba.convert("LA") if mode == "LA" else rgba.convert("RGB").convert(mode)


def encode(image: Image.Image, fmt: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def png(width: int, height: int, body: bytes, *, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG by hand: headers that lie, and encodings that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(width: int, height: int, bits: int, data: bytes, *, next_ifd: int = 0) -> bytes:
    """A grey little-endian TIFF with one strip behind the header."""
    offset = 8
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, offset), (277, 1), (278, height)]
    tags.append((279, len(data)))
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = offset + len(data)
    return struct.pack("<2sHI", b"II", 42, start) + data + ifd + struct.pack("<I", next_ifd and start)


def any_tiff(samples: np.ndarray, tags: dict[int, tuple[int, ...]], order: str = "<") -> bytes:
    """An unpacked TIFF of any samples [H, W] or [H, W, bands], in one strip, or one a plane where tag 284 says so."""
    height, width = samples.shape[:2]
    bands = samples.shape[2] if samples.ndim == 3 else 1
    is_planar = tags.get(284) == (2,)
    planes = [samples[..., band] for band in range(bands)] if is_planar else [samples]
    strips = [np.ascontiguousarray(plane).tobytes() for plane in planes]
    offsets = [8 + sum(map(len, strips[:number])) for number in range(len(strips))]
    facts = {256: (width,), 257: (height,), 258: (samples.dtype.itemsize * 8,) * bands, 259: (1,), 273: offsets}
    facts |= {277: (bands,), 278: (height,), 279: [len(strip) for strip in strips], **tags}
    start = 8 + sum(map(len, strips))
    directory, tail = struct.pack(order + "H", len(facts)), b""
    for tag, values in sorted(facts.items()):
        raw = struct.pack(f"{order}{len(values)}I", *values)
        place = raw if len(raw) == 4 else struct.pack(order + "I", start + 6 + 12 * len(facts) + len(tail))
        tail += raw if len(raw) > 4 else b""
        directory += struct.pack(order + "HHI", tag, 4, len(values)) + place
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start)
    return head + b"".join(strips) + directory + bytes(4) + tail


def turned_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


# --- good pictures ------------------------------------------------------------------------------

_MODES = {
    "JPEG": "L RGB CMYK YCbCr",
    "PNG": "1 L LA P RGB RGBA I;16",
    "WEBP": "L P RGB RGBA",
    "GIF": "1 L P RGB RGBA",
    "TIFF": "1 L LA P PA RGB RGBA CMYK YCbCr LAB I I;16 I;16B F",
    "BMP": "1 L P RGB RGBA",
    "AVIF": "L RGB RGBA",
}
_SUFFIX = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "TIFF": ".tif",
    "BMP": ".bmp",
    "AVIF": ".avif",
}
_OPTIONS: dict[str, list[dict[str, object]]] = {
    "JPEG": [
        *({"quality": quality} for quality in (1, 50, 100)),
        *({"subsampling": subsampling} for subsampling in (0, 1, 2)),
        {"progressive": True},
        {"optimize": True},
        {"dpi": (300, 300)},
        {"restart_marker_rows": 1},
        {"keep_rgb": True},
        {"comment": b"\x1b[31mred"},
        {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()},
        {"icc_profile": b"not a profile"},
    ],
    "PNG": [{"compress_level": 0}, {"optimize": True}, {"icc_profile": b"not a profile"}, {"transparency": (1, 2, 3)}],
    "WEBP": [{"lossless": True}, {"quality": 1}, {"quality": 100, "method": 6}],
    "TIFF": [
        *({"compression": name} for name in ["tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "jpeg"]),
        *({"compression": name} for name in ["zstd", "lzma"]),
        {"big_tiff": True},
        {"strip_size": 64},
        {"compression": "tiff_lzw", "tiffinfo": {317: 2}},
    ],
    "AVIF": [{"quality": 10}, {"subsampling": "4:4:4"}, {"speed": 10}, {"range": "limited"}],
}
_TURNABLE = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")


def _good() -> Iterator[tuple[str, bytes, Size]]:
    for fmt, modes in _MODES.items():
        suffix = _SUFFIX[fmt]
        for mode in modes.split():
            yield f"mode-{mode.replace(';', '')}{suffix}", encode(picture(mode), fmt), WIDE
        for number, options in enumerate(_OPTIONS.get(fmt, [])):
            yield f"option-{number}{suffix}", encode(picture(), fmt, **options), WIDE
        for width, height in ((1, 1), (1, 9), (9, 1), (379, 380), (1, 3000), (3000, 1)):
            yield f"size-{width}x{height}{suffix}", encode(picture(size=(width, height)), fmt), (width, height)
        for orientation in range(10) if fmt in _TURNABLE else ():
            data = encode(picture(), fmt, exif=turned_exif(orientation))
            yield f"turned-{orientation}{suffix}", data, TALL if 5 <= orientation <= 8 else WIDE
        if fmt in _TURNABLE and fmt != "TIFF":
            yield f"exif-broken{suffix}", encode(picture(), fmt, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), WIDE
        if fmt in ("PNG", "WEBP", "GIF", "TIFF", "AVIF"):
            frames = [picture(seed=seed) for seed in (1, 2)]
            yield f"frames{suffix}", encode(picture(), fmt, save_all=True, append_images=frames), WIDE
    yield from _good_oddities()


def _good_oddities() -> Iterator[tuple[str, bytes, Size]]:
    for name in ("group3", "group4", "tiff_ccitt"):
        yield f"fax-{name}.tif", encode(picture("1"), "TIFF", compression=name), WIDE
    for bits in (1, 2, 4):
        yield f"bits-{bits}.png", encode(picture().quantize(2**bits), "PNG", bits=bits), WIDE
    palette = picture().quantize(16)
    yield "palette-alpha.png", encode(palette, "PNG", transparency=bytes(range(0, 256, 16))), WIDE
    yield "palette-alpha.gif", encode(palette, "GIF", transparency=3), WIDE
    yield "two.mpo", encode(picture(), "MPO", save_all=True, append_images=[picture(seed=1)]), WIDE
    yield "colours-16.png", png(2, 1, bytes(1 + 12), depth=16), (2, 1)
    yield "grey-12.tif", tiff(2, 2, 12, bytes(6)), (2, 2)
    yield "ifd-loop.tif", tiff(2, 2, 8, bytes(4), next_ifd=1), (2, 2)
    yield "behind.jpg", encode(picture(), "JPEG") + b"anything" * 999, WIDE
    yield "behind.png", encode(picture(), "PNG") + b"anything" * 999, WIDE
    yield "frames-20000.gif", _many_frames(20_000), (1, 1)
    lies = {"a-png.jpg": "PNG", "a-gif.png": "GIF", "a-jpeg.tiff": "JPEG", "an-avif.bmp": "AVIF", "no-suffix": "WEBP"}
    for name, fmt in lies.items():
        yield name, encode(picture(), fmt), WIDE


def _beside_the_pixels() -> Iterator[tuple[str, bytes, Size]]:
    """Sound pictures with texts, profiles, frames and ends that are huge, broken or missing."""
    long, pixels = zlib.compress(bytes(50_000_000)), encode(picture(), "PNG")
    chunks = {
        "ztxt": chunk(b"zTXt", b"parameters\0\0" + long),
        "itxt": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + long),
        "itxts": chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(1_000_000))) * 70,
        "raw-profile": chunk(b"zTXt", b"Raw profile type exif\0\0" + long),
        "text": chunk(b"tEXt", b"workflow\0" + b"x" * (5 << 20)),
        "profile": chunk(b"iCCP", b"name\0\0" + long),
        "profile-method": chunk(b"iCCP", b"name\0\5junk"),
        "checksum": chunk(b"tEXt", b"key\0value")[:-1] + b"?",
        "checksum-exif": chunk(b"eXIf", turned_exif(6)[6:])[:-1] + b"?",
        "short": b"".join(chunk(kind, b"") for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"iCCP", b"tIME")),
        "frames": chunk(b"acTL", b"") + chunk(b"fcTL", b"?" * 26),
    }
    end = pixels.index(b"IEND") - 4
    for name, extra in chunks.items():
        yield f"png-{name}.png", pixels[:33] + extra + pixels[33:], WIDE
        yield f"png-late-{name}.png", pixels[:end] + extra + pixels[end:], WIDE
        yield f"png-cut-in-{name}.png", pixels[:end] + extra[:-6], WIDE
    yield "png-without-end.png", pixels[:end], WIDE
    jpeg = encode(picture(), "JPEG")
    texts = {
        0xE0: b"JFIF",
        0xE1: b"Exif\0\0",
        0xE2: b"ICC_PROFILE\0",
        0xED: b"Photoshop 3.0\0" + b"8BIM\3\xed",
        0xEE: b"Adobe",
    }
    texts |= {0xEF: b"x" * 65_000, 0xFE: b"\xff" * 60_000}
    for marker, text in texts.items():
        for number, body in enumerate((text, text + b"\0", text + b"\xff" * 40)):
            segment = struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
            if len(body) > 40 and marker == 0xEE:
                continue  # this one says how colours are stored
            yield f"jpeg-{marker:x}-{number}.jpg", jpeg[:20] + segment + jpeg[20:], WIDE
    yield "jpeg-without-end.jpg", jpeg[:-2], WIDE
    webp = encode(picture(), "WEBP", exif=turned_exif(6), icc_profile=b"not a profile at all")
    yield "webp-cut-in-exif.webp", webp[:-4], WIDE
    yield "webp-behind.webp", webp + b"anything", TALL
    gif = encode(picture(), "GIF")
    comment, start = b"!\xfe" + (b"\xff" + b"c" * 255) * 9000 + b"\0", gif.index(b",\0\0\0\0")
    yield "gif-comment.gif", gif[:start] + comment + gif[start:], WIDE
    yield "gif-without-end.gif", gif[:-1], WIDE
    yield "bmp-behind.bmp", encode(picture(), "BMP") + b"anything", WIDE


def _unread_kinds() -> Iterator[tuple[str, bytes, str]]:
    """Sound pictures of formats that are read, of kinds that are not."""
    flat = np.full((8, 8), 7)
    kinds: dict[str, tuple[np.ndarray, dict[int, tuple[int, ...]]]] = {
        "grey-f64": (flat.astype("<f8"), {262: (1,), 339: (3,)}),
        "grey-f16": (flat.astype("<f2"), {262: (1,), 339: (3,)}),
        "grey-u64": (flat.astype("<u8"), {262: (1,)}),
        "complex": (flat.astype("<c8"), {262: (1,), 339: (6,)}),
        "signed-white": (flat.astype("<i2"), {262: (0,), 339: (2,)}),
        "rgb-f32": (np.dstack([flat] * 3).astype("<f4"), {262: (2,), 339: (3,) * 3}),
        "grey-alpha-u16": (np.dstack([flat] * 2).astype("<u2"), {262: (1,), 338: (2,)}),
        "seven-bands": (np.dstack([flat] * 7).astype("<u2"), {262: (1,), 338: (0,) * 6}),
        "camera": (flat.astype("<u2"), {262: (32803,)}),
        "packed": (flat.astype("u1"), {262: (1,), 259: (34712,)}),
        "planes-u16": (np.dstack([flat] * 3).astype("<u2"), {262: (2,), 284: (2,)}),
    }
    for name, (samples, tags) in kinds.items():
        yield f"unread-{name}.tif", any_tiff(samples, tags), "unsupported"
    jpeg = bytearray(encode(picture(), "JPEG"))
    jpeg[jpeg.index(b"\xff\xc0") + 4] = 12
    yield "unread-12-bits.jpg", bytes(jpeg), "unsupported"
    lossless = encode(picture("L"), "JPEG").replace(b"\xff\xc0", b"\xff\xf7", 1)
    yield "unread-ls.jpg", lossless, "unsupported"
    apple = chunk(b"CgBI", b"\x50\0\x20\2")
    png_file = encode(picture(), "PNG")
    yield "unread-apple.png", png_file[:8] + apple + png_file[8:], "unsupported"
    yield "unread-animated.png", b"\x8aMNG\r\n\x1a\n" + bytes(50), "unsupported"


def _many_frames(count: int) -> bytes:
    one = encode(Image.new("P", (1, 1)), "GIF")
    start = one.index(b",\0\0\0\0")
    return one[:start] + one[start:-1] * count + b";"


# --- bad pictures -------------------------------------------------------------------------------


def _bad() -> Iterator[tuple[str, bytes, str]]:
    yield "empty.jpg", b"", "empty"
    for fmt, suffix in _SUFFIX.items():
        whole = encode(picture(), fmt)
        for percent in (20, 50, 80):
            yield f"cut-{percent}{suffix}", whole[: len(whole) * percent // 100], "decode"
        yield f"magic-only{suffix}", whole[:16], "decode"
        yield f"rubbish-behind-magic{suffix}", whole[:16] + np.random.default_rng(1).bytes(500), "decode"
    yield from _foreign()
    noise = np.random.default_rng(2)
    nothing = {
        "text.jpg": b"This is not a picture.\n" * 9,
        "page.png": b"<!DOCTYPE html><html><body>404</body></html>",
        "json.webp": b'{"image": "a.jpg"}',
        "zip.tif": b"PK\x03\x04" + bytes(200),
        "gzip.gif": b"\x1f\x8b\x08\0" + bytes(100),
        "program.bmp": b"\x7fELF" + bytes(200),
        "film.avif": b"\0\0\0\x20ftypisom" + bytes(200),
        "zeros.jpg": bytes(5000),
        "one-byte.jpg": b"\xff",
        "control.png": b"\x1b[2J\x1b]0;owned\x07",
        **{f"noise-{n}.jpg": b"\x80" + noise.bytes(1 + 200 * n) for n in range(5)},
    }
    for name, data in nothing.items():
        yield name, data, "not_an_image"
    yield from _bombs()


def _foreign() -> Iterator[tuple[str, bytes, str]]:
    wanted = ["JPEG2000", "PPM", "TGA", "PCX", "SGI", "ICO", "ICNS", "DDS", "EPS", "PDF", "IM", "DIB", "QOI"]
    for fmt in wanted:
        yield f"foreign-{fmt.lower()}.jpg", encode(picture(size=(32, 32)), fmt), "unsupported"
    for fmt, mode in (("MSP", "1"), ("XBM", "1"), ("SPIDER", "F"), ("BLP", "P")):
        yield f"foreign-{fmt.lower()}.png", encode(picture(mode), fmt), "unsupported"
    yield (
        "script.svg.png",
        b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>',
        "unsupported",
    )
    yield "plain.svg.jpg", b"\n <svg width='9' height='9'></svg>", "unsupported"
    yield "layers.jpg", b"8BPS\0\1" + bytes(99), "unsupported"
    yield "xl.jpg", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "unsupported"
    yield "exr.png", b"\x76\x2f\x31\x01" + bytes(99), "unsupported"
    yield "ghost.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n(%pipe%id) (w) file\n", "unsupported"


def _bombs() -> Iterator[tuple[str, bytes, str]]:
    row = bytes(1 + 60_000 * 3)
    yield "bomb-real.png", png(60_000, 60_000, row * 60), "too_large"
    yield "bomb-claimed.png", png(60_000, 60_000, b""), "too_large"
    yield "bomb-most.png", png(2**31 - 1, 2**31 - 1, b""), "too_large"
    yield "bomb.gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + encode(picture(), "GIF")[10:], "too_large"
    yield (
        "bomb.bmp",
        b"BM" + bytes(8) + struct.pack("<IIiiHHIIIIII", 54, 40, 99_999, 99_999, 1, 24, 0, 0, 0, 0, 0, 0),
        "too_large",
    )
    yield "bomb.tif", tiff(99_999, 99_999, 8, bytes(9)), "too_large"
    jpeg = encode(picture(), "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    yield "bomb.jpg", jpeg[:frame] + struct.pack(">HH", 65500, 65500) + jpeg[frame + 4 :], "too_large"
    yield "no-width.png", png(0, 5, b"\0" * 5), "decode"
    yield "bm-text.bmp", b"BMW builds cars and motorcycles in Munich.", "decode"  # begins as a BMP does
    yield "short-strip.tif", tiff(500, 500, 8, bytes(9)), "decode"


# --- names, links, things that are no files -------------------------------------------------------

_NAMES = [
    b"new\nline.jpg",
    b"return\r.jpg",
    b"tab\t.jpg",
    b"escape\x1b[31m.jpg",
    b"title\x1b]0;owned\x07.jpg",
    b"bell\x07\x7f\x01.jpg",
    "c1 \u009b2J.jpg".encode(),
    "emoji \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f98a.jpg".encode(),
    "right-to-left \u202egpj.exe.jpg".encode(),
    "\ufeffbom \u2028line.jpg".encode(),
    "日本語 العربية Ελλ.jpg".encode(),
    "e\u0301 decomposed.jpg".encode(),
    "\u00e9 composed.jpg".encode(),
    b"latin1 \xe9\xff.jpg",
    b"half \xf0\x9f\x98.jpg",
    b"surrogate \xed\xa0\x80.jpg",
    b"-rf.jpg",
    b"--help.jpg",
    b" leading and trailing .jpg ",
    b"quotes ' \" ` .jpg",
    b"dollar $(id) ; & | .jpg",
    b"=cmd|'calc'!A0.jpg",
    b"<img src=x onerror=alert(1)>.jpg",
    b"percent %s %n %00 %2e%2e.jpg",
    b"star * ? [a] {b}.jpg",
    b"back\\slash\\n.jpg",
    b"colon:c.jpg",
    b"hash #1?q=2.jpg",
    b"comma,semi;.jpg",
    b"...jpg",
    b"x" * 251 + b".jpg",
    "\U0001f98a".encode() * 62 + b"abc.jpg",
]


def _named(root: Path) -> Iterator[Case]:
    data = encode(picture(), "JPEG")
    folder = os.fsencode(root / "names")
    os.makedirs(folder)
    for name in _NAMES:
        _write(folder + b"/" + name, data)
        yield Case(os.fsdecode(b"names/" + name), WIDE)
    deep = "/".join(["names", *(f"deep{n}" for n in range(40)), "a.jpg"])
    (root / deep).parent.mkdir(parents=True)
    _write(os.fsencode(root / deep), data)
    yield Case(deep, WIDE)
    for absent in ("names/missing.jpg", "names/nul\0.jpg", "names/" + "y" * 256 + ".jpg", "names/-rf.jpg/below.jpg"):
        yield Case(absent, error="not_found")


def _special(root: Path) -> Iterator[Case]:
    folder = root / "special"
    folder.mkdir()
    _write(os.fsencode(folder / "plain.jpg"), encode(picture(), "JPEG"))
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(folder, os.O_RDONLY)  # a socket's path has 108 bytes at most: go through /proc
        listener.bind(f"/proc/self/fd/{here}/socket.jpg")
        os.close(here)
    links = {"to-plain": "plain.jpg", "to-link": "to-plain.jpg", "to-fifo": "fifo.jpg", "to-socket": "socket.jpg"}
    links |= {"to-folder": "folder.jpg", "to-zero": "/dev/zero", "to-tty": "/dev/tty", "dangling": "nowhere.jpg"}
    links |= {"loop": "loop.jpg", "loop-a": "loop-b.jpg", "loop-b": "loop-a.jpg"}
    for name, target in links.items():
        (folder / f"{name}.jpg").symlink_to(target)
    with open(folder / "sparse.jpg", "wb") as sparse:
        sparse.truncate(3 << 30)
    (folder / "locked.jpg").write_bytes(b"secret")
    (folder / "locked.jpg").chmod(0)
    is_readable = os.access(folder / "locked.jpg", os.R_OK)  # root reads what it likes
    outcomes = dict.fromkeys(("loop", "loop-a", "loop-b", "dangling"), "not_found")
    outcomes |= dict.fromkeys(
        ("folder", "fifo", "socket", "to-fifo", "to-socket", "to-folder", "to-zero"), "not_a_file"
    )
    outcomes |= {"to-tty": "not_a_file", "sparse": "too_large"}
    outcomes["locked"] = "not_an_image" if is_readable else "permission"
    for name, error in outcomes.items():
        yield Case(f"special/{name}.jpg", error=error)
    for name in ("plain", "to-plain", "to-link"):
        yield Case(f"special/{name}.jpg", WIDE)


def _write(path: bytes, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def write_corpus(root: Path) -> list[Case]:
    """Write everything below `root` (which must be empty) and say what is right for each."""
    assert all(features.check(name) for name in ("webp", "avif", "libtiff")), "Pillow lacks a codec"
    for folder in ("good", "bad"):
        (root / folder).mkdir()
    with warnings.catch_warnings(action="ignore"):  # Pillow's, about what is broken here on purpose
        cases = [
            *_written(root, "good", itertools.chain(_good(), _beside_the_pixels())),
            *_written(root, "bad", itertools.chain(_bad(), _unread_kinds())),
        ]
    return [*cases, *_named(root), *_special(root)]


def _written(root: Path, folder: str, files: Iterable[tuple[str, bytes, Size | str]]) -> Iterator[Case]:
    for name, data, outcome in files:
        _write(os.fsencode(root / folder / name), data)
        path = f"{folder}/{name}"
        yield Case(path, error=outcome) if isinstance(outcome, str) else Case(path, size=outcome)
