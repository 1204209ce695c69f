"""The vision encoder: crops in, one grid of image embeddings out (Moondream 3 specification, sections 5 and 6).

Each crop goes through the transformer on its own; the features of the tiles are stitched into one
map, averaged down to the grid of a single crop, put beside the global crop's features and projected
into the text width. Knows nothing of files, tokens or batches of requests.

Shape suffixes: N crops, P patches of a crop (grid²), K values of a patch, E encoder width, D text width, S crop side
in pixels, B pictures.
"""

from __future__ import annotations

from collections.abc import Callable

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
        # `kernels.optimise` may choose others; both together turn bytes to features.
        self.patch_rows: Callable[[Tensor], Tensor] = self.plain_patch_rows
        self.encode_rows: Callable[[Tensor], Tensor] = self.plain_encode_rows
        self._places: dict[tuple[Tiling, torch.device], Tensor] = {}

    def plain_patch_rows(self, crops_NSSC: Tensor) -> Tensor:
        """Turn uint8 [N, S, S, 3] into normalised patches [N, P, K] of the weights' dtype."""
        return self.patchify(normalise_crops(crops_NSSC, self.pos_emb.dtype))

    def patchify(self, crops_NCSS: Tensor) -> Tensor:
        """Cut [N, C, S, S] into [N, P, C * patch * patch]: patches row by row, inside a patch channel, row, column."""
        num_crops, channels, side, _ = crops_NCSS.shape
        patch, grid = self.config.enc_patch_size, self.config.grid_size
        assert side == self.config.crop_size, f"crops of {side} pixels, expected {self.config.crop_size}"
        cells = crops_NCSS.view(num_crops, channels, grid, patch, grid, patch)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(num_crops, grid * grid, channels * patch * patch)

    def encode(self, crops_NCSS: Tensor) -> Tensor:
        """Turn normalised crops [N, 3, S, S] into patch features [N, P, E], each crop on its own."""
        return self.encode_rows(self.patchify(crops_NCSS))

    def plain_encode_rows(self, rows_NPK: Tensor) -> Tensor:
        """Turn patches [N, P, K] into their features [N, P, E]."""
        x_NPE = self.patch_emb(rows_NPK) + self.pos_emb
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

    # -- many pictures of one tiling ---------------------------------------------------------------

    def gather(self, features_BNPE: Tensor, tiling: Tiling) -> Tensor:
        """Put global and pooled features of B pictures side by side: [B, P, 2E], the input of `proj_mlp`.

        Values are those that `embed` makes by `stitch` and `pool`, picture by picture.
        """
        global_BPE, tiles_BPE = features_BNPE[:, 0], features_BNPE[:, 1:].flatten(1, 2)
        if tiling == (1, 1):  # a map of one crop's size is its own average
            return torch.cat([global_BPE, tiles_BPE], dim=-1)
        grid, places_HW = self.config.grid_size, self._stitched_places(tiling, features_BNPE.device)
        map_BHWE = tiles_BPE.index_select(1, places_HW.flatten()).unflatten(1, places_HW.shape)
        # torch adds up a window in another order where channels lie last, which it does not see in a single picture.
        channels_first = map_BHWE.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        pooled = F.adaptive_avg_pool2d(channels_first, (grid, grid)).to(map_BHWE.dtype)
        return torch.cat([global_BPE, pooled.permute(0, 2, 3, 1).flatten(1, 2)], dim=-1)

    def _stitched_places(self, tiling: Tiling, device: torch.device) -> Tensor:
        """Return which patch of all tiles' stands where in the stitched map: int64 [H, W]; made once a tiling."""
        found = self._places.get((tiling, device))
        if found is None:
            # Reckoned on the device: a copy from the host would wait for all that it was told before.
            (row_H, y_H), (col_W, x_W) = (self._stitched_axis(number, device) for number in tiling)
            grid = self.config.grid_size
            tile_HW = row_H[:, None] * tiling.cols + col_W
            found = self._places[tiling, device] = (tile_HW * grid + y_H[:, None]) * grid + x_W
        return found

    def _stitched_axis(self, num_tiles: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return, for each line of the stitched map, its tile and the line in the tile that `stitch` takes."""
        margin, own = self.config.overlap_margin, self.config.grid_size - 2 * self.config.overlap_margin
        line = torch.arange(num_tiles * own + 2 * margin, device=device)
        tile = (line - margin).div(own, rounding_mode="floor").clamp(0, num_tiles - 1)
        return tile, line - tile * own
