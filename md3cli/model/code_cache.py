"""Codes that were searched for while a checkpoint was loaded, kept on disk for its next start.

Searching scales takes most of a start with `--quant`; with the codes at hand only packing is left.
They lie in the same folder and under the same limit as encodings (`file_cache.py`), one file for
each weight, as safetensors. A key covers the checkpoint's files (place, size, time of change), the
dtype its weights were read in, the weight's name, the scheme and the version of the search.
"""

from __future__ import annotations

import hashlib
import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from md3cli.file_cache import FileCache
from md3cli.model.quantised import LowBit, QuantisedWeight, pack_nibbles, unpack_nibbles
from md3cli.model.weight_files import WeightFiles

SEARCH_VERSION = 1  # rises when `scale_search` finds other scales
LEAST_ELEMENTS = 1 << 20  # smaller weights are searched in no time


class CodeCache:
    """Codes by weight of one checkpoint read in `dtype`, which rounds what is searched; they come back on `device`.

    A folder that cannot be written to is only read from then on.
    """

    def __init__(self, files: FileCache, checkpoint: WeightFiles, dtype: torch.dtype, device: torch.device) -> None:
        self.files, self.device = files, device
        self.is_writable = True
        facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
        self._context = json.dumps([SEARCH_VERSION, str(dtype), facts])

    def load(self, name: str, kind: LowBit, shape: tuple[int, ...]) -> QuantisedWeight | None:
        """The codes of a weight, on the cache's device; None when they are not (rightly) there."""
        payload = self.files.get(self._key(name, kind)) if _is_worth_it(shape) else None
        if payload is None:
            return None
        try:
            tensors = {part: tensor.to(self.device) for part, tensor in load(payload).items()}
            return _from_tensors(tensors, kind, shape)
        except (SafetensorError, KeyError, AssertionError):
            return None

    def save(self, name: str, weight: QuantisedWeight) -> None:
        """Keep a weight's codes; a full disk ends keeping, not the start."""
        if not (self.is_writable and _is_worth_it(weight.shape)):
            return
        try:
            self.files.put(self._key(name, weight.kind), save(_to_tensors(weight)))
        except OSError:
            self.is_writable = False

    def _key(self, name: str, kind: LowBit) -> str:
        return hashlib.sha256(f"{self._context}:{name}:{kind}".encode()).hexdigest()


def _is_worth_it(shape: tuple[int, ...]) -> bool:
    return torch.Size(shape).numel() >= LEAST_ELEMENTS


def _to_tensors(weight: QuantisedWeight) -> dict[str, Tensor]:
    codes = pack_nibbles(weight.codes) if weight.kind is LowBit.INT4 else weight.codes
    tensors = {"codes": codes, "scale": weight.scale}
    if weight.zero_point is not None:
        tensors["zero_point"] = weight.zero_point
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _from_tensors(tensors: dict[str, Tensor], kind: LowBit, shape: tuple[int, ...]) -> QuantisedWeight:
    codes = unpack_nibbles(tensors["codes"]) if kind is LowBit.INT4 else tensors["codes"]
    return QuantisedWeight(kind, shape, codes, tensors["scale"], tensors.get("zero_point"))
