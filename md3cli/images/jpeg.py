"""The pixels of a JPEG, and whether any of them are missing.

Where a scan ends too early, libjpeg paints the rest grey; data that are left over behind the last block, it skips. Both
are mere warnings, which Pillow does not pass on: a picture with a hole or a cut would be taken as whole. But libjpeg
also waits wherever its input ends, and the bytes that it has taken by then tell where it stands: inside a block, or
behind the last one, looking for a marker. So the data are handed over in pieces:

- up to `_TAIL` bytes before the end of a scan: the decoder must still be inside;
- up to the end, with bytes behind it that are no marker, enough to look ahead and too few for another two blocks:
  the decoder must be looking for a marker.

Damage that leaves the number of blocks as it is (changed bytes, a small hole, a hole in the last bits of a progressive
picture) is not seen; libjpeg does not see it either. Arithmetic and lossless coding are left to libjpeg alone, which
cannot wait inside their scans; they need their end marker.

`pixels.py` alone imports this file; it stands apart because it is one trick with a decoder's input that nothing else
there needs to know.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

_TAIL = 12  # bytes that may be left over behind the last block; some cameras leave a few
_AHEAD = b"\xff\0" * 8  # ones: no Huffman code, so that each block takes 17 bits and more; libjpeg looks 8 bytes ahead
_END = b"\xff\xd9"
_LEAST_PIECE = 1 << 14  # mean bytes of a restart interval from which each is looked at: libjpeg is slow near an end
_LONG_RUN = 64  # equal bytes in a scan: a hole, or a flat picture
_SOS, _EOI, _DRI, _RST_0, _RST_7 = 0xDA, 0xD9, 0xDD, 0xD0, 0xD7
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_HUFFMAN_FRAMES = {0xC0, 0xC1, 0xC2}
_ALL_COEFFICIENTS = (1 << 64) - 1
_BLOCK_BYTES = 1 << 24  # searched at a time


class _MissingError(OSError):
    def __init__(self) -> None:
        super().__init__("a part of its scan is missing")


class _LeftOverError(OSError):
    def __init__(self) -> None:
        super().__init__("its scan has more data than pixels")


@dataclass(slots=True)
class _Scan:
    """One scan: where its coded data lie, where its restart markers, and which coefficients it brings."""

    start: int
    end: int
    restarts: np.ndarray  # offsets
    interval: int  # blocks (MCU) from one restart marker to the next; 0: there are none
    components: list[int]
    coefficients: int  # a bit for each
    is_last_bit: bool


@dataclass(slots=True)
class _Layout:
    """What the headers of a Huffman-coded JPEG say."""

    width: int = 0
    height: int = 0
    sampling: dict[int, tuple[int, int]] = field(default_factory=dict)  # of each component: across, down
    scans: list[_Scan] = field(default_factory=list)
    end: int | None = None  # offset of the end marker

    def num_blocks(self, scan: _Scan) -> int:
        """Return the number of blocks (MCU) of a scan: of one component its own, of several the interleaved ones."""
        across = max(factor for factor, _ in self.sampling.values())
        down = max(factor for _, factor in self.sampling.values())
        if len(scan.components) > 1:
            return -(-self.width // (8 * across)) * -(-self.height // (8 * down))
        own_across, own_down = self.sampling[scan.components[0]]
        columns, rows = -(-self.width * own_across // across), -(-self.height * own_down // down)
        return -(-columns // 8) * -(-rows // 8)

    def is_complete(self) -> bool:
        """Return whether the scans bring each coefficient of each component to its last bit."""
        brought = dict.fromkeys(self.sampling, 0)  # a bit for each coefficient
        for scan in self.scans:
            for component in scan.components if scan.is_last_bit else ():
                brought[component] |= scan.coefficients
        return all(bits == _ALL_COEFFICIENTS for bits in brought.values())


def load_jpeg(image: ImageFile, data: bytes) -> None:
    """Load the pixels of `image`, which was opened from `data`; a missing end marker alone is no fault.

    Raises:
        OSError: it is damaged.
    """
    layout = _read_layout(data)
    if layout is None:
        _decode_unchecked(image, data)
    else:
        try:
            _decode(image, data, layout)
        except _LeftOverError:
            _decode_without_padding(image, data, layout)
        if layout.end is None and not _is_same_with_other_padding(image, data[: layout.scans[-1].end]):
            raise _MissingError
    image.tile = []


class _Decoding:
    """A decoder of libjpeg that gets its input in pieces."""

    def __init__(self, image: ImageFile) -> None:
        image.load_prepare()
        _, extents, _, args = image.tile[0]
        self._decoder = Image._getdecoder(image.mode, "jpeg", args, image.decoderconfig)
        self._decoder.setimage(image.im, extents)
        self._left = b""
        self.is_done = False

    def feed(self, piece: bytes | memoryview) -> bool:
        """Hand over `piece`; return whether the decoder took everything.

        Raises:
            OSError: the data are damaged, or the decoder was done before.
        """
        if self.is_done:
            raise _LeftOverError
        given = self._left + bytes(piece) if self._left else piece
        num_taken, error = self._decoder.decode(given)
        if error < 0:
            raise OSError("broken data stream")
        self.is_done = num_taken < 0
        self._left = b"" if self.is_done else bytes(given[num_taken:])
        return not self._left

    def close(self) -> None:
        self._decoder.cleanup()


def _decode_unchecked(image: ImageFile, data: bytes) -> None:
    decoding = _Decoding(image)
    try:
        decoding.feed(data)
        if not decoding.is_done:
            decoding.feed(_END)
    finally:
        decoding.close()
    if not decoding.is_done:
        raise OSError("it is truncated")


def _decode(image: ImageFile, data: bytes, layout: _Layout) -> None:
    if not layout.is_complete():
        raise _MissingError
    pieces = [piece for scan in layout.scans for piece in _pieces(data, layout, scan)]
    decoding = _Decoding(image)
    try:
        begin = 0
        for start, end in pieces:
            _feed_piece(decoding, memoryview(data), begin, start, end)
            begin = end
        if not decoding.is_done:  # several scans: the pixels are made when all are read
            decoding.feed(data[begin : layout.end] + _END)
    finally:
        decoding.close()
    if not decoding.is_done:
        raise OSError("it is truncated")


def _feed_piece(decoding: _Decoding, data: memoryview, begin: int, start: int, end: int) -> None:
    """Hand over everything from `begin` to `end`, whose coded data begin at `start`."""
    middle = end - _TAIL
    while 0xFF in data[middle - 1 : middle + 1]:  # a half marker is not taken by anyone
        middle -= 1
    if middle > start:
        is_looking = decoding.feed(data[begin:middle])
        begin = middle
        if is_looking and not decoding.is_done:  # or it has taken all of its block so far: another byte will tell
            begin += 1
            is_looking = decoding.feed(data[middle:begin])
        if decoding.is_done or is_looking:
            raise _LeftOverError
    is_looking = decoding.feed(bytes(data[begin:end]) + _AHEAD)
    if not decoding.is_done and not (is_looking and decoding.feed(_AHEAD[:2])):
        raise _MissingError


def _decode_without_padding(image: ImageFile, data: bytes, layout: _Layout) -> None:
    """Decode once more, without the equal bytes that some encoders put behind a scan.

    Raises:
        OSError: there are none, or there are still too many data, or now too few.
    """
    for scan in reversed(layout.scans):
        coded = data[scan.start : scan.end]
        bare = coded.rstrip(coded[-1:])
        if len(coded) - len(bare) > _TAIL:
            data = data[: scan.start + len(bare) + _TAIL // 2] + data[scan.end :]  # its own last bytes may be such
    shorter = _read_layout(data)
    if shorter is None:
        raise _LeftOverError
    _decode(image, data, shorter)


def _is_same_with_other_padding(image: ImageFile, data: bytes) -> bool:
    """Return whether other bytes behind the data give the same last rows, so that no bit of them was needed."""
    image.tile, tile = [], image.tile
    rows = (0, max(0, image.height - 64), *image.size)
    wanted = image.crop(rows).tobytes()
    image.tile = tile
    for padding in (b"", b"\x5a\xc3\x96\x0f" * 4, b"\x2b\x74" * 8):  # libjpeg takes none for zeros
        with Image.open(io.BytesIO(data + padding + _END), formats=("JPEG",)) as other:
            if other.crop(rows).tobytes() != wanted:
                return False
    return True


# --- headers --------------------------------------------------------------------------------------


def _read_layout(data: bytes) -> _Layout | None:
    """Read the headers; return None where they are not those of a Huffman-coded picture."""
    layout, interval, at = _Layout(), 0, 2
    markers: _Markers | None = None
    while (at := data.find(b"\xff", at) + 1) > 0 and at < len(data):
        marker = data[at]
        if marker == _EOI:
            layout.end = at - 1
            break
        if marker in (0, 0xFF, 1) or _RST_0 <= marker <= _RST_7 + 1:  # filling and markers without a body
            continue
        body = data[at + 3 : at + 1 + int.from_bytes(data[at + 1 : at + 3])]
        at += 3 + len(body)
        if marker in _FRAMES:
            if marker not in _HUFFMAN_FRAMES or layout.sampling or not _read_frame(layout, body):
                return None
        elif marker == _DRI:
            interval = int.from_bytes(body[:2])
        elif marker == _SOS:
            markers = markers or _Markers(data, at)
            scan = _read_scan(body, at, interval, markers)
            if scan is None or not layout.sampling.keys() >= set(scan.components):
                return None
            layout.scans.append(scan)
            at = scan.end
    return layout if layout.scans else None


def _read_frame(layout: _Layout, body: bytes) -> bool:
    if len(body) < 6 or len(body) < 6 + 3 * body[5]:
        return False
    layout.height, layout.width = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
    layout.sampling = {body[k]: (body[k + 1] >> 4, body[k + 1] & 15) for k in range(6, 6 + 3 * body[5], 3)}
    factors = [factor for pair in layout.sampling.values() for factor in pair]
    return len(layout.sampling) == body[5] > 0 and min(factors) > 0


def _read_scan(body: bytes, start: int, interval: int, markers: _Markers) -> _Scan | None:
    count = body[0] if body else 0
    if count == 0 or len(body) < 4 + 2 * count:
        return None
    first, last, bits = body[1 + 2 * count : 4 + 2 * count]
    if not first <= last < 64:
        return None
    restarts, end = markers.of_scan(start)
    components = [body[k] for k in range(1, 1 + 2 * count, 2)]
    return _Scan(start, end, restarts, interval, components, (2 << last) - (1 << first), bits & 15 == 0)


class _Markers:
    """Each place behind the first scan header where an FF stands that is neither data nor filling."""

    def __init__(self, data: bytes, start: int) -> None:
        array = np.frombuffer(data, np.uint8)
        found = [] if start < len(data) - 1 else [np.empty(0, np.intp)]
        for first in range(start, len(data) - 1, _BLOCK_BYTES):
            offsets = first + np.flatnonzero(array[first : min(first + _BLOCK_BYTES, len(data) - 1)] == 0xFF)
            found.append(offsets[(array[offsets + 1] - 1) < 0xFE])  # neither 0 (which wraps around) nor FF
        self._offsets = np.concatenate(found) if len(found) != 1 else found[0]
        self._ends = self._offsets[array[self._offsets + 1] & 0xF8 != _RST_0]
        self._last = len(data) - data.endswith(b"\xff")  # half a marker

    def of_scan(self, start: int) -> tuple[np.ndarray, int]:
        """Return the restart markers of the scan whose coded data begin at `start`, and its end."""
        number = self._ends.searchsorted(start)
        end = int(self._ends[number]) if number < len(self._ends) else max(start, self._last)
        return self._offsets[self._offsets.searchsorted(start) : self._offsets.searchsorted(end)], end


# --- pieces ---------------------------------------------------------------------------------------


def _pieces(data: bytes, layout: _Layout, scan: _Scan) -> list[tuple[int, int]]:
    """Return start and end of those parts of a scan, from one restart marker to the next, that are looked at.

    Raises:
        OSError: restart markers are missing.
    """
    restarts = scan.restarts
    wanted = -(-layout.num_blocks(scan) // scan.interval) - 1 if scan.interval else 0
    if len(restarts) == wanted + 1 and scan.interval and restarts[-1] + 2 >= scan.end:
        restarts = restarts[:-1]  # one behind the last block is allowed for
    if len(restarts) != wanted:
        raise _MissingError
    if wanted and np.any(np.frombuffer(data, np.uint8)[restarts + 1] != _RST_0 + np.arange(wanted) % 8):
        raise _MissingError
    bounds = [scan.start, *restarts.tolist(), scan.end]
    if scan.end - scan.start >= _LEAST_PIECE * len(bounds) or _has_long_run(data, scan):
        return list(pairwise(bounds))
    return [(bounds[-2], bounds[-1])]


def _has_long_run(data: bytes, scan: _Scan) -> bool:
    """Return whether about `_LONG_RUN` equal bytes stand in a row in a scan."""
    step = _LONG_RUN // 4
    samples = np.frombuffer(data, np.uint8)[scan.start : scan.end : step]
    is_equal = samples[1:] == samples[:-1]
    candidates = scan.start + step * np.flatnonzero(is_equal[2:] & is_equal[1:-1] & is_equal[:-2])
    return any(data.count(data[at], at, at + 3 * step) == 3 * step for at in map(int, candidates))
