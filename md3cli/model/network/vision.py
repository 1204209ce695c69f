"""The vision encoder: crops in, one grid of image embeddings out (Moondream 3 specification, sections 5 and 6).

Each crop goes through the transformer on its own; the features of the tiles are stitched into one
map, averaged down to the grid of a single crop, put beside the global crop's features and projected
into the text width. Knows nothing of files, tokens or batches of requests.

Shape suffixes: N crops, P patches of a crop (grid²), E encoder width, D text width, S crop side in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from md3cli.images.crops import Tiling
from md3cli.model.network.config import VisionConfig
from md3cli.model.network.layers import Attend, LayerNorm, Linear, Mlp, attention, merge_heads, split_heads


def normalise_crops(crops_NSSC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn uint8 [N, S, S, 3] into [N, 3, S, S] in [-1, 1], computed in float32 and cast last."""
    pixels = crops_NSSC.permute(0, 3, 1, 2).to(torch.float32)
    return ((pixels / 255 - 0.5) / 0.5).to(dtype)


class VisionAttention(nn.Module):
    """Self-attention over the patches of one crop, no mask."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.enc_n_heads
        self.attend: Attend = attention  # `kernels.optimise` may choose another
        self.qkv = Linear(config.enc_dim, 3 * config.enc_dim)
        self.proj = Linear(config.enc_dim, config.enc_dim)

    def forward(self, x_NPE: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x_NPE).chunk(3, dim=-1))
        return self.proj(merge_heads(self.attend(q, k, v, None)))  # type: ignore[no-any-return]


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.ln1 = LayerNorm(config.enc_dim)
        self.attn = VisionAttention(config)
        self.ln2 = LayerNorm(config.enc_dim)
        self.mlp = Mlp(config.enc_dim, config.enc_ff_dim, config.enc_dim)

    def forward(self, x_NPE: Tensor) -> Tensor:
        x_NPE = x_NPE + self.attn(self.ln1(x_NPE))
        return x_NPE + self.mlp(self.ln2(x_NPE))  # type: ignore[no-any-return]


class VisionEncoder(nn.Module):
    """Crops to patch features, patch features to image embeddings."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_emb = Linear(config.patch_dim, config.enc_dim)
        self.pos_emb = nn.Parameter(torch.empty(1, config.num_patches, config.enc_dim))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.enc_n_layers))
        self.post_ln = LayerNorm(config.enc_dim)
        self.proj_mlp = Mlp(2 * config.enc_dim, config.proj_inner_dim, config.proj_out_dim)

    def patchify(self, crops_NCSS: Tensor) -> Tensor:
        """Cut [N, C, S, S] into [N, P, C * patch * patch]: patches row by row, inside a patch channel, row, column."""
        num_crops, channels, side, _ = crops_NCSS.shape
        patch, grid = self.config.enc_patch_size, self.config.grid_size
        assert side == self.config.crop_size, f"crops of {side} pixels, expected {self.config.crop_size}"
        cells = crops_NCSS.view(num_crops, channels, grid, patch, grid, patch)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(num_crops, grid * grid, channels * patch * patch)

    def encode(self, crops_NCSS: Tensor) -> Tensor:
        """Turn normalised crops [N, 3, S, S] into patch features [N, P, E], each crop on its own."""
        x_NPE = self.patch_emb(self.patchify(crops_NCSS)) + self.pos_emb
        for block in self.blocks:
            x_NPE = block(x_NPE)
        return self.post_ln(x_NPE)  # type: ignore[no-any-return]

    def stitch(self, tiles_NPE: Tensor, tiling: Tiling) -> Tensor:
        """Stitch the features of rows x cols tiles to one map [rows * w + 2m, cols * w + 2m, E] (w = grid - 2m).

        A tile keeps its outer edge where it touches the border of the picture and drops
        `overlap_margin` patches on every inner edge.
        """
        rows, cols = tiling
        grid, margin = self.config.grid_size, self.config.overlap_margin
        tiles = tiles_NPE.view(rows, cols, grid, grid, -1)
        lines = []
        for row in range(rows):
            top, bottom = (0 if row == 0 else margin), (grid if row == rows - 1 else grid - margin)
            parts = []
            for col in range(cols):
                left, right = (0 if col == 0 else margin), (grid if col == cols - 1 else grid - margin)
                parts.append(tiles[row, col, top:bottom, left:right])
            lines.append(torch.cat(parts, dim=1))
        return torch.cat(lines, dim=0)

    def pool(self, map_HWE: Tensor) -> Tensor:
        """Average the stitched map down to one crop's grid: [P, E]."""
        grid = self.config.grid_size
        channels_first = map_HWE.permute(2, 0, 1)[None]
        pooled = F.adaptive_avg_pool2d(channels_first.float(), (grid, grid)).to(map_HWE.dtype)
        return pooled[0].permute(1, 2, 0).reshape(grid * grid, -1)

    def project(self, global_PE: Tensor, pooled_PE: Tensor) -> Tensor:
        """Project global and pooled features, side by side, to image embeddings [..., P, D]."""
        return self.proj_mlp(torch.cat([global_PE, pooled_PE], dim=-1))  # type: ignore[no-any-return]

    def embed(self, features_NPE: Tensor, tiling: Tiling) -> Tensor:
        """Turn the features of one image's crops, global first, into its embeddings [P, D]."""
        num_crops = 1 + tiling.rows * tiling.cols
        assert features_NPE.shape[0] == num_crops, f"{features_NPE.shape[0]} crops for tiling {tiling}"
        return self.project(features_NPE[0], self.pool(self.stitch(features_NPE[1:], tiling)))
