"""Which weights a LoRA of this network goes to, in peft's words.

peft adapts modules by name (`target_modules`) and bare parameters, such as a stack of expert matrices,
by theirs (`target_parameters`). Dense and expert matrices share names, so names are given in full.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from md3cli.errors import ConfigError
from md3cli.model.config import ModelConfig

PARTS = ("attention", "dense", "experts", "region", "projection", "vision")


def lora_targets(config: ModelConfig, parts: Collection[str] = ("attention", "dense", "experts")) -> dict[str, Any]:
    """Keyword arguments for `peft.LoraConfig` that adapt some parts of the network.

    Parts: `attention`, `dense` and `experts` of the text decoder, the `region` heads, the blocks of the
    `vision` encoder and its `projection` into the text width. Routers, norms, embeddings and head are
    left alone.

    Raises:
        ConfigError: no such part.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ConfigError(f"no part {', '.join(unknown)} of the network; there are {', '.join(PARTS)}")
    modules: list[str] = []
    parameters: list[str] = []
    for layer in range(config.text.n_layers):
        block = f"model.text.blocks.{layer}"
        if "attention" in parts:
            modules += [f"{block}.attn.qkv", f"{block}.attn.proj"]
        if config.text.is_moe_layer(layer):
            parameters += [f"{block}.mlp.{name}.weight" for name in ("fc1", "fc2") if "experts" in parts]
        elif "dense" in parts:
            modules += [f"{block}.mlp.fc1", f"{block}.mlp.fc2"]
    if "region" in parts:
        modules += [f"model.region.{kind}_{side}" for kind in ("coord", "size") for side in ("encoder", "decoder")]
    if "projection" in parts:
        modules += ["model.vision.proj_mlp.fc1", "model.vision.proj_mlp.fc2"]
    if "vision" in parts:
        leaves = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        modules += [f"model.vision.blocks.{n}.{leaf}" for n in range(config.vision.enc_n_layers) for leaf in leaves]
    return {"target_modules": modules, "target_parameters": parameters}
