"""The network of Moondream 3 as functions over a dict of tensors (specification, sections 5 to 8).

Tensor names are the original checkpoint's without `model.`; everything is float32. Shapes: N crops,
S crop side in pixels, g patch grid side, E vision width, T positions, D text width, A heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]
Config = dict[str, dict]

EPS = 1e-5
HEAD_DIM = 64
ROTARY_DIM = 32


@dataclass(frozen=True)
class Network:
    """A model: the four sections of its config (every field present) and its tensors."""

    config: Config
    tensors: Tensors

    @property
    def grid(self) -> int:
        vision = self.config["vision"]
        return vision["crop_size"] // vision["enc_patch_size"]

    @property
    def prefix_len(self) -> int:
        return 1 + self.grid**2


@dataclass(frozen=True)
class Decoded:
    """Decoder output [T, D] before the final LayerNorm, and how near the experts' choice was.

    `moe_margin` is the smallest gap between the last chosen and the first rejected router logit over
    all positions and layers; infinite where no expert was rejected.
    """

    hidden: Tensor
    moe_margin: float


def linear(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def layer_norm(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], EPS)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


# -- vision (section 5) ----------------------------------------------------------------------------


def patches_of(crop: Tensor, patch: int) -> Tensor:
    """[3, S, S] -> [g*g, 3*patch*patch]; patches row-major, inside a patch channel, row, column."""
    rows = []
    for top in range(0, crop.shape[1], patch):
        for left in range(0, crop.shape[2], patch):
            rows.append(crop[:, top : top + patch, left : left + patch].reshape(-1))
    return torch.stack(rows)


def vision_attention(net: Network, name: str, x: Tensor) -> Tensor:
    heads = net.config["vision"]["enc_n_heads"]
    width = x.shape[-1]
    head_dim = width // heads
    q, k, v = linear(net.tensors, f"{name}.qkv", x).split(width, dim=-1)
    outputs = []
    for head in range(heads):
        own = slice(head * head_dim, (head + 1) * head_dim)
        scores = q[:, own] @ k[:, own].T / math.sqrt(head_dim)
        outputs.append(torch.softmax(scores, dim=-1) @ v[:, own])
    return linear(net.tensors, f"{name}.proj", torch.cat(outputs, dim=-1))


def encode_crop(net: Network, crop: Tensor) -> Tensor:
    """One crop [3, S, S] in [-1, 1] -> features [g*g, E] after the last LayerNorm."""
    tensors, vision = net.tensors, net.config["vision"]
    x = linear(tensors, "vision.patch_emb", patches_of(crop, vision["enc_patch_size"])) + tensors["vision.pos_emb"][0]
    for layer in range(vision["enc_n_layers"]):
        name = f"vision.blocks.{layer}"
        x = x + vision_attention(net, f"{name}.attn", layer_norm(tensors, f"{name}.ln1", x))
        inner = gelu_tanh(linear(tensors, f"{name}.mlp.fc1", layer_norm(tensors, f"{name}.ln2", x)))
        x = x + linear(tensors, f"{name}.mlp.fc2", inner)
    return layer_norm(tensors, "vision.post_ln", x)


# -- stitching and projection (section 6) ----------------------------------------------------------


def stitch(tiles: Tensor, tiling: tuple[int, int], grid: int, margin: int) -> Tensor:
    """Features of the tiles [rows*cols, g*g, E] -> one map [g' , g'', E] without the inner overlaps."""
    rows, cols = tiling
    bands = []
    for row in range(rows):
        pieces = []
        for col in range(cols):
            tile = tiles[row * cols + col].reshape(grid, grid, -1)
            top = 0 if row == 0 else margin
            bottom = grid if row == rows - 1 else grid - margin
            left = 0 if col == 0 else margin
            right = grid if col == cols - 1 else grid - margin
            pieces.append(tile[top:bottom, left:right])
        bands.append(torch.cat(pieces, dim=1))
    return torch.cat(bands, dim=0)


def pooling_bins(length: int, out: int) -> list[tuple[int, int]]:
    """Adaptive average pooling: [start, end) of every cell."""
    return [(i * length // out, -((-(i + 1) * length) // out)) for i in range(out)]


def pool(features: Tensor, grid: int) -> Tensor:
    """[h, w, E] -> [g*g, E], each cell the mean of its bin."""
    cells = []
    for top, bottom in pooling_bins(features.shape[0], grid):
        for left, right in pooling_bins(features.shape[1], grid):
            cells.append(features[top:bottom, left:right].mean(dim=(0, 1)))
    return torch.stack(cells)


def image_embedding(net: Network, features: Tensor, tiling: tuple[int, int]) -> Tensor:
    """Features of all crops [1 + rows*cols, g*g, E], global first -> image embeddings [g*g, D]."""
    local = stitch(features[1:], tiling, net.grid, net.config["vision"]["overlap_margin"])
    both = torch.cat([features[0], pool(local, net.grid)], dim=-1)
    return linear(net.tensors, "vision.proj_mlp.fc2", gelu_tanh(linear(net.tensors, "vision.proj_mlp.fc1", both)))


# -- text decoder (section 7) ----------------------------------------------------------------------


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of one head [T, 64]: split-half pairs in, interleaved out, 32 of 64 dimensions."""
    half = ROTARY_DIM // 2
    freq = theta ** (-2 * torch.arange(half, dtype=torch.float32) / ROTARY_DIM)
    angle = torch.arange(x.shape[0], dtype=torch.float32)[:, None] * freq
    a, b = x[:, :half], x[:, half:ROTARY_DIM]
    out = x.clone()
    out[:, 0:ROTARY_DIM:2] = a * angle.cos() - b * angle.sin()
    out[:, 1:ROTARY_DIM:2] = a * angle.sin() + b * angle.cos()
    return out


def may_attend(length: int, prefix_len: int) -> Tensor:
    """[T, T] bool, row = query: causal, and the first `prefix_len` positions see each other."""
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[:prefix_len, :prefix_len] = True
    return allowed


def text_attention(net: Network, name: str, h: Tensor, allowed: Tensor) -> Tensor:
    tensors, text = net.tensors, net.config["text"]
    heads = text["n_heads"]
    qkv = linear(tensors, f"{name}.qkv", h)
    q, k, v = qkv.split(heads * HEAD_DIM, dim=-1)
    signal = gelu_exact(qkv)
    tau_q = torch.tanh(signal @ tensors[f"{name}.tau.wq"].T)
    tau_v = torch.tanh(signal @ tensors[f"{name}.tau.wv"].T)
    log_position = torch.log(torch.arange(h.shape[0], dtype=torch.float32) + 1)
    outputs = []
    for head in range(heads):
        own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        tau_position = 0.5 + torch.sigmoid(tensors[f"{name}.tau.alpha"][head] * log_position)
        q_head = q[:, own] * (tau_q[:, head] + tau_position)[:, None]
        v_head = v[:, own] * (tau_v[:, head] + tau_position)[:, None]
        scores = rotate(q_head, text["rope_theta"]) @ rotate(k[:, own], text["rope_theta"]).T / math.sqrt(HEAD_DIM)
        weights = torch.softmax(scores.masked_fill(~allowed, -math.inf), dim=-1)
        outputs.append(weights @ v_head)
    return linear(tensors, f"{name}.proj", torch.cat(outputs, dim=-1))


def dense_mlp(net: Network, name: str, h: Tensor) -> Tensor:
    return linear(net.tensors, f"{name}.fc2", gelu_tanh(linear(net.tensors, f"{name}.fc1", h)))


def expert(net: Network, name: str, number: int, h: Tensor) -> Tensor:
    fc1, fc2 = net.tensors[f"{name}.fc1.weight"][number], net.tensors[f"{name}.fc2.weight"][number]
    activated, gate = (h @ fc1.T).chunk(2, dim=-1)
    return (gelu_exact(activated) * (gate + 1)) @ fc2.T


def mixture(net: Network, name: str, h: Tensor) -> Decoded:
    """Top-k experts per position, weights a softmax over the chosen logits only."""
    moe = net.config["text"]["moe"]
    top = moe["experts_per_token"]
    logits = linear(net.tensors, f"{name}.router", h)
    ordered, order = logits.sort(dim=-1, descending=True)
    weights = torch.softmax(ordered[:, :top], dim=-1)
    out = torch.zeros_like(h)
    for number in range(moe["num_experts"]):
        rows, rank = torch.nonzero(order[:, :top] == number, as_tuple=True)
        out[rows] += weights[rows, rank][:, None] * expert(net, name, number, h[rows])
    gap = math.inf if top == moe["num_experts"] else float((ordered[:, top - 1] - ordered[:, top]).min())
    return Decoded(out, gap)


def decode(net: Network, x: Tensor, prefix_len: int) -> Decoded:
    """Input embeddings [T, D] of a whole sequence from position 0 -> hidden states of every position.

    `prefix_len` is 0 for a sequence without an image.
    """
    text = net.config["text"]
    first_moe = text["moe"]["start_layer"] if text["moe"] else text["n_layers"]
    allowed = may_attend(x.shape[0], prefix_len)
    moe_margin = math.inf
    for layer in range(text["n_layers"]):
        name = f"text.blocks.{layer}"
        h = layer_norm(net.tensors, f"{name}.ln", x)
        if layer < first_moe:
            feed_forward = dense_mlp(net, f"{name}.mlp", h)
        else:
            mixed = mixture(net, f"{name}.mlp", h)
            feed_forward = mixed.hidden
            moe_margin = min(moe_margin, mixed.moe_margin)
        x = x + text_attention(net, f"{name}.attn", h, allowed) + feed_forward
    return Decoded(x, moe_margin)


def token_logits(net: Network, hidden: Tensor) -> Tensor:
    return linear(net.tensors, "text.lm_head", layer_norm(net.tensors, "text.post_ln", hidden))


# -- region heads (section 8) ----------------------------------------------------------------------


def fourier(values: Tensor, frequencies: Tensor) -> Tensor:
    phase = 2 * math.pi * (values @ frequencies)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def encode_coord(net: Network, value: float) -> Tensor:
    features = fourier(torch.tensor([value], dtype=torch.float32), net.tensors["region.coord_features"])
    return linear(net.tensors, "region.coord_encoder", features)


def encode_size(net: Network, width: float, height: float) -> Tensor:
    features = fourier(torch.tensor([width, height], dtype=torch.float32), net.tensors["region.size_features"])
    return linear(net.tensors, "region.size_encoder", features)


def region_input(net: Network, hidden: Tensor) -> Tensor:
    """`region.ln` of the hidden state where the checkpoint has one, else the state itself."""
    return layer_norm(net.tensors, "region.ln", hidden) if "region.ln.weight" in net.tensors else hidden


def coord_logits(net: Network, hidden: Tensor) -> Tensor:
    return linear(net.tensors, "region.coord_decoder", region_input(net, hidden))


def size_logits(net: Network, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of width and height, the two halves of the size head."""
    width, height = linear(net.tensors, "region.size_decoder", region_input(net, hidden)).chunk(2, dim=-1)
    return width, height


def coord_of_bin(index: int, bins: int) -> float:
    return index / bins


def size_of_bin(index: int, bins: int) -> float:
    return 2.0 ** (index / (bins - 1) * 10 - 10)
