"""`Moondream3ForConditionalGeneration`: the network under the roof of transformers.

`self.model` is the network, so that parameter names are those of the original checkpoint, `model.` included. This file
holds the forward pass, what transformers, peft and Trainer ask of a model, loading and saving. `generate`, the original
class's methods, and what is read of `from_pretrained`'s arguments have files of their own. Checkpoints of any layout go
in: `weights/read.py` reads the weights under the original's names, and transformers' own machinery (dtype, device_map,
quantisation) does the rest. Users reach the class through the package, which alone imports this file.

Shape suffixes: B rows, T new positions, S all positions, N crops of a row, D width, V vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

from md3cli.errors import CheckpointError, ConfigError, EngineError, RequestError
from md3cli.model.hf.bnb import (
    bnb_files,
    fit_experts,
    has_expert_layers,
    join_experts,
    loading_bnb,
    prepare_bnb,
    read_bnb,
    settle_bnb,
    use_plain_layers,
)
from md3cli.model.hf.config import Moondream3Config, is_bnb
from md3cli.model.hf.generate import GenerationMethods, default_generation_config
from md3cli.model.hf.hub_code import NoHubCode, refuse_kernels
from md3cli.model.hf.inputs import (
    Batch,
    CacheStore,
    embed_tokens,
    encode_images,
    has_images,
    image_columns,
    make_mask,
    read_positions,
)
from md3cli.model.hf.loading import (
    base_of_adapter,
    check_device_map,
    config_of,
    dtype_of_state,
    find_weights,
    read_dtype,
    state_of,
    take_dtype,
)
from md3cli.model.hf.low_bits import (
    LowBitMethods,
    PackedSource,
    check_arguments,
    odd_arguments,
    one_device,
    read_quant,
)
from md3cli.model.hf.original_methods import OriginalMethods
from md3cli.model.hf.parallel import EP_PLAN, TP_PLAN, SharedMethods, refuse_beside_sharing
from md3cli.model.hf.placement import check_weights_arrive, placing, settle, state_in_memory
from md3cli.model.hf.saved_code import NamedBySavedFolders, name_classes
from md3cli.model.network.loss import IGNORE, batch_loss
from md3cli.model.network.moondream import Moondream3
from md3cli.model.quant.load import NONE, STORED, has_low_bits
from md3cli.model.weights.adapters import PEFT_CONFIG
from md3cli.model.weights.files import TOKENIZER_NAME
from md3cli.model.weights.hub import model_path, repo_of
from md3cli.model.weights.names import Format
from md3cli.model.weights.plan import CheckpointPlan, plan_checkpoint
from md3cli.model.weights.read import CheckpointReader
from md3cli.model.weights.write import write_checkpoint

GENERATION_CONFIG = "generation_config.json"
_LAYOUTS = (Format.ORIGINAL, Format.HF, Format.RAW)


@dataclass
class Moondream3Output(ModelOutput):
    """What `forward` returns; the three partial losses are there when `loss` is there."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    last_hidden_state: Tensor | None = None
    text_loss: Tensor | None = None
    coord_loss: Tensor | None = None
    size_loss: Tensor | None = None


class Backbone:
    """The model without its head: called with a batch, it returns `last_hidden_state` behind the last norm."""

    def __init__(self, owner: Moondream3ForConditionalGeneration) -> None:
        self._owner = owner

    def __call__(self, **batch: Any) -> Moondream3Output:
        hidden = self._owner.batch_states(Batch.of(batch))
        return Moondream3Output(last_hidden_state=self._owner.model.text.post_ln(hidden))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._owner.model, name)


