"""One network shared out over processes: each has some heads, a part of every inner width, or some of the experts.

The words are transformers': `from_pretrained(…, distributed_config=DistributedConfig(tp_size=2))` in every process that
torchrun starts, `ep_size` for whole experts, `tp_plan` and `ep_plan` to change rules. A rule names what is done with a
whole module, so that no rule can leave half of a pair undone:

- `heads`: attention. A process has whole heads: their rows of queries, keys and values, and their keys and values in
  caches. Tau reads all three of a head, so that its products are sums over the processes.
- `inner`: a dense feed-forward, or experts. A process has a part of the inner width, of every expert alike.
- `experts`: a process has whole experts, and skips what others have.
- `colwise_gather_output`: a linear layer. A process has a part of its outputs, and all get the whole result.
- `replicate`: every process has all of it.

What is summed over the processes is summed in float32. Decisions are taken from logits that are gathered, never summed:
every process has the same bits of them, and takes the same decisions. What is drawn at random is the first's. Such a
network answers and does not learn: its parameters take no gradient. Column and row parallelism is Megatron-LM's
(Shoeybi et al. 2019). Knows nothing of accelerate; layers over devices are `placement.py`'s.

Shape suffixes: N tokens, D width.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from md3cli.errors import EngineError
from md3cli.model.network.layers import Linear, Mlp, MoeMlp, Routing
from md3cli.model.network.text import Tau, TextAttention
from md3cli.model.network.vision import VisionAttention

GATHERED = "colwise_gather_output"
TP_PLAN = {  # names as `base_model_tp_plan` has them, without `model.`
    "text.blocks.*.attn": "heads",
    "text.blocks.*.mlp": "inner",
    "text.lm_head": GATHERED,
    "vision.blocks.*.attn": "heads",
    "vision.blocks.*.mlp": "inner",
    "vision.proj_mlp": "inner",
    "region.coord_decoder": GATHERED,
    "region.size_decoder": GATHERED,
}
EP_PLAN = {"text.blocks.*.mlp": "experts"}  # dense feed-forwards keep their rule
_ARGUMENTS = ("distributed_config", "tp_plan", "tp_size")  # of `from_pretrained`
_NOT_SHARED = ("fsdp_size", "dp_replicate_size", "pp_size")
_IGNORED = ("fsdp_plan", "fsdp_cpu_offload", "fsdp_mixed_precision", "enable_sequence_parallel")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that share a network, and which of them this is."""

    group: Any  # torch's ProcessGroup; None is all of them
    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor:
        """Sum a tensor over the processes, in float32; all get the same bits. A float32 tensor is written in place."""
        wide = x.float().contiguous()
        with self._together():
            dist.all_reduce(wide, group=self.group)
        return wide.to(x.dtype)

    def gather(self, x: Tensor) -> Tensor:
        """Join tensors of one shape along the last dimension, in order of the processes."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        whole = x.contiguous()
        with self._together():
            dist.all_gather(parts, whole, group=self.group)
        return torch.cat(parts, dim=-1)

    def from_rank(self, x: Tensor, rank: int = 0) -> Tensor:
        """Return what the process `rank` has, in place of a tensor of the same shape."""
        found = x.contiguous()
        with self._together():
            dist.broadcast(found, group=self.group, group_src=rank)
        return found

    def least(self, number: int, device: torch.device) -> int:
        """Return the smallest of the processes' numbers."""
        found = torch.tensor(number, device=device)
        with self._together():
            dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self.group)
        return int(found)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Say in words that another process has ended, or has not come within the group's timeout.

        Raises:
            EngineError: it has.
        """
        try:
            yield
        except RuntimeError as error:
            raise EngineError(
                f"process {self.rank} of the {self.size} that share the network has lost the others: one has ended, or "
                f"made another call; what it printed says why ({error})"
            ) from error


class Cut(NamedTuple):
    """How a parameter is cut: along `dim`, which holds `parts` things side by side, each cut alike."""

    dim: int
    parts: int = 1

    def of(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """Return the part of the process `rank`."""
        pieces = [part.chunk(size, self.dim) for part in whole.chunk(self.parts, self.dim)]
        return torch.cat([some[rank] for some in pieces], self.dim)

    def join(self, shares: list[Tensor]) -> Tensor:
        """Undo `of`."""
        split = [share.chunk(self.parts, self.dim) for share in shares]
        return torch.cat([piece for part in zip(*split, strict=True) for piece in part], self.dim)


class Sharing:
    """A network being shared out, and how, once it is."""

    def __init__(self, ranks: Ranks, mesh: Any) -> None:
        self.ranks, self._mesh = ranks, mesh
        self.cuts: dict[str, Cut] = {}  # by the parameter's name in the model
        self._sizes: dict[str, int] = {}  # of the dimension before the cut

    def cut(self, module: nn.Module, name: str, cut: Cut, *, names: Mapping[nn.Module, str]) -> None:
        """Put a placeholder of this process's part in a parameter's place; transformers reads no more than that."""
        from torch.distributed.tensor import Shard, distribute_tensor
        from torch.distributed.tensor.placement_types import _StridedShard

        whole: Tensor | None = getattr(module, name)
        full = f"{names[module]}.{name}"
        if whole is None:
            return
        if full in self.cuts:
            raise EngineError(f"two rules of the plan cut {full}: leave one of them out")
        place = Shard(cut.dim) if cut.parts == 1 else _StridedShard(cut.dim, split_factor=cut.parts)
        module._parameters[name] = nn.Parameter(
            distribute_tensor(whole, self._mesh, [place], src_data_rank=None), requires_grad=False
        )
        self.cuts[full], self._sizes[full] = cut, whole.shape[cut.dim]

    def keep_parts(self, model: nn.Module) -> None:
        """Leave each process its parts as plain tensors once they are read, which take no gradient."""
        from torch.distributed.tensor import DTensor

        for module in model.modules():
            parameters: dict[str, Any] = module._parameters
            for name, parameter in parameters.items():
                if isinstance(parameter, DTensor):
                    parameters[name] = nn.Parameter(parameter.to_local().detach(), requires_grad=False)
        model.requires_grad_(False)

    def whole_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the whole network's tensors, on the CPU, to the first process; to the others nothing.

        Every process must call it.
        """
        state = {}
        for name, tensor in model.state_dict().items():
            whole = self._whole(name, tensor)
            if self.ranks.rank == 0:
                state[name] = whole.to("cpu")
        return state

    def _whole(self, name: str, share: Tensor) -> Tensor:
        cut = self.cuts.get(name)
        if cut is None:
            return share
        sizes = [len(piece) for piece in torch.empty(self._sizes[name] // cut.parts).chunk(self.ranks.size)]
        shares = []
        for rank, size in enumerate(sizes):
            shape = list(share.shape)
            shape[cut.dim] = size * cut.parts
            mine = share if rank == self.ranks.rank else share.new_empty(shape)
            shares.append(self.ranks.from_rank(mine, rank))
        return cut.join(shares)


# -- what is asked for -----------------------------------------------------------------------------


def asks_for_sharing(kwargs: Mapping[str, Any]) -> bool:
    """Return True where arguments of `from_pretrained` share the network out."""
    return any(kwargs.get(key) is not None for key in _ARGUMENTS)


def check_config(config: Any) -> None:
    """Refuse what a `DistributedConfig` asks for that no rule here does.

    Raises:
        EngineError: it does.
    """
    asked = [f"{key}={getattr(config, key)}" for key in _NOT_SHARED if (getattr(config, key, 1) or 1) > 1]
    asked += [key for key in _IGNORED if getattr(config, key, None)]
    if isinstance(config.tp_plan, str) and config.tp_plan != "auto":
        asked.append(f"tp_plan={config.tp_plan!r:.40}")
    kind = getattr(config, "ep_implementation", "auto")
    if kind not in ("auto", "all_reduce"):
        asked.append(f"ep_implementation={kind!r}")
    if asked:
        raise EngineError(f"DistributedConfig: {', '.join(asked)} is not to be had; use tp_size, and ep_size=tp_size")
    if config.ep_size not in (1, config.tp_size):
        raise EngineError(f"DistributedConfig: ep_size={config.ep_size} must be tp_size ({config.tp_size}) or 1")


def share_out(model: nn.Module, config: Any, mesh: Any) -> Sharing:
    """Cut a model without weights by the rules that `config` leaves of the model's plans, in place.

    Raises:
        EngineError: a rule that is not known, names nothing, or does not fit; sizes that do not divide; processes that
            would not compute alike.
    """
    ranks = Ranks(mesh.get_group(), mesh.get_local_rank(), mesh.size())
    sharing = Sharing(ranks, mesh)
    _check_alike(ranks, torch.device(mesh.device_type))
    names = {module: name for name, module in model.named_modules()}
    for module, rule in _rules(model, config):
        kinds, share = RULES[rule]
        if not isinstance(module, kinds):
            raise EngineError(f"the rule {rule!r} is not for {names[module]}, a {type(module).__name__}")
        share(sharing, module, names)
    return sharing


def _rules(model: nn.Module, config: Any) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules that have a rule, and the rule."""
    tp_plan = _merged(model, "tp_plan", TP_PLAN, config.tp_plan) if config.tp_plan != {} else {}
    ep_plan = _merged(model, "ep_plan", EP_PLAN, config.ep_plan) if config.ep_size > 1 else {}
    for name, module in model.named_modules():
        rule = _rule_of(name, tp_plan)
        of_experts = _rule_of(name, ep_plan)
        if of_experts is not None and isinstance(module, MoeMlp):
            rule = of_experts
        if rule is not None:
            yield module, rule


def _merged(model: nn.Module, kind: str, plan: Mapping[str, str], given: object) -> dict[str, str]:
    """Return a plan of ours with the rules that the user changes; names begin with `model.`."""
    own = {f"model.{name}": rule for name, rule in plan.items()}
    if not isinstance(given, Mapping):
        return own
    known = {name for name, _ in model.named_modules()}
    known |= {_pattern(name) for name in known}
    if odd := [name for name in given if name not in known]:
        raise EngineError(f"{kind}: the network has no module {', '.join(sorted(map(str, odd)))}")
    if odd := [rule for rule in given.values() if rule not in RULES]:
        raise EngineError(f"{kind}: no rule {', '.join(sorted(map(str, odd)))}; there are {', '.join(RULES)}")
    return own | dict(given)


def _rule_of(name: str, plan: Mapping[str, str]) -> str | None:
    return plan.get(name, plan.get(_pattern(name)))


def _pattern(name: str) -> str:
    """Return a module's name with `*` for the numbers in it, as plans have it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _check_alike(ranks: Ranks, device: torch.device) -> None:
    """Refuse processes on unlike machines: a router's near ties could fall this way here and that way there."""
    place = torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    said = hashlib.sha256(f"{torch.__version__} {device.type} {place}".encode()).digest()
    number = int.from_bytes(said[:7], "big")
    if ranks.least(number, device) != -ranks.least(-number, device):
        raise EngineError(f"the processes that share the network differ in torch or device; this one has {place}")


def _check_divides(sharing: Sharing, count: int, what: str, name: str) -> None:
    size = sharing.ranks.size
    if count % size:
        raise EngineError(
            f"tp_size={size} does not divide the {count} {what} of {name}; choose another size, "
            f"or tp_plan={{{_pattern(name)!r}: 'replicate'}}"
        )


# -- the rules -------------------------------------------------------------------------------------

Names = Mapping[nn.Module, str]


def _share_heads(sharing: Sharing, attention: TextAttention | VisionAttention, names: Names) -> None:
    ranks = sharing.ranks
    _check_divides(sharing, attention.num_heads, "heads", names[attention])
    for name in ("weight", "bias"):
        sharing.cut(attention.qkv, name, Cut(0, 3), names=names)
    sharing.cut(attention.proj, "weight", Cut(1), names=names)
    attention.proj.forward = partial(_sum_rows, ranks, attention.proj)  # type: ignore[method-assign]
    attention.num_heads //= ranks.size
    if isinstance(attention, TextAttention):
        tau = attention.tau
        for name, cut in (("wq", Cut(1, 3)), ("wv", Cut(1, 3)), ("alpha", Cut(0))):
            sharing.cut(tau, name, cut, names=names)
        tau.products = partial(_tau_products, ranks, tau)


def _share_inner(sharing: Sharing, mlp: Mlp | MoeMlp, names: Names) -> None:
    if isinstance(mlp, MoeMlp):
        _check_divides(sharing, mlp.config.expert_inner_dim, "inner values of an expert", names[mlp])
        sharing.cut(mlp.fc1, "weight", Cut(1, 2), names=names)
        sharing.cut(mlp.fc2, "weight", Cut(2), names=names)
        mlp.run = partial(_sum_experts, sharing.ranks, mlp)
        return
    _check_divides(sharing, mlp.fc1.out_features, "inner values", names[mlp])
    for name in ("weight", "bias"):
        sharing.cut(mlp.fc1, name, Cut(0), names=names)
    sharing.cut(mlp.fc2, "weight", Cut(1), names=names)
    mlp.fc2.forward = partial(_sum_rows, sharing.ranks, mlp.fc2)  # type: ignore[method-assign]


def _share_experts(sharing: Sharing, mlp: MoeMlp, names: Names) -> None:
    ranks, count = sharing.ranks, mlp.config.num_experts
    most = -(-count // ranks.size)
    if most * (ranks.size - 1) >= count:
        raise EngineError(f"ep_size={ranks.size} leaves a process without any of the {count} experts of {names[mlp]}")
    for matrices in (mlp.fc1, mlp.fc2):
        sharing.cut(matrices, "weight", Cut(0), names=names)
    mlp.here = slice(ranks.rank * most, min(count, (ranks.rank + 1) * most))
    mlp.run = partial(_sum_experts, ranks, mlp)


def _share_outputs(sharing: Sharing, linear: Linear, names: Names) -> None:
    _check_divides(sharing, linear.out_features, "outputs", names[linear])
    for name in ("weight", "bias"):
        sharing.cut(linear, name, Cut(0), names=names)
    linear.forward = partial(_gather_outputs, sharing.ranks, linear)  # type: ignore[method-assign]


def _leave_whole(sharing: Sharing, module: nn.Module, names: Names) -> None:
    """Do nothing."""


RULES: Mapping[str, tuple[type | tuple[type, ...], Callable[[Sharing, Any, Names], None]]] = {
    "heads": ((TextAttention, VisionAttention), _share_heads),
    "inner": ((Mlp, MoeMlp), _share_inner),
    "experts": (MoeMlp, _share_experts),
    GATHERED: (Linear, _share_outputs),
    "replicate": (nn.Module, _leave_whole),
}


def _sum_rows(ranks: Ranks, linear: Linear, x: Tensor) -> Tensor:
    """Multiply a part of the inputs, sum over the processes, and add the bias once."""
    y = ranks.sum(F.linear(x, linear.weight))
    return y if linear.bias is None else y + linear.bias


def _gather_outputs(ranks: Ranks, linear: Linear, x: Tensor) -> Tensor:
    return ranks.gather(F.linear(x, linear.weight, linear.bias))


def _tau_products(ranks: Ranks, tau: Tau, features: Tensor) -> Tensor:
    """Return `Tau.plain_products` for the heads that are here, whose features are a part of what it multiplies."""
    both = ranks.sum(tau.plain_products(features)).chunk(2, dim=-1)
    return torch.cat([part.chunk(ranks.size, dim=-1)[ranks.rank] for part in both], dim=-1)


def _sum_experts(ranks: Ranks, mlp: MoeMlp, x_ND: Tensor, routing: Routing) -> Tensor:
    return ranks.sum(mlp.sum_experts(x_ND, routing)).to(x_ND.dtype)


# -- what the model class does with it -------------------------------------------------------------


class SharedMethods:
    """What a model class does where processes share its network (`sharing` is set)."""

    config: Any
    sharing: Sharing | None = None

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, device_map: Any = None) -> Any:
        """Judge what is asked for before anything is loaded; transformers calls it.

        Raises:
            EngineError: it is not to be had, or the processes are not there.
        """
        if distributed_config is not None:
            distributed_config = _read_config(distributed_config)
            check_config(distributed_config)
            if distributed_config.tp_size > 1 and device_map is not None:
                raise EngineError("a network is shared out over processes or placed by device_map; give one of them")
            _check_processes(distributed_config)
        return super().prepare_distribute_model(distributed_config, device_map)  # type: ignore[misc]

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """Share a model without weights out over the processes of a mesh; transformers calls it."""
        if mesh_manager is not None:
            model.config.distributed_config = distributed_config
            model.sharing = share_out(model, distributed_config, mesh_manager.get_mesh("tp"))
            model.model.is_shared = True
        return model

    def _beam_search(self, *args: Any, generation_config: Any, **kwargs: Any) -> Any:
        """Search with beams, as transformers does.

        Raises:
            EngineError: each process would draw beams of its own.
        """
        if self.sharing is not None and generation_config.do_sample:
            raise EngineError(
                "beams that are drawn differ between processes that share a network: leave do_sample or num_beams out"
            )
        return super()._beam_search(*args, generation_config=generation_config, **kwargs)  # type: ignore[misc]

    def from_first(self, x: Tensor) -> Tensor:
        """Return what the first of the processes has; alone, what is given."""
        return x if self.sharing is None else self.sharing.ranks.from_rank(x)

    def _whole_state(self) -> dict[str, Tensor] | None:
        """Return what `Sharing.whole_state` returns; None where the network is in one process."""
        return None if self.sharing is None else self.sharing.whole_state(cast("nn.Module", self))

    def _get_static_cache_init_shape(self) -> Any:
        """Let static caches be made of the first keys, which are of the heads that are here."""
        return None if self.sharing is not None else super()._get_static_cache_init_shape()  # type: ignore[misc]


def _read_config(given: Any) -> Any:
    """Return a `DistributedConfig` that is given as an object or as a dict.

    Raises:
        EngineError: it is neither, or has words that transformers does not know and would pass over.
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    if isinstance(given, DistributedConfig):
        return given
    known = [item.name for item in fields(DistributedConfig)]
    if not isinstance(given, Mapping) or not set(given) <= set(known):
        raise EngineError(f"distributed_config is {given!r:.100}; it takes {', '.join(known)}")
    return DistributedConfig.from_dict(dict(given))


def refuse_beside_sharing(kwargs: Mapping[str, Any], what: str | None = None) -> None:
    """Refuse what cannot be shared out: weights that a library quantises, adapters.

    Raises:
        EngineError: it is asked for together with processes.
    """
    if not asks_for_sharing(kwargs):
        return
    config = kwargs.get("config")
    if kwargs.get("quantization_config") is not None or getattr(config, "quantization_config", None) is not None:
        what = "a quantised network"
    if what is not None:
        raise EngineError(
            f"{what} cannot be shared out over processes: leave distributed_config (tp_plan, tp_size) out"
        )


def _check_processes(config: Any) -> None:
    size, environment = config.tp_size, os.environ.get("WORLD_SIZE")
    world = dist.get_world_size() if dist.is_initialized() else int(environment or 1)
    if size == 1 and (config.tp_plan is None or world == 1):
        return
    if size != world or not (dist.is_initialized() or "RANK" in os.environ):
        raise EngineError(
            f"tp_size={size} needs {size} processes and there are {world}: start the program with "
            f"`torchrun --nproc-per-node {size}`"
        )
