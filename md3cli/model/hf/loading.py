"""What `from_pretrained` is given, read: which files, which config, which dtype, and the weights for transformers."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from md3cli.errors import CheckpointError, ConfigError, UsageError
from md3cli.model.api_loading import read_device_map
from md3cli.model.hf.config import Moondream3Config, quant_method
from md3cli.model.hf.parallel import asks_for_sharing
from md3cli.model.quant.load import NONE, STORED
from md3cli.model.weights.adapters import PEFT_CONFIG, PEFT_WEIGHTS, base_of, check_start
from md3cli.model.weights.files import read_json
from md3cli.model.weights.hub import fetch_model, model_path, repo_of
from md3cli.model.weights.plan import QUANT_METHOD, CheckpointPlan
from md3cli.model.weights.read import CheckpointReader, stored_dtype

# Arguments of transformers that choose other weights, or others' names for them.
_NOT_FOLLOWED = ("state_dict", "subfolder", "variant", "gguf_file", "key_mapping", "from_tf", "from_flax")
_WIDTHS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def find_weights(name: str, kwargs: dict[str, Any]) -> Path:
    """Find the folder or file of a model, and fetch a repository; take the arguments about that out of `kwargs`.

    Raises:
        CheckpointError: there is no such model, or it cannot be fetched.
        ConfigError: an argument asks for other weights, or another way to them.
    """
    revision, is_offline = kwargs.pop("revision", None), bool(kwargs.pop("local_files_only", False))
    kwargs.pop("trust_remote_code", None)  # nothing here runs remote code
    if kwargs.pop("use_safetensors", None) is False:
        raise ConfigError("use_safetensors=False asks for pickled weights, which may run code; they are never read")
    if odd := [key for key in _NOT_FOLLOWED if kwargs.pop(key, None)]:
        raise ConfigError(
            f"from_pretrained takes no {', '.join(odd)}: a folder's own safetensors are read, in any layout; leave it "
            "out (from_pretrained(None, config=…, state_dict=…) takes tensors)"
        )
    hub = {key: kwargs.pop(key, None) for key in ("cache_dir", "force_download", "token", "proxies")}
    repo = repo_of(name)
    if repo is not None and (odd := [key for key, value in hub.items() if value and value is not True]):
        raise ConfigError(
            f"from_pretrained takes no {', '.join(odd)}: {repo} is fetched with the hub's own settings; leave it out, "
            "and say HF_HOME, HF_TOKEN or HTTPS_PROXY in the environment"
        )
    return model_path(name) if repo is None else fetch_model(repo, revision, offline=is_offline)


def check_device_map(device_map: object) -> None:
    """Refuse a GPU that is not there in words; torch says no more than that an assertion failed.

    Raises:
        ConfigError: `device_map`, or a place in it, names such a GPU.
    """
    for place in device_map.values() if isinstance(device_map, Mapping) else (device_map,):
        if isinstance(place, int) or str(place).startswith("cuda"):
            read_device_map(place)


def base_of_adapter(folder: Path) -> str:
    """Return the model that an adapter in a folder of peft's was trained on.

    Raises:
        CheckpointError: it names none, was made for changed weights, or has its own in a form that is not read.
    """
    file = folder / PEFT_CONFIG
    check_start(file, read_json(file))  # transformers takes the true base for it
    base = base_of(folder)
    if base is None:
        raise CheckpointError(f"{file} names no base model; load that first, then the adapter")
    if not (folder / PEFT_WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has no {PEFT_WEIGHTS}, the one form of an adapter's weights that is read")
    return base


def config_of(plan: CheckpointPlan, given: object) -> Moondream3Config:
    """Return the config that was given, or the checkpoint's own, or the real model's sizes where it has none."""
    file = plan.files.config_file
    if isinstance(given, Moondream3Config):
        config = deepcopy(given)
    else:
        config = Moondream3Config() if file is None else Moondream3Config.from_json_file(str(file))
    config.has_region_ln = plan.has_region_ln  # the weights know, whatever a config says
    scheme = getattr(config, "quantization_config", None)
    if scheme is None:
        return config
    if quant_method(scheme) != QUANT_METHOD:
        raise CheckpointError(
            f"{file or 'this checkpoint'}: the config says that weights are packed ({quant_method(scheme)!r:.40}), and "
            "they are plain; take its quantization_config out, or load with quantization_config=BitsAndBytesConfig(…)"
        )
    del config.quantization_config  # ours, which the plan has judged; transformers would look for its library
    return config


def take_dtype(kwargs: dict[str, Any]) -> Any:
    """Take the dtype out of `from_pretrained`'s arguments, by its newer or older name.

    Raises:
        UsageError: it has both.
    """
    newer, older = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
    if newer is not None and older is not None:
        raise UsageError("dtype and torch_dtype are one setting; give dtype alone")
    return newer or older or "auto"


def dtype_of_state(kwargs: dict[str, Any], quant: str) -> torch.dtype:
    """Take the dtype of a model that is made of a config and a state; `auto` is the config's, or the state's.

    Raises:
        ConfigError: config or state is missing, or `quant` asks for packed weights.
    """
    if quant not in (NONE, STORED):
        raise ConfigError("quant packs a folder's weights, and from_pretrained(None) has none: leave it out")
    kwargs.pop("trust_remote_code", None)  # there is no code
    config, state = kwargs.get("config"), kwargs.get("state_dict")
    if config is None or not state:
        raise ConfigError("from_pretrained(None) needs config and state_dict: there is no folder to read them from")
    dtype = take_dtype(kwargs)
    return read_dtype(config.dtype or next(iter(state.values())).dtype if dtype == "auto" else dtype)


def read_dtype(given: object, plan: CheckpointPlan | None = None) -> torch.dtype:
    """Read a dtype by any of the names transformers takes; `auto` is as stored in the checkpoint of `plan`."""
    name = str(given).removeprefix("torch.")
    found = stored_dtype(plan) if name == "auto" and plan is not None else getattr(torch, name, None)
    if found not in _WIDTHS:
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
