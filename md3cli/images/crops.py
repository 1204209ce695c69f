"""From a file on disk to the uint8 crops that the vision encoder sees, one picture at a time.

A file is opened without blocking and read once, within the limits; the same bytes are hashed and decoded (pixels.py).
What goes wrong is an `ImageError` with a record's error type and a line without paths or control characters. Tiling and
crops follow the Moondream 3 specification, section 4. Knows nothing of models, batches or processes.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageColor

from md3cli.errors import ImageError, UsageError
from md3cli.images.pixels import TOO_LITTLE_MEMORY, Colour, OnHeader, decode_rgb
from md3cli.records import ImageItem, printable
from md3cli.system import open_at_once

PREPROCESSING_VERSION = 2  # rises when the same file would give other crops; part of the encoding cache's key


@dataclass(frozen=True, slots=True)
class CropConfig:
    """How the encoder wants its pictures: sizes of a crop and a patch in pixels a side, `overlap_margin` in patches."""

    crop_size: int
    patch_size: int
    overlap_margin: int
    max_crops: int

    @property
    def margin_px(self) -> int:
        """The pixels that a tile shares with its neighbour on each side."""
        return self.overlap_margin * self.patch_size

    @property
    def window_px(self) -> int:
        """The pixels from one tile to the next: the part of a tile that is its own."""
        return (self.crop_size // self.patch_size - 2 * self.overlap_margin) * self.patch_size


class Tiling(NamedTuple):
    """The rows and columns of a picture's tiles; the global crop is extra."""

    rows: int
    cols: int

    @property
    def num_crops(self) -> int:
        """The tiles and the global crop."""
        return 1 + self.rows * self.cols


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The most that is read: `max_pixels` (width x height, by the header) and `max_file_size` in bytes."""

    max_pixels: int = 2**28
    max_file_size: int = 2**30


class DecodedImage(NamedTuple):
    """An upright 8-bit RGB picture and the SHA-256 (hex) of the bytes it was decoded from."""

    image: Image.Image
    sha256: str


class Crops(NamedTuple):
    """`pixels` uint8 [1 + rows * cols, S, S, 3]: the global crop, then the tiles in row-major order."""

    pixels: np.ndarray
    tiling: Tiling


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """What the engine gets: `crops` as in `Crops.pixels`, the upright size, and the SHA-256 of the file's bytes."""

    crops: np.ndarray
    tiling: Tiling
    width: int
    height: int
    sha256: str


class WholeImage(NamedTuple):
    """A decoded picture of which parts may be asked: `pixels` uint8 [H, W, 3], upright, and the file's SHA-256."""

    pixels: np.ndarray
    sha256: str

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])


class Cutter(Protocol):
    """Cuts decoded pictures beside the workers that decode them; any thread may call it."""

    longest_side: int  # of a picture that it cuts, in pixels

    def crops_of(self, pixels: np.ndarray) -> Crops:
        """Return the bytes that `cut_crops` gives for an upright picture, uint8 [H, W, 3].

        Raises:
            EngineError: the device that cuts has failed.
            MemoryError: there is no memory for it.
        """


# --- tiling and crops ---------------------------------------------------------------------------


