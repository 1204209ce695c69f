"""A checkpoint written in any known layout, one canonical tensor in memory at a time.

The folder is made hidden beside its place, by one writer at a time, and appears under its name by one rename.
A killed writer leaves it with the names and digests of the files that are finished; the next writer with the
same source and settings goes on from there, any other starts anew. The header of a file follows from the name
table and is written first, so each tensor goes to its place as soon as it is made; then the file is read back
from the disk once, for its digest and to compare every tensor. Which values are written is not decided here.

Files are written here, not by `safetensors.torch.save_file`: that needs a whole file in memory (18 GB in the raw
layout, which is always one file) and orders tensors by name, so that the bytes of every checkpoint would change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from md3cli.errors import CheckpointError, OutputError
from md3cli.model.network.config import ModelConfig
from md3cli.model.weights.codes import QuantisedWeight
from md3cli.model.weights.files import (
    CHECKSUMS_NAME,
    CONFIG_NAME,
    DTYPE_BYTES,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    JsonObject,
    misfit,
)
from md3cli.model.weights.names import (
    INT4_GROUP,
    REGION_LN,
    Format,
    Recipe,
    Shape,
    Slot,
    StoredTensor,
    expected_tensors,
    slots,
    stored_name,
)
from md3cli.model.weights.plan import INT8_WEIGHTS, QUANT_METHOD, CheckpointPlan, hf_config, plan_checkpoint
from md3cli.model.weights.read import TORCH_DTYPES, CheckpointReader, disassemble, read_quantised, stored_dtype
from md3cli.system import drop_cache, locked_folder, sync_folder

_FINISHED = ".finished.json"
DTYPE_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
SHARD_LIMIT_BYTES = 5_000_000_000
_ALIGNMENT = 8
_READ_BYTES = 1 << 23

Progress = Callable[[int], None]  # called with the bytes just written

# -- the folder in the making ----------------------------------------------------------------------


class PartialFolder:
    """A checkpoint folder in the making; `open_partial` makes it. Knows nothing of tensors."""

    def __init__(self, path: Path, made_from: str | None) -> None:
        self.path, self._made_from = path, made_from
        finished = _finished_digests(path / _FINISHED, made_from)
        self._digests = finished or {}
        if finished is None:
            for entry in path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()

    def has(self, name: str) -> bool:
        """Return True for a file that an earlier writer finished."""
        return name in self._digests and (self.path / name).is_file()

    def finish(self, name: str, sha256: str) -> None:
        """Note that a file is whole and on disk."""
        self._digests[name] = sha256
        temporary = self.path / f"{_FINISHED}.new"
        _write_synced(temporary, json.dumps({"made_from": self._made_from, "digests": self._digests}))
        temporary.replace(self.path / _FINISHED)

    def publish(self, target: Path) -> None:
        """Give the folder its name, with the digests of the weight files; `target` may be an empty folder."""
        # Small files have no digest: they are judged when they are read, and may be edited.
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self._digests.items()))
        _write_synced(self.path / CHECKSUMS_NAME, lines)
        if target.is_dir():
            target.rmdir()
        self.path.rename(target)
        (target / _FINISHED).unlink(missing_ok=True)  # after: a kill in between must not cost the work
        sync_folder(target.parent)


def _finished_digests(file: Path, made_from: str | None) -> dict[str, str] | None:
    """Return what an earlier writer finished; None where it made something else."""
    try:
        state = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    if made_from is None or not isinstance(state, dict) or state.get("made_from") != made_from:
        return None
    digests = state.get("digests")
    return digests if isinstance(digests, dict) else None


@contextlib.contextmanager
def open_partial(target: Path, made_from: str | None) -> Iterator[PartialFolder]:
    """Yield the folder in which `target` is made, to one writer at a time; remove it where the writer raises.

    `made_from` names source and settings; None never continues what an earlier writer left.

    Raises:
        OutputError: another process is writing the same target, or something in the folder cannot be written.
    """
    path = target.with_name(f".{target.name}.partial")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with locked_folder(path):
            try:
                yield PartialFolder(path, made_from)
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise
    except BlockingIOError as error:
        raise OutputError(f"{target} is being written by another process") from error
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error


def _write_synced(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


# -- files: where each tensor goes, and whether it arrived -----------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor goes: bytes `start` to `stop` behind the header."""

    dtype: str
    shape: Shape
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write: its slots, and the place of each of their tensors by its plain name."""

    slots: tuple[Slot, ...]
    places: Mapping[str, Place]

    @property
    def num_bytes(self) -> int:
        return max(place.stop for place in self.places.values())


@dataclass(frozen=True, slots=True)
class StoredDtypes:
    """The dtypes of weights and of int4's scales, in the safetensors spelling; scales of rows are float32."""

    weights: str
    int4_scales: str = "F32"

    def of(self, slot: Slot, part: StoredTensor) -> str:
        """Return the dtype of one part of a slot; a part of codes allows one only."""
        wanted = self.weights
        if slot.recipe.is_low_bit:
            wanted = self.int4_scales if slot.recipe is Recipe.INT4 else "F32"
        return wanted if wanted in part.dtypes else min(part.dtypes)


