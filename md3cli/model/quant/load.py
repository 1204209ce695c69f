"""A network whose text matrices stay in 8 or 4 bits, read and packed tensor by tensor.

Which matrices: those the 4-bit port packs in the decoder (attention, dense MLPs, experts). Vision, routers, tau, norms,
embedding, head and region heads stay in 16 bits, also where a file stores them in fewer. Nothing stays mapped: each
file is let go after each tensor, so that memory holds the packed model and one tensor, never the full model beside it.
Only the loader of engines imports this file, which is apart from it because nothing here knows a run's options.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from md3cli.model.kernels import weights as kernel_weights
from md3cli.model.kernels.weights import KernelExperts, KernelLinear, KernelWeight
from md3cli.model.network.layers import ExpertMatrices, Linear, MoeMlp
from md3cli.model.network.moondream import Moondream3
from md3cli.model.quant.layers import place_experts
from md3cli.model.quant.matrices import LowBitLinear, Matrix, TextPass, can_hold, pack
from md3cli.model.quant.search import CodeCache, search
from md3cli.model.weights.adapters import LowRank, merged, read_adapter
from md3cli.model.weights.codes import LowBit, QuantisedWeight, quantise
from md3cli.model.weights.names import Slot, is_experts, is_portable
from md3cli.model.weights.plan import CheckpointPlan
from md3cli.model.weights.read import SCHEMES, CheckpointReader, assign_weights, read_quantised
from md3cli.system import return_freed_memory

STORED, NONE = "stored", "none"


def low_bit_of(slot: Slot, quant: str) -> LowBit | None:
    """Return the scheme a tensor is to be held in; None is plain 16 or 32 bits.

    `quant` is as `--quant`: `stored` follows the file, `none` widens everything, int8 and int4 hold
    every matrix of the decoder so.
    """
    if quant == NONE or not (is_portable(slot.name) and slot.name.startswith("text.")):
        return None
    if quant == STORED:
        return SCHEMES.get(slot.recipe)
    return LowBit(quant)


def has_low_bits(plan: CheckpointPlan, quant: str) -> bool:
    """Return True when any tensor of a checkpoint is to be held in few bits."""
    return any(low_bit_of(slot, quant) is not None for slot in plan.slots)


class LowBitReader:
    """Tensors of a checkpoint in the scheme they are to be held in, with an adapter's changes in them."""

    def __init__(
        self,
        plan: CheckpointPlan,
        reader: CheckpointReader,
        quant: str,
        adapter: Path | None,
        cache: CodeCache | None = None,
        *,
        for_kernels: bool = False,
    ) -> None:
        self.reader, self.quant, self.cache = reader, quant, cache
        self._can_hold = kernel_weights.can_hold if for_kernels else can_hold
        self.slots = {slot.name: slot for slot in plan.slots}
        changes = read_adapter(adapter, plan.config) if adapter is not None else []
        self._changes: Mapping[str, LowRank] = {change.weight: change for change in changes}

    def plain(self, name: str) -> Tensor:
        """Return the tensor in the reader's dtype, whatever it is stored in; perhaps a view of the file."""
        weight, change = self.reader[name], self._changes.get(name)
        return weight if change is None else merged(weight, change)

    def plain_of_codes(self, name: str) -> Tensor:
        """Return the tensor in the reader's dtype; where it is to be held in few bits, what its codes stand for."""
        if low_bit_of(self.slots[name], self.quant) is None:
            return self.plain(name)
        return self.quantised(name).dequantise(self.reader.dtype)

    def kind_of(self, name: str) -> LowBit | None:
        """Return the scheme this tensor is packed in; None where it stays plain, also for its size."""
        slot = self.slots[name]
        kind = low_bit_of(slot, self.quant)
        names = _packed_with(name, slot.shape)
        return kind if kind is not None and all(self._can_hold(kind, self.slots[n].shape) for n in names) else None

    def quantised(self, name: str) -> QuantisedWeight:
        """Return the codes of a tensor that is to be held in few bits."""
        slot = self.slots[name]
        kind = low_bit_of(slot, self.quant)
        assert kind is not None, name
        if name in self._changes:
            return search(self.plain(name), kind, name=name)
        if SCHEMES.get(slot.recipe) is kind:
            return read_quantised(slot, self.reader.read_stored)
        found = self.cache.load(name, kind, slot.shape) if self.cache is not None else None
        if found is None:
            found = search(self.plain(name), kind, name=name)
            if self.cache is not None:
                self.cache.save(name, found)
        return found


