"""Checkpoints in any known layout, read into one name table and from there into the network.

`checkpoint_plan` has already judged the headers when this file maps the weights: safetensors, no
copy where a tensor is stored as it is used, conversions (dtype, split and merge, 8 and 4 bits) tensor by
tensor. The network is built on the meta device and the tensors are assigned to it.

Stored tensors to canonical ones and back: splits, stacks, 8-bit and 4-bit weights.

`assemble` and `disassemble` are inverse up to rounding for every `Recipe`.
Source: Moondream 3 specification, sections 19.1 to 19.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from md3cli.errors import CheckpointError
from md3cli.model.network.config import ModelConfig
from md3cli.model.network.moondream import Moondream3
from md3cli.model.weights.codes import LowBit, QuantisedWeight, pack_nibbles, quantise, unpack_nibbles
from md3cli.model.weights.names import Recipe, Slot
from md3cli.model.weights.plan import CheckpointPlan, plan_checkpoint

SCHEMES = {Recipe.FP8: LowBit.FP8, Recipe.INT4: LowBit.INT4, Recipe.INT8: LowBit.INT8}


def assemble(slot: Slot, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    """The canonical tensor of `slot` in `dtype`; `read` gives a stored tensor by its plain name.

    No copy is made where the stored tensor is already right.
    """
    parts = [part.name for part in slot.parts]
    match slot.recipe:
        case Recipe.COPY:
            return read(parts[0]).to(dtype)
        case Recipe.TRANSPOSE:
            return read(parts[0]).to(dtype).T.contiguous()
        case Recipe.FIRST_HALF:
            return read(parts[0])[: slot.shape[0]].to(dtype)
        case Recipe.SECOND_HALF:
            return read(parts[0])[slot.shape[0] :].to(dtype)
        case Recipe.CONCAT:
            return torch.cat([read(name).to(dtype) for name in parts])
        case Recipe.STACK_EXPERTS:
            return _stack_experts(slot, read, dtype)
        case Recipe.FP8 | Recipe.INT4 | Recipe.INT8:
            return read_quantised(slot, read).dequantise(dtype)


def disassemble(slot: Slot, tensor: Tensor | QuantisedWeight) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of `slot`, by plain name, in the order of its parts; views where possible.

    A slot stored in 8 or 4 bits takes codes that were made already, or a tensor to be rounded to them.
    """
    if slot.recipe.is_low_bit:
        if isinstance(tensor, Tensor):
            tensor = quantise(tensor, SCHEMES[slot.recipe])
        return zip([part.name for part in slot.parts], _stored_quantised(tensor), strict=True)
    assert isinstance(tensor, Tensor), slot.name
    names = [part.name for part in slot.parts]
    match slot.recipe:
        case Recipe.COPY:
            pieces: tuple[Tensor, ...] = (tensor,)
        case Recipe.TRANSPOSE:
            pieces = (tensor.T.contiguous(),)
        case Recipe.CONCAT:
            pieces = tensor.chunk(len(names))
        case Recipe.STACK_EXPERTS:
            pieces = tensor.flatten(0, 1).chunk(len(names))
        case _:
            raise AssertionError("fused tensors are read, never written")
    return zip(names, pieces, strict=True)