def lay_out(recipes: Iterable[Slot], dtypes: StoredDtypes, limit_bytes: int | None) -> Iterator[Shard]:
    """Cut slots, in order, into files of at most `limit_bytes`; a slot that is larger gets a file of its own."""
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
    parts = [(dtypes.of(slot, part), part) for slot in group for part in slot.parts]
    places: dict[str, Place] = {}
    offset = 0
    # Widest dtypes first, as the library does: every tensor is aligned to the size of its values.
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
    """Write one file, sync it and read it back; return its SHA-256, 64 hex digits.

    `state` is asked for each canonical tensor once.

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
                content = _bytes_of(piece.to(TORCH_DTYPES.get(place.dtype, piece.dtype))).numpy().data
                stream.seek(len(header) + place.start)
                stream.write(content)
                sums[plain] = zlib.crc32(content)
                progress(place.stop - place.start)
        stream.flush()
        os.fsync(stream.fileno())
        drop_cache(stream.fileno())  # else what is read back is memory, not the disk
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


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes in row order, without a copy where they already lie so."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)


# -- a checkpoint ----------------------------------------------------------------------------------


def write_checkpoint(
    state: Mapping[str, Tensor] | Mapping[str, Tensor | QuantisedWeight],
    config: ModelConfig,
    target: Path,
    layout: Format,
    *,
    dtype: torch.dtype = torch.bfloat16,
    int4_scale_dtype: torch.dtype = torch.float32,
    marks: Collection[str] = (),
    tokenizer_file: Path | None = None,
    shard_limit_bytes: int = SHARD_LIMIT_BYTES,
    made_from: str | None = None,
    progress: Progress = lambda num_bytes: None,
) -> None:
    """Write the canonical tensors `state` as the new folder `target`.

    Args:
        state: is asked for each tensor once, so it may make them on demand (`read.CheckpointReader`).
            Matrices to be stored in 8 or 4 bits may come as codes; else extremes are spread over all codes.
        int4_scale_dtype: of the scales and zero points of groups; scales of rows are float32.
        marks: stored names that say which matrices become codes (`names.slots`).
        made_from: what a target left by a killed writer must have been made from to be continued.

    Raises:
        CheckpointError: `state` is not the model of `config`, or the layout cannot hold it.
        OutputError: `target` is in the way, cannot be written, or reads back different.
    """
    limit = shard_limit_bytes if layout not in (Format.RAW, Format.RAW_FP8) else None  # raw is always one file
    table = list(slots(_shapes(set(state), config), layout, marks))
    dtypes = StoredDtypes(DTYPE_CODES[dtype], DTYPE_CODES[int4_scale_dtype])
    files = _named(list(lay_out(table, dtypes, limit)))
    _check_target(target)
    if tokenizer_file is not None and (fault := misfit(tokenizer_file)) is not None:
        raise CheckpointError(fault)
    with open_partial(target, made_from) as partial:
        missing = sum(shard.num_bytes for name, shard in files.items() if not partial.has(name))
        _check_room(target, partial.path, missing)
        _write_files(partial, files, state, layout, progress)
        document = config_document(config, layout, dtype, table)
        _write_synced(partial.path / CONFIG_NAME, json.dumps(document, indent=1))
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, partial.path / TOKENIZER_NAME)
        partial.publish(target)


def _shapes(names: set[str], config: ModelConfig) -> dict[str, Shape]:
    """Return the shapes of the tensors with these names, which must be exactly those of the model of `config`."""
    expected = expected_tensors(config, has_region_ln=any(name in names for name in REGION_LN))
    if odd := sorted(expected.keys() ^ names):
        raise CheckpointError(f"the weights are not a model of this configuration: {', '.join(odd[:5])}")
    return expected


def _check_target(target: Path) -> None:
    try:
        is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    except OSError as error:  # a name too long, a folder that may not be entered
        raise OutputError(f"{str(target)[:200]}: cannot be written: {error.strerror or error}") from error
    if not is_free:
        raise OutputError(f"{target} is already there; name a folder that does not exist yet")


def _check_room(target: Path, folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OutputError(
            f"{target} needs {num_bytes:,} bytes and {folder.parent} has {free:,} left; choose another place"
        )


def _named(shards: list[Shard]) -> dict[str, Shard]:
    if len(shards) == 1:
        return {WEIGHTS_NAME: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def _write_files(
    partial: PartialFolder,
    files: Mapping[str, Shard],
    state: Mapping[str, Tensor] | Mapping[str, Tensor | QuantisedWeight],
    layout: Format,
    progress: Progress,
) -> None:
    for name, shard in files.items():
        if partial.has(name):
            progress(shard.num_bytes)
        else:
            partial.finish(name, write_shard(partial.path / name, shard, state, layout, progress))
    if len(files) > 1:
        homes = {stored_name(plain, layout): name for name, shard in files.items() for plain in shard.places}
        total = sum(shard.num_bytes for shard in files.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
        _write_synced(partial.path / f"{WEIGHTS_NAME}.index.json", json.dumps(index, indent=1))


# -- config.json ----------------------------------------------------------------------------------


def config_document(config: ModelConfig, layout: Format, dtype: torch.dtype, table: Iterable[Slot] = ()) -> JsonObject:
    """Return the config.json of a layout: in the HF port's style for that, else four sections under `config`.

    `table` says which matrices are codes: int4's group size stands where the original's code looks for it,
    int8 in a `quantization_config`.
    """
    table = list(table)
    sections: JsonObject = asdict(config)
    for part in ("text", "region"):
        packed = any(slot.recipe is Recipe.INT4 and slot.name.startswith(f"{part}.") for slot in table)
        sections[part]["group_size"] = INT4_GROUP if packed else None
    sections["text"]["prefix_attn"] = config.prefix_len  # informative: the original's code reads it
    dtype_name = str(dtype).removeprefix("torch.")
    if layout is Format.HF:
        return {**hf_config(sections), "dtype": dtype_name}
    if any(slot.recipe is Recipe.INT8 for slot in table):
        sections["quantization_config"] = _quantization_config(table)
    head = {"architectures": ["HfMoondream"], "model_type": "moondream3", "torch_dtype": dtype_name}
    return {**head, "config": sections}


def _quantization_config(table: Iterable[Slot]) -> JsonObject:
    """Say what int8 means here, in the words of compressed-tensors; targets have `*` for the layer.

    It stands inside `config`, where transformers does not look for a quantiser of its own.
    """
    layer = re.compile(r"\.blocks\.\d+\.")
    stems = (slot.name.removesuffix(".weight") for slot in table if slot.recipe is Recipe.INT8)
    targets = list(dict.fromkeys(layer.sub(".blocks.*.", stem) for stem in stems))
    group = {"targets": targets, "weights": dict(INT8_WEIGHTS), "input_activations": None}
    return {"quant_method": QUANT_METHOD, "format": "int-quantized", "config_groups": {"group_0": group}}


# -- from one layout to another -------------------------------------------------------------------


class _AsStored(Mapping[str, Tensor | QuantisedWeight]):
    """The tensors of a checkpoint as its files hold them: codes stay codes."""

    def __init__(self, weights: CheckpointReader) -> None:
        self._weights = weights
        self._slots = {slot.name: slot for slot in weights.plan.slots}

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, name: str) -> Tensor | QuantisedWeight:
        slot = self._slots[name]
        return read_quantised(slot, self._weights.read_stored) if slot.recipe.is_low_bit else self._weights[name]


def _int4_scale_dtype(plan: CheckpointPlan) -> torch.dtype:
    """Return the widest dtype that a file keeps its groups' scales and zero points in."""
    scales = [part.name for slot in plan.slots if slot.recipe is Recipe.INT4 for part in slot.parts[1:]]
    kinds = {TORCH_DTYPES[plan.files.entries[name].dtype] for name in scales}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _marks(plan: CheckpointPlan) -> frozenset[str]:
    """Return the names by which a file says which matrices are codes."""
    coded = [slot for slot in plan.slots if slot.recipe in (Recipe.INT4, Recipe.INT8)]
    return frozenset(part.name for slot in coded for part in slot.parts)


