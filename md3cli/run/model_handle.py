"""What a run needs of a model, as Protocols, and the one place outside model/ that imports it.

`find_model` reads headers only: a run whose records are all there, and a dry run, never load weights
nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from md3cli.config import ModelOptions
from md3cli.errors import CheckpointError, RequestError
from md3cli.images.crops import CropConfig, PreparedImage
from md3cli.records import Answer, Job, Request, RunIdentity

if TYPE_CHECKING:
    from md3cli.model.engine.prompts import Prompts
    from md3cli.model.network.config import ModelConfig
    from md3cli.model.weights.hub import ModelFiles

REAL_CROP_CONFIG = CropConfig(crop_size=378, patch_size=14, overlap_margin=4, max_crops=12)


class Engine(Protocol):
    """Runs requests in batches; driven from one thread."""

    @property
    def batch_size(self) -> int:
        """Requests in flight at a time."""
        ...

    @property
    def device(self) -> str:
        """Where it runs, as `--device` names it."""
        ...

    @property
    def encoding_bytes(self) -> int:
        """What one picture's encoding takes in the cache."""
        ...

    @property
    def wants_more(self) -> bool:
        """True while taking in more helps to fill the next batches."""
        ...

    @property
    def has_work(self) -> bool:
        """True while something is taken in and not answered."""
        ...

    def add(self, key: int, picture: PreparedImage | None, request: Request) -> None:
        """Take a request in; `key` comes back with its answer."""
        ...

    def step(self) -> Sequence[Answer]:
        """Do the next piece of work; returns what finished, in any order."""
        ...

    def stage_seconds(self) -> Mapping[str, float]:
        """Where the time went so far."""
        ...


class Model(Protocol):
    """A model that was found and is loaded when the first request is ready."""

    @property
    def identity(self) -> RunIdentity: ...
    @property
    def crop_config(self) -> CropConfig: ...
    def load(self) -> Engine: ...


class FoundModel(Model, Protocol):
    """A model whose headers say what it can do."""

    def refusal_of(self, request: Request) -> str | None:
        """Why this model can do a request for no picture at all; None: it can."""
        ...


def find_model(options: ModelOptions) -> FoundModel:
    """The model named by `options`, fetched where that is needed and allowed.

    Raises:
        CheckpointError: there is none, or its headers make no model.
    """
    from md3cli.model.weights.hub import resolve_model
    from md3cli.model.weights.plan import plan_checkpoint

    files = resolve_model(
        options.model, revision=options.revision, tokenizer=options.tokenizer, offline=options.offline
    )
    identity = options.identity(files.identity)
    return _ModelOnDisk(options, identity, plan_checkpoint(files.path).config, files)


def check_skills(model: FoundModel, requests: Sequence[Request]) -> None:
    """Refuse before anything is written what `model` would fail for every picture alike.

    Raises:
        CheckpointError: it cannot do one of the `requests`.
    """
    for request in requests:
        refusal = model.refusal_of(request)
        if refusal is not None:
            raise CheckpointError(f"{refusal}; choose another --model")


def crop_config_without_network(options: ModelOptions) -> CropConfig:
    """How the model named by `options` cuts pictures, where its files are here; else as the real one does."""
    from md3cli.model.weights.files import find_weight_files
    from md3cli.model.weights.hub import resolve_model
    from md3cli.model.weights.plan import read_config

    try:
        files = resolve_model(options.model, revision=options.revision, offline=True)
        return read_config(find_weight_files(files.path)).vision.crop_config
    except CheckpointError:
        return REAL_CROP_CONFIG


class _ModelOnDisk:
    def __init__(self, options: ModelOptions, identity: RunIdentity, config: ModelConfig, files: ModelFiles) -> None:
        self.identity, self.crop_config = identity, config.vision.crop_config
        self._options, self._config, self._files = options, config, files

    def refusal_of(self, request: Request) -> str | None:
        try:
            self._prompts.check_skill(request)
        except RequestError as error:
            return str(error)
        return None

    @cached_property
    def _prompts(self) -> Prompts:
        from md3cli.model.engine.prompts import Prompts, Tokenizer

        tokenizer = Tokenizer.load(self._files.tokenizer_file, self._config)
        return Prompts(self._config, tokenizer, self._files.name)

    def load(self) -> Engine:
        from md3cli.model.engine.load import load_engine

        engine = load_engine(self._options)
        assert engine.crop_config == self.crop_config
        assert engine.identity == self.identity
        return _TorchEngine(engine)


class _TorchEngine:
    """The model's engine with the words of this module."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @property
    def batch_size(self) -> int:
        return int(self._engine.batch_size)

    @property
    def device(self) -> str:
        return str(self._engine.model.device)

    @property
    def encoding_bytes(self) -> int:
        config = self._engine.config
        return int(config.vision.num_patches * config.text.dim * self._engine.model.dtype.itemsize)

    @property
    def wants_more(self) -> bool:
        return bool(self._engine.wants_more)

    @property
    def has_work(self) -> bool:
        return bool(self._engine.has_work)

    def add(self, key: int, picture: PreparedImage | None, request: Request) -> None:
        self._engine.add(Job(key, picture, request))

    def step(self) -> Sequence[Answer]:
        answers: Sequence[Answer] = self._engine.step()
        return answers

    def stage_seconds(self) -> Mapping[str, float]:
        stats = self._engine.stats
        return {
            "vision": self._engine.encoder.seconds,
            "prefill": stats.prefix_seconds + stats.prompt_seconds,
            "decode": stats.decode_seconds,
        }
