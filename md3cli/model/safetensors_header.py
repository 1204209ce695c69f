"""The header of a safetensors file, parsed and judged before the library or torch sees the file.

Its length is bounded and its entries must tile the data exactly, so a damaged or hostile file is
refused before anything is allocated for it. No torch; no judgement about which tensors a model needs.
Format: https://github.com/huggingface/safetensors (eight bytes of length, JSON, data).
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from md3cli.errors import CheckpointError
from md3cli.model.misfits import misfit

HEADER_LIMIT_BYTES = 10_000_000  # the real model's largest header is under 1 MB

DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file, as its header describes it; `dtype` in the safetensors spelling."""

    file: Path
    stored_name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_header_bytes(file: Path) -> bytes:
    """The JSON header of a safetensors file, unparsed.

    Raises:
        CheckpointError: the file cannot be read, is cut short, or claims an absurd length.
    """
    try:
        if not file.is_file():  # opening a FIFO would wait for ever
            raise CheckpointError(misfit(file) or f"{file} is no regular file")
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(misfit(file) or f"{file} is cut short: {len(prefix)} bytes; fetch it again")
            (length,) = struct.unpack("<Q", prefix)
            if length > HEADER_LIMIT_BYTES:
                raise CheckpointError(
                    misfit(file)
                    or f"{file}: its header claims {length:,} bytes, more than the {HEADER_LIMIT_BYTES:,} any model "
                    "needs; it is no safetensors file or a damaged one"
                )
            header = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    if len(header) < length:
        raise CheckpointError(misfit(file) or f"{file} is cut short: it ends inside its header; fetch it again")
    return header


def read_header(file: Path) -> list[TensorEntry]:
    """What a safetensors file says it holds; its entries are checked to cover the data exactly.

    Raises:
        CheckpointError: anything that is not a whole and consistent safetensors file.
    """
    raw = read_header_bytes(file)
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header is no valid JSON ({first_line(error)}); fetch it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is no JSON object; it is no safetensors file")
    header.pop("__metadata__", None)
    spans: list[tuple[int, int]] = []
    entries: list[TensorEntry] = []
    for name, item in header.items():
        entry, span = _read_entry(file, name, item)
        entries.append(entry)
        spans.append(span)
    _check_spans(file, spans, file.stat().st_size - 8 - len(raw))
    return entries


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _read_entry(file: Path, name: str, item: object) -> tuple[TensorEntry, tuple[int, int]]:
    damaged = CheckpointError(f"{file}: the header's entry for {name[:120]!r} is damaged; fetch the file again")
    if not isinstance(item, dict):
        raise damaged
    dtype, shape, span = item.get("dtype"), item.get("shape"), item.get("data_offsets")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(span, list) or len(span) != 2:
        raise damaged
    if not all(map(_is_count, shape)) or len(shape) > 8 or not all(map(_is_count, span)):
        raise damaged
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{file}: tensor {name[:120]!r} has the dtype {dtype[:20]!r}, which no known format uses")
    entry = TensorEntry(file, name, dtype, tuple(shape))
    if span[1] - span[0] != entry.num_bytes:
        raise damaged
    return entry, (span[0], span[1])


def _check_spans(file: Path, spans: list[tuple[int, int]], data_bytes: int) -> None:
    """The tensors must lie one behind the other, from the header to the end of the file."""
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise CheckpointError(f"{file}: its tensors overlap or leave holes; the file is damaged, fetch it again")
        end = stop
    if end > data_bytes:
        raise CheckpointError(f"{file} is cut short: {data_bytes:,} of {end:,} bytes of weights; fetch it again")
    if end < data_bytes:
        raise CheckpointError(f"{file}: {data_bytes - end:,} bytes behind its last tensor; the file is damaged")


def first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:120]
