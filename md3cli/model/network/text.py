"""The text decoder: embeddings in, hidden states out (Moondream 3 specification, section 7).

Parallel blocks (attention and feed-forward read the same LayerNorm), attention with tau and partial rotary positions,
dense feed-forward in the first layers and a mixture of experts after. It does not know where keys and values of earlier
positions live: a `KeyValueStore` is handed each layer's new ones and returns all that may be attended to.

Shape suffixes: B batch, T new positions, S all positions, H heads, K head width (64), D width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from md3cli.model.network.config import HEAD_DIM, ROTARY_DIM, TextConfig
from md3cli.model.network.layers import Attend, LayerNorm, Linear, Mlp, MoeMlp, attention, merge_heads, split_heads


class PassKind(StrEnum):
    """What the decoder is doing: products are tiled, and rounded, by the kind of a pass and never by its rows."""

    STEP = "step"
    PROMPT = "prompt"
    PREFIX = "prefix"

    @classmethod
    def of(cls, num_positions: int, prefix_len: int) -> PassKind:
        """Tell the kind from the positions of each sequence; a prefix, or a text as long, brings `prefix_len`."""
        if num_positions == 1:
            return cls.STEP
        return cls.PREFIX if num_positions >= prefix_len else cls.PROMPT


class KeyValueStore(Protocol):
    """Keeps keys and values between calls."""

    def update(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of a layer; return keys and values [B, H, S, K] to attend to."""
        ...


class SlotStore(ABC):
    """A `KeyValueStore` over slots of a cache: each row of a pass has one of them, and knows what it may attend to.

    `keys` and `values` have a tensor [slots, H, capacity, K] for each layer. There are two ways through a pass. The
    plain one stores by `update` and attends under `mask`. Kernels write to `cache_of` at `slots`, of which -1 marks
    an idle row, and read there up to each row's own position; they never ask for the mask.
    """

    attends_new = False  # True: new keys and values are all that is attended to
    num_prefix: int | None = None  # where these are a prefix and what follows it: positions of the prefix

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.keys, self.values = keys, values

    @abstractmethod
    def slots(self) -> Tensor:
        """Return the slot of each row, int64 [B]; -1: the row stores nothing, and nobody reads its result."""

    @abstractmethod
    def mask(self) -> Tensor | None:
        """Return which of the `attended` each row may attend to, bool [B, 1, T, S]; None: all."""

    def cache_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer."""
        return self.keys[layer], self.values[layer]

    def update(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and return those to attend to."""
        for stored, new_BHTK in zip(self.cache_of(layer), (k_BHTK, v_BHTK), strict=True):
            self._write(stored, new_BHTK)
        return self.attended(layer, k_BHTK, v_BHTK)

    @abstractmethod
    def _write(self, stored: Tensor, new_BHTK: Tensor) -> None:
        """Put new keys or values into the slots."""

    @abstractmethod
    def attended(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H, S, K] to attend to, once the new ones are stored."""


def rotary_frequencies(theta: float, device: torch.device) -> Tensor:
    """Return what positions are multiplied with, float32 [16]."""
    steps = torch.arange(0, ROTARY_DIM, 2, dtype=torch.float32, device=device)
    return 1.0 / theta ** (steps / ROTARY_DIM)


def rotary_table(position_BT: Tensor, theta: float) -> Tensor:
    """Return the angles' cosines and sines [2, B, 1, T, 16], float32."""
    angle_BTF = position_BT[..., None].float() * rotary_frequencies(theta, position_BT.device)
    return torch.stack([angle_BTF.cos(), angle_BTF.sin()])[:, :, None]


def rotate(x_BHTK: Tensor, table: Tensor) -> Tensor:
    """Rotate the first 32 of 64 dimensions; pairs are split-half on input and interleaved on output.

    Arithmetic in float32, cast back. Only a dump of the key cache could tell the output order: q and
    k are permuted alike.
    """
    cos, sin = table[0], table[1]
    turned, kept = x_BHTK[..., :ROTARY_DIM].float(), x_BHTK[..., ROTARY_DIM:]
    a, b = turned.chunk(2, dim=-1)
    pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.cat([pairs.to(x_BHTK.dtype), kept], dim=-1)


class Tau(nn.Module):
    """Scales of queries and values per head and token, from the token itself and its position."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.wq = nn.Parameter(torch.empty(num_heads, 3 * dim))
        self.wv = nn.Parameter(torch.empty(num_heads, 3 * dim))
        self.alpha = nn.Parameter(torch.empty(num_heads))
        self.products: Callable[[Tensor], Tensor] = self.plain_products  # `kernels.optimise` may choose another

    def forward(self, qkv_BT3D: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors for q and v, each [B, H, T, 1]; positions count from 0, float32 inside the logarithm."""
        features = F.gelu(qkv_BT3D)  # exact GELU of the unrotated projection, all of q, k and v
        log_position = (position_BT.float() + 1).log()[..., None]
        by_position_BTH = 0.5 + torch.sigmoid(self.alpha.float() * log_position)
        scales = [torch.tanh(part).float() + by_position_BTH for part in self.products(features).chunk(2, dim=-1)]
        scale_q, scale_v = (scale.to(qkv_BT3D.dtype).transpose(1, 2)[..., None] for scale in scales)
        return scale_q, scale_v

    def plain_products(self, features_BT3D: Tensor) -> Tensor:
        """Return the part of the scales that depends on the token itself, for q and behind it for v: [B, T, 2H]."""
        return torch.cat([F.linear(features_BT3D, self.wq), F.linear(features_BT3D, self.wv)], dim=-1)


