"""`Moondream3Config`: a network's sizes as transformers keeps them, and which of its parts a LoRA adapts.

The four sections of a config.json stand under `config`, as in the original's files. A file may have any layout (see
`plan.normalise_config`); this one is kept and written. Knows no weights, only their names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from md3cli.errors import ConfigError
from md3cli.model.hf.parallel import EP_PLAN, TP_PLAN
from md3cli.model.hf.saved_code import NamedBySavedFolders, auto_map, write_imports
from md3cli.model.network.config import ModelConfig
from md3cli.model.weights.plan import SECTIONS, normalise_config

IMAGE_TOKEN_ID = 8  # stands where an image's embeddings go; no prompt contains it (specification, section 3)
PAD_TOKEN_ID = 10  # reserved; not the end of text, or collators would hide that from the loss
BNB = "bitsandbytes"  # as transformers calls it in a `quantization_config`
PARTS = ("attention", "dense", "experts", "region", "projection", "vision")  # that a LoRA may adapt
_LAYOUT_KEYS = ("config", *SECTIONS, "text_config", "vision_config", "region_config")


def _size(key: str) -> property:
    return property(lambda config: int(config.config["text"][key]))


class Moondream3Config(NamedBySavedFolders, PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes, prompt templates and control ids of a Moondream 3 network.

    `config` holds the four sections `text vision region tokenizer`; a missing size is the real model's.
    `has_region_ln` says whether the weights have a LayerNorm before the region heads (newer ones do). Further
    arguments are those of every transformers config; sections may also stand among them, in any layout.

    Raises:
        CheckpointError: sizes are out of range, or do not fit together.
    """

    model_type = "moondream3"
    keys_to_ignore_at_inference = ("past_key_values", "last_hidden_state", "text_loss", "coord_loss", "size_loss")

    base_model_tp_plan: ClassVar[dict[str, Any] | None] = TP_PLAN
    base_model_ep_plan: ClassVar[dict[str, Any] | None] = EP_PLAN

    config: dict[str, Any]
    has_region_ln: bool

    def __init__(self, config: Mapping[str, Any] | None = None, *, has_region_ln: bool = True, **kwargs: Any) -> None:
        given = {key: kwargs.pop(key) for key in _LAYOUT_KEYS if key in kwargs}
        if config is not None:
            given["config"] = dict(config)
        network = ModelConfig.from_sections(normalise_config(given))
        self.config = asdict(network)
        self.has_region_ln = has_region_ln
        tokens = network.tokenizer
        kwargs.setdefault("bos_token_id", tokens.bos_id)
        kwargs.setdefault("eos_token_id", tokens.eos_id)
        kwargs.setdefault("pad_token_id", PAD_TOKEN_ID)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs | {"auto_map": auto_map()})  # whatever code a stranger's file names

    def save_pretrained(  # type: ignore[override]  # transformers names its keyword arguments one by one
        self, save_directory: str | Path, *args: Any, **kwargs: Any
    ) -> None:
        """Write config.json, and the file of imports that its `auto_map` names."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_imports(Path(save_directory))  # first: what is pushed to a hub is what is there then
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def network(self) -> ModelConfig:
        """The sizes as the network reads them."""
        return ModelConfig.from_sections(self.config)

    # What generic code of transformers, peft and trl asks a config for.
    vocab_size = _size("vocab_size")
    hidden_size = _size("dim")
    num_hidden_layers = _size("n_layers")
    num_attention_heads = _size("n_heads")
    num_key_value_heads = _size("n_kv_heads")
    max_position_embeddings = _size("max_context")

    @property
    def head_dim(self) -> int:
        return int(self.hidden_size // self.num_attention_heads)

    @property
    def image_token_id(self) -> int:
        return IMAGE_TOKEN_ID

    @classmethod
    def from_network(cls, network: ModelConfig, **kwargs: Any) -> Moondream3Config:
        """Make the config of a network's sizes."""
        return cls(asdict(network), **kwargs)


def quant_method(settings: object) -> str | None:
    """Return the name of the quantisation that a `quantization_config` asks for, as an object or as in a file."""
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if method is None and isinstance(settings, dict) and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return BNB
    return None if method is None else str(getattr(method, "value", method))


def is_bnb(config: PreTrainedConfig) -> bool:
    """Return True where a config asks for bitsandbytes, or where its weights are packed so already."""
    return quant_method(getattr(config, "quantization_config", None)) == BNB


def lora_targets(
    config: ModelConfig | Moondream3Config, parts: Collection[str] = ("attention", "dense", "experts")
) -> dict[str, Any]:
    """Return keyword arguments for `peft.LoraConfig` that adapt some parts of the network.

    `config` is the model's own (`model.config`), which knows whether bitsandbytes packs it: each expert is a layer
    then, and a stack of them otherwise. Sizes alone (`model.config.network`) are those of a model that is not packed.

    The parts are `attention`, `dense` and `experts` of the text decoder, the `region` heads, the blocks of the
    `vision` encoder and its `projection` into the text width. Routers, norms, embeddings and head are left alone.

    Raises:
        ConfigError: there is no such part.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ConfigError(f"no part {', '.join(unknown)} of the network; there are {', '.join(PARTS)}")
    # Names are given in full, because dense and expert matrices share theirs. peft adapts modules by name, and bare
    # parameters, such as a stack of expert matrices, by the parameter's name.
    modules: list[str] = []
    parameters: list[str] = []
    is_apart = isinstance(config, Moondream3Config) and is_bnb(config)
    if isinstance(config, Moondream3Config):
        config = config.network
    for layer in range(config.text.n_layers):
        block = f"model.text.blocks.{layer}"
        if "attention" in parts:
            modules += [f"{block}.attn.qkv", f"{block}.attn.proj"]
        if config.text.moe is not None and config.text.is_moe_layer(layer):
            stacks = [f"{block}.mlp.{name}" for name in ("fc1", "fc2") if "experts" in parts]
            if is_apart:
                modules += [f"{stack}.{expert}" for stack in stacks for expert in range(config.text.moe.num_experts)]
            else:
                parameters += [f"{stack}.weight" for stack in stacks]
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
