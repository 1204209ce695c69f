"""Draws small Moondream 3 models: a seed decides the config and every tensor.

A random language head hardly ever writes a coordinate or ends a text, so the bias of a few special
ids is shaped (`plant`) until each of them wins in a share of the states the model itself visits.
"""

from __future__ import annotations

import json
import random

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from reference import network as net
from reference.cases import draw_image
from reference.network import Config, Network, Tensors
from reference.reading import complete
from reference.sequence import Model
from reference.skills import answer
from reference.writing import TOKENIZER

TOKENIZER_SECTION = json.loads((TOKENIZER.parent / "config.json").read_text())["config"]["tokenizer"]
TOKENIZER_SIZE = 448

# Share of visited states in which each id is to beat every ordinary one.
PLANTED_SHARES = {"coord_id": 0.30, "size_id": 0.10, "start_ground_points_id": 0.08, "end_ground_id": 0.08}
STOPPING_SHARES = {"eos_id": 0.10, "answer_id": 0.10}


def draw_config(seed: int, dense: bool = False) -> Config:
    """A config of every freedom the specification allows and its constraints (section 2) permit."""
    rng = random.Random(seed)
    heads = rng.randint(1, 3)
    layers = rng.randint(2, 4)
    grid = rng.randint(3, 7)
    patch = rng.choice([3, 4, 6, 7, 10, 14])
    vision_heads = rng.randint(1, 3)
    experts = rng.randint(2, 9)
    moe = {
        "num_experts": experts,
        "start_layer": rng.randint(0, layers - 1),
        "experts_per_token": rng.randint(1, min(4, experts)),
        "expert_inner_dim": 8 * rng.randint(1, 5),
    }
    text = {
        "dim": 64 * heads,
        "ff_dim": 32 * rng.randint(1, 6),
        "n_layers": layers,
        "vocab_size": rng.choice([TOKENIZER_SIZE, TOKENIZER_SIZE, TOKENIZER_SIZE + 37]),
        "max_context": rng.choice([256, 300, 512]),
        "n_heads": heads,
        "n_kv_heads": heads,
        "rope_theta": rng.choice([1.5e6, 1.5e6, 1e4]),
        "moe": None if dense else moe,
    }
    vision = {
        "enc_dim": vision_heads * rng.choice([8, 12, 16]),
        "enc_patch_size": patch,
        "enc_n_layers": grid,
        "enc_ff_dim": 8 * rng.randint(2, 6),
        "enc_n_heads": vision_heads,
        "proj_out_dim": 64 * heads,
        "crop_size": grid * patch,
        "max_crops": rng.choice([1, 4, 6, 9, 12, 12]),
        "overlap_margin": rng.randint(0, (grid - 1) // 2),
        "proj_inner_dim": 16 * rng.randint(2, 6),
    }
    region = {
        "dim": 64 * heads,
        "coord_feat_dim": 8 * rng.randint(1, 6),
        "coord_out_dim": rng.choice([1024, 1024, 512, 256]),
        "size_feat_dim": 8 * rng.randint(1, 6),
        "size_out_dim": 2048,
    }
    return complete({"text": text, "vision": vision, "region": region, "tokenizer": TOKENIZER_SECTION})


class _Draw:
    """Tensors by name from one generator, rounded to what bfloat16 can hold."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: Tensors = {}

    def plain(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> None:
        drawn = torch.randn(shape, generator=self.generator) * std + mean
        self.tensors[name] = drawn.to(torch.bfloat16).float()

    def linear(self, name: str, out: int, inner: int, gain: float = 1.0) -> None:
        self.plain(f"{name}.weight", (out, inner), gain / inner**0.5)
        self.plain(f"{name}.bias", (out,), 0.1 * gain)

    def layer_norm(self, name: str, width: int) -> None:
        self.plain(f"{name}.weight", (width,), 0.15, mean=1.0)
        self.plain(f"{name}.bias", (width,), 0.1)


def draw_vision(draw: _Draw, vision: dict) -> None:
    width, grid = vision["enc_dim"], vision["crop_size"] // vision["enc_patch_size"]
    draw.linear("vision.patch_emb", width, vision["in_channels"] * vision["enc_patch_size"] ** 2, gain=1.5)
    draw.plain("vision.pos_emb", (1, grid**2, width), 0.5)
    for layer in range(vision["enc_n_layers"]):
        name = f"vision.blocks.{layer}"
        draw.layer_norm(f"{name}.ln1", width)
        draw.layer_norm(f"{name}.ln2", width)
        draw.linear(f"{name}.attn.qkv", 3 * width, width, gain=1.5)
        draw.linear(f"{name}.attn.proj", width, width)
        draw.linear(f"{name}.mlp.fc1", vision["enc_ff_dim"], width)
        draw.linear(f"{name}.mlp.fc2", width, vision["enc_ff_dim"])
    draw.layer_norm("vision.post_ln", width)
    draw.linear("vision.proj_mlp.fc1", vision["proj_inner_dim"], 2 * width, gain=1.5)
    draw.linear("vision.proj_mlp.fc2", vision["proj_out_dim"], vision["proj_inner_dim"], gain=1.5)


def draw_text(draw: _Draw, text: dict) -> None:
    dim, heads, moe = text["dim"], text["n_heads"], text["moe"]
    draw.plain("text.wte", (text["vocab_size"], dim), 1.0)
    for layer in range(text["n_layers"]):
        name = f"text.blocks.{layer}"
        draw.layer_norm(f"{name}.ln", dim)
        draw.linear(f"{name}.attn.qkv", 3 * dim, dim, gain=1.5)
        draw.linear(f"{name}.attn.proj", dim, dim, gain=1.5)
        draw.plain(f"{name}.attn.tau.wq", (heads, 3 * dim), 1.0 / dim**0.5)
        draw.plain(f"{name}.attn.tau.wv", (heads, 3 * dim), 1.0 / dim**0.5)
        draw.plain(f"{name}.attn.tau.alpha", (heads,), 1.0)
        if moe is None or layer < moe["start_layer"]:
            draw.linear(f"{name}.mlp.fc1", text["ff_dim"], dim, gain=1.5)
            draw.linear(f"{name}.mlp.fc2", dim, text["ff_dim"], gain=1.5)
            continue
        experts, inner = moe["num_experts"], moe["expert_inner_dim"]
        draw.linear(f"{name}.mlp.router", experts, dim, gain=2.0)
        draw.plain(f"{name}.mlp.fc1.weight", (experts, 2 * inner, dim), 1.0 / dim**0.5)
        draw.plain(f"{name}.mlp.fc2.weight", (experts, dim, inner), 1.5 / inner**0.5)
    draw.layer_norm("text.post_ln", dim)
    draw.linear("text.lm_head", text["vocab_size"], dim, gain=4.0)


def draw_region(draw: _Draw, region: dict, with_ln: bool) -> None:
    dim = region["dim"]
    draw.plain("region.coord_features", (1, region["coord_feat_dim"] // 2), 1.5)
    draw.plain("region.size_features", (2, region["size_feat_dim"] // 2), 1.5)
    draw.linear("region.coord_encoder", dim, region["coord_feat_dim"], gain=1.5)
    draw.linear("region.size_encoder", dim, region["size_feat_dim"], gain=1.5)
    draw.linear("region.coord_decoder", region["coord_out_dim"], dim, gain=4.0)
    draw.linear("region.size_decoder", region["size_out_dim"], dim, gain=4.0)
    if with_ln:
        draw.layer_norm("region.ln", dim)


def draw_network(seed: int, dense: bool = False, config: Config | None = None) -> Network:
    """The model of a seed, or of the seed and a config, planted; every third has no `region.ln`."""
    config = draw_config(seed, dense) if config is None else config
    draw = _Draw(seed)
    draw_vision(draw, config["vision"])
    draw_text(draw, config["text"])
    draw_region(draw, config["region"], with_ln=seed % 3 != 2)
    network = Network(config, draw.tensors)
    plant(network, seed)
    return network


# -- planting --------------------------------------------------------------------------------------


def visited_states(model: Model, images: list[Image.Image]) -> Tensor:
    """Hidden states [n, D] at and after the prompts of a few requests."""
    states = []
    asked = [
        {"skill": "caption", "length": "short", "max_tokens": 12},
        {"skill": "query", "question": "What is this?", "reasoning": True, "max_tokens": 8},
        {"skill": "detect", "object": "red square", "max_objects": 2},
        {"skill": "segment", "object": "sign", "max_tokens": 6},
    ]
    for image in images:
        encoded = model.encode_image(image)
        for request in asked:
            sequence = answer(model, request, encoded)["sequence"]
            first = sequence.trace[0]["pos"]
            states.append(net.decode(model.network, sequence.inputs, sequence.prefix_len).hidden[first:])
    return torch.cat(states)


@torch.no_grad()
def plant(network: Network, seed: int) -> None:
    """Raise the head's bias of the special ids so that each wins where `…_SHARES` says, in place."""
    rng = random.Random(seed)
    ids = network.config["tokenizer"]
    model = Model(network, Tokenizer.from_file(str(TOKENIZER)))
    images = [draw_image(rng, network.config) for _ in range(2)]
    bias = network.tensors["text.lm_head.bias"]
    ordinary = slice(10, None)
    for shares in (PLANTED_SHARES, PLANTED_SHARES | STOPPING_SHARES):  # stops last: they end what is visited
        logits = net.token_logits(network, visited_states(model, images))
        best_ordinary = logits[:, ordinary].amax(dim=1)
        for name, share in shares.items():
            behind = best_ordinary - logits[:, ids[name]]
            bias[ids[name]] += torch.quantile(behind, share)
    network.tensors["text.lm_head.bias"] = bias.to(torch.bfloat16).float()
