"""The original class's own methods for the transformers class: `query`, `caption`, `detect`, …, over the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any, cast

from torch import nn

from md3cli.errors import ConfigError, EngineError
from md3cli.model.api import Moondream, Skills
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.load import make_engine
from md3cli.model.engine.machine import MemoryPlan, plan_memory
from md3cli.model.engine.prompts import Tokenizer
from md3cli.model.hf.parallel import Sharing
from md3cli.model.hf.placement import check_weights_arrive, is_spread
from md3cli.model.network.moondream import Moondream3
from md3cli.model.quant.layers import has_packed_weights, low_bit_matrices
from md3cli.model.weights.files import TOKENIZER_NAME
from md3cli.model.weights.hub import resolve_model
from md3cli.records import RunIdentity


class OriginalMethods(Skills):
    """The original class's own methods, over the network as it is now.

    Scripts written for the original's remote code run unchanged; arguments and results are `Moondream`'s.
    """

    model: Moondream3
    name_or_path: str  # what the weights were loaded from; "" for a new network
    tokenizer_source: str | None = None  # file, folder or repository; None: beside the weights
    sharing: Sharing | None  # with other processes
    _moondream: Moondream | None = None
    _moondream_state: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the engine out of copies, which make their own."""
        return {**vars(self), "_moondream": None, "_moondream_state": ()}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Make the original class's methods ready, as `Moondream.compile` says; `forward` and `generate` stay eager.

        What is compiled goes when weights are trained or adapters change. Arguments are `torch.nn.Module.compile`'s,
        and none of them is taken.

        Raises:
            ConfigError: there are arguments; `torch.compile(model, …)` takes them, for the forward pass.
        """
        if args or kwargs:
            given = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
            raise ConfigError(
                f"compile({given:.200}): the original's compile takes no arguments; torch.compile(model, …) takes these"
            )
        if self.sharing is not None or is_spread(cast("nn.Module", self)):
            raise EngineError("what lies on several devices, on disk or in several processes is not compiled")
        self.moondream().compile()

    def moondream(self) -> Moondream:
        """Return the engine's face over the network as it is now.

        Raises:
            CheckpointError: the tokenizer cannot be had.
            EngineError: the network was not loaded from anywhere, so that no tokenizer is known.
        """
        # After a training step or a change of adapter a new engine is made: the old one remembers pictures as the old
        # weights saw them.
        state = self._weights_state()
        if self._moondream is None or state != self._moondream_state:
            self._moondream = None  # a GPU has no room for the slots of two engines
            self._moondream, self._moondream_state = Moondream(self._new_engine()), state
        return self._moondream

    def _face(self) -> Moondream:
        return self.moondream()

    def _weights_state(self) -> tuple[Any, ...]:
        """Return what changes when weights are trained, moved or exchanged, or adapters come, go or are switched."""
        # What is offloaded (meta) is another tensor after each pass.
        here = (p for p in self.model.parameters() if p.device.type != "meta")
        tensors = tuple((id(p), p.data_ptr(), p._version, p.device, p.dtype) for p in here)
        packed = tuple(map(id, low_bit_matrices(self.model)))
        layers: Iterator[Any] = (module for module in self.model.modules() if hasattr(module, "merged_adapters"))
        adapters = tuple((*one.active_adapters, *one.merged_adapters, one.disable_adapters) for one in layers)
        return (tensors, packed, adapters)

    def _new_engine(self) -> Engine:
        check_weights_arrive(cast("nn.Module", self))
        if self.name_or_path:
            files = resolve_model(self.name_or_path, tokenizer=self.tokenizer_source)
            file, name, identity = files.tokenizer_file, files.name, files.identity
        elif self.tokenizer_source is not None:
            source = Path(self.tokenizer_source)
            file, name, identity = source / TOKENIZER_NAME if source.is_dir() else source, "", "new"
        else:
            raise EngineError("this network has no tokenizer; set tokenizer_source to a tokenizer.json or its folder")
        model, config = self.model, self.model.config
        tokenizer = Tokenizer.load(file, config)
        plan = plan_memory(None, config, model.dtype, model.device, config.text.max_context)
        if self.sharing is not None:  # passes of other sizes would wait for one another for ever
            ranks = self.sharing.ranks
            plan = MemoryPlan(*(value and ranks.least(value, model.device) for value in astuple(plan)))
        # Not planned: a network that may be trained has its plain parts, which read all of a slot.
        is_planned = None if has_packed_weights(model) else False
        return make_engine(model, tokenizer, name, RunIdentity(identity), plan, is_planned=is_planned)