def convert_checkpoint(
    source: Path,
    target: Path,
    layout: Format | None,
    *,
    tokenizer_file: Path | None = None,
    progress: Progress = lambda num_bytes: None,
) -> CheckpointPlan:
    """Write the checkpoint `source` as the new folder `target` in another layout, and compare both bit for bit.

    8- and 4-bit weights are widened to the dtype of the others; nothing else changes in value. With None the layout
    is the source's own, and codes stay as they are. `tokenizer_file` is for a source that has none beside it.

    Raises:
        CheckpointError: `source` cannot be read, or the layout cannot hold it.
        OutputError: `target` cannot be written, or reads back different.
    """
    plan = plan_checkpoint(source)
    dtype = stored_dtype(plan)
    with CheckpointReader(plan, dtype=dtype) as weights:
        write_checkpoint(
            weights if layout is not None else _AsStored(weights),
            plan.config,
            target,
            layout or plan.layout,
            dtype=dtype,
            int4_scale_dtype=_int4_scale_dtype(plan),
            marks=_marks(plan) if layout is None else (),
            tokenizer_file=plan.files.tokenizer_file or tokenizer_file,
            progress=progress,
        )
    written = plan_checkpoint(target)
    _check_equal(plan, written, dtype)
    return written


def _check_equal(plan: CheckpointPlan, written: CheckpointPlan, dtype: torch.dtype) -> None:
    with CheckpointReader(plan, dtype=dtype) as ours, CheckpointReader(written, dtype=dtype) as theirs:
        for name in ours:
            if not torch.equal(_bytes_of(ours[name]), _bytes_of(theirs[name])):
                raise OutputError(f"{written.files.folder}: {name} reads back different; the disk may be failing")
