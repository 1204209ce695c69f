"""Devices that are not there, with values: tensors that compute on the CPU and refuse those of another device.

    register()
    with Pretended(), torch.no_grad():
        x = torch.ones(3, device="pretended:0")
        x + x.to("pretended:1")  # raises, as on a machine with two GPUs

Fake tensors of torch check devices as well, and have no values: nothing can be read from them, as a forward pass of
this network must. `register` makes the process believe in them for good, so use it in a process of its own.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ATEN = torch.ops.aten
_COPIES = (ATEN._to_copy.default, ATEN.copy_.default)


def register() -> None:
    """Let torch know the devices `pretended:0`, `pretended:1`, …; there is no way back."""
    backend_registration._setup_privateuseone_for_python_backend("pretended")


class OnDevice(Tensor):
    """A tensor that says it is on a pretended device, over one on the CPU that has its values."""

    values: Tensor

    @staticmethod
    def __new__(cls, given: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Tensor:
        values = given.values if isinstance(given, OnDevice) else given
        if device is None and values is given:
            return given  # accelerate makes a parameter by the class of the one before, which lay elsewhere
        made = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            values.stride(),
            values.storage_offset(),
            dtype=values.dtype,
            device=device or given.device,
            requires_grad=requires_grad,
        )
        made.values = values
        return made

    def tolist(self) -> Any:
        """Return the values, which torch does not give of a subclass."""
        return self.values.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.values}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """Lets tensors be made on, and moved to, pretended devices of any number."""

    def __enter__(self) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes on the CPU and moves, which is seen here
        self._inference = patch("torch.inference_mode", torch.no_grad)  # whose tensors a subclass cannot share
        self._inference.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inference.stop()
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode torch leaves it to us to take such operators apart
                return func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is ATEN._fused_sdp_choice.default:
        return 0  # attention by plain products: the fused forms have other names on each device
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    placed = [leaf for leaf in given if isinstance(leaf, OnDevice)]
    devices = {leaf.device for leaf in placed}
    is_mixed = len(devices) > 1 or (placed and any(leaf.dim() for leaf in given if not isinstance(leaf, OnDevice)))
    if is_mixed and func not in _COPIES:
        raise RuntimeError(f"{func}: tensors on {', '.join(sorted({str(leaf.device) for leaf in given}))}")
    wanted = kwargs.pop("device", None)
    kwargs.pop("pin_memory", None)
    device = torch.device(wanted) if wanted is not None else next(iter(devices), torch.device("cpu"))
    if func is ATEN.copy_.default:
        device = args[0].device
    if wanted is not None and func is ATEN._to_copy.default and not kwargs.get("dtype"):
        kwargs["dtype"] = args[0].dtype  # a copy, not the tensor itself
    by_values = {id(leaf.values): leaf for leaf in placed}
    result = func(*tree_map(_values, args), **tree_map(_values, kwargs))
    if device.type == "cpu":
        return result
    return tree_map(lambda leaf: by_values.get(id(leaf), _place(leaf, device)), result)


def _values(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, OnDevice) else leaf


def _place(leaf: Any, device: torch.device) -> Any:
    return OnDevice(leaf, device) if isinstance(leaf, Tensor) else leaf
