"""Loading and saving for the model class, and which weights a LoRA of it goes to.

Any layout goes in, the original's or another one comes out. `weights/read.py` reads the weights and hands them to
transformers under the original's names, so that its own machinery (dtype, device_map, quantisation) does the rest. The
model class alone mixes this in; training scripts take `lora_targets` from here.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import torch
from transformers import GenerationConfig

from md3cli.errors import CheckpointError, ConfigError, EngineError
from md3cli.model.hf.config import Moondream3Config
from md3cli.model.hf.generate import default_generation_config
from md3cli.model.network.config import ModelConfig
from md3cli.model.network.moondream import Moondream3
from md3cli.model.weights.adapters import PEFT_CONFIG, base_of, check_start
from md3cli.model.weights.files import TOKENIZER_NAME, read_json
from md3cli.model.weights.formats import Format
from md3cli.model.weights.hub import fetch_model, model_path, repo_of
from md3cli.model.weights.plan import CheckpointPlan, plan_checkpoint
from md3cli.model.weights.read import CheckpointReader, stored_dtype
from md3cli.model.weights.write import write_checkpoint

GENERATION_CONFIG = "generation_config.json"
_LAYOUTS = (Format.ORIGINAL, Format.HF, Format.RAW)
PARTS = ("attention", "dense", "experts", "region", "projection", "vision")


def lora_targets(config: ModelConfig, parts: Collection[str] = ("attention", "dense", "experts")) -> dict[str, Any]:
    """Return keyword arguments for `peft.LoraConfig` that adapt some parts of the network.

    Parts: `attention`, `dense` and `experts` of the text decoder, the `region` heads, the blocks of the
    `vision` encoder and its `projection` into the text width. Routers, norms, embeddings and head are
    left alone. peft adapts modules by name (`target_modules`) and bare parameters, such as a stack of expert
    matrices, by theirs (`target_parameters`). Dense and expert matrices share names, so names are given in full.
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


class LoadingMethods:
    """`from_pretrained` and `save_pretrained` of the model class."""

    model: Moondream3
    config: Moondream3Config
    name_or_path: str  # what the weights were loaded from; "" for a new network

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | None = None, *args: Any, **kwargs: Any
    ) -> Self:
        """Load a checkpoint folder or file in any layout `md3` reads, an alias, or a hub repository.

        A folder that PEFT saved loads the model it names and the adapter on top. Takes transformers'
        keyword arguments; `dtype` is as stored unless given. With `output_loading_info` the result is a
        pair, as it is there.

        Raises:
            CheckpointError: the weights cannot be had or do not fit, or the adapter was made for changed ones.
            EngineError: a quantisation whose library is not installed.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)  # type: ignore[misc, no-any-return]
        name = str(pretrained_model_name_or_path)
        if (Path(name) / PEFT_CONFIG).is_file():
            return cls._load_with_adapter(Path(name), **kwargs)
        folder = find_weights(name, kwargs)
        plan = plan_checkpoint(folder)
        kwargs["config"] = _config_of(plan, kwargs.get("config"))
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None) or "auto"
        kwargs["dtype"] = read_dtype(dtype, plan)
        with CheckpointReader(plan, dtype=kwargs["dtype"]) as weights:
            kwargs["state_dict"] = {f"model.{key}": weights[key] for key in weights}
        try:
            loaded: Any = super().from_pretrained(None, *args, **kwargs)  # type: ignore[misc]
        except ImportError as error:
            raise EngineError(f"{name} cannot be loaded in the way asked for: {error}") from error
        model: Self = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = repo_of(name) or str(folder)  # adapters keep it as their base
        model._take_generation_config(plan)
        return loaded  # type: ignore[no-any-return]

    @classmethod
    def _load_with_adapter(cls, folder: Path, **kwargs: Any) -> Self:
        check_start(folder / PEFT_CONFIG, read_json(folder / PEFT_CONFIG))  # transformers takes the true base for it
        base = base_of(folder)
        if base is None:
            raise CheckpointError(f"{folder / PEFT_CONFIG} names no base model; load that first, then the adapter")
        model: Any = cls.from_pretrained(base, **kwargs)
        model.load_adapter(str(folder))
        return model  # type: ignore[no-any-return]

    def _take_generation_config(self, plan: CheckpointPlan) -> None:
        if (plan.files.folder / GENERATION_CONFIG).is_file():
            self.generation_config = GenerationConfig.from_pretrained(str(plan.files.folder))
        else:
            self.generation_config = default_generation_config(self.config)

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, layout: str = Format.ORIGINAL, **kwargs: Any
    ) -> None:
        """Write a folder that loads again here and in `md3`.

        `layout` `original` writes what transformers writes, whose names are the original's; `hf` the
        names of the Hugging Face port, `raw` the vendor's: these two as new folders, merged weights only.
        The tokenizer goes along where it is known.

        Raises:
            CheckpointError: the layout has no place for these weights (the port for `region.ln`).
            OutputError: the folder cannot be written.
        """
        target = Path(save_directory)
        if layout not in _LAYOUTS:
            raise CheckpointError(f"layout {layout!r} is not one of {', '.join(_LAYOUTS)}")
        tokenizer = self._tokenizer_beside_weights()
        if layout == Format.ORIGINAL:
            super().save_pretrained(target, *args, **kwargs)  # type: ignore[misc]
            if tokenizer is not None and not (target / TOKENIZER_NAME).exists():
                shutil.copyfile(tokenizer, target / TOKENIZER_NAME)
            return
        state, dtype = self.model.state_dict(), self.model.dtype
        write_checkpoint(state, self.config.network, target, Format(layout), dtype=dtype, tokenizer_file=tokenizer)

    def _tokenizer_beside_weights(self) -> Path | None:
        if not self.name_or_path or repo_of(self.name_or_path) is not None:
            return None
        path = model_path(self.name_or_path)
        file = (path if path.is_dir() else path.parent) / TOKENIZER_NAME
        return file if file.is_file() else None


def find_weights(name: str, kwargs: dict[str, Any]) -> Path:
    """Find the folder or file of a model, fetched where it is a repository; take what says how out of `kwargs`."""
    revision, is_offline = kwargs.pop("revision", None), bool(kwargs.pop("local_files_only", False))
    for key in ("trust_remote_code", "cache_dir", "force_download", "token", "use_safetensors", "proxies"):
        kwargs.pop(key, None)  # nothing here runs remote code or reads pickles; the hub's cache and login are used
    repo = repo_of(name)
    return model_path(name) if repo is None else fetch_model(repo, revision, offline=is_offline)


def _config_of(plan: CheckpointPlan, given: object) -> Moondream3Config:
    """Return the config as given, or the file's; the weights say whether `region.ln` is there."""
    if isinstance(given, Moondream3Config):
        config = deepcopy(given)
    else:
        file = plan.files.config_file
        config = Moondream3Config() if file is None else Moondream3Config.from_json_file(str(file))
    config.has_region_ln = plan.has_region_ln
    return config


def read_dtype(given: object, plan: CheckpointPlan) -> torch.dtype:
    """Read a dtype by any of the names transformers takes; `auto` is as stored."""
    if isinstance(given, torch.dtype):
        return given
    found = stored_dtype(plan) if given == "auto" else getattr(torch, str(given).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"dtype {given!r}: no such dtype; use auto, bfloat16, float16 or float32")
    return found
