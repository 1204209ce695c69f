"""The vision encoder as a GPU computes it, put in place of the plain one of a loaded model.

A block takes seven kernels: two products and attention, a sum with its norm, two products, a sum with the next block's
norm. `place_vision_forms` is called once, when an engine on CUDA is built; each form computes what its plain twin in
`network/vision.py` and `network/layers.py` does. It stands apart from `forms.py`, which holds the text decoder's.

Shape suffixes: N crops, P patches of a crop, K values of a patch (padded), E encoder width, S crop side in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from md3cli.model.kernels import vision_operators  # noqa: F401  # importing it makes the operators
from md3cli.model.kernels.tiles import capability_of
from md3cli.model.network.layers import LayerNorm, Mlp
from md3cli.model.network.vision import VisionBlock, VisionEncoder, normalise_crops

OPS = torch.ops.md3
ROW_ALIGNMENT = 8  # values of 16 bits: cuBLAS wants rows that start at multiples of 16 bytes

# Attentions in the order in which they are tried for 16 heads of 72 without a mask, from (this capability, this torch)
# on. Never timed in a run: which one is faster may change with what else runs there, and each rounds in its own way.
CUDNN_FIRST = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
FLASH_FIRST = (SDPBackend.FLASH_ATTENTION,)
ATTENTION_BY_CARD: dict[tuple[int, int], dict[tuple[int, int], tuple[SDPBackend, ...]]] = {
    # H200, the encoder for 9 and 63 crops: cuDNN 13.7 and 92.5 ms, flash 14.5 and 99.6, efficient 18.3 and 122.9.
    (9, 0): {(2, 11): CUDNN_FIRST},
    # B200, B300: not measured; torch itself prefers cuDNN, since its flash kernel is written for older cards.
    (10, 0): {(2, 11): CUDNN_FIRST},
    (10, 3): {(2, 11): CUDNN_FIRST},
}
# Of float32 neither of them is able.
_LAST = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def place_vision_forms(encoder: VisionEncoder) -> None:
    """Exchange the encoder's feed-forwards and its passes over crops for the kernels' forms, in place."""
    for owner in [module for module in encoder.modules() if isinstance(module, (VisionBlock, VisionEncoder))]:
        for name, child in list(owner.named_children()):
            if isinstance(child, Mlp):
                setattr(owner, name, FusedMlp(child))
    form = FusedVision(encoder)
    encoder.patch_rows, encoder.encode_rows = form.patch_rows, form.encode_rows


def attention_order(capability: tuple[int, int] | None, torch_version: str = torch.__version__) -> list[SDPBackend]:
    """Return the attentions to try, the best first, on a card of this compute capability; None is the CPU."""
    version = tuple(map(int, torch_version.split(".")[:2]))
    known = {} if capability is None else ATTENTION_BY_CARD.get(capability, {})
    measured = [order for least, order in sorted(known.items()) if least <= version]
    return [*(measured[-1] if measured else FLASH_FIRST), *_LAST]


class FusedMlp(nn.Module):
    """`layers.Mlp` whose first product adds its bias and computes GELU before it is written."""

    def __init__(self, plain: Mlp) -> None:
        super().__init__()
        self.fc1, self.fc2 = plain.fc1, plain.fc2

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., K] -> [..., O]."""
        rows = x.reshape(-1, x.shape[-1])
        if rows.is_cuda:  # on a CPU the same call computes the GELU by erf, which this network does not want
            inner = torch._addmm_activation(self.fc1.bias, rows, self.fc1.weight.t(), use_gelu=True)
        else:
            inner = F.gelu(self.fc1(rows), approximate="tanh")
        return self.fc2(inner).view(*x.shape[:-1], -1)  # type: ignore[no-any-return]


class FusedVision:
    """The encoder's passes from bytes to features; holds the encoder, and its first weight padded to whole rows."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self.encoder = encoder
        weight_EK = encoder.patch_emb.weight.detach()
        self.patch_weight_EK = F.pad(weight_EK, (0, -weight_EK.shape[1] % ROW_ALIGNMENT))
        every_byte = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
        # On the host: torch divides by a constant otherwise on a GPU, by its rounded reciprocal.
        values = normalise_crops(every_byte, weight_EK.dtype).flatten()
        self.values = values.to(weight_EK.device)
        self.attention = attention_order(capability_of(weight_EK.device))

    def patch_rows(self, crops_NSSC: Tensor) -> Tensor:
        """Do what `VisionEncoder.plain_patch_rows` does; zeros stand behind the values of each patch."""
        patch, width = self.encoder.config.enc_patch_size, self.patch_weight_EK.shape[1]
        return OPS.patch_rows(crops_NSSC, self.values, patch, width)  # type: ignore[no-any-return]

    def encode_rows(self, rows_NPK: Tensor) -> Tensor:
        """Do what `VisionEncoder.plain_encode_rows` does, for patches with zeros behind them or without."""
        if (missing := self.patch_weight_EK.shape[1] - rows_NPK.shape[2]) > 0:
            rows_NPK = F.pad(rows_NPK, (0, missing))
        x_NPE = F.linear(rows_NPK, self.patch_weight_EK, self.encoder.patch_emb.bias)
        blocks = [block for block in self.encoder.blocks if isinstance(block, VisionBlock)]
        norms = [*(block.ln1 for block in blocks), self.encoder.post_ln]
        x_NPE, h_NPE = add_norm(x_NPE, self.encoder.pos_emb, norms[0])
        # Once for all blocks: entering takes the host 20 us.
        with sdpa_kernel(self.attention, set_priority=True):
            for block, next_norm in zip(blocks, norms[1:], strict=True):
                x_NPE, h_NPE = add_norm(x_NPE, block.attn(h_NPE), block.ln2)
                x_NPE, h_NPE = add_norm(x_NPE, block.mlp(h_NPE), next_norm)
        return h_NPE


def add_norm(x: Tensor, branch: Tensor, norm: LayerNorm) -> tuple[Tensor, Tensor]:
    """Return `x + branch` and its LayerNorm; a branch of fewer leading rows is repeated."""
    return OPS.add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps)  # type: ignore[no-any-return]