def select_tiling(width: int, height: int, cfg: CropConfig) -> Tiling:
    """Return the rows and columns of tiles for a picture of `width` x `height` pixels."""
    window, most = cfg.window_px, cfg.max_crops
    inner_w, inner_h = width - 2 * cfg.margin_px, height - 2 * cfg.margin_px
    if inner_h <= window or inner_w <= window:
        return Tiling(1, 1)
    rows, cols = math.ceil(inner_h / window), math.ceil(inner_w / window)
    if rows * cols > most:
        # No second look at the product, as in the original: 8000 x 500 pixels give (1, 13), more than `max_crops`.
        shrink = math.sqrt(most / (rows * cols))
        return Tiling(max(1, math.floor(rows * shrink)), max(1, math.floor(cols * shrink)))
    rows = max(rows, math.floor(math.sqrt(most * inner_h / inner_w)))
    cols = max(cols, math.floor(math.sqrt(most * inner_w / inner_h)))
    if rows * cols > most:
        rows, cols = (rows, most // rows) if cols > rows else (most // cols, cols)
    return Tiling(max(1, rows), max(1, cols))


def cut_crops(image: Image.Image, cfg: CropConfig) -> Crops:
    """Cut the crops of an RGB picture: the whole picture is resized (Lanczos) once for each target."""
    assert image.mode == "RGB", image.mode
    size, window = cfg.crop_size, cfg.window_px
    tiling = select_tiling(*image.size, cfg)
    pixels = np.empty((tiling.num_crops, size, size, 3), np.uint8)
    pixels[0] = _resize(image, size, size)
    if tiling == (1, 1):
        pixels[1] = pixels[0]  # the only tile is the global crop, byte for byte
        return Crops(pixels, tiling)
    whole = _resize(image, tiling.cols * window + 2 * cfg.margin_px, tiling.rows * window + 2 * cfg.margin_px)
    for row in range(tiling.rows):
        for col in range(tiling.cols):
            top, left = row * window, col * window
            pixels[1 + row * tiling.cols + col] = whole[top : top + size, left : left + size]
    return Crops(pixels, tiling)


def _resize(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Resize to the bytes that one call of Pillow 12.3, and so the original with it, gives, on every Pillow."""
    # The two passes round to 8 bits in between, so their order shows. Up to Pillow 12.1 the width comes first; in 12.2
    # and 12.3 except for pictures more than 100 times as tall as wide; Pillow 13 begins with the height of any tall
    # picture (a quarter of a 480 x 640 picture's global crop differed). One call for each pass costs what one did.
    is_height_first = image.height > 100 * image.width and image.height > height
    between = (image.width, height) if is_height_first else (width, image.height)
    for size in (between, (width, height)):
        if size != image.size:  # Pillow would copy it
            image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image)


BAND_ROWS = 16  # of 12 megapixels: 200 kB, which stay in the cache between two copies


def copy_pixels(image: Image.Image, target: np.ndarray) -> None:
    """Copy an RGB picture to `target`, uint8 [H, W, 3]."""
    # np.asarray of the whole picture joins pieces of 64 kB: 51 ms for 12 megapixels, and 15 ms in bands (Zen 4).
    for top in range(0, image.height, BAND_ROWS):
        bottom = min(top + BAND_ROWS, image.height)
        target[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))


# --- files --------------------------------------------------------------------------------------


def prepare_image(
    item: ImageItem,
    cfg: CropConfig,
    limits: ImageLimits,
    background: str | None,
    *,
    data: bytes | None = None,
) -> PreparedImage:
    """Read and cut the picture of `item`; arguments and errors are those of `read_image`."""
    try:
        image, sha256 = read_image(item, limits, background, data=data)
        crops = cut_crops(image, cfg)
    except MemoryError as error:
        raise ImageError("too_large", TOO_LITTLE_MEMORY) from error
    return PreparedImage(crops.pixels, crops.tiling, image.width, image.height, sha256)


def read_whole(
    item: ImageItem, limits: ImageLimits, background: str | None, *, data: bytes | None = None
) -> WholeImage:
    """Read the picture of `item` as an array; arguments and errors are those of `read_image`."""
    image, sha256 = read_image(item, limits, background, data=data)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    copy_pixels(image, pixels)
    return WholeImage(pixels, sha256)


def parse_background(background: str | None) -> Colour | None:
    """Return the colour that `--background` names; None, as for "none", drops alpha, which is the original's way.

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


def read_image(
    item: ImageItem,
    limits: ImageLimits,
    background: str | None = None,
    *,
    on_header: OnHeader | None = None,
    data: bytes | None = None,
) -> DecodedImage:
    """Return the picture of `item`, upright, 8-bit RGB, the first frame only.

    Args:
        background: a colour to lay transparent pictures on; None drops alpha, as the original does.
        on_header: called with the number of pixels before any of them is allocated; may block.
        data: the file's bytes where they were fetched already, within the limits; then nothing is opened.

    Raises:
        ImageError: whatever is wrong with the file; `type` is the record's.
        UsageError: `background` is no colour.
    """
    colour = parse_background(background)
    if data is None:
        data = read_bytes(item, limits.max_file_size)
    sha256 = hashlib.sha256(data).hexdigest()
    return DecodedImage(decode_rgb(data, limits.max_pixels, colour, on_header), sha256)


_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
_NOT_OPENABLE = {errno.ENXIO, errno.ENODEV}  # sockets; devices without a driver


def read_bytes(item: ImageItem, limit_bytes: int) -> bytes:
    """Return the bytes of `item`; a FIFO does not block, and no device is read.

    Raises:
        ImageError: the file cannot be read, is empty, or is larger than `limit_bytes`.
    """
    try:
        with _open_regular(item.path) as file:
            num_bytes = os.fstat(file.fileno()).st_size if item.size is None else item.size
            if num_bytes > limit_bytes:
                size = f"{num_bytes:,} bytes, more than the {limit_bytes:,} of --max-file-size"
                raise ImageError("too_large", f"the file has {size}")
            if num_bytes == 0:
                raise ImageError("empty", "the file is empty (0 bytes)")
            file.seek(item.offset)
            data = file.read(num_bytes)
    except ValueError as error:  # a NUL in the name
        raise ImageError("not_found", "no file can have this name") from error
    except OSError as error:
        raise _translate(error) from error
    if item.size is not None and len(data) < item.size:
        raise ImageError("decode", f"the archive ends after {len(data):,} of the picture's {item.size:,} bytes")
    return data


def _open_regular(path: str) -> BinaryIO:
    fd = open_at_once(path)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise ImageError("not_a_file", f"this is {_kind_of(mode)}, not a file")
    return open(fd, "rb")


def _kind_of(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _translate(error: OSError) -> ImageError:
    reason = os.strerror(error.errno) if error.errno else "unknown error"
    if error.errno in _ABSENT:
        return ImageError("not_found", f"cannot open: {reason}")
    if isinstance(error, PermissionError):
        return ImageError("permission", f"cannot open: {reason}")
    if error.errno in _NOT_OPENABLE:
        return ImageError("not_a_file", "this is a socket or a device, not a file")
    return ImageError("io", f"cannot read: {reason}")
