"""The text decoder's parts as the kernels compute them, put in place of the plain ones of a loaded model.

`place_forms` is called once, when an engine on CUDA is built. Each form computes what its plain twin
does: `FusedExperts` is `layers.MoeMlp.run_experts` with the router's choice and the block's sums,
`FusedProjection` is `text.TextAttention.plain_projection`, `FusedHeads` is `text.TextAttention.plain_heads`.

Shape suffixes: B sequences, T new positions, N = B * T tokens, D width, X experts, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import md3cli.model.kernels.decision_operators  # noqa: F401 - importing them registers them
from md3cli.model.kernels import operators
from md3cli.model.kernels.tiles import Product, WeightForm, tile_of
from md3cli.model.kernels.vision_forms import place_vision_forms
from md3cli.model.kernels.weights import KernelExperts, KernelWeight
from md3cli.model.network.layers import ExpertMatrices, MoeMlp, merge_heads
from md3cli.model.network.moondream import (
    BinTables,
    Moondream3,
    RegionHeads,
    coord_value,
    size_value,
)
from md3cli.model.network.text import KeyValueStore, PassKind, SlotStore, TextAttention, rotary_frequencies

OPS = torch.ops.md3


def place_forms(model: Moondream3) -> None:
    """Exchange experts and attention of every text layer, what a step has beside them, and vision's parts, in place.

    Decisions are taken by kernels from then on, too (`engine/decisions.py`).
    """
    place_vision_forms(model.vision)
    model.text.rotary_table = RotaryAngles(model.config.text.rope_theta, model.device)
    model.region.features = fused_features
    if model.region.tables is None:
        model.region.tables = bin_tables(model.region)
    prefix_len = model.config.prefix_len
    for module in list(model.text.modules()):
        if isinstance(module, MoeMlp) and module.fused is None:
            module.fused = FusedExperts(module, prefix_len)
        elif isinstance(module, TextAttention) and not isinstance(module.project, FusedProjection):
            module.project = FusedProjection(module, prefix_len)
            module.heads = FusedHeads(module.project)


class RotaryAngles:
    """`text.rotary_table` in one kernel."""

    def __init__(self, theta: float, device: torch.device) -> None:
        self.frequency = rotary_frequencies(theta, device)

    def __call__(self, position_BT: Tensor) -> Tensor:
        """Return cosines and sines [2, B, 1, T, 16]."""
        return OPS.rotary_angles(position_BT, self.frequency)  # type: ignore[no-any-return]


def fused_features(values: Tensor, frequencies: Tensor) -> Tensor:
    """Do what `moondream.fourier_features` does in one kernel."""
    return OPS.fourier_features(values, frequencies)  # type: ignore[no-any-return]


@torch.no_grad()
def bin_tables(region: RegionHeads) -> BinTables:
    """Encode every coordinate bin, and round every size bin's value as the size encoder does."""
    dtype, device = region.coord_features.dtype, region.coord_features.device
    # Sizes on the host: a GPU's powers of two may be rounded otherwise.
    sizes_Z = size_value(torch.arange(region.num_size_bins), region.num_size_bins).to(dtype).float()
    coords_C = coord_value(torch.arange(region.num_coord_bins, device=device), region.num_coord_bins)
    return BinTables(region.encode_coord(coords_C).contiguous(), sizes_Z.to(device))


class FusedExperts:
    """All experts of a layer in four kernels (six for many tokens), in any form of weight; idle tokens cost nothing."""

    def __init__(self, layer: MoeMlp, prefix_len: int) -> None:
        self.router, self.num_choices, self.prefix_len = layer.router, layer.config.experts_per_token, prefix_len
        self.fc1, self.fc2 = expert_weight(layer.fc1), expert_weight(layer.fc2)

    def __call__(
        self, h_BTD: Tensor, live_BT: Tensor | None, residual_BTD: Tensor | None, branch_BTD: Tensor | None
    ) -> Tensor:
        """Return `residual + branch + experts(h)` [B, T, D]; without the first two summands the experts' sum alone."""
        kind = PassKind.of(h_BTD.shape[1], self.prefix_len)
        h_ND = h_BTD.reshape(-1, h_BTD.shape[-1])
        # Contiguous: one picture's, expanded from its slot, is a single value under a stride of 0.
        live_N = live_BT.reshape(-1).contiguous() if live_BT is not None else None
        summands = [s.reshape_as(h_ND) if s is not None else None for s in (residual_BTD, branch_BTD)]
        out_ND: Tensor = self.of_rows(h_ND, self.router(h_ND), live_N, *summands, kind=kind)
        return out_ND.view(h_BTD.shape)

    def of_rows(
        self,
        h_ND: Tensor,
        logits_NX: Tensor,
        live_N: Tensor | None = None,
        residual_ND: Tensor | None = None,
        branch_ND: Tensor | None = None,
        *,
        kind: PassKind,
    ) -> Tensor:
        """Return what `__call__` does, [N, D], for rows whose router logits are known."""
        up = tile_of(Product.UP_GATE, kind, self.fc1.form, h_ND.dtype, h_ND.device)
        out = tile_of(Product.DOWN, kind, self.fc2.form, h_ND.dtype, h_ND.device)
        assert up.rows == out.rows, "both products walk the same blocks"
        plan = OPS.plan_rows if len(h_ND) <= operators.PLAN_ROWS else OPS.plan_tiles
        pair_token, place, weight, block_expert, block_first, ends = plan(logits_NX, live_N, self.num_choices, up.rows)
        blocks = block_expert, block_first, ends
        y_PI = OPS.up_gate(h_ND, *self.fc1.arguments, pair_token, *blocks, up.as_list())
        z_PD = OPS.down(y_PI, *self.fc2.arguments, *blocks, out.as_list())
        return OPS.combine(z_PD, place, weight, residual_ND, branch_ND)  # type: ignore[no-any-return]


