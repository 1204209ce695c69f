"""The original class's own methods on the transformers class: `query caption detect point segment …`.

They are those of `api.Moondream` over this network as it is now: after a training step or a change of
adapter a new engine is made, because the old one remembers pictures as the old weights saw them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from md3cli.errors import EngineError
from md3cli.model.api import Moondream
from md3cli.model.api_requests import ImageLike, SpatialRefs
from md3cli.model.engine.encoder import ImageEncoder
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.generation import EncodedImage
from md3cli.model.engine.memory import plan_memory
from md3cli.model.engine.prompts import Prompts, Tokenizer
from md3cli.model.network.moondream import Moondream3
from md3cli.model.weights.files import TOKENIZER_NAME
from md3cli.model.weights.hub import resolve_model
from md3cli.records import RunIdentity


class OriginalMethods:
    """Scripts written for the original's remote code run unchanged; arguments and results are `Moondream`'s."""

    model: Moondream3
    name_or_path: str  # what the weights were loaded from; "" for a new network
    tokenizer_source: str | None = None  # file, folder or repository; None: beside the weights
    _moondream: Moondream | None = None
    _moondream_state: tuple[Any, ...] = ()

    def encode_image(self, image: ImageLike, settings: Mapping[str, Any] | None = None) -> EncodedImage:
        """Encode once, ask often."""
        return self.moondream().encode_image(image, settings)

    def caption(
        self,
        image: ImageLike,
        length: str = "normal",
        stream: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """`{"caption": text}`."""
        return self.moondream().caption(image, length, stream, settings)

    def query(
        self,
        image: ImageLike | None = None,
        question: str | None = None,
        reasoning: bool = True,
        spatial_refs: SpatialRefs | None = None,
        stream: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """`{"answer": text}`, with `reasoning` also `"reasoning"`."""
        return self.moondream().query(image, question, reasoning, spatial_refs, stream, settings)

    def detect(self, image: ImageLike, object: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`{"objects": [{"x_min", "y_min", "x_max", "y_max", …}]}`."""
        return self.moondream().detect(image, object, settings)

    def point(
        self,
        image: ImageLike,
        object: str,
        settings: Mapping[str, Any] | None = None,
        spatial_refs: SpatialRefs | None = None,
    ) -> dict[str, Any]:
        """`{"points": [{"x", "y", …}]}`."""
        return self.moondream().point(image, object, settings, spatial_refs)

    def segment(
        self,
        image: ImageLike,
        object: str,
        settings: Mapping[str, Any] | None = None,
        spatial_refs: SpatialRefs | None = None,
    ) -> dict[str, Any]:
        """`{"segments": [{"svg_path", "bbox", …}]}`."""
        return self.moondream().segment(image, object, settings, spatial_refs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the engine's passes, as the original's `compile` does; for `torch.compile` call that on the model."""
        self.moondream().compile()

    def moondream(self) -> Moondream:
        """The engine's face over the network as it is now.

        Raises:
            CheckpointError: the tokenizer cannot be had.
            EngineError: a network that was not loaded from anywhere, so that no tokenizer is known.
        """
        state = self._weights_state()
        if self._moondream is None or state != self._moondream_state:
            self._moondream = None  # a GPU has no room for the slots of two engines
            self._moondream, self._moondream_state = self._new_moondream(), state
        return self._moondream

    def _weights_state(self) -> tuple[Any, ...]:
        """What changes when weights are trained, moved, or adapters come, go or are switched."""
        tensors = tuple((id(p), p._version, p.device, p.dtype) for p in self.model.parameters())
        layers: Iterator[Any] = (module for module in self.model.modules() if hasattr(module, "merged_adapters"))
        adapters = tuple((*one.active_adapters, *one.merged_adapters, one.disable_adapters) for one in layers)
        return (tensors, adapters)

    def _new_moondream(self) -> Moondream:
        if self.name_or_path:
            files = resolve_model(self.name_or_path, tokenizer=self.tokenizer_source)
            file, name, identity = files.tokenizer_file, files.name, files.identity
        elif self.tokenizer_source is not None:
            source = Path(self.tokenizer_source)
            file, name, identity = source / TOKENIZER_NAME if source.is_dir() else source, "", "new"
        else:
            raise EngineError("this network has no tokenizer; set tokenizer_source to a tokenizer.json or its folder")
        config = self.model.config
        tokenizer = Tokenizer.load(file, config)
        max_context = config.text.max_context
        plan = plan_memory(None, config, self.model.dtype, self.model.device, max_context)
        engine = Engine(
            self.model,
            tokenizer,
            Prompts(config, tokenizer, name),
            ImageEncoder(self.model, max_crops=plan.max_crops),
            identity=RunIdentity(identity),
            batch_size=plan.slots,
            max_context=max_context,
            prefill_tokens=plan.prefill_tokens,
        )
        return Moondream(engine)
