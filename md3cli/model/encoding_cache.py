"""Image embeddings that outlive a run, so that other prompts to the same pictures need no vision work.

What is kept are the projected embeddings (2.85 MiB a picture for the real model in bf16), not the
keys and values made from them (137 MiB): reading those back would take longer than computing them.
A key covers everything the values depend on: the picture's bytes, how pictures are prepared, the
vision weights, the dtype.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from md3cli.file_cache import FileCache
from md3cli.images import PREPROCESSING_VERSION
from md3cli.model.moondream import Moondream3

TENSOR_NAME = "embeddings"


class EncodingCache:
    """`encoder.EmbeddingStore` over a folder. A folder that cannot be written to is only read from then on.

    `model` must still hold its plain weights: keys are made of them.
    """

    def __init__(self, files: FileCache, model: Moondream3, *, background: str, quant_vision: str = "none") -> None:
        self.files = files
        self.shape = (model.config.vision.num_patches, model.config.text.dim)
        self.dtype = model.dtype
        self.is_writable = True
        self.num_hits = self.num_misses = 0
        self._context = _context(model, background, quant_vision)

    def load(self, image_key: str) -> Tensor | None:
        """The embeddings [P, D] of a picture, on the CPU; None when they are not (rightly) there."""
        payload = self.files.get(self._key(image_key))
        tensor = self._parse(payload) if payload is not None else None
        self.num_hits += tensor is not None
        self.num_misses += tensor is None
        return tensor

    def save(self, image_key: str, embeddings_PD: Tensor) -> None:
        """Keep a picture's embeddings; a full disk ends keeping, not the run."""
        if not self.is_writable or not embeddings_PD.isfinite().all():  # kept, a passing fault would stay for ever
            return
        try:
            self.files.put(self._key(image_key), save({TENSOR_NAME: embeddings_PD.cpu().contiguous()}))
        except OSError:
            self.is_writable = False

    def _parse(self, payload: bytes) -> Tensor | None:
        try:
            tensor = load(payload).get(TENSOR_NAME)
        except (SafetensorError, ValueError, KeyError):
            return None
        if tensor is None or tensor.shape != self.shape or tensor.dtype != self.dtype:
            return None
        if not tensor.isfinite().all():
            return None
        return tensor

    def _key(self, image_key: str) -> str:
        return hashlib.sha256(f"{self._context}:{image_key}".encode()).hexdigest()


def _context(model: Moondream3, background: str, quant_vision: str) -> str:
    """Everything but the picture that embeddings depend on, as one line."""
    facts = {
        "preprocessing": PREPROCESSING_VERSION,
        "crops": asdict(model.config.vision.crop_config),
        "background": background,
        "weights": vision_digest(model),
        "dtype": str(model.dtype),
        "quant_vision": quant_vision,
    }
    return json.dumps(facts, sort_keys=True)


def vision_digest(model: Moondream3) -> str:
    """Digest of the vision weights' bytes (0.9 GB of the real model: about a second)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.vision.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
