"""What transformers calls the options of a model, read as those of `Moondream.load`.

The cards' snippets load with `dtype` and `device_map`. Loads nothing; what makes no sense is a ConfigError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from md3cli.errors import ConfigError
from md3cli.model.api_requests import describe_value
from md3cli.model.engine.load import DTYPES, choose_device

_DTYPES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}  # bfloat16 is bf16 here
_ONE_DEVICE = "Moondream runs on one device; AutoModelForCausalLM of md3cli.original spreads a model over several"


def read_dtype(given: object) -> str:
    """Return the name that `Moondream.load` has for a dtype: of `torch.bfloat16`, `"bfloat16"` or `"auto"`."""
    if given is None:
        return "auto"
    name = str(given).removeprefix("torch.")
    name = _DTYPES.get(name, name)
    if not isinstance(given, str | torch.dtype) or name not in ("auto", *DTYPES):
        raise ConfigError(f"dtype is {describe_value(given)}; use auto, {', '.join(_DTYPES)}")
    return name


def read_device_map(given: object) -> str:
    """Return the one device that a `device_map` names, as `Moondream.load` calls it; None and `"auto"` are `auto`.

    It may be text, a number of a CUDA device, a `torch.device`, or any of these for the whole model: `{"": "cuda"}`.
    """
    said = f"device_map is {describe_value(given)}"
    if isinstance(given, Mapping):
        if list(given) != [""]:
            raise ConfigError(f"{said}, which places parts of the model; {_ONE_DEVICE}")
        given = given[""]
    if given is None:
        return "auto"
    if isinstance(given, bool) or not isinstance(given, str | int | torch.device):
        raise ConfigError(f'{said}; use "auto", "cpu", "cuda", or {{"": "cuda:1"}}')
    name = f"cuda:{given}" if isinstance(given, int) else str(given)
    if name.startswith(("balanced", "sequential")) or name == "disk":
        raise ConfigError(f"{said}; {_ONE_DEVICE}")
    if name != "auto":
        try:
            choose_device(name)
        except ConfigError as error:  # it speaks of the command's option
            raise ConfigError(re.sub(r"--device (\w+(:\d+)?)", r'device_map="\1"', str(error))) from error
    return name
