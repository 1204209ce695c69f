"""Faster forms of the network's parts, chosen per device and dtype; each equals a plain form elsewhere.

`optimise` exchanges modules of a loaded model in place, for inference only:

- CPU, bfloat16 and float32: weights in the layout oneDNN computes with, so that no product reorders
  them first. One row reads weights at 17 GB/s instead of 11, GELU rides along for nothing
  (2048x2048, bfloat16), and the embedded model's float32 products take 1.3 ms instead of MKL's 3.2
  (2304 rows, 128x512; one Zen 4 core, torch 2.13, 2026-11). MKL's float32 products of one, two and
  three rows also round otherwise than those of more: a row would depend on how many it has with it.
- CPU: attention by plain products, a few heads at a time: in bfloat16 the fused kernel runs at a
  third of the GEMM rate for the vision encoder and at 2 GB/s for a single query row.
- CUDA: kernels of our own for the experts and for all between a projection and its attention
  (`kernels/forms.py`), for every dtype and size, so that a small model checks what a large one runs.
- small experts on other devices: every expert sees every token and weights of zero drop what was not
  chosen; a handful of products is cheaper than sorting tokens for dozens.

`GroupedExperts` is what the kernels for CUDA are compared with.

No form lets a row see its companions: each computes rows on their own (tests/model/engine/test_kernels.py).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from md3cli.model.network.layers import ExpertMatrices, Linear, Mlp, MoeMlp, Routing, bmm_attention, gate, usual_size
from md3cli.model.network.moondream import Moondream3
from md3cli.model.network.text import Tau, TextAttention
from md3cli.model.network.vision import VisionAttention
from md3cli.system import return_freed_memory

SCORES_IN_CACHE = 1 << 20  # attention scores of a block: 2 MiB in bf16, two heads of the vision encoder
SMALL_EXPERTS = 1 << 20  # elements of a layer's experts; above it, computing all for every token costs more


def optimise(model: Moondream3) -> None:
    """Exchange plain parts of `model` for the fastest of its device and dtype, in place.

    Afterwards the model computes the same and cannot be trained or saved. Parts that were loaded in
    few bits are left as they are (`quant/load.py`).
    """
    if model.device.type == "cuda":
        from md3cli.model.kernels.forms import place_forms

        place_forms(model)
        return
    is_packed = model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float32) and has_packed_linear()
    for layer in [m for m in model.modules() if isinstance(m, MoeMlp) and isinstance(m.fc1, ExpertMatrices)]:
        _optimise_experts(layer, is_packed)
    if is_packed:
        for module in model.modules():  # goes down as it is asked: into the forms, not into what they replaced
            _pack_children(module)
        for module in model.modules():
            if isinstance(module, (VisionAttention, TextAttention)):
                module.attend = blocked_attention
        return_freed_memory()  # the plain copies


def has_packed_linear() -> bool:
    """Return True where this build of torch carries oneDNN's prepacked products."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _optimise_experts(layer: MoeMlp, is_packed: bool) -> None:
    is_small = layer.fc1.weight.numel() + layer.fc2.weight.numel() <= SMALL_EXPERTS
    if is_small:
        layer.run = AllExperts(layer, is_packed=is_packed)
    elif is_packed:
        layer.run = PackedExperts(layer)


def _pack_children(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, Mlp) and isinstance(child.fc1, Linear) and isinstance(child.fc2, Linear):
            setattr(module, name, PackedMlp(child))
        elif isinstance(child, Tau):
            child.products = PackedLinear(torch.cat([child.wq, child.wv]), None)  # both in one
            del child.wq, child.wv  # the plain copies
        elif isinstance(child, Linear):
            setattr(module, name, PackedLinear(child.weight, child.bias))


# -- dense products --------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """`layers.Linear` over a weight in oneDNN's own layout; `activation` may be `gelu_tanh`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__()
        self.bias = bias.detach() if bias is not None else None
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.post_op = ("gelu", "tanh") if activation == "gelu_tanh" else ("none", "")

    def forward(self, x: Tensor) -> Tensor:
        name, algorithm = self.post_op
        return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
            x, self.weight, self.bias, name, [], algorithm
        )


class PackedMlp(nn.Module):
    """`layers.Mlp` with packed weights; GELU is computed while the first product is still in registers."""

    def __init__(self, plain: Mlp) -> None:
        super().__init__()
        self.fc1 = PackedLinear(plain.fc1.weight, plain.fc1.bias, activation="gelu_tanh")
        self.fc2 = PackedLinear(plain.fc2.weight, plain.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))  # type: ignore[no-any-return]


# -- attention -------------------------------------------------------------------------------------


def blocked_attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Tensor | None) -> Tensor:
    """Compute `layers.bmm_attention` a few heads at a time, so that their scores never leave the cache.

    2.3 times as fast for the vision encoder's 16 heads of 729 x 729 in bf16 (14 against 34 ms).
    """
    batch, num_heads, length, head_dim = q_BHTK.shape
    heads = max(1, SCORES_IN_CACHE // (length * k_BHSK.shape[2]))
    if heads >= num_heads:
        return bmm_attention(q_BHTK, k_BHSK, v_BHSK, mask)
    out_BHTK = q_BHTK.new_empty(batch, length, num_heads, head_dim).transpose(1, 2)
    nothing = q_BHTK.new_empty(())
    for row in range(batch):
        for first in range(0, num_heads, heads):
            part = slice(first, first + heads)
            q, k, v = q_BHTK[row, part], k_BHSK[row, part], v_BHSK[row, part]
            scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=head_dim**-0.5)
            if mask is not None:
                scores = scores.masked_fill(~mask[row if mask.shape[0] > 1 else 0], float("-inf"))
            out_BHTK[row, part] = torch.bmm(scores.softmax(dim=-1), v)
    return out_BHTK