class FusedProjection:
    """q, k and v of a text layer in three kernels: the projection, tau's products, and all that follows."""

    def __init__(self, plain: TextAttention, prefix_len: int) -> None:
        self.owner, self.prefix_len = plain, prefix_len
        self.tau_weight = torch.cat([plain.tau.wq.detach(), plain.tau.wv.detach()])
        self.alpha = plain.tau.alpha.detach()

    def __call__(
        self, h_BTD: Tensor, position_BT: Tensor, table: Tensor, store: KeyValueStore | None, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `TextAttention.plain_projection` does."""
        q_BHTK, k_BHTK, v_BHTK = (
            part.transpose(1, 2) if part.numel() else part
            for part in self.stored(h_BTD, position_BT, table, store, layer)
        )
        if isinstance(store, SlotStore):
            k_BHTK, v_BHTK = store.attended(layer, k_BHTK, v_BHTK)
        elif store is not None:
            k_BHTK, v_BHTK = store.update(layer, k_BHTK, v_BHTK)
        return q_BHTK, k_BHTK, v_BHTK

    def stored(
        self, h_BTD: Tensor, position_BT: Tensor, table: Tensor, store: KeyValueStore | None, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v [B, T, H, 64] of the new positions; keys and values go straight into a slot store.

        They are returned where nobody stored them, or they alone are attended to; else both are empty.
        """
        qkv_N3D = self.owner.qkv(h_BTD).flatten(0, 1)
        kind = PassKind.of(h_BTD.shape[1], self.prefix_len)
        tile = tile_of(Product.TAU, kind, WeightForm.PLAIN, h_BTD.dtype, h_BTD.device)
        parts = OPS.tau_products(qkv_N3D, self.tau_weight, tile.as_list())
        slots = store if isinstance(store, SlotStore) else None
        returns_kv = slots is None or slots.attends_new
        cache = (slots.slots(), *slots.cache_of(layer)) if slots is not None else (None, None, None)
        return OPS.tau_rope_store(qkv_N3D, parts, self.alpha, position_BT, table, *cache, returns_kv)  # type: ignore[no-any-return]


class FusedHeads:
    """Attention of a text layer up to its last product; over slots it reads what each row has, and needs no mask."""

    def __init__(self, projection: FusedProjection) -> None:
        self.projection = projection

    def __call__(
        self,
        h_BTD: Tensor,
        position_BT: Tensor,
        table: Tensor,
        mask: Tensor | None,
        store: KeyValueStore | None,
        layer: int,
    ) -> Tensor:
        """Return what `TextAttention.plain_heads` does, [B, T, D]; zeros for idle rows of a slot store."""
        if not isinstance(store, SlotStore):
            q, k, v = self.projection(h_BTD, position_BT, table, store, layer)
            return merge_heads(self.projection.owner.attend(q, k, v, mask))
        q, k, v = self.projection.stored(h_BTD, position_BT, table, store, layer)
        if store.attends_new:
            num_own = store.num_prefix or q.shape[1]
            q_BHTK, k_BHTK, v_BHTK = (part[:, :num_own].transpose(1, 2) for part in (q, k, v))
            own_BTD = merge_heads(self.projection.owner.attend(q_BHTK, k_BHTK, v_BHTK, None))
            if store.num_prefix is None:
                return own_BTD
            # The one prompt behind the one prefix reads both from the slot, where they are by now.
            behind = q[:, num_own:], *store.cache_of(layer), store.slots(), position_BT[:, num_own:]
            return torch.cat([own_BTD, OPS.slot_attention_block(*behind).flatten(2)], dim=1)
        attend = OPS.slot_attention_step if q.shape[1] == 1 else OPS.slot_attention_block
        return attend(q, *store.cache_of(layer), store.slots(), position_BT).flatten(2)  # type: ignore[no-any-return]


def expert_weight(stack: nn.Module) -> KernelWeight:
    """Return the weight of a stack of experts, plain or in codes, as the kernels read it."""
    if isinstance(stack, ExpertMatrices):
        return KernelWeight.of_plain(stack.weight)
    assert isinstance(stack, KernelExperts), type(stack)
    return stack.matrix
