"""bitsandbytes' 4 and 8 bits for the transformers classes: linear layers and experts alike.

transformers' own quantiser does the work: it exchanges each `nn.Linear` for the library's layer, packs the weights, and
saves and loads what is packed. Here stands what it needs of this network. It looks for torch's own class, and leaves
subclasses alone; and it knows no stack of experts, so that each expert is a linear layer of its own here
(`ExpertLayers`). A token then unpacks the experts it has chosen, peft adapts them by name, and the library's layers do
the rest, gradients included. `split_experts` and `join_experts` go between both forms of the weights.

The library converts a weight for its product on CPUs with bfloat16 units when a layer first runs in evaluation. Those
products take no widths but multiples of 32 and 64, and give no gradients afterwards, so `settle_bnb` switches them off.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from md3cli.errors import CheckpointError, ConfigError, EngineError
from md3cli.model.hf.config import BNB, Moondream3Config, is_bnb, quant_method
from md3cli.model.hf.loading import read_dtype, take_dtype
from md3cli.model.network.layers import ExpertMatrices, Linear, MoeMlp
from md3cli.model.weights.adapters import PEFT_WEIGHTS
from md3cli.model.weights.files import CONFIG_NAME, WeightFiles, find_weight_files, read_header, read_json

# What stays plain where a user names nothing: parts that lose answers in 4 bits (examples/benchmarks.md), of which the
# real model has half a thousandth. transformers' own choice, the head, is large and loses none.
PLAIN_PARTS = ("router", "patch_emb", "coord_decoder")
_ADAPTED_LAYER = re.compile(r"\.mlp\.fc[12]\.[0-9]{1,4}\.lora_A\.weight$")
_EXPERT = re.compile(r"(.*\.mlp\.fc[12])\.([0-9]{1,4})\.weight")


class ExpertLayers(nn.ModuleList):
    """One linear layer per expert, no bias: what `ExpertMatrices` computes, over layers that a tool may exchange."""

    def __init__(self, stack_XOI: nn.Parameter) -> None:
        num_experts, out_features, in_features = stack_XOI.shape
        with torch.device("meta"):
            super().__init__(nn.Linear(in_features, out_features, bias=False) for _ in range(num_experts))
        for layer, matrix in zip(self, stack_XOI.detach(), strict=True):
            layer.weight = nn.Parameter(matrix, requires_grad=stack_XOI.requires_grad)

    def forward(self, x_PD: Tensor, counts: list[int]) -> Tensor:
        """Multiply rows sorted by expert, `counts[e]` of them for expert e: [P, in] -> [P, out]."""
        ends = itertools.accumulate(counts)
        # No `split`: the library's 8-bit product changes its input and back, which autograd forbids for split parts.
        rows = ((x_PD[end - count : end], layer) for count, end, layer in zip(counts, ends, self, strict=True))
        return torch.cat([layer(part) for part, layer in rows if len(part)])


def prepare_bnb(arguments: dict[str, Any]) -> None:
    """Make the arguments of `from_pretrained` ready to be packed, where they ask for it; the state is a plain one."""
    given = arguments.get("quantization_config")
    if quant_method(given) != BNB:
        return
    settings = deepcopy(_settings(given))
    if settings.llm_int8_skip_modules is None:
        settings.llm_int8_skip_modules = list(PLAIN_PARTS)
    arguments["quantization_config"] = settings
    arguments["state_dict"] = split_experts(arguments["state_dict"])


def _settings(given: Any) -> Any:
    """Return the settings as transformers' object, where they are an object or stand in a file."""
    return BitsAndBytesConfig(**given) if isinstance(given, dict) else given  # type: ignore[no-untyped-call]