def _stack_experts(slot: Slot, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    result = torch.empty(slot.shape, dtype=dtype, device=read(slot.parts[0].name).device)
    rows = result.flatten(0, 1).chunk(len(slot.parts))  # a part is rows of one expert
    for part, target in zip(slot.parts, rows, strict=True):
        target.copy_(read(part.name))
    return result


def read_quantised(slot: Slot, read: Callable[[str], Tensor]) -> QuantisedWeight:
    """The codes and scales of a slot stored in 8 or 4 bits (`slot.recipe.is_low_bit`)."""
    codes, *scales = (read(part.name) for part in slot.parts)
    scales = [scale.float() for scale in scales]
    if slot.recipe is Recipe.INT4:
        return QuantisedWeight(LowBit.INT4, slot.shape, unpack_nibbles(codes), *scales)
    return QuantisedWeight(SCHEMES[slot.recipe], slot.shape, codes, scales[0].view(slot.shape[:-1]))


def _stored_quantised(weight: QuantisedWeight) -> tuple[Tensor, ...]:
    """Inverse of `read_quantised`."""
    if weight.zero_point is None:
        scale = weight.scale[..., None] if weight.kind is LowBit.INT8 else weight.scale
        return weight.codes, scale
    return pack_nibbles(weight.codes), weight.scale, weight.zero_point


TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PACKED_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I8": torch.int8}


class LoadedModel(NamedTuple):
    """A network with its weights, ready for inference, and what it was read from."""

    model: Moondream3
    config: ModelConfig
    plan: CheckpointPlan


class CheckpointReader(Mapping[str, Tensor]):
    """The canonical tensors of a checkpoint, each made when it is asked for and not kept.

    Tensors stored as they are asked for are views of the mapped file; they stay valid after
    `close`. With `keeps_open` false a file is mapped anew for each tensor and let go with it: what was
    read before no longer counts as this process's memory. Use as a context manager.
    """

    def __init__(
        self,
        plan: CheckpointPlan,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        keeps_open: bool = True,
    ) -> None:
        self.plan = plan
        self.dtype = dtype
        self.device = torch.device(device)
        self.keeps_open = keeps_open
        self._slots = {slot.name: slot for slot in plan.slots}
        self._open_files: dict[Path, Any] = {}  # safetensors exports no type of its handles

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of this canonical name, in `dtype` on `device`.

        Raises:
            KeyError: no such tensor.
            CheckpointError: the file changed or cannot be read.
        """
        return assemble(self._slots[name], self.read_stored, self.dtype)

    def read_stored(self, plain: str) -> Tensor:
        """A tensor as it is stored, by its plain name, on `device`; nothing is opened for the meta device."""
        entry = self.plan.files.entries[plain]
        if self.device.type == "meta":
            return torch.empty(entry.shape, dtype=(TORCH_DTYPES | _PACKED_DTYPES)[entry.dtype], device="meta")
        try:
            handle = self._open_files.get(entry.file)
            if handle is None:
                handle = safe_open(entry.file, framework="pt")
                if self.keeps_open:
                    self._open_files[entry.file] = handle
            tensor: Tensor = handle.get_tensor(entry.stored_name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{entry.file}: tensor {entry.stored_name} cannot be read: {error}") from error
        return tensor.to(self.device)

    def close(self) -> None:
        """Let go of the files; tensors already given out stay valid."""
        self._open_files.clear()


def stored_dtype(plan: CheckpointPlan) -> torch.dtype:
    """The dtype that holds every plainly stored weight without loss; packed ones and scales do not count."""
    dtype: torch.dtype | None = None
    for slot in plan.slots:
        if slot.recipe.is_low_bit:
            continue
        for part in slot.parts:
            found = TORCH_DTYPES[plan.files.entries[part.name].dtype]
            dtype = found if dtype is None else torch.promote_types(dtype, found)
    assert dtype is not None, "every layout stores norms and biases plainly"
    return dtype


def build_model(config: ModelConfig, weights: Mapping[str, Tensor], *, has_region_ln: bool) -> Moondream3:
    """The network with these canonical tensors assigned, not copied; for inference, no gradients.

    Raises:
        CheckpointError: the names are not exactly those of the network.
    """
    with torch.device("meta"):
        model = Moondream3(config, has_region_ln=has_region_ln)
    try:
        model.load_state_dict(dict(weights), strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit the network: {error}") from error
    return model.requires_grad_(False).eval()


def load_model(path: Path | str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> LoadedModel:
    """Load the checkpoint at `path` (a folder or a .safetensors file) in any known layout.

    8-bit and 4-bit weights are widened to `dtype`. On the CPU, weights stored in `dtype` stay
    mapped from the file, which therefore must not be changed while the model lives.

    Raises:
        CheckpointError: anything that keeps the model from loading; the message names it.
    """
    plan = plan_checkpoint(Path(path))
    with CheckpointReader(plan, dtype=dtype, device=device) as weights:
        model = build_model(plan.config, weights, has_region_ln=plan.has_region_ln)
    return LoadedModel(model, plan.config, plan)
