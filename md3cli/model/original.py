"""The names of the 4-bit card's manual loading: a config, a model without weights, weights for it.

    model = MoondreamModel(MoondreamConfig())
    load_weights("./", model, device="cuda")

Users reach them through `md3cli.original`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self

from md3cli.errors import EngineError
from md3cli.model.api import Moondream, Skills
from md3cli.model.network.config import ModelConfig
from md3cli.model.weights.plan import normalise_config
from md3cli.records import RecordDict


class MoondreamConfig(ModelConfig):
    """The sizes of a network; those of the real model where nothing is given."""

    __slots__ = ()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Self:
        """Read the sections `text vision region tokenizer`, as a config.json of any layout has them.

        Raises:
            CheckpointError: a value of the wrong kind, out of range, or sizes that do not fit together.
        """
        sizes = ModelConfig.from_sections(normalise_config(config_dict))
        return cls(**{item.name: getattr(sizes, item.name) for item in fields(sizes)})

    def to_dict(self) -> dict[str, Any]:
        """Return the sections as a config.json has them."""
        return asdict(self)


class MoondreamModel(Skills):
    """A model with the original's methods, which answers once `load_weights` has given it weights.

    Until then it holds the sizes alone, and no memory is taken for a network.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._loaded: Moondream | None = None

    def compile(self) -> None:
        """Make the model ready, as `Moondream.compile` does.

        Raises:
            EngineError: there are no weights yet.
        """
        self._face().compile()

    def annotate(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[RecordDict]:
        """Yield records for many requests, as `Moondream.annotate` does.

        Raises:
            EngineError: there are no weights yet.
        """
        return self._face().annotate(requests)

    def _face(self) -> Moondream:
        if self._loaded is None:
            raise EngineError('this model has no weights yet; load them first: load_weights("folder", model)')
        return self._loaded


def load_weights(weights_file: str | Path, model: MoondreamModel, device: str = "auto", **options: Any) -> None:
    """Load the weights of a checkpoint into a model; weights in 8 and 4 bits stay so.

    The checkpoint's config.json says the sizes, whatever the model was made with; `model.config` has them afterwards.

    Args:
        weights_file: a folder, a file or a repository, in any layout that `Moondream.load` reads.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`; `"auto"` is the first GPU, or the CPU.
        options: further arguments of `Moondream.load`, as `dtype`.

    Raises:
        CheckpointError: the weights cannot be had, or do not fit.
        ConfigError: this machine has no such device, dtype or setting.
    """
    model._loaded = None  # most GPUs hold one model, not two
    model._loaded = Moondream.load(weights_file, device=device, **options)
    model.config = model._loaded.engine.model.config