@contextmanager
def loading_bnb(name: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Surround transformers' loading of packed weights: what fails in there is said in words.

    Raises:
        EngineError: bitsandbytes is not installed, its layers do not compute on this machine, or packed ones would lie
            on the CPU beside a GPU, or on disk.
        CheckpointError: weights that are packed already are damaged.
    """
    is_stored = is_bnb(arguments["config"])
    settings = arguments["config"].quantization_config if is_stored else arguments.get("quantization_config")
    if quant_method(settings) != BNB:
        yield
        return
    try:
        require_library(_settings(settings), _device_of(arguments.get("device_map")), arguments["dtype"])
        yield
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if "dispatched on the CPU" in str(error):
            raise EngineError(f"{name} cannot be placed as device_map says: {error}") from error
        if not is_stored:
            raise
        raise CheckpointError(f"{name}: its packed weights cannot be read ({error}); pack them again") from error


def _device_of(device_map: Any) -> torch.device:
    """Return the device that most of a model will be on, as transformers chooses it."""
    if isinstance(device_map, dict):
        device_map = next(iter(device_map.values()), None)
    if device_map in (None, "auto", "balanced", "balanced_low_0", "sequential", "disk"):
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device_map)


def use_plain_layers(model: nn.Module) -> None:
    """Give a network the layers that transformers exchanges: torch's own, one for each expert."""
    use_expert_layers(model)
    for module in model.modules():
        if isinstance(module, Linear):
            module.__class__ = nn.Linear  # type: ignore[assignment]


def use_expert_layers(model: nn.Module) -> None:
    """Give each expert of a network a layer of its own, over the memory of the stack."""
    for module in model.modules():
        if isinstance(module, MoeMlp):
            for name in ("fc1", "fc2"):
                stack = getattr(module, name)
                assert isinstance(stack, ExpertMatrices)
                setattr(module, name, ExpertLayers(stack.weight))


def fit_experts(model: nn.Module, adapter: Path) -> None:
    """Make a model's experts those that a folder of peft's adapts: layers, of a packed model, or stacks.

    Raises:
        CheckpointError: the model is packed, and the adapter was trained on stacks.
    """
    file = adapter / PEFT_WEIGHTS
    names = [entry.stored_name for entry in read_header(file)] if file.is_file() else []
    if not has_expert_layers(model):
        if any(_ADAPTED_LAYER.search(name) for name in names):
            use_expert_layers(model)
        return
    layers = {name for name, module in model.named_modules() if isinstance(module, ExpertLayers)}
    if any(
        name.removeprefix("base_model.model.").replace(".base_layer", "").split(".lora_")[0] in layers for name in names
    ):
        raise CheckpointError(
            f"{adapter} adapts the experts as stacks, and bitsandbytes packs each for itself: load it without a "
            "quantization_config, or train one on a packed model"
        )


def split_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with a matrix for each expert, of one with stacks [X, out, in]; views, nothing is copied."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith((".mlp.fc1.weight", ".mlp.fc2.weight")) and tensor.dim() == 3:
            path = name.removesuffix(".weight")
            result |= {f"{path}.{number}.weight": matrix for number, matrix in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


def join_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with stacks of experts, of one with a matrix for each; the inverse of `split_experts`."""
    result: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if match := _EXPERT.fullmatch(name):
            stacks.setdefault(f"{match[1]}.weight", {})[int(match[2])] = tensor
        else:
            result[name] = tensor
    return result | {name: torch.stack([found[n] for n in sorted(found)]) for name, found in stacks.items()}


def has_expert_layers(model: nn.Module) -> bool:
    """Return True where the experts are layers, as those of a model that is or was packed."""
    return any(isinstance(module, ExpertLayers) for module in model.modules())


def _is_new(record: logging.LogRecord, seen: set[str] = set()) -> bool:  # noqa: B006 - what was said in this process
    """Let a message of the library's through once: its 8-bit product says at each call that it casts its input."""
    is_new = record.getMessage() not in seen
    seen.add(record.getMessage())
    return is_new


def settle_bnb(model: nn.Module) -> None:
    """Make a loaded model's packed layers compute on every device, and judge them; plain models are left alone.

    Raises:
        CheckpointError: a packed weight is not of its layer's size, or not finite.
    """
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_new)
    for name, module in model.named_modules():
        kind = type(module.weight).__name__ if isinstance(module, nn.Linear) else ""
        if kind == "Params4bit":
            module.support_avx512bf16_for_cpu = False
            _check(name, _fits_4bit(module))
        elif kind == "Int8Params":
            _check(name, _fits_8bit(module))


def _check(name: str, fits: bool) -> None:
    if not fits:
        raise CheckpointError(f"{name}: the packed weight does not fit its layer; the files are damaged")


def _fits_4bit(layer: Any) -> bool:
    """Return True where codes and scales are as many as the layer needs: the library reads them unchecked."""
    weight, state = layer.weight, layer.weight.quant_state
    if state is None or tuple(state.shape) != (layer.out_features, layer.in_features):
        return False
    count, size = layer.out_features * layer.in_features, state.blocksize
    if size not in (32, 64, 128, 256, 512, 1024, 2048, 4096) or state.quant_type not in ("nf4", "fp4"):
        return False
    blocks = -(-count // size)
    sums = [(weight.data.view(torch.uint8), -(-count // 2)), (state.absmax, blocks), (state.code, 16)]
    scales = [state.absmax]
    if state.nested:
        inner = state.state2
        if inner is None or inner.blocksize != 256 or state.absmax.dtype is not torch.uint8 or state.offset is None:
            return False
        sums += [(inner.absmax, -(-blocks // 256)), (inner.code, 256), (state.offset, 1)]
        scales = [inner.absmax, inner.code, state.offset]
    is_sized = all(tensor.numel() == wanted for tensor, wanted in sums)
    return is_sized and all(one.dtype is torch.float32 and bool(one.isfinite().all()) for one in (*scales, state.code))


def _fits_8bit(layer: Any) -> bool:
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    if layer.state.has_fp16_weights:
        return scales is None
    if layer.weight.dtype is not torch.int8 or tuple(layer.weight.shape) != (layer.out_features, layer.in_features):
        return False
    return scales is not None and scales.shape == (layer.out_features,) and bool(scales.isfinite().all())


# -- packed folders --------------------------------------------------------------------------------


def bnb_files(path: Path) -> WeightFiles | None:
    """Return the files of a checkpoint that `save_pretrained` wrote packed; None for any other.

    Raises:
        CheckpointError: no checkpoint is there, or its headers are damaged.
    """
    file = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if not file.is_file() or quant_method(read_json(file).get("quantization_config")) != BNB:
        return None
    return find_weight_files(path)


def read_bnb(files: WeightFiles, arguments: dict[str, Any]) -> tuple[Moondream3Config, torch.dtype, dict[str, Tensor]]:
    """Return config, dtype and state of a packed checkpoint; the dtype is as saved unless the arguments have one.

    Raises:
        CheckpointError: the config is damaged.
        ConfigError: the arguments ask for other bits than those of the files.
    """
    assert files.config_file is not None
    given, file = arguments.get("config"), str(files.config_file)
    stored, asked = read_json(files.config_file)["quantization_config"], arguments.get("quantization_config")
    bits = "load_in_4bit"
    if asked is not None and bool(getattr(_settings(asked), bits, None)) != bool(stored.get(bits)):
        raise ConfigError(f"{file} says {bits}={stored.get(bits)}: what is packed is not packed again; leave it out")
    config = deepcopy(given) if isinstance(given, Moondream3Config) else Moondream3Config.from_json_file(file)
    config.quantization_config = stored
    config.has_region_ln = "region.ln.weight" in files.entries
    dtype = take_dtype(arguments)
    if dtype == "auto":
        dtype = config.dtype or torch.bfloat16
    width, state = read_dtype(dtype), dict[str, Tensor]()
    for path in files.files:
        for name, tensor in load_file(path).items():
            is_plain = name.endswith(".weight") and tensor.is_floating_point()  # transformers casts the rest alone
            state[name] = tensor.to(width) if is_plain else tensor
    return config, width, state


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters, buffers and scales of a model; shared memory counts once."""
    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        for holder in (state, getattr(state, "state2", None), weight, getattr(module, "state", None)):
            found += [value for value in getattr(holder, "__dict__", {}).values() if isinstance(value, Tensor)]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.device.type != "meta"}
    return sum(sizes.values())


def require_library(settings: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a machine on which the library's own layer does not compute.

    Raises:
        EngineError: bitsandbytes is not installed, or its layer fails here; the message has its words.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise EngineError(f"bitsandbytes is not installed ({error}): pip install 'md3cli[bnb]'") from error
    layers: Any = bitsandbytes.nn
    width, bits = 64, 4 if settings.load_in_4bit else 8
    try:
        if settings.load_in_4bit:
            layer = layers.Linear4bit(width, width, quant_type=settings.bnb_4bit_quant_type)
            layer.support_avx512bf16_for_cpu = False
        else:
            layer = layers.Linear8bitLt(width, width, has_fp16_weights=settings.llm_int8_has_fp16_weight)
        layer = layer.to(dtype).to(device)
        layer(torch.ones(1, width, dtype=dtype, device=device))
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        name = str(dtype).removeprefix("torch.")
        raise EngineError(f"bitsandbytes does not compute in {bits} bits on {device} in {name}: {error}") from error
