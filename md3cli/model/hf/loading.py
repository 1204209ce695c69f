"""What `from_pretrained` is given, read: which files, which config, which dtype."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from md3cli.errors import CheckpointError
from md3cli.model.hf.config import Moondream3Config
from md3cli.model.weights.hub import fetch_model, model_path, repo_of
from md3cli.model.weights.plan import QUANT_METHOD, CheckpointPlan
from md3cli.model.weights.read import stored_dtype


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
