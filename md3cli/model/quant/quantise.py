"""A checkpoint of any layout written with its large matrices in 8 or 4 bits, tensor by tensor.

int4 is the original's scheme, packed where the 4-bit port packs; int8 has the same matrices with one scale per row; fp8
has the experts alone, as published. Vision, routers, tau, norms, embedding and head stay as they are stored, vision by
choice in int8. Scales are searched (`search.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from md3cli.errors import CheckpointError
from md3cli.model.quant.search import search
from md3cli.model.weights.codes import LowBit, QuantisedWeight, quantise_int4
from md3cli.model.weights.files import checkpoint_revision
from md3cli.model.weights.names import INT8_SCALE, Format, is_int8_vision, is_portable, slots
from md3cli.model.weights.plan import CheckpointPlan, plan_checkpoint
from md3cli.model.weights.read import SCHEMES, CheckpointReader, assemble, read_quantised, stored_dtype
from md3cli.model.weights.write import DTYPE_CODES, Progress, StoredDtypes, lay_out, write_checkpoint

SHARD_LIMIT_BYTES = 1_000_000_000  # what a killed run has to do again at most
_LAYOUTS = {LowBit.INT4: Format.INT4, LowBit.INT8: Format.INT8, LowBit.FP8: Format.ORIGINAL_FP8}

Importance = Mapping[str, Tensor]  # canonical weight -> mean square of its inputs, float32 [in] or [experts, in]


@dataclass(frozen=True, slots=True)
class QuantiseSettings:
    """What becomes codes, and how they are stored.

    `int4_scale_dtype` float32 is what existing readers expect; bfloat16 saves 0.27 GB of the real model.
    """

    kind: LowBit
    has_int8_vision: bool = False
    int4_scale_dtype: torch.dtype = torch.float32


def quantise_checkpoint(
    source: Path,
    target: Path,
    settings: QuantiseSettings,
    *,
    importance: Importance | None = None,
    tokenizer_file: Path | None = None,
    shard_limit_bytes: int = SHARD_LIMIT_BYTES,
    progress: Progress = lambda num_bytes: None,
) -> CheckpointPlan:
    """Write the checkpoint `source` in few bits as the new folder `target`; return the plan of what was written.

    Matrices that `source` already holds in the wanted scheme are taken over code by code. A run that
    was killed is continued by the next one with the same source and settings. `tokenizer_file` is
    for a source that has none beside it.

    Raises:
        CheckpointError: `source` cannot be read or quantised (a matrix that fills no even number of
            groups, or holds values that are not finite).
        OutputError: `target` cannot be written, or reads back different.
    """
    plan = plan_checkpoint(source)
    if settings.kind is LowBit.FP8 and plan.config.text.moe is None:
        raise CheckpointError(f"{source} has no experts, and fp8 is for experts only; use int8 or int4")
    importance, dtype = importance or {}, stored_dtype(plan)
    with CheckpointReader(plan, dtype=dtype) as weights:
        made = _Quantising(weights, settings, importance)
        write_checkpoint(
            made,
            plan.config,
            target,
            _LAYOUTS[settings.kind],
            dtype=dtype,
            int4_scale_dtype=settings.int4_scale_dtype,
            marks=made.marks,
            tokenizer_file=plan.files.tokenizer_file or tokenizer_file,
            shard_limit_bytes=shard_limit_bytes,
            made_from=_fingerprint(plan, settings, importance, shard_limit_bytes),
            progress=progress,
        )
    return plan_checkpoint(target)


def stored_bytes(plan: CheckpointPlan, settings: QuantiseSettings | None) -> int:
    """Return the bytes of weights that `quantise_checkpoint` would write; for None, of all weights in 16 or 32 bits.

    Raises:
        CheckpointError: a matrix cannot be quantised so.
    """
    expected = {slot.name: slot.shape for slot in plan.slots}
    dtype = DTYPE_CODES[stored_dtype(plan)]
    if settings is None:
        table, dtypes = slots(expected, Format.ORIGINAL), StoredDtypes(dtype)
    else:
        table = slots(expected, _LAYOUTS[settings.kind], _marks(expected, settings))
        dtypes = StoredDtypes(dtype, DTYPE_CODES[settings.int4_scale_dtype])
    return sum(shard.num_bytes for shard in lay_out(table, dtypes, None))


def _marks(names: Mapping[str, object], settings: QuantiseSettings) -> frozenset[str]:
    """Return the names by which a file says which matrices are codes; fp8 experts are known without."""
    mark = {LowBit.INT4: ".packed", LowBit.INT8: INT8_SCALE}.get(settings.kind)
    marks = {f"{name}{mark}" for name in names if is_portable(name)} if mark else set()
    if settings.has_int8_vision:
        marks |= {f"{name}{INT8_SCALE}" for name in names if is_int8_vision(name)}
    return frozenset(marks)


class _Quantising(Mapping[str, Tensor | QuantisedWeight]):
    """The tensors of a checkpoint, some as codes as `settings` say, each made when it is asked for."""

    def __init__(self, weights: CheckpointReader, settings: QuantiseSettings, importance: Importance) -> None:
        self._weights, self._importance, self._int4_scale_dtype = weights, importance, settings.int4_scale_dtype
        self._stored = {slot.name: slot for slot in weights.plan.slots}
        shapes = {name: slot.shape for name, slot in self._stored.items()}
        self.marks = _marks(shapes, settings)
        self._recipes = {slot.name: slot.recipe for slot in slots(shapes, _LAYOUTS[settings.kind], self.marks)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)

    def __getitem__(self, name: str) -> Tensor | QuantisedWeight:
        self._weights.close()  # maps of files count as memory: none outlives its tensor
        recipe, stored = self._recipes[name], self._stored[name]
        if not recipe.is_low_bit:
            return self._weights[name]
        if stored.recipe is recipe:
            return read_quantised(stored, self._weights.read_stored)
        is_coded = stored.recipe.is_low_bit
        weight = assemble(stored, self._weights.read_stored, torch.float32) if is_coded else self._weights[name]
        made = search(weight, SCHEMES[recipe], self._importance.get(name), name=name)
        if made.zero_point is None or self._int4_scale_dtype is torch.float32:
            return made
        scale, zero_point = (values.to(self._int4_scale_dtype).float() for values in (made.scale, made.zero_point))
        return quantise_int4(weight, scale, zero_point)  # the nearest codes for what is stored


def _fingerprint(plan: CheckpointPlan, settings: QuantiseSettings, importance: Importance, limit: int) -> str:
    """Return what a half-written target must have been made from to be continued."""
    digest = hashlib.sha256()
    for name, values in sorted(importance.items()):
        digest.update(name.encode())
        digest.update(values.contiguous().numpy().data)
    facts = {
        "source": checkpoint_revision(plan.files),
        "written": [file.stat().st_mtime_ns for file in plan.files.files],
        "quant": settings.kind,
        "int8_vision": settings.has_int8_vision,
        "scales": str(settings.int4_scale_dtype),
        "importance": digest.hexdigest(),
        "shard_limit": limit,
    }
    return json.dumps(facts)