class Moondream3ForConditionalGeneration(  # type: ignore[misc, no-untyped-call]
    LowBitMethods,
    SharedMethods,
    OriginalMethods,
    NamedBySavedFolders,
    NoHubCode,
    GenerationMethods,
    PreTrainedModel,
    GenerationMixin,
):
    """Moondream 3 with `generate`, Trainer, PEFT, and the original's own `query`, `caption`, `detect`, ….

    Inputs are those of `Moondream3Processor`. `labels` are the ids to predict at their own positions
    (-100 elsewhere; positions of the image never count), `region_labels` the coordinates and sizes.
    """

    config_class = Moondream3Config
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the losses are means of a batch; Trainer scales when it accumulates
    _no_split_modules = ["TextBlock", "VisionBlock"]  # noqa: RUF012 - as transformers declares it
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _tp_plan = {f"model.{name}": rule for name, rule in TP_PLAN.items()}  # noqa: RUF012
    _ep_plan = {f"model.{name}": rule for name, rule in EP_PLAN.items()}  # noqa: RUF012

    def __init__(self, config: Moondream3Config) -> None:
        super().__init__(config)
        self.model = Moondream3(config.network, has_region_ln=config.has_region_ln)
        if is_bnb(config):
            use_plain_layers(self.model)
        self.gradient_checkpointing = False
        self._inputs_require_grads = False
        self.post_init()  # type: ignore[no-untyped-call]
        self.generation_config = default_generation_config(config)

    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and parameter.dim() == 1:
                nn.init.ones_(parameter)
            elif name in ("bias", "alpha"):
                nn.init.zeros_(parameter)
            else:
                is_frequency = name.endswith("_features")
                nn.init.normal_(parameter, std=1.0 if is_frequency else 0.02)

    # -- files ------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]  # transformers names its keyword arguments one by one
        cls, pretrained_model_name_or_path: str | Path | None = None, *args: Any, **kwargs: Any
    ) -> Self:
        """Load a checkpoint folder or file in any layout `md3` reads, an alias, or a hub repository.

        Of a folder that PEFT saved, the model it names is loaded, with the adapter on top. The keyword arguments are
        transformers'; `dtype` is as stored unless given. With `output_loading_info` the result is a pair.

        Matrices that are stored in 8 or 4 bits stay so, on one device, and the model can then not be trained. With
        `dtype=torch.float32`, `quant="none"`, a `quantization_config` or an adapter on top they become plain weights;
        with `quant="int8"` or `"int4"` plain ones are packed. That is what `Moondream.load` does with `quant`.

        Raises:
            CheckpointError: the weights cannot be had or do not fit, or the adapter was made for changed ones.
            ConfigError: a GPU that is not there, or what a model in few bits cannot do: several devices, an argument
                that it cannot follow.
            EngineError: a quantisation whose library is not installed.
        """
        check_device_map(kwargs.get("device_map"))
        if pretrained_model_name_or_path is None:
            kwargs["dtype"] = dtype_of_state(kwargs, read_quant(kwargs))
            return cls._load_state(None, *args, **kwargs)  # type: ignore[return-value]
        name = str(pretrained_model_name_or_path)
        adapter = (kwargs.get("adapter_kwargs") or {}).pop("_adapter_model_path", name)  # as Auto classes find it
        if (Path(adapter) / PEFT_CONFIG).is_file():
            return cls._load_with_adapter(Path(adapter), **kwargs)
        if adapter != name:
            raise CheckpointError(f"{adapter} is an adapter, and no folder; fetch it first: `hf download {adapter}`")
        folder, quant = find_weights(name, kwargs), read_quant(kwargs)
        if (files := bnb_files(folder)) is not None:
            if quant not in (NONE, STORED):
                raise ConfigError(f"{name} is packed by bitsandbytes, and quant={quant!r} packs plain weights")
            kwargs["config"], kwargs["dtype"], kwargs["state_dict"] = read_bnb(files, kwargs)
            loaded: Any = cls._load_state(name, *args, **kwargs)
        else:
            loaded = cls._load_plan(plan_checkpoint(folder), folder, quant, name, *args, **kwargs)
        model: Self = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = repo_of(name) or str(folder)  # adapters keep it as their base
        model._take_generation_config(folder if folder.is_dir() else folder.parent)
        return loaded  # type: ignore[no-any-return]

    @classmethod
    def _load_plan(
        cls, plan: CheckpointPlan, folder: Path, quant: str, name: str, *args: Any, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Load a checkpoint of a layout that `md3` reads; arguments are what is left of `from_pretrained`'s."""
        kwargs["config"] = config_of(plan, kwargs.get("config"))
        dtype = take_dtype(kwargs)
        kwargs["dtype"] = read_dtype(dtype, plan)
        source = PackedSource(folder, plan, quant, kwargs["dtype"]) if has_low_bits(plan, quant) else None
        if source is not None and (dtype == "auto" or source.dtype is not torch.float32):
            return cls._load_packed(source, **kwargs)
        with CheckpointReader(plan, dtype=kwargs["dtype"]) as weights:
            kwargs["state_dict"] = state_of(weights if source is None else source.widened(), kwargs)
            return cls._load_state(name, *args, **kwargs)

    @classmethod
    def _load_state(cls, name: str | None, *args: Any, **kwargs: Any) -> Self | tuple[Self, dict[str, Any]]:
        """Let transformers load the config and state that stand among its own arguments."""
        refuse_kernels(kwargs)
        refuse_beside_sharing(kwargs)
        prepare_bnb(kwargs)
        try:
            with loading_bnb(name or "this state", kwargs), placing():
                loaded: Any = super().from_pretrained(None, *args, **kwargs)
        except ImportError as error:
            raise EngineError(f"{name or 'this state'} cannot be loaded in the way asked for: {error}") from error
        model: Self = loaded[0] if isinstance(loaded, tuple) else loaded
        settle(model, model.model, kwargs.get("state_dict") or {})
        if model.sharing is not None:
            model.sharing.keep_parts(model)
        settle_bnb(model)
        return loaded  # type: ignore[no-any-return]

    @classmethod
    def _load_packed(cls, source: PackedSource, **kwargs: Any) -> Self | tuple[Self, dict[str, Any]]:
        """Load a network whose codes stay codes; arguments are what is left of `from_pretrained`'s."""
        config, dtype, has_info = kwargs.pop("config"), kwargs.pop("dtype"), kwargs.pop("output_loading_info", False)
        device_map = kwargs.pop("device_map", None)
        check_arguments("from_pretrained", kwargs)
        device = one_device(device_map)
        config.dtype = dtype
        with torch.device("meta"):
            model = cls(config)
        model.model, model.packed_source = source.load(device), source
        if device_map is not None:
            vars(model)["hf_device_map"] = {"": device}
        model.train(False)
        return (model, {}) if has_info else model

    @classmethod
    def _load_with_adapter(cls, folder: Path, **kwargs: Any) -> Self:
        refuse_beside_sharing(kwargs, "a network with an adapter on top")
        base = base_of_adapter(folder)
        kwargs.setdefault("quant", NONE)  # no adapter can be put on packed weights
        name = kwargs.pop("adapter_name", None)
        loaded: Any = cls.from_pretrained(base, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        fit_experts(model, folder)
        model.load_adapter(str(folder), adapter_name=name)
        return loaded  # type: ignore[no-any-return]

    def _take_generation_config(self, folder: Path) -> None:
        if (folder / GENERATION_CONFIG).is_file():
            self.generation_config = GenerationConfig.from_pretrained(str(folder))
        else:
            self.generation_config = default_generation_config(self.config)

    def save_pretrained(  # type: ignore[override]  # as above
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *args: Any,
        layout: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a folder that loads again here and in `md3`, with the tokenizer where it is known.

        The layout `original` is what transformers writes, under the original's names; `hf` has the names of the
        Hugging Face port, and `raw` the vendor's. These two make new folders of merged weights only. A folder of the
        first loads in a plain transformers, too, with `trust_remote_code=True`, where md3cli is installed. None is
        `original`; of a model in 8 or 4 bits it is a new folder with the codes that its files hold, in their layout,
        and a layout that is named has its weights wide. With `is_main_process=False` nothing is written.

        Raises:
            ConfigError: an argument of transformers' that this way of saving cannot follow.
            CheckpointError: the layout has no place for these weights (the port has none for `region.ln`).
            OutputError: the folder cannot be written.
        """
        target = Path(save_directory)
        if layout not in (None, *_LAYOUTS):
            raise CheckpointError(f"layout {layout!r} is not one of {', '.join(_LAYOUTS)}")
        tokenizer = self._tokenizer_beside_weights()
        if self.packed_source is not None:
            check_arguments("save_pretrained", kwargs)
            if is_main_process:
                self.packed_source.save(target, None if layout is None else Format(layout), tokenizer)
                self.generation_config.save_pretrained(target)
                name_classes(target)
            return
        if layout is not None and is_bnb(self.config):
            raise CheckpointError(f"layout {layout} has no place for weights that bitsandbytes packed; leave it out")
        if layout in (Format.HF, Format.RAW) and (odd := odd_arguments(kwargs)):
            raise ConfigError(f"save_pretrained with layout={layout!r} takes no {odd}: leave it out, or the layout")
        state = self._whole_state()
        is_writer = is_main_process and (self.sharing is None or self.sharing.ranks.rank == 0)
        if layout in (None, Format.ORIGINAL):
            if state is not None:
                kwargs["state_dict"] = state
            if has_expert_layers(self) and not is_bnb(self.config):
                kwargs.setdefault("state_dict", join_experts(self.state_dict()))
            super().save_pretrained(target, is_main_process, *args, **kwargs)
            if is_writer and tokenizer is not None and not (target / TOKENIZER_NAME).exists():
                shutil.copyfile(tokenizer, target / TOKENIZER_NAME)
            return
        if is_writer:
            plain = state_in_memory(self) if state is None else state
            state = join_experts({name.removeprefix("model."): tensor for name, tensor in plain.items()})
            dtype = self.model.dtype
            write_checkpoint(state, self.config.network, target, Format(layout), dtype=dtype, tokenizer_file=tokenizer)

    def _tokenizer_beside_weights(self) -> Path | None:
        if not self.name_or_path or repo_of(self.name_or_path) is not None:
            return None
        path = model_path(self.name_or_path)
        file = (path if path.is_dir() else path.parent) / TOKENIZER_NAME
        return file if file.is_file() else None

    # -- the forward pass -------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tilings: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        region_values: Tensor | None = None,
        labels: Tensor | None = None,
        region_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> Moondream3Output | tuple[Any, ...]:
        """Compute logits of every position, and the loss where there are labels.

        Args:
            input_ids: [B, T]; with a picture BOS, its placeholders, the prompt; or the new ids of a cached pass.
            pixel_values: [B, N, 3, S, S] in -1 … 1, global crop first, padded to the most crops of the batch.
            tilings: [B, 2] rows and columns of tiles; (0, 0) for a row without a picture.
            attention_mask: [B, S], 0 at padding, on either side.
            inputs_embeds: [B, T, D] instead of `input_ids`; pictures already filled in.
            region_values: [B, T, 2] values behind coordinate and size ids, NaN elsewhere.
            region_labels: [B, T, 2] values to predict; by default `region_values` where there is a label.
            logits_to_keep: of the last positions only; 0 for all.
        """
        if labels is not None and self.training and self.sharing is not None:
            raise EngineError("a network that processes share does not learn: train it in one, or with device_map")
        if labels is not None or (self.training and self.gradient_checkpointing):
            past_key_values, use_cache = None, False
        elif use_cache is not False and past_key_values is None:
            past_key_values = DynamicCache()
        batch = Batch(
            input_ids,
            pixel_values,
            tilings,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            region_values,
        )
        hidden = self.batch_states(batch)
        logits = self.model.text.logits(hidden[:, -logits_to_keep:])
        output = Moondream3Output(logits=logits, past_key_values=past_key_values, last_hidden_state=hidden)
        if labels is not None:
            if input_ids is None or logits_to_keep:
                raise RequestError("labels need input_ids, and logits of all positions")
            labels = self._real_labels(labels, tilings, attention_mask)
            if region_labels is None and region_values is not None:
                region_labels = region_values.masked_fill((labels == IGNORE)[..., None], float("nan"))
            losses = batch_loss(self.model, hidden, logits, input_ids, labels, region_labels)
            output.loss, output.text_loss, output.coord_loss, output.size_loss = losses
        is_dict = self.config.return_dict if return_dict is None else return_dict
        return output if is_dict else output.to_tuple()

    def batch_states(self, batch: Batch) -> Tensor:
        """Return hidden states [B, T, D] before the last LayerNorm; new positions see the cache and each other."""
        given = batch.input_ids if batch.inputs_embeds is None else batch.inputs_embeds
        if given is None:
            raise RequestError("forward needs input_ids or inputs_embeds")
        self.check_no_gradients()
        check_weights_arrive(self)
        num_rows, num_new = given.shape[:2]
        valid = self._valid_positions(batch.attention_mask, num_rows, batch.num_past + num_new)
        x_BTD = batch.inputs_embeds
        if x_BTD is None:
            x_BTD = self.embed_inputs(batch, valid[:, -num_new:])
        if self._inputs_require_grads and torch.is_grad_enabled() and not x_BTD.requires_grad:
            x_BTD.requires_grad_(True)
        position_ids = read_positions(valid, num_new) if batch.position_ids is None else batch.position_ids
        position_BT = position_ids.to(valid.device)[:, -num_new:].expand(num_rows, -1)
        cache = batch.past_key_values
        width = valid.shape[1] if cache is None else cache.get_mask_sizes(num_new, 0)[0]
        has_image = has_images(batch.tilings, num_rows, valid.device)
        mask = make_mask(valid, position_BT, has_image, self.model.config.prefix_len, width)
        store = None if cache is None else CacheStore(cache)
        return self.model.text(x_BTD, position_BT, mask, store)  # type: ignore[no-any-return]

    def embed_inputs(self, batch: Batch, valid_BT: Tensor) -> Tensor:
        """Return embeddings [B, T, D] of new ids; pictures are filled in unless the cache holds them already."""
        assert batch.input_ids is not None
        x = embed_tokens(self.model, batch.input_ids.to(self.model.device), batch.region_values)
        has_image = has_images(batch.tilings, len(x), x.device)
        if batch.num_past or batch.pixel_values is None or batch.tilings is None or not bool(has_image.any()):
            return x
        shortest = int(valid_BT.sum(dim=1)[has_image].min())
        if shortest < self.model.config.prefix_len:
            raise RequestError(
                f"a row with a picture has {shortest} ids, and the picture alone takes {self.model.config.prefix_len}; "
                "make the inputs with Moondream3Processor, and do not truncate them"
            )
        images = encode_images(self.model, batch.pixel_values, batch.tilings)
        columns = image_columns(valid_BT, has_image, self.model.config.vision.num_patches)
        return x.index_put(columns, images.to(x.dtype))

    def _valid_positions(self, attention_mask: Tensor | None, num_rows: int, width: int) -> Tensor:
        """Return where there is no padding, bool [B, S]."""
        if attention_mask is None:
            return torch.ones(num_rows, width, dtype=torch.bool, device=self.model.device)
        return attention_mask.to(self.model.device).bool()

    def _real_labels(self, labels: Tensor, tilings: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Take padding and the pictures' placeholders out of the labels."""
        valid = torch.ones_like(labels).bool() if attention_mask is None else attention_mask.bool()
        has_image = has_images(tilings, len(labels), labels.device)
        in_prefix = has_image[:, None] & (read_positions(valid, labels.shape[1]) < self.model.config.prefix_len)
        return labels.masked_fill(~valid | in_prefix, IGNORE)

    # -- what trainers ask ------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token table as a module that shares its weight; the network never calls that module."""
        wte = self.model.text.wte
        table: nn.Embedding = nn.Embedding.from_pretrained(wte, freeze=not wte.requires_grad)
        return table

    @property
    def base_model(self) -> Backbone:  # type: ignore[override]
        """The model without its head, for trainers that compute the head themselves (trl)."""
        return Backbone(self)

    def get_output_embeddings(self) -> nn.Module:
        """Return the vocabulary head."""
        return self.model.text.lm_head

    def enable_input_require_grads(self) -> None:
        """Let gradients reach checkpointed blocks of a frozen network with adapters."""
        self._inputs_require_grads = True

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        self._inputs_require_grads = False

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Recompute the blocks of both towers in the backward pass instead of keeping what is inside them."""
        self.gradient_checkpointing = enable
        if "use_reentrant" not in getattr(gradient_checkpointing_func, "keywords", {}):
            # As peft leaves it; torch's old way gives adapters of the vision encoder, whose input is data, no gradient.
            gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        for blocks in (self.model.vision.blocks, self.model.text.blocks):
            for index, block in enumerate(blocks):
                forward = block.__dict__.pop("forward", None)  # None, or what hooks of accelerate have put there
                if isinstance(forward, partial) and forward.func is _checkpointed:
                    forward = forward.args[2]
                if forward is not None:
                    block.forward = forward
                if enable and index % every_n_layers == 0:
                    block.forward = partial(_checkpointed, gradient_checkpointing_func, block, forward)


def _checkpointed(
    recompute: Callable[..., Any], block: nn.Module, forward: Callable[..., Any] | None, *inputs: Any
) -> Any:
    """Run a block's `forward`, or its class's; it is run again later where a gradient will be asked for."""
    forward = forward or partial(type(block).forward, block)
    return recompute(forward, *inputs) if block.training and torch.is_grad_enabled() else forward(*inputs)
