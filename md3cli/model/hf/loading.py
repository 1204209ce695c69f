"""What `from_pretrained` is given, read: which files, which config, which dtype, and the weights for transformers."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from md3cli.errors import CheckpointError
from md3cli.model.hf.config import Moondream3Config
from md3cli.model.hf.parallel import asks_for_sharing
from md3cli.model.weights.hub import fetch_model, model_path, repo_of
from md3cli.model.weights.plan import QUANT_METHOD, CheckpointPlan
from md3cli.model.weights.read import CheckpointReader, stored_dtype


def find_weights(name: str, kwargs: dict[str, Any]) -> Path:
    """Find the folder or file of a model, and fetch a repository; take the arguments about that out of `kwargs`."""
    revision, is_offline = kwargs.pop("revision", None), bool(kwargs.pop("local_files_only", False))
    for key in ("trust_remote_code", "cache_dir", "force_download", "token", "use_safetensors", "proxies"):
        kwargs.pop(key, None)  # nothing here runs remote code or reads pickles; the hub's cache and login are used
    repo = repo_of(name)
    return model_path(name) if repo is None else fetch_model(repo, revision, offline=is_offline)


def config_of(plan: CheckpointPlan, given: object) -> Moondream3Config:
    """Return the config that was given, or the checkpoint's own, or the real model's sizes where it has none."""
    if isinstance(given, Moondream3Config):
        config = deepcopy(given)
    else:
        file = plan.files.config_file
        config = Moondream3Config() if file is None else Moondream3Config.from_json_file(str(file))
    config.has_region_ln = plan.has_region_ln  # the weights know, whatever a config says
    scheme = getattr(config, "quantization_config", None)
    if isinstance(scheme, dict) and scheme.get("quant_method") == QUANT_METHOD:
        del config.quantization_config  # ours, which the plan has judged; transformers would look for its library
    return config


def read_dtype(given: object, plan: CheckpointPlan | None = None) -> torch.dtype:
    """Read a dtype by any of the names transformers takes; `auto` is as stored in the checkpoint of `plan`."""
    if isinstance(given, torch.dtype):
        return given
    name = str(given).removeprefix("torch.")
    found = stored_dtype(plan) if name == "auto" and plan is not None else getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"dtype {given!r}: no such dtype; use auto, bfloat16, float16 or float32")
    return found


def state_of(weights: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that transformers loads; where it places or shares out, files are read tensor by tensor."""
    is_placed = kwargs.get("device_map") is not None or asks_for_sharing(kwargs)
    if is_placed and kwargs.get("quantization_config") is None and isinstance(weights, CheckpointReader):
        return {f"model.{key}": LazyTensor(weights, key) for key in weights}
    return {f"model.{key}": weights[key] for key in weights}


class LazyTensor:
    """A tensor of a checkpoint that is read each time it is indexed, as the slices of safetensors are."""

    def __init__(self, weights: CheckpointReader, name: str) -> None:
        self._weights, self._name = weights, name

    def get_shape(self) -> list[int]:
        """Return the shape of the whole."""
        return list(self._weights.shape(self._name))

    def __getitem__(self, index: Any) -> Tensor:
        """Return a part; it keeps nothing of the rest in memory."""
        whole = self._weights[self._name]
        part = whole[index]
        return part if part.numel() == whole.numel() else part.clone()
