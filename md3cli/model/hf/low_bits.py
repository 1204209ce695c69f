"""Weights that stay in 8 or 4 bits under the transformers classes, as they do in the engine.

A packed model's network is the engine's own (`engine/load.load_weights`), with the engine's faster forms: the same
bytes, the same answers. It cannot be trained, widened or taken apart. What asks for that is refused in words that say
how to load instead; what is saved is what the files hold, code by code. Knows no products and no layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from md3cli.config import ModelOptions
from md3cli.errors import ConfigError, EngineError
from md3cli.model.api_loading import read_device_map
from md3cli.model.engine.kernels import PackedLinear, optimise, resident_tensors
from md3cli.model.engine.load import QUANTS, choose_device, load_weights, prepare_device
from md3cli.model.hf.config import BNB, quant_method
from md3cli.model.hf.placement import is_spread
from md3cli.model.kernels.weights import KernelLinear
from md3cli.model.network.moondream import Moondream3
from md3cli.model.quant.layers import low_bit_matrices
from md3cli.model.quant.load import NONE, STORED
from md3cli.model.quant.matrices import LowBitLinear
from md3cli.model.weights.names import Format
from md3cli.model.weights.plan import CheckpointPlan
from md3cli.model.weights.write import convert_checkpoint

_OF_AUTO_CLASSES = ("_from_auto", "adapter_kwargs")  # what they add: who asks, and how the hub was spoken to
_ONE_DEVICE = ("auto", "balanced", "balanced_low_0", "sequential")  # transformers' words for: find a place
_HARMLESS: Mapping[str, tuple[object, ...]] = {  # arguments of transformers whose values change nothing here
    "attn_implementation": ("sdpa",),
    "low_cpu_mem_usage": (True,),
    "weights_only": (True,),
    "safe_serialization": (True,),
}
_NO_ADAPTER = "takes no adapter: load the model with quant='none'"  # peft's refusal shows the layer
_WIDE = "load it with quant='none' (in 16 bits) or dtype=torch.float32"


def read_quant(kwargs: dict[str, Any]) -> str:
    """Take `quant` out of `from_pretrained`'s arguments, with the values that `Moondream.load` takes.

    A `quantization_config`, which is bitsandbytes', starts from plain weights: beside it `quant` is `none`. Other
    libraries know no stack of experts, and some fetch code from the hub.

    Raises:
        ConfigError: there is no such value, it does not go with the others, or the library is another.
    """
    given, other = kwargs.pop("quant", None), kwargs.get("quantization_config")
    for bits in ("load_in_4bit", "load_in_8bit"):
        if kwargs.pop(bits, False):  # what older transformers took by themselves
            raise ConfigError(f"{bits} belongs in quantization_config=BitsAndBytesConfig({bits}=True)")
    if given not in (None, *QUANTS):
        raise ConfigError(f"quant={str(given)[:80]!r}: use {', '.join(QUANTS)}")
    if other is not None and given not in (None, NONE):
        raise ConfigError(f"quant={str(given)!r}: quantization_config starts from plain weights; leave quant out")
    if other is not None and quant_method(other) != BNB:
        raise ConfigError(
            f"quantization_config of {quant_method(other) or type(other).__name__!r:.40}: BitsAndBytesConfig alone "
            "packs this network; quant='int8' and quant='int4' pack it without a library"
        )
    return NONE if other is not None else str(given or STORED)


def one_device(device_map: object) -> torch.device:
    """Return the one device that a `device_map` of transformers means: None is torch's default, `auto` the first GPU.

    Raises:
        ConfigError: it names several devices, or one that is not here.
    """
    places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    distinct = {str(place): place for place in places}
    if len(distinct) != 1 or "disk" in distinct:
        raise ConfigError(
            f"weights in 8 or 4 bits lie on one device, and device_map names {', '.join(sorted(distinct)) or 'none'}: "
            f"give one, or {_WIDE}"
        )
    ((name, place),) = distinct.items()
    if place is None:
        return choose_device(str(torch.get_default_device()))
    return choose_device("auto" if name in _ONE_DEVICE else read_device_map(place))


def odd_arguments(given: Mapping[str, object]) -> str:
    """Return the names of those arguments of transformers that ask for something; None, False and {} do not."""
    asked = {key: value for key, value in given.items() if value and key not in _OF_AUTO_CLASSES}
    return ", ".join(sorted(key for key, value in asked.items() if value not in _HARMLESS.get(key, ())))


def check_arguments(call: str, given: Mapping[str, object]) -> None:
    """Refuse arguments of transformers that a packed model cannot follow, by name.

    Raises:
        ConfigError: one of them asks for something.
    """
    if odd := odd_arguments(given):
        raise ConfigError(f"{call} of weights in 8 or 4 bits takes no {odd}: leave it out, or {_WIDE}")


@dataclass(frozen=True, slots=True)
class PackedSource:
    """The folder or file that a packed model comes from, and how it is held (`quant` as `read_quant` returns it)."""

    path: Path
    plan: CheckpointPlan
    quant: str
    dtype: torch.dtype

    def load(self, device: torch.device) -> Moondream3:
        """Read the network, packed for `device`, in the forms that an engine would give it.

        Raises:
            CheckpointError: the files cannot be read.
            ConfigError: the device lacks something, or has no room.
        """
        prepare_device(device)
        network = load_weights(self._options("auto"), self.plan, dtype=self.dtype, device=device)
        optimise(network)
        for module in network.modules():
            if isinstance(module, LowBitLinear | KernelLinear | PackedLinear):
                module.extra_repr = lambda: _NO_ADAPTER  # type: ignore[method-assign]
        return network

    def widened(self) -> dict[str, Tensor]:
        """Return the values that the codes stand for, in float32, by canonical name."""
        options, cpu = self._options("fp32"), torch.device("cpu")
        return load_weights(options, self.plan, dtype=torch.float32, device=cpu).state_dict()

    def _options(self, dtype: str) -> ModelOptions:
        return ModelOptions(model=str(self.path), quant=self.quant, dtype=dtype, cache=False)

    def save(self, target: Path, layout: Format | None, tokenizer_file: Path | None) -> None:
        """Write the files' weights as the new folder `target`: code by code in their layout, or wide in another one.

        Raises:
            CheckpointError: the files cannot be read, or the layout cannot hold them.
            ConfigError: the codes are in no file.
            OutputError: the folder cannot be written.
        """
        if layout is None and self.quant != STORED:
            raise ConfigError(
                f"{self.path} was put into {self.quant} while it was loaded: `md3 models quantize {self.path} "
                f"{target} --quant {self.quant}` writes a folder of such codes, layout='original' the wide weights"
            )
        convert_checkpoint(self.path, target, layout, tokenizer_file=tokenizer_file)


class LowBitMethods(nn.Module):
    """What a model class does otherwise where its network is packed (`packed_source` is set)."""

    model: Moondream3
    packed_source: PackedSource | None = None

    @property
    def is_packed(self) -> bool:
        """Whether the large matrices are held in 8 or 4 bits."""
        return self.packed_source is not None

    def _refuse(self, what: str) -> EngineError:
        return EngineError(f"this model's weights are held in 8 or 4 bits, {what}, {_WIDE}")

    def train(self, mode: bool = True) -> Self:
        """Switch to training and back, as every module does.

        Raises:
            EngineError: the weights are packed.
        """
        if mode and self.is_packed:
            raise self._refuse("which cannot be trained, nor can adapters on them; to train")
        return super().train(mode)

    def check_no_gradients(self) -> None:
        """Refuse a pass that a gradient is asked of: through packed products it would be a wrong one, without a word.

        Raises:
            EngineError: the weights are packed, and something is to be learned.
        """
        if self.is_packed and torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            raise self._refuse("through which no gradient flows; to train")

    def _check_takes_adapter(self, otherwise: str) -> None:
        if self.is_packed:
            raise self._refuse(f"on which no adapter can be put; {otherwise}")
        if getattr(self, "sharing", None) is not None:
            raise EngineError(f"a network that processes share takes no adapter: load it in one process; {otherwise}")
        if is_spread(self) and any(parameter.is_meta for parameter in self.parameters()):
            raise EngineError(
                "layers that device_map leaves on the CPU or on disk would lose an adapter's weights, without a word: "
                f"load the model where all of it has room; {otherwise}"
            )

    def add_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Add an adapter of peft's, as transformers does; refused where weights are packed or offloaded."""
        self._check_takes_adapter("to adapt it")
        return super().add_adapter(*args, **kwargs)  # type: ignore[misc]

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter of peft's, as transformers does; refused where weights are packed or offloaded."""
        self._check_takes_adapter("Moondream.load(…, adapter=…) merges it first, or")
        return super().load_adapter(*args, **kwargs)  # type: ignore[misc]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the plain tensors by name, as every module does; refused where they are not all there is."""
        if self.is_packed:
            raise self._refuse("for which a state_dict has no place. save_pretrained writes them; for plain tensors")
        return super().state_dict(*args, **kwargs)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of all weights, those in few bits and in layouts of their own included."""
        if self.packed_source is None:
            return super().get_memory_footprint(return_buffers)  # type: ignore[misc, no-any-return]
        plain = sum(tensor.numel() * tensor.element_size() for tensor in resident_tensors(self.model))
        return plain + sum(matrix.num_bytes for matrix in low_bit_matrices(self.model))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Do what `to`, `cuda`, `half`, … ask for; a packed network is read anew on another device."""
        if self.packed_source is None:
            return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]
        here = torch.empty(0, dtype=self.model.dtype, device=self.model.device)
        there: Tensor = fn(here)
        if there.dtype is not here.dtype:
            ours, asked = (str(tensor.dtype).removeprefix("torch.") for tensor in (here, there))
            raise self._refuse(f"and the rest stays in {ours}; for {asked}")
        if there.device != here.device:
            self.model = self.packed_source.load(choose_device(str(there.device)))
        return self
