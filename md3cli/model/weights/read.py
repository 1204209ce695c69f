"""Checkpoints of any known layout, read into canonical tensors and from there into the network.

`plan_checkpoint` has already judged the headers when a file is mapped here. No copy is made where a tensor is stored
as it is used; conversions (dtype, split and merge, 8 and 4 bits) are made tensor by tensor. The network is built on
the meta device, and the tensors are assigned to it. `assemble` and `disassemble` are inverse up to rounding for every
`Recipe`. Source: Moondream 3 specification, sections 19.1 to 19.3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from md3cli.errors import CheckpointError
from md3cli.model.network.moondream import Moondream3
from md3cli.model.weights.codes import LowBit, QuantisedWeight, pack_nibbles, quantise, unpack_nibbles
from md3cli.model.weights.names import Recipe, Slot
from md3cli.model.weights.plan import CheckpointPlan, plan_checkpoint

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PACKED_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I8": torch.int8}
SCHEMES = {Recipe.FP8: LowBit.FP8, Recipe.INT4: LowBit.INT4, Recipe.INT8: LowBit.INT8}


def assemble(slot: Slot, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    """Make the canonical tensor of `slot` in `dtype`; `read` gives a stored tensor by its plain name."""
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
    """Return the stored tensors of `slot` by plain name, in the order of its parts; views where possible.

    A slot stored in 8 or 4 bits takes codes that were made already, or a tensor to be rounded to them.
    """
    names = [part.name for part in slot.parts]
    if slot.recipe.is_low_bit:
        if isinstance(tensor, Tensor):
            tensor = quantise(tensor, SCHEMES[slot.recipe])
        codes, scale = tensor.codes, tensor.scale
        if tensor.zero_point is not None:
            return zip(names, (pack_nibbles(codes), scale, tensor.zero_point), strict=True)
        return zip(names, (codes, scale[..., None] if tensor.kind is LowBit.INT8 else scale), strict=True)
    assert isinstance(tensor, Tensor), slot.name
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
    """Read the codes and scales of a slot stored in 8 or 4 bits (`slot.recipe.is_low_bit`)."""
    codes, *scales = (read(part.name) for part in slot.parts)
    scales = [scale.float() for scale in scales]
    if slot.recipe is Recipe.INT4:
        return QuantisedWeight(LowBit.INT4, slot.shape, unpack_nibbles(codes), *scales)
    return QuantisedWeight(SCHEMES[slot.recipe], slot.shape, codes, scales[0].view(slot.shape[:-1]))


class CheckpointReader(Mapping[str, Tensor]):
    """The canonical tensors of a checkpoint, each made when it is asked for and not kept.

    Tensors stored as they are asked for are views of the mapped file, and stay valid after `close`. With
    `keeps_open` false a file is mapped anew for each tensor and let go with it: what was read before no
    longer counts as this process's memory. A context manager.
    """

    def __init__(
        self,
        plan: CheckpointPlan,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        keeps_open: bool = True,
    ) -> None:
        self.plan, self.dtype, self.device = plan, dtype, torch.device(device)
        self.keeps_open = keeps_open
        self._slots = {slot.name: slot for slot in plan.slots}
        self._open_files: dict[Path, Any] = {}  # safetensors exports no type of its handles

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, name: str) -> Tensor:
        """Make the tensor of this canonical name, in `dtype` on `device`.

        Raises:
            KeyError: no such tensor.
            CheckpointError: the file changed or cannot be read.
        """
        return assemble(self._slots[name], self.read_stored, self.dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the tensor of this canonical name, without reading it."""
        return self._slots[name].shape

    def read_stored(self, plain: str) -> Tensor:
        """Read a tensor as it is stored, by its plain name, to `device`; nothing is opened for the meta device."""
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
    """Return the dtype that holds every plainly stored weight without loss; codes and scales do not count."""
    plain = (part.name for slot in plan.slots if not slot.recipe.is_low_bit for part in slot.parts)
    # Never of nothing: every layout stores norms and biases plainly.
    return functools.reduce(torch.promote_types, (TORCH_DTYPES[plan.files.entries[name].dtype] for name in plain))


def assign_weights(model: Moondream3, weights: Mapping[str, Tensor]) -> None:
    """Give an empty network these canonical tensors, assigned, not copied.

    Raises:
        CheckpointError: the names are not exactly those of the network.
    """
    try:
        model.load_state_dict(dict(weights), strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit the network: {error}") from error
    model.requires_grad_(False).eval()


def load_model(path: Path | str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Moondream3:
    """Load the checkpoint at `path` (a folder or a .safetensors file) in any known layout.

    8-bit and 4-bit weights are widened to `dtype`. On the CPU, weights stored in `dtype` stay
    mapped from the file, which therefore must not be changed while the model lives.

    Raises:
        CheckpointError: anything that keeps the model from loading; the message names it.
    """
    plan = plan_checkpoint(Path(path))
    with torch.device("meta"):
        model = Moondream3(plan.config, has_region_ln=plan.has_region_ln)
    with CheckpointReader(plan, dtype=dtype, device=device) as weights:
        assign_weights(model, weights)
    return model
