"""Weights before the first step.

A small vision transformer trained on drawn shapes stays blind for thousands of steps. Two things open
its eyes in a few hundred: whitened patches, and attention that begins by looking at neighbours.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from tiny_pool import SHARD_SIZE, Pool
from torch import Tensor, nn

from md3cli.model.network.moondream import Moondream3
from md3cli.model.network.vision import normalise_crops


def initialise(model: Moondream3, seed: int) -> None:
    """Truncated normal weights, zero biases, unit norms; outputs of residual branches start small."""
    torch.manual_seed(seed)
    depth = {"vision": len(model.vision.blocks), "text": len(model.text.blocks)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "tau.alpha")):
                parameter.zero_()
            elif ".ln" in name or "_ln." in name:
                parameter.fill_(1.0)
            elif name == "region.coord_features":
                parameter.normal_(std=6.0)
            elif name == "region.size_features":
                parameter.normal_(std=3.0)
            else:
                is_table = name in ("text.wte", "vision.pos_emb")
                std = 0.02 if is_table or "tau" in name else parameter.shape[-1] ** -0.5
                if name.endswith(("attn.proj.weight", "mlp.fc2.weight")) and ".blocks." in name:
                    std /= math.sqrt(2 * depth[name.split(".")[0]])
                if name in ("text.lm_head.weight", "region.coord_decoder.weight", "region.size_decoder.weight"):
                    std = 0.01
                nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std)
        model.vision.pos_emb.copy_(_waves(model.config.vision.grid_size, model.config.vision.enc_dim))
        for name, parameter in model.vision.named_parameters():
            if name.endswith("attn.qkv.weight"):
                query, key, _ = parameter.chunk(3)
                key.copy_(query)


def _waves(grid: int, dim: int) -> Tensor:
    """Sines and cosines of a patch's row and column, [1, grid², dim].

    With keys that begin as queries do, patches attend to their neighbours from the first step, which
    spares the encoder most of the blind time (compare "Mimetic initialization", Trockman & Kolter, 2023).
    """
    frequency = math.pi / grid * torch.logspace(-1, 2, dim // 4, base=2.0)
    angle_GF = torch.arange(grid)[:, None] * frequency
    wave_GF = torch.cat([angle_GF.sin(), angle_GF.cos()], dim=1)
    rows, cols = wave_GF[:, None].expand(grid, grid, -1), wave_GF[None].expand(grid, grid, -1)
    return 0.3 * torch.cat([rows, cols], dim=-1).reshape(1, grid * grid, dim)


@torch.no_grad()
def whiten_patches(model: Moondream3, pool: Pool) -> None:
    """Make the patch embedding the leading principal components of drawn patches, at equal strength.

    Random filters would mostly pass on a patch's mean colour; whitened ones show edges and corners from
    the first step. They stay fixed (the idea is from fast CIFAR-10 trainers: Page 2019, Jordan 2024).
    """
    crops = np.concatenate([pool[index].crops for index in range(SHARD_SIZE)])
    patches = model.vision.patchify(normalise_crops(torch.from_numpy(crops))).flatten(0, 1).double()
    mean = patches.mean(0)
    centred = patches - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    leading = vectors[:, -model.config.vision.enc_dim :] * (values[-model.config.vision.enc_dim :] + 0.01).rsqrt()
    weight = 0.5 * leading.T
    model.vision.patch_emb.weight.copy_(weight)
    model.vision.patch_emb.bias.copy_(-weight @ mean)
