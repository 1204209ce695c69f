"""A network whose layers lie on several devices, on the CPU or on disk: what accelerate's hooks leave to do.

`device_map` lets accelerate place modules and put hooks around their `forward`: a hook brings the inputs to the
module's device, and weights from CPU or disk for as long as the module runs. Four small parameters are used outside
any `forward` (the token table, the patches' positions, the frequencies of the region heads): they stay in memory on one
device, the home, where rows, masks and decisions are. What a tower or a head computes elsewhere is brought home by a
hook of torch. Knows nothing of processes; those are `parallel.py`'s.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from md3cli.errors import EngineError
from md3cli.model.network.moondream import Moondream3
from md3cli.model.network.text import TextBlock

HOOK = "_hf_hook"  # where accelerate keeps the hook of a module
_LOOSE = r"'model\.(text\.wte|vision\.pos_emb|region\.\w+_features)'"


def is_spread(model: nn.Module) -> bool:
    """Return True where accelerate has put hooks around the model: its layers are on several devices, or offloaded."""
    return hasattr(model, HOOK)


@contextmanager
def placing() -> Iterator[None]:
    """Surround accelerate's placing: it wonders at places of parameters that are in no module below the towers."""
    with warnings.catch_warnings():
        said = rf"The following device_map keys do not match any submodules in the model: \[{_LOOSE}(, {_LOOSE})*\]$"
        warnings.filterwarnings("ignore", message=said)
        yield


def settle(model: nn.Module, network: Moondream3, state: Mapping[str, Any]) -> None:
    """Finish what accelerate began where layers are spread, in place; elsewhere do nothing.

    `state` is what transformers was given to load: tensors, or what reads them when it is indexed.

    Raises:
        EngineError: a block's parts would compute on several devices.
    """
    if not is_spread(model):
        return
    home = _device_of(model)
    assert home is not None
    for owner, name in _loose_parameters(network):
        _keep_at_home(network.get_submodule(owner), name, state[f"model.{owner}.{name}"][...], home)
    for kind, blocks in (("vision", network.vision.blocks), ("text", network.text.blocks)):
        for number, block in enumerate(blocks):
            _hold_together(block, f"{kind}.blocks.{number}", home)
    for module in _gates(network):
        module.register_forward_hook(partial(_bring_home, home))


def check_weights_arrive(model: nn.Module) -> None:
    """Refuse a pass in which a module would compute with weights that nothing brings: peft's, on offloaded layers.

    Raises:
        EngineError: there is such a module.
    """
    if not is_spread(model):
        return
    for name, module in model.named_modules():
        is_away = any(parameter is not None and parameter.is_meta for parameter in module._parameters.values())
        if is_away and not getattr(getattr(module, HOOK, None), "offload", False):
            raise EngineError(f"{name} has no weights: layers on the CPU or on disk (device_map) take no adapter")


def state_in_memory(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors by name; those that are offloaded are read into memory, all at once."""
    if not is_spread(model):
        return model.state_dict()
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    return get_state_dict_offloaded_model(model)  # type: ignore[no-any-return]


def _loose_parameters(network: Moondream3) -> Iterator[tuple[str, str]]:
    """Yield the parameters that are used outside their module's `forward`: (module, name)."""
    for owner in ("text", "vision", "region"):
        for name, _ in network.get_submodule(owner).named_parameters(recurse=False):
            yield owner, name


def _gates(network: Moondream3) -> list[nn.Module]:
    """Return the modules whose results are used at home."""
    text, vision = network.text, network.vision
    towers = [text, text.post_ln, text.lm_head, vision.patch_emb, vision.post_ln, vision.proj_mlp]
    return [*towers, *network.region.children()]


def _device_of(module: nn.Module) -> torch.device | None:
    """Return the device on which a module with a hook computes; None without one."""
    found = getattr(getattr(module, HOOK, None), "execution_device", None)
    return None if found is None else torch.device(found)


def _keep_at_home(owner: nn.Module, name: str, value: Tensor, home: torch.device) -> None:
    """Give a module its parameter for good; a hook that would take it away again goes."""
    from accelerate.hooks import remove_hook_from_module

    hook = getattr(owner, HOOK, None)
    if getattr(hook, "offload", False):
        remove_hook_from_module(owner)
    old = owner._parameters[name]
    assert old is not None
    kept = value.to(home, old.dtype)
    owner._parameters[name] = nn.Parameter(kept, requires_grad=old.requires_grad)


def _hold_together(block: nn.Module, name: str, home: torch.device) -> None:
    """See to it that a block gets its inputs on its one device."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    devices = {device for device in map(_device_of, block.modules()) if device is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise EngineError(f"device_map puts parts of {name} on {names}: give each block one device")
    device = next(iter(devices), home)
    if not hasattr(block, HOOK):
        add_hook_to_module(block, AlignDevicesHook(device))
    if isinstance(block, TextBlock):
        block.device = device


def _bring_home(home: torch.device, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.to(home)