# Hidden states, positions, rotary table, store, layer -> queries of the new positions, keys and values of all.
Project = Callable[[Tensor, Tensor, Tensor, KeyValueStore | None, int], tuple[Tensor, Tensor, Tensor]]
# Hidden states, positions, rotary table, mask, store, layer -> what the heads attended to, joined [B, T, D].
Heads = Callable[[Tensor, Tensor, Tensor, Tensor | None, KeyValueStore | None, int], Tensor]


class TextAttention(nn.Module):
    """Multi-head attention with tau and partial rotary positions."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads = config.n_heads
        self.attend: Attend = attention  # `kernels.optimise` may choose another
        self.project: Project = self.plain_projection  # and here
        self.heads: Heads = self.plain_heads  # and here
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.proj = Linear(config.dim, config.dim)
        self.tau = Tau(config.dim, config.n_heads)

    def plain_projection(
        self, h_BTD: Tensor, position_BT: Tensor, table: Tensor, store: KeyValueStore | None, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, H, T, 64], and keys and values [B, H, S, 64] to attend to, the new ones stored."""
        qkv = self.qkv(h_BTD)
        scale_q, scale_v = self.tau(qkv, position_BT)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        q, k, v = rotate(q * scale_q, table), rotate(k, table), v * scale_v
        if store is not None:
            k, v = store.update(layer, k, v)
        return q, k, v

    def plain_heads(
        self,
        h_BTD: Tensor,
        position_BT: Tensor,
        table: Tensor,
        mask: Tensor | None,
        store: KeyValueStore | None,
        layer: int,
    ) -> Tensor:
        """Project, store and attend: joined heads [B, T, D], before the last product."""
        q, k, v = self.project(h_BTD, position_BT, table, store, layer)
        allowed = store.mask() if isinstance(store, SlotStore) else mask
        # A layer may lie on another device than the rows of a slot store.
        return merge_heads(self.attend(q, k, v, None if allowed is None else allowed.to(q.device)))


class TextBlock(nn.Module):
    """`x + attention(LN(x)) + feed_forward(LN(x))`, one LayerNorm for both."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.device: torch.device | None = None  # where it computes; None: where the token table lies
        self.ln = LayerNorm(config.dim)
        self.attn = TextAttention(config)
        if config.moe is not None and config.is_moe_layer(layer):
            self.mlp: nn.Module = MoeMlp(config.dim, config.moe)
        else:
            self.mlp = Mlp(config.dim, config.ff_dim, config.dim)

    def forward(
        self,
        x_BTD: Tensor,
        position_BT: Tensor,
        table: Tensor,
        mask: Tensor | None,
        store: KeyValueStore | None,
        live_BT: Tensor | None = None,
        only_stores: bool = False,
    ) -> Tensor:
        """Return the block's output [B, T, D]; new keys and values go to `store`.

        With `only_stores` nothing else is done, and the input is returned.
        """
        h_BTD = self.ln(x_BTD)
        if only_stores:
            self.attn.project(h_BTD, position_BT, table, store, self.layer)
            return x_BTD
        attended = self.attn.proj(self.attn.heads(h_BTD, position_BT, table, mask, store, self.layer))
        if isinstance(self.mlp, MoeMlp) and self.mlp.fused is not None:
            return self.mlp.fused(h_BTD, live_BT, x_BTD, attended)
        return x_BTD + attended + self.mlp(h_BTD)  # type: ignore[no-any-return]


class TextDecoder(nn.Module):
    """Token table, blocks, last LayerNorm and head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        assert config.dim == HEAD_DIM * config.n_heads
        self.config = config
        self.wte = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.blocks = nn.ModuleList(TextBlock(config, layer) for layer in range(config.n_layers))
        self.post_ln = LayerNorm(config.dim)
        self.lm_head = Linear(config.dim, config.vocab_size)
        # `kernels.optimise` may choose another.
        self.rotary_table: Callable[[Tensor], Tensor] = partial(rotary_table, theta=config.rope_theta)

    def embed(self, ids: Tensor) -> Tensor:
        """Look token ids [...] up in the table [..., D]."""
        return F.embedding(ids, self.wte)

    def forward(
        self,
        x_BTD: Tensor,
        position_BT: Tensor,
        mask: Tensor | None = None,
        store: KeyValueStore | None = None,
        live_BT: Tensor | None = None,
        *,
        only_stores: bool = False,
    ) -> Tensor:
        """Turn embeddings at absolute positions into hidden states [B, T, D] before the last LayerNorm.

        `mask` is bool, broadcastable to [B, 1, T, S], True where a position may be attended to; None attends to
        everything, and a slot store brings its own. Without `store` S is T. `live_BT` is False for positions whose
        result nobody reads: fast forms may leave experts out for them. `only_stores` is for passes that fill `store`
        and nothing else: the last layer stops at its keys and values, and what is returned is its input.
        """
        assert mask is None or not isinstance(store, SlotStore)
        table = self.rotary_table(position_BT)
        *blocks, last = self.blocks
        for block in blocks:
            x_BTD = block(x_BTD, position_BT, table, mask, store, live_BT)
        assert store is not None or not only_stores
        return last(x_BTD, position_BT, table, mask, store, live_BT, only_stores)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn hidden states [..., D] into vocabulary logits [..., V]."""
        return self.lm_head(self.post_ln(hidden))  # type: ignore[no-any-return]
