"""A checkpoint written in any known layout, streaming: one canonical tensor in memory at a time.

The header of a safetensors file comes first and follows from the name table, so each tensor is
written to its place as soon as it is made. The folder appears under its name by one rename, when
all of it is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from md3cli.errors import CheckpointError, OutputError
from md3cli.model.checkpoint import TORCH_DTYPES, CheckpointReader, stored_dtype
from md3cli.model.checkpoint_plan import CheckpointPlan, plan_checkpoint
from md3cli.model.config import ModelConfig
from md3cli.model.formats import Format, JsonObject, hf_config
from md3cli.model.name_tables import INT4_GROUP, REGION_LN, Recipe, Slot, slots, stored_name
from md3cli.model.packing import disassemble
from md3cli.model.safetensors_header import DTYPE_BYTES
from md3cli.model.tensor_table import Shape, expected_tensors
from md3cli.model.weight_files import CONFIG_NAME, TOKENIZER_NAME, WEIGHTS_NAME

SHARD_LIMIT_BYTES = 5_000_000_000
_DTYPE_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
_ALIGNMENT = 8

Progress = Callable[[int], None]  # called with the bytes just written


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a stored tensor goes: `start` counts from the end of the header."""

    dtype: str
    shape: Shape
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Shard:
    """The slots of one file and the place of each of their tensors, by plain name."""

    slots: tuple[Slot, ...]
    places: Mapping[str, _Place]

    @property
    def num_bytes(self) -> int:
        return max(place.stop for place in self.places.values())