# -- experts ---------------------------------------------------------------------------------------


class AllExperts:
    """Every expert for every token, unchosen ones with weight zero: two products, no sorting."""

    def __init__(self, layer: MoeMlp, *, is_packed: bool = False) -> None:
        self.num_experts = layer.config.num_experts
        fc1 = layer.fc1.weight.detach().flatten(0, 1)  # [X * 2I, D]
        fc2 = layer.fc2.weight.detach().transpose(0, 1).flatten(1)  # [D, X * I]
        self.fc1, self.fc2 = (PackedLinear(w, None) if is_packed else partial(F.linear, weight=w) for w in (fc1, fc2))

    def __call__(self, x_ND: Tensor, routing: Routing) -> Tensor:
        weights_NX = torch.zeros(len(x_ND), self.num_experts, device=x_ND.device)
        weights_NX = weights_NX.scatter(1, routing.experts_NA, routing.weights_NA)
        up_NXI2 = self.fc1(x_ND).unflatten(1, (self.num_experts, -1))
        inner_NXI = gate(up_NXI2) * weights_NX[..., None].to(x_ND.dtype)
        return self.fc2(inner_NXI.flatten(1))


class PackedExperts:
    """The plain loop over experts, over packed weights."""

    def __init__(self, layer: MoeMlp) -> None:
        self.num_choices = layer.config.experts_per_token
        self.fc1 = [PackedLinear(weight, None) for weight in layer.fc1.weight]
        self.fc2 = [PackedLinear(weight, None) for weight in layer.fc2.weight]
        del layer.fc1, layer.fc2  # the plain copies

    def __call__(self, x_ND: Tensor, routing: Routing) -> Tensor:
        if len(x_ND) == 1:
            return self._one_token(x_ND, routing)
        order = routing.experts_NA.flatten().argsort(stable=True)
        counts = routing.experts_NA.flatten().bincount(minlength=len(self.fc1)).tolist()
        tokens_of_pairs = order // self.num_choices
        weights_of_pairs = routing.weights_NA.flatten()[order, None]
        out_ND = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device)
        first = 0
        for expert, count in enumerate(counts):
            if not count:
                continue
            pairs = slice(first, first + count)
            tokens = tokens_of_pairs[pairs]
            rows = x_ND.new_zeros(usual_size(count), x_ND.shape[1])
            torch.index_select(x_ND, 0, tokens, out=rows[:count])
            y = self.fc2[expert](gate(self.fc1[expert](rows)))[:count]
            out_ND.index_add_(0, tokens, y.float() * weights_of_pairs[pairs])
            first += count
        return out_ND.to(x_ND.dtype)

    def _one_token(self, x_1D: Tensor, routing: Routing) -> Tensor:
        """Run a single row, which needs no sorting; experts in order of their number, as everywhere."""
        out_1D = torch.zeros(x_1D.shape, dtype=torch.float32)
        pairs = sorted(zip(routing.experts_NA[0].tolist(), routing.weights_NA[0].tolist(), strict=True))
        for expert, weight in pairs:
            out_1D += self.fc2[expert](gate(self.fc1[expert](x_1D))).float() * weight
        return out_1D.to(x_1D.dtype)


class GroupedExperts:
    """Tokens sorted by expert, all experts in two grouped products; nothing waits for the host."""

    def __init__(self, layer: MoeMlp) -> None:
        self.num_experts, self.num_choices = layer.config.num_experts, layer.config.experts_per_token
        self.fc1 = layer.fc1.weight.detach().transpose(1, 2)  # [X, D, 2I], a view
        self.fc2 = layer.fc2.weight.detach().transpose(1, 2)  # [X, I, D]

    def __call__(self, x_ND: Tensor, routing: Routing) -> Tensor:
        flat = routing.experts_NA.flatten()
        order = flat.argsort(stable=True)
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=flat.device)
        ends = counts.scatter_add(0, flat, torch.ones_like(flat)).cumsum(0).to(torch.int32)
        sorted_PD = x_ND.index_select(0, order // self.num_choices)
        inner_PI = gate(torch._grouped_mm(sorted_PD, self.fc1, offs=ends))
        y_PD = torch._grouped_mm(inner_PI, self.fc2, offs=ends)
        # Back to (token, choice) order, then summed per token in order of the expert's number.
        by_choice = torch.empty_like(y_PD).index_copy(0, order, y_PD).view(len(x_ND), self.num_choices, -1)
        experts_first = routing.experts_NA.argsort(dim=1)
        weighted = by_choice.float() * routing.weights_NA[..., None]
        return weighted.gather(1, experts_first[..., None].expand_as(weighted)).sum(1).to(x_ND.dtype)


def resident_tensors(model: Moondream3) -> list[Tensor]:
    """Return every weight the model keeps in memory, whichever form its parts have; shared storage once."""
    found: list[Tensor | None] = []
    for module in model.modules():
        found += module.parameters(recurse=False)
        if isinstance(module, PackedLinear):
            found += [module.weight, module.bias]
        if isinstance(module, MoeMlp) and isinstance(module.run, PackedExperts):
            found += [linear.weight for linear in (*module.run.fc1, *module.run.fc2)]
    return list({id(tensor): tensor for tensor in found if tensor is not None}.values())
