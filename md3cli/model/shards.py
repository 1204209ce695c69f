"""Files of a checkpoint that is being written: where each tensor goes, and whether it arrived.

The header of a safetensors file comes first and follows from the name table, so each tensor is
written to its place as soon as it is made. Afterwards the file is read back from the disk once, for
its digest and to compare every tensor with what was meant. Which values are written is not decided here.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from md3cli.errors import OutputError
from md3cli.model.checkpoint import TORCH_DTYPES
from md3cli.model.formats import Format, JsonObject
from md3cli.model.name_tables import Recipe, Slot, StoredTensor, stored_name
from md3cli.model.packing import disassemble
from md3cli.model.quantised import QuantisedWeight
from md3cli.model.safetensors_header import DTYPE_BYTES
from md3cli.model.tensor_table import Shape

DTYPE_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
_ALIGNMENT = 8
_READ_BYTES = 1 << 23

Progress = Callable[[int], None]  # called with the bytes just written


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor goes: `start` counts from the end of the header."""

    dtype: str
    shape: Shape
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write: its slots and the place of each of their tensors, by plain name."""

    slots: tuple[Slot, ...]
    places: Mapping[str, Place]

    @property
    def num_bytes(self) -> int:
        return max(place.stop for place in self.places.values())


@dataclass(frozen=True, slots=True)
class StoredDtypes:
    """What weights and int4's scales are stored in, in the safetensors spelling; scales of rows are float32."""

    weights: str
    int4_scales: str = "F32"

    def of(self, slot: Slot, part: StoredTensor) -> str:
        """The dtype of one part of a slot; codes know their own."""
        wanted = self.weights
        if slot.recipe.is_low_bit:
            wanted = self.int4_scales if slot.recipe is Recipe.INT4 else "F32"
        return wanted if wanted in part.dtypes else min(part.dtypes)


def lay_out(recipes: Iterable[Slot], dtypes: StoredDtypes, limit_bytes: int | None) -> Iterator[Shard]:
    """Slots in order, cut into files of at most `limit_bytes` (a slot that is larger has one to itself)."""
    group: list[Slot] = []
    size = 0
    for slot in recipes:
        slot_bytes = sum(_num_bytes(dtypes.of(slot, part), part.shape) for part in slot.parts)
        if group and limit_bytes is not None and size + slot_bytes > limit_bytes:
            yield _shard(group, dtypes)
            group, size = [], 0
        group.append(slot)
        size += slot_bytes
    yield _shard(group, dtypes)


def _num_bytes(dtype: str, shape: Shape) -> int:
    return torch.Size(shape).numel() * DTYPE_BYTES[dtype]


def _shard(group: list[Slot], dtypes: StoredDtypes) -> Shard:
    """Widest dtypes first, so that every tensor is aligned to its own size (as the library does)."""
    parts = [(dtypes.of(slot, part), part) for slot in group for part in slot.parts]
    places: dict[str, Place] = {}
    offset = 0
    for code, part in sorted(parts, key=lambda item: -DTYPE_BYTES[item[0]]):
        size = _num_bytes(code, part.shape)
        places[part.name] = Place(code, part.shape, offset, offset + size)
        offset += size
    return Shard(tuple(group), places)


def write_shard(
    file: Path,
    shard: Shard,
    state: Mapping[str, Tensor | QuantisedWeight],
    layout: Format,
    progress: Progress = lambda num_bytes: None,
) -> str:
    """Write one file, sync it and read it back; the SHA-256 of the file, 64 hex digits.

    `state` is asked for each canonical tensor once. Tensors are stored in the dtypes of their places.

    Raises:
        OutputError: the file reads back different.
        OSError: it cannot be written.
    """
    header = _header(shard, layout)
    sums: dict[str, int] = {}
    with file.open("wb") as stream:
        stream.write(header)
        for slot in shard.slots:
            for plain, piece in disassemble(slot, state[slot.name]):
                place = shard.places[plain]
                content = tensor_bytes(piece.to(TORCH_DTYPES.get(place.dtype, piece.dtype))).numpy().data
                stream.seek(len(header) + place.start)
                stream.write(content)
                sums[plain] = zlib.crc32(content)
                progress(place.stop - place.start)
        stream.flush()
        os.fsync(stream.fileno())
        _drop_cache(stream.fileno())
    return _read_back(file, len(header), shard, sums)


def _header(shard: Shard, layout: Format) -> bytes:
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    for plain, place in shard.places.items():
        header[stored_name(plain, layout)] = {
            "dtype": place.dtype,
            "shape": list(place.shape),
            "data_offsets": [place.start, place.stop],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _drop_cache(descriptor: int) -> None:
    """Ask the system to read the file from the disk next time; where it cannot, the check is of memory."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_back(file: Path, header_bytes: int, shard: Shard, sums: Mapping[str, int]) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(header_bytes))
        for plain, place in sorted(shard.places.items(), key=lambda item: item[1].start):
            found = 0
            left = place.stop - place.start
            while left:
                content = stream.read(min(left, _READ_BYTES))
                if not content:
                    break
                digest.update(content)
                found = zlib.crc32(content, found)
                left -= len(content)
            if left or found != sums[plain]:
                raise OutputError(f"{file}: {plain} reads back different; the disk may be failing")
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes in row order, without a copy where they already lie so."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