def write_checkpoint(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    target: Path,
    layout: Format,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer_file: Path | None = None,
    shard_limit_bytes: int = SHARD_LIMIT_BYTES,
    progress: Progress = lambda num_bytes: None,
) -> None:
    """Write the canonical tensors `state` as the new folder `target`.

    Weights are stored in `dtype`, scales in float32. `state` is asked for each tensor once, so it
    may make them on demand (`checkpoint.CheckpointReader`).

    Raises:
        CheckpointError: `state` is not the model of `config`, or the layout cannot hold it.
        OutputError: `target` is in the way, or cannot be written.
    """
    names = set(state)  # `name in state` would make the tensor
    expected = expected_tensors(config, has_region_ln=not names.isdisjoint(REGION_LN))
    if expected.keys() != names:
        odd = sorted(expected.keys() ^ names)
        raise CheckpointError(f"the weights are not a model of this configuration: {', '.join(odd[:5])}")
    limit = shard_limit_bytes if layout not in (Format.RAW, Format.RAW_FP8) else None  # raw is always one file
    shards = list(_split(slots(expected, layout), layout, _DTYPE_CODES[dtype], limit))
    _check_target(target, sum(shard.num_bytes for shard in shards))
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write_files(partial, shards, state, layout, dtype, progress)
        _write_json(partial / CONFIG_NAME, config_document(config, layout, dtype))
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, partial / TOKENIZER_NAME)
        if target.is_dir():
            target.rmdir()  # empty, see _check_target
        partial.rename(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_target(target: Path, num_bytes: int) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(f"{target} is already there; name a folder that does not exist yet")
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OutputError(f"{target} needs {num_bytes:,} bytes and {folder} has {free:,} left; choose another place")


# -- the files ------------------------------------------------------------------------------------


def _split(recipes: Iterable[Slot], layout: Format, dtype: str, limit: int | None) -> Iterator[_Shard]:
    group: list[Slot] = []
    size = 0
    for slot in recipes:
        slot_bytes = sum(_num_bytes(code, part.shape) for code, part in _stored_parts(slot, dtype))
        if group and limit is not None and size + slot_bytes > limit:
            yield _lay_out(group, dtype)
            group, size = [], 0
        group.append(slot)
        size += slot_bytes
    yield _lay_out(group, dtype)


def _stored_parts(slot: Slot, dtype: str) -> Iterator[tuple[str, Any]]:
    """Each part of a slot with the dtype it is written in: scales are float32, weights `dtype`."""
    is_packed = slot.recipe in (Recipe.FP8, Recipe.INT4)
    for part in slot.parts:
        yield ("F32" if is_packed else dtype) if dtype in part.dtypes else min(part.dtypes), part


def _num_bytes(dtype: str, shape: Shape) -> int:
    return torch.Size(shape).numel() * DTYPE_BYTES[dtype]


def _lay_out(group: list[Slot], dtype: str) -> _Shard:
    """Widest dtypes first, so that every tensor is aligned to its own size (as the library does)."""
    parts = [(code, part) for slot in group for code, part in _stored_parts(slot, dtype)]
    places: dict[str, _Place] = {}
    offset = 0
    for code, part in sorted(parts, key=lambda item: -DTYPE_BYTES[item[0]]):
        size = _num_bytes(code, part.shape)
        places[part.name] = _Place(code, part.shape, offset, offset + size)
        offset += size
    return _Shard(tuple(group), places)


def _write_files(
    folder: Path,
    shards: list[_Shard],
    state: Mapping[str, Tensor],
    layout: Format,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({stored_name(plain, layout): name for plain in shard.places})
        with (folder / name).open("wb") as stream:
            _write_shard(stream, shard, state, layout, dtype, progress)
            stream.flush()
            os.fsync(stream.fileno())
    if len(shards) > 1:
        total = sum(shard.num_bytes for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / f"{WEIGHTS_NAME}.index.json", index)


def _write_shard(
    stream: BinaryIO,
    shard: _Shard,
    state: Mapping[str, Tensor],
    layout: Format,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    for plain, place in shard.places.items():
        header[stored_name(plain, layout)] = {
            "dtype": place.dtype,
            "shape": list(place.shape),
            "data_offsets": [place.start, place.stop],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    stream.write(struct.pack("<Q", len(text)) + text)
    for slot in shard.slots:
        tensor = state[slot.name]
        if slot.recipe not in (Recipe.FP8, Recipe.INT4):
            tensor = tensor.to(dtype)
        for plain, piece in disassemble(slot, tensor):
            place = shard.places[plain]
            stream.seek(8 + len(text) + place.start)
            stream.write(_bytes(piece).numpy().data)
            progress(place.stop - place.start)


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes in row order, without a copy where they already lie so."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)


def _write_json(file: Path, document: JsonObject) -> None:
    with file.open("w", encoding="utf-8") as stream:
        json.dump(document, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def config_document(config: ModelConfig, layout: Format, dtype: torch.dtype) -> JsonObject:
    """The config.json that goes with a layout: the port's style for it, four sections under `config` else."""
    sections = asdict(config)
    group_size = INT4_GROUP if layout is Format.INT4 else None
    sections["text"]["group_size"] = sections["region"]["group_size"] = group_size
    sections["text"]["prefix_attn"] = config.prefix_len  # informative: the original's code reads it
    dtype_name = str(dtype).removeprefix("torch.")
    if layout is Format.HF:
        return {**hf_config(sections), "dtype": dtype_name}
    head = {"architectures": ["HfMoondream"], "model_type": "moondream3", "torch_dtype": dtype_name}
    return {**head, "config": sections}


# -- from one layout to another -------------------------------------------------------------------


def convert_checkpoint(
    source: Path, target: Path, layout: Format, *, progress: Progress = lambda num_bytes: None
) -> CheckpointPlan:
    """Write the checkpoint `source` as the new folder `target` in another layout, and compare what was written.

    8- and 4-bit weights are widened to the dtype of the others; nothing else changes in value.

    Raises:
        CheckpointError: `source` cannot be read, or the layout cannot hold it.
        OutputError: `target` cannot be written, or reads back different.
    """
    plan = plan_checkpoint(source)
    dtype = stored_dtype(plan)
    with CheckpointReader(plan, dtype=dtype) as weights:
        write_checkpoint(
            weights,
            plan.config,
            target,
            layout,
            dtype=dtype,
            tokenizer_file=plan.files.tokenizer_file,
            progress=progress,
        )
    written = plan_checkpoint(target)
    _check_equal(plan, written, dtype)
    return written


def _check_equal(plan: CheckpointPlan, written: CheckpointPlan, dtype: torch.dtype) -> None:
    """Bit for bit, tensor by tensor."""
    with CheckpointReader(plan, dtype=dtype) as ours, CheckpointReader(written, dtype=dtype) as theirs:
        for name in ours:
            if not torch.equal(_bytes(ours[name]), _bytes(theirs[name])):
                raise OutputError(f"{written.files.folder}: {name} reads back different; the disk may be failing")
