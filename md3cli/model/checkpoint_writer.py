"""A checkpoint written in any known layout, streaming: one canonical tensor in memory at a time.

The folder appears under its name by one rename, when all of it is on disk and was read back.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from md3cli.errors import CheckpointError, OutputError
from md3cli.model.checkpoint import CheckpointReader, stored_dtype
from md3cli.model.checkpoint_plan import INT8_WEIGHTS, QUANT_METHOD, CheckpointPlan, plan_checkpoint
from md3cli.model.config import ModelConfig
from md3cli.model.formats import Format, JsonObject, hf_config
from md3cli.model.misfits import misfit
from md3cli.model.name_tables import INT4_GROUP, REGION_LN, Recipe, Slot, slots, stored_name
from md3cli.model.partial_folder import PartialFolder, open_partial, write_synced
from md3cli.model.quantised import QuantisedWeight
from md3cli.model.shards import DTYPE_CODES, Progress, Shard, StoredDtypes, lay_out, tensor_bytes, write_shard
from md3cli.model.tensor_table import expected_tensors
from md3cli.model.weight_files import CONFIG_NAME, TOKENIZER_NAME, WEIGHTS_NAME

SHARD_LIMIT_BYTES = 5_000_000_000


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
        state: is asked for each tensor once, so it may make them on demand (`checkpoint.CheckpointReader`).
            Matrices to be stored in 8 or 4 bits may come as codes; else extremes are spread over all codes.
        dtype: of weights.
        int4_scale_dtype: of the scales and zero points of groups; scales of rows are float32.
        marks: names as of a file to be read (`name_tables.slots`), saying which matrices become codes.
        made_from: what a target left by a killed writer must have been made from to be continued.

    Raises:
        CheckpointError: `state` is not the model of `config`, or the layout cannot hold it.
        OutputError: `target` is in the way, cannot be written, or reads back different.
    """
    names = set(state)  # `name in state` would make the tensor
    expected = expected_tensors(config, has_region_ln=not names.isdisjoint(REGION_LN))
    if expected.keys() != names:
        odd = sorted(expected.keys() ^ names)
        raise CheckpointError(f"the weights are not a model of this configuration: {', '.join(odd[:5])}")
    limit = shard_limit_bytes if layout not in (Format.RAW, Format.RAW_FP8) else None  # raw is always one file
    table = list(slots(expected, layout, marks))
    dtypes = StoredDtypes(DTYPE_CODES[dtype], DTYPE_CODES[int4_scale_dtype])
    files = _named(list(lay_out(table, dtypes, limit)))
    _check_target(target)
    if tokenizer_file is not None and (fault := misfit(tokenizer_file)) is not None:
        raise CheckpointError(fault)
    try:
        with open_partial(target, made_from) as partial:
            missing = sum(shard.num_bytes for name, shard in files.items() if not partial.has(name))
            _check_room(target, partial.path, missing)
            _write_files(partial, files, state, layout, progress)
            document = config_document(config, layout, dtype, table)
            write_synced(partial.path / CONFIG_NAME, json.dumps(document, indent=1))
            if tokenizer_file is not None:
                shutil.copyfile(tokenizer_file, partial.path / TOKENIZER_NAME)
            partial.publish(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error


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
    """Shards by file name, as the hub has them."""
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
        write_synced(partial.path / f"{WEIGHTS_NAME}.index.json", json.dumps(index, indent=1))


# -- config.json ----------------------------------------------------------------------------------


def config_document(config: ModelConfig, layout: Format, dtype: torch.dtype, table: Iterable[Slot] = ()) -> JsonObject:
    """The config.json that goes with a layout: the port's style for it, four sections under `config` else.

    `table` says which matrices are codes: int4's group size stands where the original's code looks
    for it, int8 in a `quantization_config`.
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
        sections["quantization_config"] = quantization_config(table)
    head = {"architectures": ["HfMoondream"], "model_type": "moondream3", "torch_dtype": dtype_name}
    return {**head, "config": sections}


def quantization_config(table: Iterable[Slot]) -> JsonObject:
    """What int8 means here, in the words of compressed-tensors: symmetric codes, one `weight_scale` per output row.

    Its `targets` are the matrices' names with `*` for the layer. It stands inside `config`, where
    transformers does not look for a quantiser of its own.
    """
    layer = re.compile(r"\.blocks\.\d+\.")
    stems = (slot.name.removesuffix(".weight") for slot in table if slot.recipe is Recipe.INT8)
    targets = list(dict.fromkeys(layer.sub(".blocks.*.", stem) for stem in stems))
    group = {"targets": targets, "weights": dict(INT8_WEIGHTS), "input_activations": None}
    return {"quant_method": QUANT_METHOD, "format": "int-quantized", "config_groups": {"group_0": group}}


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
            if not torch.equal(tensor_bytes(ours[name]), tensor_bytes(theirs[name])):
                raise OutputError(f"{written.files.folder}: {name} reads back different; the disk may be failing")