def load_dequantised(
    model: Moondream3, plan: CheckpointPlan, *, quant: str, device: torch.device, adapter: Path | None = None
) -> None:
    """Give an empty network the values that low-bit codes stand for, in float32.

    Raises:
        CheckpointError: the files or the adapter cannot be read.
    """
    with CheckpointReader(plan, dtype=torch.float32, device=device) as reader:
        weights = LowBitReader(plan, reader, quant, adapter)
        state = {name: weights.plain_of_codes(name) for name in weights.slots}
    assign_weights(model, state)


def load_low_bit(
    model: Moondream3,
    plan: CheckpointPlan,
    *,
    quant: str,
    dtype: torch.dtype,
    device: torch.device,
    adapter: Path | None = None,
    cache: CodeCache | None = None,
    for_kernels: bool = False,
) -> None:
    """Give an empty network its low-bit matrices packed for `device`, and the rest in `dtype`, that of activations.

    Codes that have to be made are taken from `cache` and left there. `for_kernels` keeps every scheme's
    codes in the layout of the GPU's kernels and puts these in place.

    Raises:
        CheckpointError: the files or the adapter cannot be read.
    """
    text_pass = _follow_pass(model)
    rest: dict[str, Tensor] = {}
    with CheckpointReader(plan, dtype=dtype, device=device, keeps_open=False) as reader:
        weights = LowBitReader(plan, reader, quant, adapter, cache, for_kernels=for_kernels)
        for name in weights.slots:
            if weights.kind_of(name) is None:
                rest[name] = weights.plain(name).clone(memory_format=torch.contiguous_format)
            elif for_kernels:
                _place(model, name, KernelWeight.of_quantised(weights.quantised(name)))
            else:
                _place(model, name, pack(weights.quantised(name), text_pass, dtype))
    model.load_state_dict(rest, strict=True, assign=True)
    return_freed_memory()
    if for_kernels:
        from md3cli.model.kernels.forms import place_forms

        place_forms(model)  # nothing else computes with this layout
    model.requires_grad_(False).eval()


def _packed_with(name: str, shape: tuple[int, ...]) -> list[str]:
    """Return the weights that are packed or left plain together with this one: an expert's two matrices."""
    if not is_experts(name, shape):
        return [name]
    return [f"{name.rsplit('.', 2)[0]}.{leaf}.weight" for leaf in ("fc1", "fc2")]


def _follow_pass(model: Moondream3) -> TextPass:
    """Return what will know the kind of each of the decoder's passes before it runs."""
    text_pass, prefix_len = TextPass(), model.config.prefix_len

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Only a picture's prefix brings so many positions at once.
        text_pass.is_prefix = inputs[0].shape[1] >= prefix_len

    model.text.register_forward_pre_hook(note)
    return text_pass


def _place(model: Moondream3, name: str, packed: list[Matrix] | KernelWeight) -> None:
    """Put a packed weight where the network has the plain weight `name`."""
    path = name.removesuffix(".weight")
    owner_path, leaf = path.rsplit(".", 1)
    owner, plain = model.get_submodule(owner_path), model.get_submodule(path)
    if isinstance(plain, ExpertMatrices):
        assert isinstance(owner, MoeMlp)
        if isinstance(packed, KernelWeight):
            setattr(owner, leaf, KernelExperts(packed))
        else:
            place_experts(owner, leaf, packed)
        return
    assert isinstance(plain, Linear)
    if isinstance(packed, KernelWeight):
        setattr(owner, leaf, KernelLinear(packed, plain.bias, model.config.prefix_len))
    else:
        setattr(owner, leaf, LowBitLinear(packed[0], plain.bias))


def quantise_decoder(model: Moondream3, kind: LowBit, *, experts_only: bool = False, for_kernels: bool = False) -> None:
    """Put the decoder's plain matrices into few bits, in place: for measurements on random weights.

    Extremes are spread over all codes; `load_low_bit` searches for better scales. Weights of sizes that
    the layout does not hold stay as they are. Call it before `kernels.optimise`.
    """
    text_pass = _follow_pass(model)
    holds = kernel_weights.can_hold if for_kernels else can_hold
    shapes = {name: weight.shape for name, weight in model.named_parameters() if is_portable(name)}
    for name in [name for name in shapes if name.startswith("text.")]:
        weight = model.get_parameter(name)
        together = _packed_with(name, tuple(weight.shape))
        if (experts_only and weight.dim() != 3) or not all(holds(kind, tuple(shapes[n])) for n in together):
            continue
        codes = quantise(weight.detach(), kind)
        _place(model, name, KernelWeight.of_quantised(codes) if for_kernels else pack(codes, text_pass, model.dtype))
